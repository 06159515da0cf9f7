"""Every type that crosses a stage boundary, with the invariant it guarantees.

Dimension letters, used at the end of tensor names everywhere:
    T  denoising steps, index 0 = noisiest     S  samples (prompt and seed)
    L  quantizable linear layers, forward order M  tokens (rows of a matrix product)
    C  candidate choices                        N  out features    K  in features
    G  groups along K                           P  packed bytes along K
    D  channels of a latent token               R  probes
Scalars end in their unit: _bytes, _us, _ms, _macs, _bits.

Results are frozen dataclasses; what comes from outside (budgets, plans) is a frozen pydantic model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from workbench.options import BadInput, SensitivityConfig
from workbench.plans import BitPlan, ScoredPlan


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One layer that a plan gives a width, in the order of execution.

    kind: "quantize", or "modulation": a layer whose weight has a width and whose activations stay float.
    same_input: the first layer that reads the same tensor, or itself; such layers share a Hessian and a range, wherever they stand.
    fused_with: the first of its siblings, layers of one block that read the same tensor in one pass and share a low-rank factor.
    tokens: rows of its input for one sample and call; calls: how often it runs in a step.
    module: the tree it belongs to. linear: the module that holds its weight, where it is a part of one (`rows` of its outputs or
    `columns` of its inputs, each a half-open range); else its own name."""

    index: int
    name: str
    block: str
    role: str
    n_out: int
    k_in: int
    tokens: int
    has_bias: bool
    same_input: int
    fused_with: int
    kind: str = "quantize"
    calls: int = 1
    module: str = "transformer"
    linear: str = ""
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    @property
    def macs_per_step(self) -> int:
        """Multiply-accumulates of one sample's step, all calls."""
        return self.calls * self.tokens * self.n_out * self.k_in

    @property
    def has_act_bits(self) -> bool:
        """Whether a plan gives its activations a width."""
        return self.kind == "quantize"

    @property
    def module_name(self) -> str:
        """Dotted name of the module that holds the weight."""
        return self.linear or self.name


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Encoded prompts. Values of `per_sample` have S rows: a tensor's first axis, or a tuple of S tensors where samples differ in
    length; `shared` ones (position ids) serve all samples."""

    per_sample: dict[str, Tensor | tuple[Tensor, ...]]
    shared: dict[str, Tensor]

    def rows(self, index: slice | Tensor) -> Conditioning:
        """The conditioning of some samples, by a slice or a tensor of sample numbers."""
        def pick(value):
            if isinstance(value, Tensor):
                return value[index if isinstance(index, slice) else index.to(value.device)]
            return tuple(value[i] for i in (range(len(value))[index] if isinstance(index, slice) else index.tolist()))
        return replace(self, per_sample={name: pick(value) for name, value in self.per_sample.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device."""
        return Conditioning(per_sample={name: _moved(value, device) for name, value in self.per_sample.items()},
                            shared={name: value.to(device) for name, value in self.shared.items()})

    def clone(self) -> Conditioning:
        """The same in memory of its own."""
        return Conditioning(per_sample={name: value.clone() if isinstance(value, Tensor) else tuple(each.clone() for each in value)
                                        for name, value in self.per_sample.items()}, shared=dict(self.shared))


def _moved(value: Tensor | tuple[Tensor, ...], device) -> Tensor | tuple[Tensor, ...]:
    return value.to(device) if isinstance(value, Tensor) else tuple(each.to(device) for each in value)


