"""The backward replay against finite differences in float64: through guidance in two calls, in one doubled call, and with its norm
rescaled; through samplers of first and second order; with layers of one input far from each other."""

from types import SimpleNamespace
from typing import ClassVar

import diffusers as d
import numpy as np
import pytest
import torch
from torch import nn

from tests.quant.toy import solve
from workbench.models import Bundle
from workbench.models.denoiser import Call, Denoiser, Predictor, denoise
from workbench.models.discover import Rule
from workbench.models.integrator import Integrator
from workbench.models.tree import clone_tree
from workbench.options import QuantConfig, SensitivityConfig
from workbench.quant.activations import fake_quantize, format_of
from workbench.quant.transforms import make
from workbench.replay.backward import Costates, backward
from workbench.replay.trace import Trace
from workbench.sensitivity import profile
from workbench.sensitivity.signed import project
from workbench.types import Conditioning

WIDTH, STEPS, SCALE = 16, 4, 3.0
QUANT = QuantConfig(group_size=None, hessian="none", solver="nearest")


class Net(nn.Module):
    """Every block reads one text tensor, as Wan's do: its layers of one input do not follow each other."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("inside", "text", "out")}) for _ in range(2))

    def forward(self, x, text, time):
        for block in self.blocks:
            x = x + block["out"](torch.tanh(block["inside"](x) + block["text"](text).mean(-2, keepdim=True) + time))
        return (x,)


class Guided(Denoiser):
    """Guidance of one kind: "two" calls, one "doubled" call, or two whose combination is "rescaled" to the conditional norm."""

    def __init__(self, kind, integrator):
        self.kind, self.sigma_T = kind, integrator.sigma_T1

    def calls(self, x, step, conditioning):
        cond, uncond, time = conditioning.per_sample["text"], conditioning.per_sample["negative"], self.sigma_T[step].to(x)
        if self.kind == "doubled":
            inputs = {"x": torch.cat([x, x]), "text": torch.cat([cond, uncond]), "time": time}
            return (Call(branch="batched", rows=2, inputs=inputs),)
        return tuple(Call(branch=name, inputs={"x": x, "text": text, "time": time}) for name, text in (("cond", cond), ("uncond", uncond)))

    def combine(self, outputs, step):
        positive, negative = outputs[0].chunk(2) if self.kind == "doubled" else outputs
        combined = negative + SCALE * (positive - negative)
        if self.kind == "rescaled":
            combined = combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        return combined


class GuidedBundle(Bundle):
    blocks: ClassVar = {"blocks": "block"}
    rules: ClassVar = (Rule(".*", "quantize"),)
    kind, scheduler = "two", staticmethod(lambda: d.FlowMatchEulerDiscreteScheduler(shift=2.0))

    def settle(self, asked):
        pass  # it takes nothing

    def integrator(self, steps):
        return Integrator.of(self.scheduler(), steps)

    def denoiser(self, integrator):
        return Guided(self.kind, integrator)

    def sigma_of(self, kwargs):
        return kwargs["time"]

    def _encode(self, prompts):
        generator = torch.Generator().manual_seed(len(prompts))
        text, negative = torch.randn(2, len(prompts), 3, WIDTH, generator=generator, dtype=torch.float64)
        return Conditioning(per_sample={"text": text, "negative": negative}, shared={})

    def example(self, device):
        text = torch.zeros(1, 3, WIDTH, device=device)
        return torch.zeros(1, 5, WIDTH, device=device), Conditioning(per_sample={"text": text, "negative": text}, shared={})

    def noise(self, seeds):
        return torch.stack([torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds])

    def decode(self, latent):
        raise NotImplementedError


def make_bundle(kind, scheduler):
    torch.manual_seed(0)
    made = type("Made", (GuidedBundle,), {"kind": kind, "scheduler": staticmethod(scheduler)})
    return made(name="guided", source="", pipeline=SimpleNamespace(transformer=Net()), model_hash="guided-hash",
                device=torch.device("cpu")).in_dtype(torch.float64)


SAMPLERS = {
    "Euler": lambda: d.FlowMatchEulerDiscreteScheduler(shift=2.0),
    "UniPC": lambda: d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
    "Heun": lambda: d.FlowMatchHeunDiscreteScheduler(shift=2.0),
}


@pytest.fixture(params=[(kind, name) for kind in ("two", "doubled", "rescaled") for name in SAMPLERS], ids=lambda p: "-".join(p))
def recorded(request):
    """(bundle, trace of one sample) in float64."""
    bundle = make_bundle(request.param[0], SAMPLERS[request.param[1]])
    integrator, conditioning, latent = bundle.integrator(STEPS), bundle.encode(["p"]), bundle.noise([1])
    latents, outputs, state = [latent], [], integrator.start(latent)
    predict = bundle.predictor(integrator, conditioning)
    with torch.no_grad():
        for step in range(integrator.steps):
            outputs.append(predict(state.latent, step))
            state = integrator.advance(state, outputs[-1], step)
            latents.append(state.latent)
    return bundle, Trace(integrator=integrator, latent_ST=torch.stack(latents, 1), output_ST=torch.stack(outputs, 1),
                         conditioning=conditioning, prompts=("p",), seeds=(1,), model_hash=bundle.model_hash, tokens=bundle.tokens)


@torch.no_grad()
def final(bundle, trace, step, layer, change):
    """The end of the float rollout when `change(x, y)` is added to one layer's output in every call of one step."""
    tree, integrator = clone_tree(bundle.transformer), trace.integrator
    now = [0]
    tree.get_submodule(layer.module_name).register_forward_hook(
        lambda _m, args, y: y + change(args[0]) if now[0] == step else y)
    predict = bundle.predictor(integrator, trace.conditioning, modules={"transformer": tree})
    state = integrator.start(trace.latent_ST[:, 0])
    for number in range(integrator.steps):
        now[0] = number
        state = integrator.advance(state, predict(state.latent, number), number)
    return state.latent


