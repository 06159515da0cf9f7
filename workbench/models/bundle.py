"""What every model family offers to the stages: a loaded pipeline seen as layers, a schedule and a velocity.

Dimension letters as in `types.py`: S samples, M tokens, D channels of a latent token, T steps, L layers.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from workbench.options import BadInput
from workbench.plans import BitPlan
from workbench.resources import resource_folder
from workbench.types import Conditioning, LayerInfo, Schedule

ASSETS = resource_folder("assets")
PROMPT_KINDS = ("calibration", "held_out", "showcase")


class StepCursor:
    """Where the running denoising loop is. One root hook writes it; quantized layers read `row`.

    sigma: noise level of the current forward. row: activation bits of every layer at this step (None: all float).
    plan: when set, the hook looks the row up by sigma; a search leaves it None and writes `row` itself."""

    def __init__(self):
        self.sigma: float = math.nan
        self.row: Sequence[int] | None = None
        self.plan: BitPlan | None = None

    def move_to(self, sigma: float) -> None:
        """Called once per forward of the transformer, before its first layer."""
        self.sigma = sigma
        if self.plan is not None:
            self.row = self.plan.act_bits_at(sigma)


class Bundle(abc.ABC):
    """A loaded diffusers pipeline and everything a stage may ask of it.

    The transformer runs in float32 on a CPU and in bfloat16 on a GPU; latents are float32 everywhere."""

    def __init__(self, *, name: str, source: str, pipeline, model_hash: str, device: torch.device):
        self.name, self.source, self.pipeline, self.model_hash, self.device = name, source, pipeline, model_hash, device
        self.transformer: nn.Module = pipeline.transformer.eval().requires_grad_(False)
        self.dtype = next(self.transformer.parameters()).dtype
        self._parameters = sum(p.numel() for p in self.transformer.parameters())  # while quantized layers are lent, fewer are there
        self.cursor = StepCursor()
        self.lock = threading.RLock()
        self.transformer.register_forward_pre_hook(self._read_step, with_kwargs=True)
        self.layers, self.modulation, self.protected = self._sort_linears()

    # --- what a family defines ---

    @abc.abstractmethod
    def _sort_linears(self) -> tuple[tuple[LayerInfo, ...], tuple[LayerInfo, ...], dict[str, str]]:
        """Every nn.Linear of the transformer as one of: quantizable, modulation (weight only), protected (name: why)."""

    @abc.abstractmethod
    def _sigma_of(self, kwargs: dict) -> float:
        """The noise level of a forward, from the transformer's own time argument."""

    @abc.abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of the prompts."""

    @abc.abstractmethod
    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        """Noise (S, M, D) float32, the same as the pipeline draws with a CPU generator of each seed."""

    @abc.abstractmethod
    def schedule(self, steps: int) -> Schedule:
        """The noise levels the pipeline itself would use."""

    @abc.abstractmethod
    def velocity(self, latent_SMD: Tensor, schedule: Schedule, step: int, conditioning: Conditioning) -> Tensor:
        """The model's output (S, M, D) float32 at one step; differentiable with respect to the latent."""

    @abc.abstractmethod
    def decode(self, latent_SMD: Tensor) -> np.ndarray:
        """Images uint8 (S, H, W, 3)."""

    def modulation_input(self, schedule: Schedule, steps: range, conditioning: Conditioning) -> Tensor:
        """What every adaLN linear reads at these steps (T, S, K). A family whose modulation depends on the latent has none."""
        raise BadInput(f"{self.name}: its modulation cannot be cached; store it instead")

    # --- shared ---

    def _read_step(self, _module, _args, kwargs):
        self.cursor.move_to(self._sigma_of(kwargs))

    def advance(self, latent_SMD: Tensor, velocity_SMD: Tensor, schedule: Schedule, step: int) -> Tensor:
        """One Euler step of the flow: x + (sigma_{t+1} - sigma_t) v, in float32."""
        return latent_SMD + (schedule.sigma_T1[step + 1] - schedule.sigma_T1[step]).to(latent_SMD.device) * velocity_SMD

    def linear(self, name: str) -> nn.Module:
        """The module of a layer, float or quantized."""
        return self.transformer.get_submodule(name)

    def replace(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Put other modules in layers' places; returns those that stood there."""
        split = {name: name.rpartition(".") for name in modules}
        places = {name: (self.transformer.get_submodule(parent)._modules, leaf) for name, (parent, _, leaf) in split.items()}
        before = {name: children[leaf] for name, (children, leaf) in places.items()}
        for name, (children, leaf) in places.items():
            children[leaf] = modules[name]
        return before

    @contextlib.contextmanager
    def in_arithmetic(self, dtype: torch.dtype) -> Iterator[Bundle]:
        """This bundle with a copy of its transformer in another float type, as long as the block lasts; weights are rounded to it."""
        with self.lock:
            kept = self.transformer, self.dtype
            try:
                if dtype != self.dtype:
                    # the hook that reads the step is bound to this bundle, which must not be copied along
                    self.transformer, self.dtype = copy.deepcopy(self.transformer, {id(self): self}).to(dtype), dtype
                yield self
            finally:
                self.transformer, self.dtype = kept

    @property
    def parameters(self) -> int:
        """Parameters of the float transformer."""
        return self._parameters

    @property
    def float_bytes(self) -> int:
        """Bytes of the transformer stored in a 16-bit float type, the reference for every saving."""
        return 2 * self.parameters

    @property
    def float_type(self) -> str:
        """The float reference as the screen names it."""
        return f"{str(self.dtype).removeprefix('torch.')} arithmetic on {self.device.type}, 2 bytes per stored parameter"

    def prompts(self, kind: str) -> tuple[str, ...]:
        """The model's own prompts: calibration, held_out (never seen by calibration) or showcase."""
        if kind not in PROMPT_KINDS:
            raise ValueError(f"unknown prompt set {kind!r}; use one of {PROMPT_KINDS}")
        path = ASSETS / "prompts" / f"{self.name}.json"
        if not path.exists():
            path = ASSETS / "prompts" / "general.json"
        return tuple(json.loads(path.read_text())[kind])

    def check_layers(self) -> None:
        """Every linear is accounted for exactly once; raises BadInput if a model has layers this family does not know."""
        known = [layer.name for layer in (*self.layers, *self.modulation)] + list(self.protected)
        linears = {name for name, module in self.transformer.named_modules() if isinstance(module, nn.Linear)}
        unknown = sorted(linears.symmetric_difference(known))
        if unknown or len(known) != len(set(known)):
            raise BadInput(f"{self.name}: layer {unknown[0] if unknown else 'names'} is not one this family knows; "
                           "load the pipeline unfused and without adapters")
