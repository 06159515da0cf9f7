"""The embedded Flux model as the stages see it, and what is refused before anything is loaded."""

import json

import numpy as np
import pytest
import torch

from workbench import trace
from workbench.models import sources
from workbench.models.bundle import StepCursor
from workbench.options import BadInput, ModelSpec, TraceConfig
from workbench.plans import BitChoice, BitPlan, mean_act_bits

PROMPTS = ("fluent red heart", "noto grinning face")


def test_denoising_loop_gives_the_pipelines_own_image(bundle):
    recorded = trace.record(bundle, TraceConfig(prompts=PROMPTS, steps=3, seed=11))
    mine = bundle.decode(recorded.latent_STMD[:, -1])
    for index, prompt in enumerate(PROMPTS):
        theirs = bundle.pipeline(prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(11 + index), height=bundle.size,
                                 width=bundle.size, max_sequence_length=bundle.text_tokens, output_type="np").images[0]
        assert np.abs((theirs * 255).round().astype(int) - mine[index].astype(int)).max() <= 1  # batch of 1 against batch of 2


def test_every_linear_is_quantizable_modulation_or_protected(bundle):
    names = [layer.name for layer in (*bundle.layers, *bundle.modulation)] + list(bundle.protected)
    linears = [name for name, module in bundle.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(names) == sorted(linears)
    assert [layer.index for layer in bundle.layers] == list(range(len(bundle.layers)))
    assert all("norm" in layer.role for layer in bundle.modulation)


def test_layers_are_in_forward_order_and_share_inputs_as_stated(bundle):
    seen = []
    handles = [bundle.linear(layer.name).register_forward_hook(lambda _m, args, _y, i=layer.index: seen.append((i, args[0])))
               for layer in bundle.layers]
    schedule = bundle.schedule(2)
    trace.forward(bundle, bundle.initial_latents([0]), schedule, 0, bundle.encode(PROMPTS[:1]))
    for handle in handles:
        handle.remove()
    inputs = dict(seen)
    firsts = [i for i, _ in seen if bundle.layers[i].shares_input_with == i]
    assert firsts == sorted(firsts)
    for layer in bundle.layers:
        assert inputs[layer.index].shape[-2:] == (layer.tokens, layer.k_in)
        same = [j for j, x in inputs.items() if x is inputs[layer.index]]
        assert min(same) == layer.shares_input_with


def test_cursor_reads_sigma_from_the_transformers_own_time_argument(bundle):
    schedule = bundle.schedule(5)
    conditioning = bundle.encode(PROMPTS[:1])
    for step in range(5):
        trace.forward(bundle, bundle.initial_latents([0]), schedule, step, conditioning)
        assert bundle.cursor.sigma == pytest.approx(float(schedule.sigma_T1[step]), rel=1e-5)


def test_a_plan_of_20_steps_drives_28():
    sigma_20 = tuple(1 - t / 20 for t in range(20))
    bits = [3, 4, 6, 8, 16]
    rows = tuple((bits[t % 5],) for t in range(20))
    plan = BitPlan(model_hash="0" * 16, layer_names=("a",), sigma_T=sigma_20, weight_choice_L=(BitChoice(weight_bits=4),), act_bits_TL=rows,
                   weight_bytes=1, act_bits_mean=mean_act_bits(rows), act_bits_macs=1.0, bit_ops=1.0)
    cursor = StepCursor()
    cursor.plan = plan
    for t in range(28):
        sigma = 1 - t / 28
        cursor.move_to(sigma)
        nearest = min(range(20), key=lambda s: abs(sigma_20[s] - sigma))
        assert cursor.row == rows[nearest]


@pytest.mark.parametrize(("make", "words"), [
    (lambda d: "no-such-model", "unknown model"),
    (lambda d: str(d), "no diffusers pipeline"),
    (lambda d: str(_write(d / "weights.ckpt", "x")), "pickle"),
    (lambda d: str(_write(d / "model_index.json", json.dumps({"_class_name": "WanPipeline"})).parent), "supported are FluxPipeline"),
    (lambda d: str(_write(d / "model_index.json", "{").parent), "cannot be read"),
    (lambda d: str(_write(d / "transformer" / "diffusion_pytorch_model.bin", "x").parents[1]), "pickle"),
    (lambda d: str(_write(d / "model_index.json", json.dumps({"_class_name": "FluxPipeline"})).parent), "cannot be loaded"),
])
def test_bad_models_are_refused_in_one_line(tmp_path, make, words):
    with pytest.raises(BadInput, match=words) as error:
        sources.load(ModelSpec(source=make(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_model_from_the_hub_has_its_own_name_not_that_of_its_snapshot(tmp_path, monkeypatch):
    snapshot = tmp_path / "0123456789abcdef0123456789abcdef01234567"
    snapshot.symlink_to(sources.EMBEDDED["emoji-flux"])
    monkeypatch.setattr(sources, "_download", lambda source: snapshot)
    loaded = sources.load(ModelSpec(source="maker/model"))
    assert (loaded.name, loaded.source) == ("model", "maker/model")
    with pytest.raises(BadInput, match=r"^model is no diffusers pipeline"):
        monkeypatch.setattr(sources, "_download", lambda source: tmp_path)
        sources.load(ModelSpec(source="maker/model"))


def _write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path
