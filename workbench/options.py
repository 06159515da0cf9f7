"""Options of every stage, each setting declared once, and the two errors and one report that all stages share.

Forms and command-line flags are generated from these fields: default, bounds, step and help live here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from workbench.resources import resource_folder

ACT_BITS = (3, 4, 6, 8, 16)
WEIGHT_BITS = (2, 3, 4, 6, 8, 16)
GROUP_SIZES = (32, 64, 128)
MAX_PROMPT_CHARACTERS = 5000  # of one prompt; what a model reads of it is a matter of its text length
LATENCY_TABLES = resource_folder("assets") / "latency"  # measured on other machines, one file each
MEASURED_TARGETS = tuple(sorted(path.stem for path in LATENCY_TABLES.glob("*.json")))
MODELLED_TARGETS = ("a100", "h100", "rtx4090", "rtx5090", "b200")
LATENCY_TARGETS = ("this machine", *MEASURED_TARGETS, *MODELLED_TARGETS)


class BadInput(ValueError):
    """Something from outside is wrong. The message is one line: what is wrong, and what would be right."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, also of one that says nothing or whose text cannot be made."""
    try:
        said = str(error).strip()
    except Exception as fault:
        return f"its message cannot be read ({type(fault).__name__})"
    return said.splitlines()[0] if said else "no message"


class Cancelled(Exception):
    """Raised by a progress callback to stop a stage; the stage leaves nothing half-written behind.

    `so_far` is what the stage had by then, where it has something to show: a search's result up to there."""

    so_far: Any = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report of a running stage. `detail` carries a stage's partial result for whoever draws it."""

    stage: str
    done: int
    total: int
    message: str = ""
    detail: Any = None


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """The default listener."""


def explain(error: ValidationError) -> str:
    """A pydantic error as one line for people: the first problem and where it is."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


class Frozen(BaseModel):
    """Base of options and of everything read from outside."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: dict | str, what: str | None = ""):
        """Build from a dict or a JSON text; raises BadInput with one line instead of a traceback. `what` names the whole in that line, by
        default the class; with None the field alone says where the mistake is, as on a form."""
        label = "" if what is None else f"{what or cls.__name__}: "
        try:
            return cls.model_validate_json(values) if isinstance(values, str) else cls.model_validate(values)
        except ValidationError as error:
            raise BadInput(label + explain(error)) from None


def setting(default, help_text: str, *, step: float | None = None, **bounds):
    """One declaration of a setting: default, bounds, step and help. Forms and command-line flags are made from it."""
    extra = {"step": step} if step is not None else None
    return Field(default=default, description=help_text, json_schema_extra=extra, **bounds)


class ModelSpec(Frozen):
    """Where a model comes from: an embedded name, a local diffusers folder, or a hub id."""

    source: str = setting("emoji-flux", "embedded model, folder of a diffusers pipeline, or hub id", min_length=1)
    device: str = setting("auto", "auto, cpu or cuda", pattern=r"^(auto|cpu|cuda(:\d+)?)$")


class GenerationConfig(Frozen):
    """What is generated, beside the prompt and the seed. Empty: what the model's own pipeline would use."""

    height: int | None = setting(None, "height in pixels; empty: the model's own", ge=16, le=8192, step=16)
    width: int | None = setting(None, "width in pixels; empty: the model's own", ge=16, le=8192, step=16)
    frames: int | None = setting(None, "frames of a clip; empty: the model's own", ge=1, le=1025, step=4)
    guidance: float | None = setting(None, "guidance scale; empty: the model's own", ge=0, le=100, step=0.5)
    true_guidance: float | None = setting(None, "guidance by a negative prompt, of a model that has its own guidance distilled; empty: off",
                                          ge=0, le=100, step=0.5)
    guidance_2: float | None = setting(None, "guidance scale of the second transformer; empty: that of the first", ge=0, le=100, step=0.5)
    text_tokens: int | None = setting(None, "longest prompt in tokens; empty: the model's own", ge=1, le=4096, step=16)
    negative_prompt: str = setting("", "what to steer away from, where guidance is on", max_length=MAX_PROMPT_CHARACTERS)

    @property
    def words(self) -> str:
        """In one line."""
        asked = self.model_dump(exclude_defaults=True)
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asked.items()) or "the pipeline's own sizes"

    def over(self, other: GenerationConfig) -> GenerationConfig:
        """What is asked for here, and where nothing is, what `other` asks for."""
        return other.model_copy(update=self.model_dump(exclude_defaults=True))