@dataclass(frozen=True, kw_only=True)
class SensitivityMap:
    """Temporal Fisher information and what activation quantization would do, all float32 on the CPU.

    fisher_TL, stderr_TL: squared gradient per token at a layer's output, and its standard error over samples, whose probes are one
    observation together; None where one sample gives none.
    alpha_TL: calibration weights, mean 1 over T for every layer. act_absmax_TL: largest |input| seen.
    directional_TLC: mean of (g . delta)^2; squared_error_TLC: mean |delta|^2 per token; delta is the change of a layer's
    output when its input is quantized to `act_bits_C` (the 16-bit column is 0).
    sigma_T1: noise levels of the steps, and the last one's end."""

    layers: tuple[LayerInfo, ...]
    sigma_T1: Tensor
    fisher_TL: Tensor
    stderr_TL: Tensor | None
    alpha_TL: Tensor
    act_absmax_TL: Tensor
    act_bits_C: tuple[int, ...]
    directional_TLC: Tensor
    squared_error_TLC: Tensor
    config: SensitivityConfig
    samples: int
    model_hash: str

    def __post_init__(self):
        steps, layers, choices = self.steps, len(self.layers), len(self.act_bits_C)
        shapes = {"fisher_TL": (steps, layers), "stderr_TL": (steps, layers), "alpha_TL": (steps, layers),
                  "act_absmax_TL": (steps, layers), "directional_TLC": (steps, layers, choices),
                  "squared_error_TLC": (steps, layers, choices)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None and name == "stderr_TL":
                continue
            if tuple(value.shape) != shape or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite and of shape {shape}, not {tuple(value.shape)}")
        if bool((self.fisher_TL < 0).any()):
            raise ValueError("Fisher information cannot be negative")
        if not torch.allclose(self.alpha_TL.mean(0), torch.ones(layers), atol=1e-4):
            raise ValueError("alpha must have mean 1 over the steps of every layer")

    @property
    def steps(self) -> int:
        return len(self.sigma_T1) - 1

    @property
    def most_fragile(self) -> tuple[int, int]:
        """(layer, step) of the largest Fisher information: where one would look first."""
        step, layer = divmod(int(self.fisher_TL.argmax()), len(self.layers))
        return layer, step


@dataclass(frozen=True, kw_only=True)
class DistortionTable:
    """Predicted increase of the end-to-end error (mean squared error of the final latent, summed over its elements).

    error_TLC for activation bits `act_bits_C` (the 16-bit column is 0); weight_error_LC for `weight_bits_C`."""

    act_bits_C: tuple[int, ...]
    error_TLC: Tensor
    weight_bits_C: tuple[int, ...]
    weight_error_LC: Tensor

    def __post_init__(self):
        if bool((self.error_TLC[..., self.act_bits_C.index(16)] != 0).any()):
            raise ValueError("the float column of a distortion table must be 0")
        for value in (self.error_TLC, self.weight_error_LC):
            if not bool(torch.isfinite(value).all()):
                raise ValueError("a distortion table must be finite")


@dataclass(frozen=True, kw_only=True)
class SearchEvent:
    """What the search just did; logged, drawn live and replayed. Points are (mean act bits so far, score)."""

    step: int
    steps: int
    candidates: tuple[tuple[float, float], ...]
    survivors: tuple[tuple[float, float], ...]
    evaluations: int
    seconds: float
    front: tuple[tuple[int, float, float], ...] = ()  # (weight_bytes, mean act bits, measured error)
    message: str = ""
    plans: tuple[ScoredPlan, ...] = field(default=(), repr=False)  # measured just now; only reported, no result keeps them


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How a prediction orders measured plans: Spearman's rank correlation over all plans, and over those near the budget alone. None where
    there are too few plans, or nothing to order."""

    prediction: str
    spearman: float | None
    plans: int
    spearman_near: float | None
    plans_near: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """front: non-dominated in (weight bytes, mean act bits, error); references: uniform and other rivals, as points, by `origin`;
    finalists, once the search has ended: plans within budget, the first to be judged on other prompts first: the best of each origin, then
    by measured error."""

    front: tuple[ScoredPlan, ...]
    references: tuple[ScoredPlan, ...]
    finalists: tuple[ScoredPlan, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SearchResult(Found):
    """Where a search ended. ranking: how well each table predicted what was measured."""

    chosen: ScoredPlan
    evaluations: int
    seconds: float
    events: tuple[SearchEvent, ...] = field(default=(), repr=False)
    ranking: tuple[Ranking, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QuantWeight:
    """Packed weight: packed_NP uint8, scale_NG float16, not 0, zero_NG uint8 or None."""

    packed_NP: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    bits: int
    group_size: int | None
    k_in: int

    def __post_init__(self):
        n_out, packed = self.packed_NP.shape
        groups = 1 if self.group_size is None else -(-self.k_in // self.group_size)
        if self.packed_NP.dtype != torch.uint8 or packed != -(-self.k_in * self.bits // 8):
            raise BadInput(f"packed weight has {packed} bytes a row; {self.k_in} codes of {self.bits} bits need "
                           f"{-(-self.k_in * self.bits // 8)}")
        if self.scale_NG.shape != (n_out, groups):
            raise BadInput(f"scales are {tuple(self.scale_NG.shape)}; expected {(n_out, groups)}")
        if not bool((torch.isfinite(self.scale_NG) & (self.scale_NG != 0)).all()):
            raise BadInput("a weight scale is zero or not finite")

    @property
    def weight_bytes(self) -> int:
        parts = (self.packed_NP, self.scale_NG, self.zero_NG)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)


@dataclass(frozen=True, kw_only=True)
class SolveReport:
    """What solving one layer achieved, in the Hessian's norm."""

    layer: str
    loss_rtn: float
    loss_solved: float
    damping: float
    dead_channels: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean with a 95 % interval over n prompts. `higher_is_better` is None where neither is."""

    mean: float
    low: float
    high: float
    n: int
    unit: str = ""
    higher_is_better: bool | None = True


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt and seed through both models; frames uint8 (F, H, W, 3), F = 1 for images. Metrics of pictures are means over frames."""

    prompt: str
    seed: int
    frames_float: Any
    frames_quantized: Any
    psnr_db: float
    ssim: float
    latent_nmse: float
    latent_nmse_T: tuple[float, ...]
    vif: float | None = None  # not defined for tiny images
    lpips: float | None = None  # where its weights are present

    @property
    def image_float(self):
        """uint8 (H, W, 3): of a video the first frame."""
        return self.frames_float[0]

    @property
    def image_quantized(self):
        """uint8 (H, W, 3): of a video the first frame."""
        return self.frames_quantized[0]


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """The final latent that each model predicts at every step, (S, T, *shape) float32 on the CPU, and the noise levels sigma_T1."""

    sigma_T1: Tensor
    float_ST: Tensor
    quantized_ST: Tensor


@dataclass(frozen=True, kw_only=True)
class SoloTiming:
    """Milliseconds of one image's transformer calls, run alone and in turns, beside what the plan's cost table predicted. slower: how
    many times as long the machine takes as when that table was measured."""

    float_ms: float
    quantized_ms: float
    predicted_ms: float
    slower: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Float against quantized over the same prompts, seeds and steps. `trajectories` is None where they were too large to keep."""

    pairs: tuple[Pair, ...]
    metrics: dict[str, Interval]
    float_seconds_per_image: float
    quantized_seconds_per_image: float
    float_bytes: int
    quantized_bytes: int
    compute: str
    reason: str
    plan: BitPlan
    trajectories: Trajectories | None = field(default=None, repr=False)
    solo_timing: SoloTiming | None = None  # only for a plan of this machine's own cost table