def slope_of(bundle, trace, probe, step, layer, change, eps=1e-5):
    """Derivative of <probe, final latent> along the change."""
    plus, minus = (final(bundle, trace, step, layer, lambda x, sign=sign: sign * eps * change(x)) for sign in (1, -1))
    return float((probe * (plus - minus)).sum()) / (2 * eps)


def rounding(bundle, layer, bits):
    """x -> what quantizing it to these bits changes of the layer's output."""
    transform, act_format = make(QUANT.transform, layer.k_in, QUANT.seed), format_of(QUANT, QUANT.group_size)

    def change(x):
        rotated = transform.forward(x)
        return (fake_quantize(rotated, bits, act_format) - rotated) @ transform.weight(bundle.weight(layer)).T
    return change


def test_the_effect_of_rounding_a_layer_s_input_in_all_calls_is_its_finite_difference(recorded):
    bundle, trace = recorded
    smap = profile(bundle, trace, SensitivityConfig(probes=1, seed=3), QUANT)
    probe = torch.randn((1, *trace.output_ST[:, 0].shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64)[0]
    for step in (0, 1, trace.steps - 1):
        for layer in bundle.layers:
            slope = slope_of(bundle, trace, probe, step, layer, rounding(bundle, layer, 4))
            found = float(smap.directional_TLC[step, layer.index, smap.act_bits_C.index(4)])
            assert found == pytest.approx(slope**2, rel=1e-3, abs=1e-12), (step, layer.name)


def test_signed_errors_are_the_same_slopes_and_weights_err_in_all_calls(recorded):
    """Also of layers whose input is read by others far away: each is rounded by its own error, not by the last layer's."""
    bundle, trace = recorded
    bank = solve(bundle, trace, None, QUANT, (4, 16))
    signed = project(bundle, trace, bank, probes=1, seed=3)
    probe = torch.randn((1, *trace.output_ST[:, 0].shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64)[0]
    texts = [layer for layer in bundle.layers if layer.role == "text"]
    assert len({layer.same_input for layer in texts}) == 1 and texts[1].index - texts[0].index > 1
    assert len({layer.fused_with for layer in texts}) == 2
    for layer in bundle.layers:
        for step in (0, trace.steps - 1):
            slope = slope_of(bundle, trace, probe, step, layer, rounding(bundle, layer, 3))
            assert float(signed.act_TRSLC[step, 0, 0, layer.index, 0]) == pytest.approx(slope, rel=1e-3, abs=1e-7), (step, layer.name)
        delta_NK = (bank.effective_weight(layer.name, 4) - bank.effective_weight(layer.name, 16)).double()
        slopes = [slope_of(bundle, trace, probe, step, layer, lambda x, d=delta_NK: x @ d.T) for step in range(trace.steps)]
        assert float(signed.weight_RSLC[0, 0, layer.index, 0]) == pytest.approx(sum(slopes), rel=1e-3, abs=1e-6), layer.name


def test_costates_of_the_replay_are_those_of_the_sampler_s_state(recorded):
    """The gradient of <r, x_0> with respect to the noise, through everything, by autograd of the whole rollout."""
    bundle, trace = recorded
    integrator = trace.integrator
    probe = torch.randn((2, *trace.output_ST[:, 0].shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costates = Costates(trace.steps)
    backward(bundle, trace, probe, [costates])
    found = costates.result()
    assert [len(parts) for parts in found] == [2 * min(integrator.order, step + 2) - 1 for step in range(trace.steps)]
    start = trace.latent_ST[:, 1].clone().requires_grad_()
    predict = bundle.predictor(integrator, trace.conditioning)
    state = trace.state(1)
    state = type(state)(latents=(*state.latents[:-1], start), outputs=state.outputs)
    with torch.enable_grad():
        for step in range(1, trace.steps):
            state = integrator.advance(state, predict(state.latent, step), step)
        [gradient] = torch.autograd.grad((probe[0] * state.latent).sum(), start)
    newest = min(integrator.order, 2) - 1
    torch.testing.assert_close(found[0][newest][0], gradient, rtol=1e-6, atol=1e-9)


def test_a_denoising_loop_asks_for_every_call_and_reports_every_step(recorded):
    bundle, trace = recorded
    seen = []
    end = denoise(bundle, trace.integrator, trace.latent_ST[:, 0], trace.conditioning, lambda *step: seen.append(step))
    torch.testing.assert_close(end.double(), trace.latent_ST[:, -1], rtol=1e-5, atol=1e-6)
    assert [step for step, *_ in seen] == list(range(trace.steps)) and torch.equal(seen[-1][3], end)
    assert isinstance(bundle.predictor(trace.integrator, trace.conditioning), Predictor)
    assert np.isfinite(end.numpy()).all()