PIPELINES_OWN = GenerationConfig()


class TraceConfig(Frozen):
    """What to record: prompts, one seed each (seed, seed + 1, ...), steps."""

    prompts: tuple[str, ...] = setting((), "calibration prompts; empty: the model's own set", max_length=256)
    steps: int = setting(20, "denoising steps", ge=1, le=100, step=1)
    seed: int = setting(0, "seed of the first prompt", ge=0, le=2**31 - 1, step=1)

    @field_validator("prompts")
    @classmethod
    def _prompts_are_texts(cls, prompts):
        for number, prompt in enumerate(prompts, 1):
            if not prompt.strip():
                raise ValueError(f"prompt {number} is empty; remove the line or write a caption")
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                raise ValueError(f"prompt {number} has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS:,} are allowed")
        return prompts


class SensitivityConfig(Frozen):
    """How Fisher information is estimated and turned into calibration weights."""

    estimator: str = setting("adjoint", "adjoint: effect on the final latent; local: on this step's output",
                             pattern="^(adjoint|local)$")
    probes: int = setting(2, "random probes per sample", ge=1, le=16, step=1)
    weighting: str = setting("softmax", "how Fisher becomes alpha", pattern="^(softmax|linear|sqrt|uniform)$")
    tau: float = setting(1.0, "softmax temperature on mean-normalised Fisher", gt=0, le=100, step=0.1)
    cap: float = setting(10.0, "largest allowed max/min of alpha over time", ge=1, le=1000, step=1)
    distortion: str = setting("directional", "form of the distortion table", pattern="^(directional|white)$")
    seed: int = setting(0, "seed of the probes", ge=0, le=2**31 - 1, step=1)


class QuantConfig(Frozen):
    """How weights are solved. Weight bits per layer come from the plan."""

    transform: str = setting("hadamard", "applied to a layer's input, inverted in its weight",
                             pattern="^(none|hadamard|smooth|smooth_hadamard)$")
    smoothing: str = setting("fixed", "smoothing vector: of one alpha, or searched by a layer's output error", pattern="^(fixed|search)$")
    smooth_alpha: float = setting(0.5, "how much of the outliers smoothing moves into the weight", ge=0, le=1, step=0.05)
    solver: str = setting("gptq", "gptq, nearest rounding, or nearest with searched scales (clip)", pattern="^(gptq|nearest|clip)$")
    hessian: str = setting("fisher", "calibration weighting of the Hessian (ssc: by Spearman correlation; none: no Hessian)",
                          pattern="^(fisher|ssc|uniform|none)$")
    weight_grid: str = setting("signed", "grid of the weights: symmetric, with scales of either sign too (signed), or with a zero point",
                               pattern="^(symmetric|signed|asymmetric)$")
    group_size: int | None = setting(64, "weights that share a scale; none: one scale per output channel")
    branch_bits: float = setting(0.0, "bits per weight for a low-rank branch in 16 bits; its rank follows", ge=0, le=4, step=0.05)
    act_scale: str = setting("token", "activations that share a scale: a token, a group of one token, or (static) the tensor",
                             pattern="^(token|group|tensor)$")
    act_grid: str = setting("mid_rise", "grid of the activations: 2^b levels around zero (mid_rise), 2^b - 1 with one at zero (symmetric; "
                                      "better without a rotation; 8 bits always), or 2^b with a zero point",
                          pattern="^(symmetric|mid_rise|asymmetric)$")
    act_clip: float = setting(1.0, "share of the activations' range that the grid covers", gt=0, le=1, step=0.05)
    damping: float = setting(0.2, "added to the Hessian's diagonal, as a fraction of its mean", gt=0, le=1, step=0.01)
    modulation_bits: int = setting(8, "weight bits of the adaLN linears where no search chooses them (their activations stay float)")
    modulation: str = setting("stored", "adaLN weights stored, or their outputs cached per prompt and step and the weights dropped",
                              pattern="^(stored|cached)$")
    seed: int = setting(0, "seed of the Hadamard signs", ge=0, le=2**31 - 1, step=1)

    @field_validator("group_size")
    @classmethod
    def _known_group(cls, group_size):
        if group_size is not None and group_size not in GROUP_SIZES:
            raise ValueError(f"group size {group_size} is not supported; use one of {GROUP_SIZES} or none")
        return group_size

    @field_validator("modulation_bits")
    @classmethod
    def _known_width(cls, bits):
        if bits not in WEIGHT_BITS:
            raise ValueError(f"{bits} bits are not supported; use one of {WEIGHT_BITS}")
        return bits


