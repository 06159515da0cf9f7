"""What a search decides (BitPlan) and what it costs, to the byte and the bit operation.

Dimension letters as in `types.py`: T steps, L layers, C choices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from workbench.options import ACT_BITS, PIPELINES_OWN, WEIGHT_BITS, Frozen, GenerationConfig, QuantConfig

MODULATION_GROUP = 64  # weights of an adaLN linear that share a scale


class BitChoice(Frozen):
    """Storage of one layer's weight."""

    weight_bits: int
    group_size: int | None = 64
    symmetric: bool = True

    @field_validator("weight_bits")
    @classmethod
    def _known_width(cls, bits):
        if bits not in WEIGHT_BITS:
            raise ValueError(f"{bits} weight bits are not supported; use one of {WEIGHT_BITS}")
        return bits

    @property
    def is_float(self) -> bool:
        return self.weight_bits == 16

    @classmethod
    def of(cls, bits: int, quant: QuantConfig, layer=None) -> BitChoice:
        """How a layer (by default one with activation bits) is stored at a width under these settings."""
        if layer is not None and not layer.has_act_bits:
            return cls(weight_bits=bits, group_size=MODULATION_GROUP)
        return cls(weight_bits=bits, group_size=quant.group_size, symmetric=quant.weight_grid != "asymmetric")


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Microseconds of each layer for one image and step, per weight width W and activation width A, and of everything else.

    `measured` says whether the times were taken on the target itself or follow from its published peak rates."""

    target: str
    measured: bool
    provenance: str
    weight_bits_W: tuple[int, ...]
    act_bits_A: tuple[int, ...]
    us_LWA: Tensor  # float64
    fixed_us: float

    def __post_init__(self):
        if not bool((torch.isfinite(self.us_LWA) & (self.us_LWA >= 0)).all()) or not 0 <= self.fixed_us < math.inf:
            raise ValueError("latencies must be finite and not negative")

    def act_us_LA(self, weight_bits_L) -> Tensor:
        """What each activation width costs once the weights are chosen, float64 (L, A)."""
        columns_L = torch.tensor([self.weight_bits_W.index(bits) for bits in weight_bits_L])
        return self.us_LWA[torch.arange(len(columns_L)), columns_L]

    def range_ms(self, steps: int) -> tuple[float, float]:
        """Milliseconds of the fastest and of the slowest plan."""
        us_LC = self.us_LWA.flatten(1)
        return tuple(steps * (float(bound.sum()) + self.fixed_us) / 1000 for bound in (us_LC.min(1).values, us_LC.max(1).values))

    def plan_ms(self, weight_bits_L, act_bits_TL) -> float:
        """Milliseconds of one image: the transformer calls of all steps."""
        act_us_LA = self.act_us_LA(weight_bits_L)
        columns_TL = torch.tensor([[self.act_bits_A.index(16 if bits is None else bits) for bits in row] for row in act_bits_TL])
        us_TL = act_us_LA.expand(len(columns_TL), -1, -1).gather(2, columns_TL[..., None])[..., 0]
        return (float(us_TL[active_cells(act_bits_TL)].sum()) + self.fixed_us * len(columns_TL)) / 1000


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Exact bytes of each layer's weight per width, and of everything that is not chosen by a plan; latency where it is known.

    usual_bits_L: the width of a layer in a plan of one width, None where it is that one (modulation has a width of its own).
    generation: the sizes and lengths that `macs_L` and the latency are for."""

    weight_bits_C: tuple[int, ...]
    weight_bytes_LC: Tensor  # int64
    fixed_bytes: int
    macs_L: Tensor  # int64, per image and step
    latency: LatencyTable | None = None
    usual_bits_L: tuple[int | None, ...] = ()
    generation: GenerationConfig = PIPELINES_OWN

    def total_bytes(self, weight_bits_L) -> int:
        """Resident bytes of the transformer for one width per layer."""
        columns = torch.tensor([self.weight_bits_C.index(bits) for bits in weight_bits_L])
        return self.fixed_bytes + int(self.weight_bytes_LC.gather(1, columns[:, None]).sum())

    def uniform(self, bits: int) -> tuple[int, ...]:
        """The weights of a plan of one width."""
        return tuple(bits if usual is None else usual for usual in self.usual_bits_L or (None,) * len(self.macs_L))


