"""What every model family offers to the stages: a loaded pipeline seen as layers, a sampler and calls.

Dimension letters as in `types.py`: S samples, T steps, L layers. Latents have any rank: (S, *shape).
"""

from __future__ import annotations

import abc
import copy
import json
import threading
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.models import tree
from workbench.models.denoiser import Denoiser, Predictor, StepState
from workbench.models.discover import Rule, discover
from workbench.models.integrator import Integrator
from workbench.models.media import Media
from workbench.options import PIPELINES_OWN, BadInput, GenerationConfig
from workbench.resources import resource_folder
from workbench.types import Conditioning, LayerInfo

ASSETS = resource_folder("assets")
TREES = ("transformer", "transformer_2")  # where a pipeline keeps its denoisers
PROMPT_KINDS = ("calibration", "held_out", "showcase")


class Bundle(abc.ABC):
    """A loaded diffusers pipeline, the float model, and everything a stage may ask of it.

    Nothing here changes after loading: hooks and replaced layers go into trees of their own (`tree.py`), so that any number of threads
    may use one bundle. The transformer runs in float32 on a CPU and in bfloat16 on a GPU; latents are float32 everywhere.
    `modules` are the transformers by name; `float_bytes` counts them in 16 bits."""

    rules: ClassVar[Sequence[Rule]]
    blocks: ClassVar[Mapping[str, str]]

    def __init__(self, *, name: str, source: str, pipeline, model_hash: str, device: torch.device,
                 generation: GenerationConfig = PIPELINES_OWN):
        self.name, self.source, self.pipeline, self.model_hash, self.device = name, source, pipeline, model_hash, device
        self.modules: dict[str, nn.Module] = {each: module for each in TREES if (module := getattr(pipeline, each, None)) is not None}
        self.dtype = next(self.transformer.parameters()).dtype
        self.parameters = sum(p.numel() for module in self.modules.values() for p in module.parameters())
        self.renew_locks()
        self.prepare()
        self._settle(generation)

    # --- what a family defines ---

    @abc.abstractmethod
    def integrator(self, steps: int) -> Integrator:
        """The sampler that the pipeline itself would use for so many steps."""

    @abc.abstractmethod
    def denoiser(self, integrator: Integrator) -> Denoiser:
        """The calls of a schedule."""

    @abc.abstractmethod
    def sigma_of(self, kwargs: Mapping) -> Tensor:
        """The noise level of a forward of a plain pipeline, whose arguments are all named here, as the transformer's own time argument
        tells it and in its type."""

    @abc.abstractmethod
    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of the prompts, on the device."""

    @abc.abstractmethod
    def example(self, device: torch.device) -> tuple[Tensor, Conditioning]:
        """A latent and a conditioning of the shapes of one sample, of any values."""

    @abc.abstractmethod
    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Noise (S, *shape) float32, the same as the pipeline draws with a CPU generator of each seed."""

    @abc.abstractmethod
    def decode(self, latent: Tensor) -> Media:
        """What the latents (S, *shape) show."""

    @abc.abstractmethod
    def settle(self, asked: GenerationConfig) -> None:
        """Sets what is generated (sizes in pixels, lengths in tokens, guidance) from what is asked, and from the pipeline where nothing
        is. Raises BadInput with one line for a value that the pipeline does not take."""

    @property
    def takes(self) -> tuple[str, ...]:
        """The fields of GenerationConfig that the pipeline has; the others are refused. By default it has none."""
        return ()

    def prepare(self) -> None:
        """What is done to the transformers before anybody else sees them. A family may move their weights here, and never later."""
        for module in self.modules.values():
            module.eval().requires_grad_(False)

    def modulation_input(self, integrator: Integrator, steps: range, conditioning: Conditioning) -> Tensor:
        """What every adaLN linear reads at these steps (T, S, K). A family whose modulation depends on the latent has none."""
        raise BadInput(f"{self.name}: its modulation cannot be cached; store it instead")

    # --- shared ---

    def at(self, generation: GenerationConfig) -> Bundle:
        """This model, set to generate something else: other sizes, guidance or text length. The modules are shared."""
        if generation == self.generation:
            return self
        other = copy.copy(self)
        other._settle(generation)
        return other

    def _settle(self, generation: GenerationConfig) -> None:
        for name in GenerationConfig.model_fields:
            if name not in self.takes and getattr(generation, name) not in (None, ""):
                raise BadInput(f"{name.replace('_', ' ')}: a {type(self.pipeline).__name__} has none; leave it empty")
        self.generation = generation
        self.settle(generation)
        found = self._discover()
        self.layers: tuple[LayerInfo, ...] = found.layers
        self.protected: dict[str, str] = found.kept_float

    @property
    def transformer(self) -> nn.Module:
        """The only transformer, or the first."""
        return self.modules["transformer"]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of the prompts, on the device."""
        with self._encoding:
            return self._encode(prompts)

    def renew_locks(self) -> None:
        """For a process that was forked while another thread held one."""
        self._encoding = threading.Lock()  # a tokenizer that sets its padding serves one caller at a time

    def predictor(self, integrator: Integrator, conditioning: Conditioning, *, modules: Mapping[str, nn.Module] | None = None,
                  state: StepState | None = None) -> Predictor:
        """The float model's output, or that of other trees of this model, for one batch; see `Predictor`."""
        return Predictor(modules or self.modules, self.denoiser(integrator), integrator, conditioning, state)

    def _discover(self):
        integrator, meta = self.integrator(self._steps_to_see_all_trees()), torch.device("meta")
        return discover({name: tree.on_meta(module) for name, module in self.modules.items()}, self.denoiser(integrator),
                        *self.example(meta), steps=range(integrator.steps), rules=self.rules, blocks=self.blocks)

    def _steps_to_see_all_trees(self) -> int:
        return 1 if len(self.modules) == 1 else 8

    def linear(self, layer: LayerInfo | str) -> nn.Linear:
        """The float module that holds a layer's weight; by name where it is no layer's."""
        if isinstance(layer, str):
            return self.transformer.get_submodule(layer)
        return self.modules[layer.module].get_submodule(layer.module_name)

    def weight(self, layer: LayerInfo) -> Tensor:
        """w_NK of a layer: its linear's, or the part that is this layer's."""
        weight_NK = self.linear(layer).weight
        weight_NK = weight_NK if layer.rows is None else weight_NK[slice(*layer.rows)]
        return weight_NK if layer.columns is None else weight_NK[:, slice(*layer.columns)]

    def bias(self, layer: LayerInfo) -> Tensor | None:
        """bias_N of a layer."""
        bias_N = self.linear(layer).bias if layer.has_bias else None
        return bias_N if bias_N is None or layer.rows is None else bias_N[slice(*layer.rows)]

    def float_layer(self, layer: LayerInfo) -> nn.Linear:
        """A layer as a linear of its own, sharing the weight: the module itself, unless the layer is a part of one."""
        if layer.rows is None and layer.columns is None:
            return self.linear(layer)
        made = nn.Linear(layer.k_in, layer.n_out, bias=layer.has_bias, device="meta")
        made.weight = nn.Parameter(self.weight(layer), requires_grad=False)
        if layer.has_bias:
            made.bias = nn.Parameter(self.bias(layer), requires_grad=False)
        return made

    def in_dtype(self, dtype: torch.dtype) -> Bundle:
        """This model with its transformers rounded to another float type, in trees of their own; itself where that is its type."""
        if dtype == self.dtype:
            return self
        other = self.with_modules({name: tree.as_dtype(module, dtype) for name, module in self.modules.items()}, dtype)
        other.prepare()
        return other

    def with_modules(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> Bundle:
        """This model with other transformers, which compute in `dtype`; this one keeps its own."""
        other = copy.copy(self)
        other.modules, other.dtype = dict(modules), dtype
        return other

    @property
    def tokens(self) -> int:
        """The most rows that one sample brings to any layer: what batches are measured by."""
        return max(layer.tokens for layer in self.layers)

    @property
    def modulation(self) -> tuple[LayerInfo, ...]:
        """The layers whose activations stay float."""
        return tuple(layer for layer in self.layers if not layer.has_act_bits)

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
