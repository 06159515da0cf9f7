"""A pipeline of made-up numbers with the real types, so that the interface can be tested without a model.

Each stage waits `pause` seconds per report, if it is set, so that a test can look at or cancel what is running.
"""

import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch

from workbench.generate import Drafts
from workbench.inspection import BINS, LayerStep
from workbench.options import PIPELINES_OWN, BadInput, Budget, GenerationConfig, Progress, SensitivityConfig, ignore_progress
from workbench.plans import BitChoice, BitPlan, CostTable, ScoredPlan, make_plan
from workbench.types import (
    Comparison,
    DistortionTable,
    Interval,
    LayerInfo,
    Pair,
    SearchEvent,
    SearchResult,
    SensitivityMap,
    SoloTiming,
    Trajectories,
)

ROLES = ("q", "k", "v", "out", "up", "down")
ACT_BITS_C, WEIGHT_BITS_C = (3, 4, 6, 8, 16), (2, 3, 4, 6, 8, 16)
MODEL_HASH = "fake0123"


def make_layers(blocks=5):
    names = [(f"blocks.{b}", role) for b in range(blocks) for role in ROLES]
    return tuple(LayerInfo(index=i, name=f"{block}.{role}", block=block, role=role, n_out=256, k_in=256, tokens=80, has_bias=True,
                           same_input=i, fused_with=i) for i, (block, role) in enumerate(names))


@dataclass
class FakeBundle:
    name: str = "emoji-flux"
    source: str = "emoji-flux"
    model_hash: str = MODEL_HASH
    float_type: str = "float32 arithmetic on cpu"
    layers: tuple = make_layers()
    modulation: tuple = ()
    generation: GenerationConfig = PIPELINES_OWN
    tokens: int = 64
    takes: tuple = ("height", "width", "guidance", "negative_prompt")
    parameters: int = 30 * 65_536

    @property
    def protected(self):
        return {"proj_out": "final projection"}

    @property
    def float_bytes(self):
        return 2 * self.parameters

    def prompts(self, kind):
        return tuple(f"{kind} prompt {i}" for i in range(6))

    def integrator(self, steps):
        return SimpleNamespace(sigma_T1=make_levels(steps), steps=steps)

    def renew_locks(self):
        pass  # it has none

    def at(self, generation):
        return self if generation == self.generation else replace(self, generation=generation)


def make_levels(steps):
    return torch.linspace(1, 0, steps + 1)


def make_sensitivity(layers, steps):
    t, i = torch.arange(steps)[:, None], torch.arange(len(layers))[None]
    fisher_TL = torch.exp(0.08 * (t - steps / 2) ** 2 - 0.4 * (i % 7) + 0.03 * i)
    alpha_TL = fisher_TL / fisher_TL.mean(0)
    act_C = torch.tensor(ACT_BITS_C)
    squared_error_TLC = torch.ones(steps, len(layers), 1) * torch.where(act_C == 16, torch.zeros(()), 4.0 ** -act_C)
    return SensitivityMap(layers=layers, sigma_T1=make_levels(steps), fisher_TL=fisher_TL, stderr_TL=0.1 * fisher_TL, alpha_TL=alpha_TL,
                          act_absmax_TL=1 + fisher_TL.sqrt(), act_bits_C=ACT_BITS_C, squared_error_TLC=squared_error_TLC,
                          directional_TLC=fisher_TL[..., None] * squared_error_TLC, config=SensitivityConfig(), samples=4,
                          model_hash=MODEL_HASH)


def make_table(smap):
    weight_C = torch.tensor(WEIGHT_BITS_C)
    return DistortionTable(act_bits_C=ACT_BITS_C, error_TLC=smap.directional_TLC, weight_bits_C=WEIGHT_BITS_C,
                           weight_error_LC=smap.fisher_TL.sum(0)[:, None] * 4.0 ** -weight_C)