def active_cells(act_bits_TL) -> Tensor:
    """(T, L) bool: the cells that have activation bits. The others are None: weights alone are quantized there, or nothing runs."""
    return torch.tensor([[bits is not None for bits in row] for row in act_bits_TL], dtype=torch.bool)


def bits_or(act_bits_TL, otherwise: int) -> Tensor:
    """(T, L) float64, `otherwise` where a cell has none."""
    return torch.tensor([[otherwise if bits is None else bits for bits in row] for row in act_bits_TL], dtype=torch.float64)


def mean_act_bits(act_bits_TL) -> float:
    """Plain mean over active steps and layers (the paper's)."""
    return float(bits_or(act_bits_TL, 0).sum() / active_cells(act_bits_TL).sum().clamp(min=1))


def mean_act_bits_macs(act_bits_TL, macs_L) -> float:
    """Mean over active steps and layers, weighted by multiply-accumulates."""
    weight_TL = torch.as_tensor(macs_L, dtype=torch.float64) * active_cells(act_bits_TL)
    return float((bits_or(act_bits_TL, 0) * weight_TL).sum() / weight_TL.sum().clamp(min=1))


def bit_operations(weight_bits_L, act_bits_TL, macs_L) -> float:
    """Bit operations of one image: sum over active steps and layers of MACs x weight bits x activation bits (modelled)."""
    per_layer_L = torch.as_tensor(weight_bits_L, dtype=torch.float64) * torch.as_tensor(macs_L, dtype=torch.float64)
    return float((bits_or(act_bits_TL, 0) * per_layer_L).sum())


def nearest_step(sigma_T: Sequence[float], sigma: float) -> int:
    """The step of a schedule whose noise level is nearest to `sigma`."""
    return min(range(len(sigma_T)), key=lambda t: abs(sigma_T[t] - sigma))


class BitPlan(Frozen):
    """What a search decides: one stored weight per layer, activation bits per step and layer, keyed by sigma; None where a layer has
    none at a step, because its activations stay float or because it does not run there.

    Plans of format 1 named no modulation layers; `upgraded` gives them theirs."""

    format: str = Field(default="adatsq-plan-2", pattern="^adatsq-plan-[12]$")
    model_hash: str = Field(min_length=8, max_length=64)
    method: str = Field(default="adatsq", max_length=64)
    layer_names: tuple[str, ...] = Field(min_length=1, max_length=4096)
    sigma_T: tuple[float, ...] = Field(min_length=1, max_length=1000)
    weight_choice_L: tuple[BitChoice, ...]
    act_bits_TL: tuple[tuple[int | None, ...], ...]
    quant: QuantConfig = QuantConfig()
    generation: GenerationConfig = PIPELINES_OWN
    weight_bytes: int = Field(ge=0)
    act_bits_mean: float
    act_bits_macs: float
    bit_ops: float
    latency_ms: float | None = Field(default=None, ge=0, description="of one image's transformer calls, predicted for `latency_target`")
    latency_target: str | None = Field(default=None, max_length=200)
    predicted_error: float | None = None

    @model_validator(mode="after")
    def _sizes_agree(self):
        layers, steps = len(self.layer_names), len(self.sigma_T)
        if len(set(self.layer_names)) != layers:
            raise ValueError("a layer is named twice")
        if any(not 0 < s <= 1e6 for s in self.sigma_T) or any(a < b for a, b in pairwise(self.sigma_T)):
            raise ValueError("sigma_T must be positive and decreasing (calls of one step may share a level)")
        if len(self.weight_choice_L) != layers:
            raise ValueError(f"{len(self.weight_choice_L)} weight choices for {layers} layers")
        if len(self.act_bits_TL) != steps or any(len(row) != layers for row in self.act_bits_TL):
            raise ValueError(f"act_bits_TL must have {steps} rows (steps) of {layers} columns (layers)")
        for step, row in enumerate(self.act_bits_TL):
            for layer, bits in enumerate(row):
                if bits is not None and bits not in ACT_BITS:
                    raise ValueError(f"act_bits_TL[{step}][{layer}] is {bits}; use one of {ACT_BITS}, or null where there is none")
        if not math.isclose(self.act_bits_mean, mean_act_bits(self.act_bits_TL), rel_tol=1e-6):
            raise ValueError("act_bits_mean is not the mean of act_bits_TL")
        return self

    @property
    def weight_bits_L(self) -> tuple[int, ...]:
        return tuple(choice.weight_bits for choice in self.weight_choice_L)

    @property
    def plan_id(self) -> str:
        """Short content hash of what the plan decides."""
        also = {"generation"} if self.generation != PIPELINES_OWN else set()
        decided = self.model_dump(include={"model_hash", "layer_names", "sigma_T", "weight_choice_L", "act_bits_TL", "quant"} | also)
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]

    def act_bits_at(self, sigma: float) -> tuple[int | None, ...]:
        """Activation bits of every layer at the plan's step nearest to `sigma`."""
        return self.act_bits_TL[nearest_step(self.sigma_T, sigma)]

    def upgraded(self, layers) -> BitPlan:
        """A plan of format 1 with the modulation layers of its model, at the width that its settings gave them; any other as it is."""
        old = [layer for layer in layers if layer.has_act_bits]
        if self.format != "adatsq-plan-1" or self.layer_names != tuple(layer.name for layer in old):
            return self
        usual = usual_bits(self.quant)
        place = {layer.name: number for number, layer in enumerate(old)}
        choices = [self.weight_choice_L[place[layer.name]] if layer.has_act_bits else BitChoice.of(usual, self.quant, layer)
                   for layer in layers]
        rows = [[row[place[layer.name]] if layer.has_act_bits else None for layer in layers] for row in self.act_bits_TL]
        return BitPlan.model_validate({**dict(self), "format": "adatsq-plan-2", "layer_names": tuple(layer.name for layer in layers),
                                       "weight_choice_L": tuple(choices), "act_bits_TL": tuple(map(tuple, rows))})


