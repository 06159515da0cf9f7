"""One layer at one step: what it reads, how its weight is spread, and that nobody's replay is disturbed by a look."""

import threading

import pytest
import torch

from workbench import inspection, sensitivity, trace
from workbench.options import BadInput, QuantConfig, TraceConfig


@pytest.fixture(scope="module")
def recorded(bundle):
    return trace.record(bundle, TraceConfig(prompts=("noto pizza", "fluent rocket"), steps=2))


def test_ranges_are_those_of_the_layer_s_own_input(bundle, recorded):
    seen, layer, step = [], bundle.layers[3], 1
    handle = bundle.linear(layer.name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        trace.forward(bundle, recorded.latent_STMD[:, step], recorded.schedule, step, recorded.conditioning)
    handle.remove()
    look = inspection.inspect(bundle, recorded, layer.index, step, QuantConfig(transform="none"))
    x_RK = torch.cat(seen).flatten(0, -2).float()
    assert torch.equal(look.low_K, x_RK.amin(0)) and torch.equal(look.high_K, x_RK.amax(0))
    assert torch.equal(look.low_K, look.transformed_low_K) and look.samples == 2
    assert int(look.weight_counts_B.sum()) == bundle.linear(layer.name).weight.numel()
    with pytest.raises(BadInput, match="does not exist"):
        inspection.inspect(bundle, recorded, len(bundle.layers), 0, QuantConfig())


def test_whoever_looks_into_a_layer_during_a_replay_is_told_to_wait(bundle, recorded):
    """A forward of somebody else would leave its inputs where the replay keeps its own."""
    refused = []

    def look():
        try:
            inspection.inspect(bundle, recorded, 0, 0, QuantConfig())
        except BadInput as error:
            refused.append(str(error))

    def from_elsewhere():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    with sensitivity.LayerTap(bundle):
        from_elsewhere()
    assert len(refused) == 1 and "in use" in refused[0]
    from_elsewhere()
    assert len(refused) == 1, "the lock was not given back"