def make_costs(layers):
    per_layer_C = torch.tensor([65_536 * b // 8 for b in WEIGHT_BITS_C])
    return CostTable(weight_bits_C=WEIGHT_BITS_C, weight_bytes_LC=per_layer_C.repeat(len(layers), 1), fixed_bytes=20_000,
                     macs_L=torch.tensor([layer.macs_per_step for layer in layers]))


def make_scored(found, weight_bits, act_bits, origin="beam"):
    smap = found.sensitivity
    steps, layers = smap.fisher_TL.shape
    act_bits_TL = torch.full((steps, layers), act_bits)
    if origin == "beam":
        act_bits_TL[smap.fisher_TL > smap.fisher_TL.quantile(0.8)] = 8
    plan = make_plan(layers=smap.layers, sigma_T=smap.sigma_T1[:-1].tolist(), costs=found.costs, quant=found.quant,
                     weight_choice_L=[BitChoice(weight_bits=weight_bits)] * layers, act_bits_TL=act_bits_TL.tolist(),
                     model_hash=MODEL_HASH, method=origin, predicted_error=1e-3)
    better = 1.0 if origin == "uniform" else 0.5
    return ScoredPlan(plan=plan, error=better * (4.0 ** -weight_bits + 4.0 ** -plan.act_bits_mean), samples=4, held_out=True, origin=origin)


def make_image(draw, size=128):
    """Something to look at: soft rings of two random colours, with noise in every pixel."""
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    rings = 0.5 + 0.5 * np.cos(draw.uniform(8, 40) * np.hypot(x - draw.uniform(-0.3, 0.3), y))
    first, second = draw.uniform(40, 250, (2, 3))
    picture = rings[..., None] * first + (1 - rings[..., None]) * second + draw.integers(-8, 9, (size, size, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


class FakePipeline:
    """The functions of `workbench.pipeline`, with the same signatures and reports."""

    def __init__(self, pause=0.0, blocks=5):
        self.pause, self.blocks, self._clock = pause, blocks, threading.Event()

    def _report(self, on_progress, stage, done, total, detail=None):
        self._clock.wait(self.pause)
        on_progress(Progress(stage=stage, done=done, total=total, detail=detail))

    def load(self, source="emoji-flux", device="auto", *, on_progress=ignore_progress):
        self._report(on_progress, "load", 1, 1)
        if source != "emoji-flux":
            raise BadInput(f"no embedded model, folder or hub id is called {source!r}; embedded: emoji-flux")
        return FakeBundle(layers=make_layers(self.blocks))

    def is_loaded(self, source):
        return source == "emoji-flux"

    def profile(self, bundle, trace_config, config, quant, *, target=None, run=None, on_progress=ignore_progress):
        steps = trace_config.steps
        for t in range(steps):
            self._report(on_progress, "trace", t + 1, steps)
        smap = make_sensitivity(bundle.layers, steps)
        for t in reversed(range(steps)):
            self._report(on_progress, "sensitivity", steps - t, steps, {"step": t, "fisher_L": smap.fisher_TL[t].tolist()})
        return SimpleNamespace(trace=SimpleNamespace(seeds=(0, 1)), sensitivity=smap, bank=None, table=make_table(smap),
                               costs=make_costs(bundle.layers), quant=quant, seconds=1.0)

    def search(self, bundle, found, budget, config, *, run=None, on_progress=ignore_progress):
        front = tuple(make_scored(found, w, a) for w, a in ((3, 3), (3, 4), (4, 4), (4, 6), (8, 8)))
        references = tuple(make_scored(found, b, b, "uniform") for b in (3, 4, 8))
        steps, events = len(found.sensitivity.fisher_TL), []
        for t in range(steps):
            survivors = tuple((3.0 + i / 4, 0.1 ** (1 + i / 3) * (t + 1)) for i in range(config.beam))
            measured = tuple((s.plan.weight_bytes, s.plan.act_bits_mean, s.error) for s in front[:t])
            events.append(SearchEvent(step=t, steps=steps, candidates=tuple((b, 1.5 * e) for b, e in survivors), survivors=survivors,
                                      evaluations=8 * (t + 1), seconds=0.1 * t, front=measured))
            plans = (*references[t : t + 1], *front[t : t + 1])
            self._report(on_progress, "search", t + 1, steps, replace(events[-1], plans=plans))
        return SearchResult(front=front, references=references, chosen=front[2], evaluations=100, seconds=2.0, events=tuple(events))

    def evaluate_plan(self, bundle, found, plan, *, prompts=16, on_progress=ignore_progress):
        """The error of `make_scored`'s kind, spread over the prompts."""
        if plan.quant != found.quant:
            raise BadInput("the plan's weights are solved with other settings than this profile's; profile with the plan's settings first")
        for stage in ("trace", "rollout"):
            for step in range(len(plan.sigma_T)):
                self._report(on_progress, stage, step, len(plan.sigma_T))
        weight_bits = sum(plan.weight_bits_L) / len(plan.weight_bits_L)
        error = 0.5 * (4.0 ** -weight_bits + 4.0 ** -plan.act_bits_mean)
        return ScoredPlan(plan=plan, error=error, samples=prompts, held_out=True, origin="painted", low=0.8 * error, high=1.2 * error)

    def default_budget(self, bundle, found):
        return Budget(max_weight_bytes=1_200_000, max_mean_act_bits=5.0)

    def quantize(self, bundle, found, plan, *, on_progress=ignore_progress):
        self._report(on_progress, "weights", 1, 1)
        return SimpleNamespace(plan=plan, weight_bytes=plan.weight_bytes)

    def compare(self, bundle, quantized, prompts, seed, steps, *, on_progress=ignore_progress):
        draw = np.random.default_rng(seed)
        pairs = []
        for i, prompt in enumerate(prompts):
            image = make_image(draw)
            noisy = np.clip(image.astype(int) + draw.integers(-4, 5, image.shape), 0, 255).astype(np.uint8)
            pairs.append(Pair(prompt=prompt, seed=seed + i, frames_float=image[None], frames_quantized=noisy[None],
                              psnr_db=36.0 + i, ssim=0.97,
                              latent_nmse=0.004, latent_nmse_T=tuple(0.004 * (t + 1) / steps for t in range(steps))))
        for side in ("float", "quantized"):
            for i, pair in enumerate(pairs):
                self._report(on_progress, f"generate {side}", i + 1, len(pairs), Drafts(i, (getattr(pair, f"image_{side}"),)))
        metrics = {"PSNR": Interval(mean=36.0, low=35.0, high=37.0, n=len(pairs), unit="dB"),
                   "latent NMSE": Interval(mean=0.004, low=0.003, high=0.005, n=len(pairs), higher_is_better=False)}
        latents = torch.zeros(len(pairs), steps, 1, 1)
        kept = Trajectories(sigma_T1=make_levels(steps), float_ST=latents, quantized_ST=latents)
        return Comparison(trajectories=kept, pairs=tuple(pairs), metrics=metrics, float_seconds_per_image=0.4,
                          quantized_seconds_per_image=0.6,
                          float_bytes=bundle.float_bytes, quantized_bytes=quantized.weight_bytes, compute="emulated",
                          reason="dequantized weights, float product", plan=quantized.plan)

    def solo_timing(self, bundle, quantized, steps, float_seconds, *, on_progress=ignore_progress):
        self._report(on_progress, "time one image", 1, 1)
        return SoloTiming(float_ms=400.0, quantized_ms=600.0, predicted_ms=590.0)

    def draw(self, bundle, prompts, seed, steps, *, on_progress=ignore_progress):
        """The float images of `compare`."""
        made = self.compare(bundle, SimpleNamespace(plan=None, weight_bytes=0), prompts, seed, steps, on_progress=on_progress)
        return SimpleNamespace(prompts=tuple(prompts), seeds=tuple(pair.seed for pair in made.pairs),
                               images=[pair.image_float for pair in made.pairs], seconds_per_image=0.4)

    def preview(self, bundle, comparison, pair, step):
        """The final images, darker the earlier the step."""
        share = (step + 1) / (len(comparison.trajectories.sigma_T1) - 1)
        shown = comparison.pairs[pair]
        return tuple((image * share).astype(np.uint8) for image in (shown.image_float, shown.image_quantized))

    def inspect(self, bundle, recorded, layer, step, quant):
        channel_K = torch.arange(256.0)
        high_K = 1 + (channel_K * (layer + 1) % 17) + step
        counts_B = torch.exp(-0.01 * (torch.arange(BINS) - BINS // 2) ** 2) * 1000
        return LayerStep(layer=layer, step=step, samples=4, transform=quant.transform, low_K=-high_K, high_K=high_K,
                         transformed_low_K=-torch.full((256,), 9.0), transformed_high_K=torch.full((256,), 9.0),
                         weight_edges_B=torch.linspace(-0.2, 0.2, BINS + 1), weight_counts_B=counts_B, transformed_counts_B=counts_B.sqrt())

    def export(self, bundle, quantized, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(quantized.plan.model_dump_json())
        (folder / "model.safetensors").write_bytes(bytes(1000))

    def validate_plan(self, bundle, text):
        plan = BitPlan.parse(text, "plan")
        if plan.model_hash != bundle.model_hash:
            raise BadInput(f"plan: it was made for model {plan.model_hash}, not for {bundle.name} ({bundle.model_hash})")
        return plan