MOST_FINALISTS = 16


class SearchConfig(Frozen):
    """The beam search of AdaTSQ (arXiv 2602.09883) and the refinement of what it finds, section 4 of the design."""

    beam: int = setting(3, "surviving paths per step", ge=1, le=64, step=1)
    configs: int = setting(3, "configurations tried from each path (at least low, mid, high)", ge=3, le=16, step=1)
    samples: int = setting(4, "prompts that score a path", ge=1, le=64, step=1)
    scoring: str = setting("adjoint", "adjoint: predicted effect on the final latent; raw: deviation of this step (the paper)",
                           pattern="^(adjoint|raw)$")
    rollout: str = setting("quantized", "score along the quantized rollout, or additively at the float latents",
                           pattern="^(quantized|float)$")
    planning_table: str = setting("signed", "plan by signed: errors added up with their signs on fresh prompts; additive: the distortion "
                                  "table", pattern="^(signed|additive)$")
    refine: int = setting(12, "swaps of bits proposed and judged by measured error after the beam; 0: none", ge=0, le=200, step=1)
    rivals: str = setting("all", "allocations of other methods measured beside the search", pattern="^(all|uniform)$")
    modulation_widths: str = setting("searched", "weight bits of the adaLN linears: chosen like others, or fixed at their usual width",
                                     pattern="^(searched|fixed)$")
    finalists: int = setting(4, "plans judged by full generations on held-out prompts", ge=1, le=MOST_FINALISTS, step=1)
    seed: int = setting(0, "seed", ge=0, le=2**31 - 1, step=1)


class BenchConfig(Frozen):
    """What is timed: one image through all steps, and its layers."""

    rounds: int = setting(9, "turns over which medians are taken", ge=3, le=200, step=1)
    baselines: bool = setting(True, "time other libraries that are installed too")


class LatencyConfig(Frozen):
    """Where a plan is to run."""

    target: str = setting(LATENCY_TARGETS[0], f"measured here; measured elsewhere: {', '.join(MEASURED_TARGETS)}; or modelled from "
                        f"published peak rates: {', '.join(MODELLED_TARGETS)}")

    @field_validator("target")
    @classmethod
    def _known_target(cls, target):
        if target not in LATENCY_TARGETS:
            raise ValueError(f"unknown latency target {target!r}; use one of {', '.join(LATENCY_TARGETS)}")
        return target


class ContestConfig(Frozen):
    """What every method of a comparison may spend."""

    weight_bits: int = setting(4, f"width of every weight: {', '.join(map(str, WEIGHT_BITS))}")
    act_bits: float = setting(4.0, "mean activation bits a method may spend", ge=min(ACT_BITS), le=16)
    effective_bits: float | None = setting(None, "bits per weight, all storage counted, that searched plans may spend; "
                                                 "default: their own size at the width", gt=0, le=17)
    modulation: str = setting("stored", "adaLN weights stored, or their outputs cached per prompt and step (every method)",
                              pattern="^(stored|cached)$")

    @field_validator("weight_bits")
    @classmethod
    def _known_width(cls, bits):
        if bits not in WEIGHT_BITS:
            raise ValueError(f"not supported; use one of {WEIGHT_BITS}")
        return bits


class EvolutionConfig(Frozen):
    """The evolutionary search of group sizes (Q-DiT, arXiv 2406.17343)."""

    population: int = setting(12, "genomes in a generation", ge=2, le=200, step=1)
    generations: int = setting(5, "generations after the first", ge=0, le=100, step=1)
    samples: int = setting(2, "calibration prompts that judge a genome", ge=1, le=64, step=1)
    mutation: float = setting(0.1, "share of layers that a mutation changes", gt=0, le=1, step=0.05)
    seed: int = setting(0, "seed", ge=0, le=2**31 - 1, step=1)


class Budget(Frozen):
    """What a plan may spend. None means no limit; at least one limit must be set."""

    max_weight_bytes: int | None = Field(default=None, gt=0, description="resident bytes of the transformer")
    max_mean_act_bits: float | None = Field(default=None, ge=min(ACT_BITS), le=16, description="plain mean over steps and layers")
    max_latency_ms: float | None = Field(default=None, gt=0, description="transformer calls of one image, all steps")

    @model_validator(mode="after")
    def _one_is_set(self):
        if self.max_weight_bytes is None and self.max_mean_act_bits is None and self.max_latency_ms is None:
            raise ValueError("no limit is set; give a budget of memory, of latency, of mean activation bits, or several")
        return self