def usual_bits(quant: QuantConfig) -> int:
    """Weight bits of the modulation where no search chooses them; 16 where its outputs are cached and it is not stored at all."""
    return 16 if quant.modulation == "cached" else quant.modulation_bits


def make_plan(*, layers, sigma_T, weight_choice_L, act_bits_TL, costs: CostTable, quant: QuantConfig,
              model_hash: str, method: str = "adatsq", predicted_error: float | None = None) -> BitPlan:
    """A plan with its costs computed from the table; sigma_T are the noise levels of its steps (without the final 0). Bits given for
    layers that have no activation bits are left out."""
    weight_bits_L = [choice.weight_bits for choice in weight_choice_L]
    rows = tuple(tuple(None if b is None or not layer.has_act_bits else int(b) for b, layer in zip(row, layers, strict=True))
                 for row in act_bits_TL)
    return BitPlan(
        model_hash=model_hash, method=method, layer_names=tuple(layer.name for layer in layers),
        sigma_T=tuple(float(s) for s in sigma_T), weight_choice_L=tuple(weight_choice_L), act_bits_TL=rows,
        quant=quant, generation=costs.generation, weight_bytes=costs.total_bytes(weight_bits_L), act_bits_mean=mean_act_bits(rows),
        act_bits_macs=mean_act_bits_macs(rows, costs.macs_L), bit_ops=bit_operations(weight_bits_L, rows, costs.macs_L),
        latency_ms=costs.latency and costs.latency.plan_ms(weight_bits_L, rows), latency_target=costs.latency and costs.latency.target,
        predicted_error=predicted_error)


class ScoredPlan(Frozen):
    """A plan with its measured error: normalised MSE of the final latent against float, over `samples` prompts. `low` and `high` are
    its 95 % interval over prompts, where it was judged."""

    plan: BitPlan
    error: float = Field(ge=0)
    samples: int = Field(ge=1)
    held_out: bool = False
    origin: str = Field(default="beam", description="beam, lagrangian, uniform, ...")
    low: float | None = None
    high: float | None = None
