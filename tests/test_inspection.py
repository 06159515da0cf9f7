"""One layer at one step: what it reads, how its weight is spread, and that nobody's replay is disturbed by a look."""

import threading

import pytest
import torch

from workbench import inspection, sensitivity
from workbench.models.tree import clone_tree
from workbench.options import BadInput, QuantConfig, SensitivityConfig, TraceConfig
from workbench.replay.trace import record


@pytest.fixture(scope="module")
def recorded(bundle):
    return record(bundle, TraceConfig(prompts=("noto pizza", "fluent rocket"), steps=2))


def test_ranges_are_those_of_the_layer_s_own_input(bundle, recorded):
    seen, layer, step = [], bundle.layers[5], 1
    tree = clone_tree(bundle.transformer)
    tree.get_submodule(layer.module_name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        bundle.predictor(recorded.integrator, recorded.conditioning, modules={"transformer": tree})(recorded.latent_ST[:, step], step)
    layer_inspection = inspection.inspect(bundle, recorded, layer.index, step, QuantConfig(transform="none"))
    x_RK = torch.cat(seen).flatten(0, -2).float()
    assert torch.equal(layer_inspection.low_K, x_RK.amin(0)) and torch.equal(layer_inspection.high_K, x_RK.amax(0))
    assert torch.equal(layer_inspection.low_K, layer_inspection.transformed_low_K) and layer_inspection.samples == 2
    assert int(layer_inspection.weight_counts_B.sum()) == bundle.weight(layer).numel()
    with pytest.raises(BadInput, match="does not exist"):
        inspection.inspect(bundle, recorded, len(bundle.layers), 0, QuantConfig())


def test_modulation_is_looked_at_as_it_is(bundle, recorded):
    layer_inspection = inspection.inspect(bundle, recorded, bundle.modulation[0].index, 0, QuantConfig())
    assert layer_inspection.transform == "none" and torch.equal(layer_inspection.low_K, layer_inspection.transformed_low_K)


def test_a_look_during_a_replay_changes_neither(bundle, recorded):
    """Both run at once, each on a tree of its own."""
    config = SensitivityConfig(probes=1)
    quiet = sensitivity.profile(bundle, recorded, config, QuantConfig())
    expected = inspection.inspect(bundle, recorded, 2, 1, QuantConfig())
    looks, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            looks.append(inspection.inspect(bundle, recorded, 2, 1, QuantConfig()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        busy = sensitivity.profile(bundle, recorded, config, QuantConfig())
    finally:
        stop.set()
        thread.join()
    assert torch.equal(busy.fisher_TL, quiet.fisher_TL) and looks
    assert all(torch.equal(each.low_K, expected.low_K) and torch.equal(each.high_K, expected.high_K) for each in looks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bundle.transformer.modules())
