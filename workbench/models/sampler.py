"""A diffusers scheduler as plain data, and everything that one run of it on basis vectors tells.

A deterministic sampler is linear in the noise and in the model's outputs, whatever its order. So it is fed unit vectors, one for
the noise and one for each output, and its latents are then its coefficients. What has none is refused: it draws noise, clips, or
divides by zero. Letters: T calls of the model, 0 = noisiest · U = 1 + T, the noise and then each output · J a pair's age, 0 = the
newest · W independent columns. Coefficients are float64 on the CPU.
"""

from __future__ import annotations

import inspect
import json
import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.options import BadInput

DETERMINISTIC = "FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler or DPMSolverMultistepScheduler"
LEARNED_VARIANCE = ("learned", "learned_range")
TRAIN_TIMESTEPS = 1000  # of a scheduler whose configuration names none
PROBE_SCALE = 1e3  # of the random inputs: far beyond every range that a scheduler clips to
LINEAR_TOLERANCE = 1e-5  # clipping shows as 1e-2 and more; casts to float32 as 1e-7, and 2e-6 after 1000 steps
MIN_TOLERANCE = 1e-11  # of a pair form, where the scheduler keeps float64
MAX_PAIRS = 6
MIN_ALPHA_CUMPROD = 2**-24  # diffusers' own bound, for schedules that end in pure noise


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A scheduler of diffusers and how its steps were set, as text that a file can hold; `build` makes the real one again."""

    class_name: str
    config: str  # JSON
    settings: str  # JSON: steps, arguments of set_timesteps, shift where `set_shift` changed it

    @classmethod
    def of(cls, scheduler, steps: int, arguments: dict) -> Sampler:
        """Describes `scheduler`, which is only read. Raises BadInput if it is none of diffusers' or holds what JSON cannot, and for less
        than one step or more than it was trained with."""
        name = type(scheduler).__name__
        if _scheduler_class(name) is not type(scheduler):
            raise BadInput(f"{name} is another class than diffusers' own of that name; use one of diffusers' schedulers")
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        count, most = _whole(steps), config.get("num_train_timesteps") or TRAIN_TIMESTEPS
        if not 1 <= count <= most:
            raise BadInput(f"{name} cannot take {steps} steps; give a whole number from 1 to {most}")
        if config.get("variance_type") in LEARNED_VARIANCE:
            config["variance_type"] = "fixed_small"  # the learned variance is split off the output before a sampler sees it
        settings = {"steps": count, "arguments": {key: _argument(value) for key, value in arguments.items()},
                    "shift": scheduler.shift if hasattr(type(scheduler), "set_shift") else None}
        try:
            return cls(class_name=name, config=json.dumps(config, default=_plain, sort_keys=True),
                       settings=json.dumps(settings, default=_plain, sort_keys=True))
        except TypeError as error:
            raise BadInput(f"{name} cannot be written down: {error}; give numbers, texts and lists of them") from None

    def build(self):
        """The real scheduler with its steps set, new and at its first step. Raises BadInput where diffusers refuses."""
        scheduler_class = _scheduler_class(self.class_name)
        try:
            config, settings = json.loads(self.config), json.loads(self.settings)
            named = inspect.signature(scheduler_class.__init__).parameters
            scheduler = scheduler_class(**{key: value for key, value in config.items() if key in named})
            # Pipelines register settings that __init__ does not know (Cosmos: sigma_min and sigma_max).
            scheduler.register_to_config(**{key: value for key, value in config.items() if key not in named})
            if settings["shift"] is not None and settings["shift"] != scheduler.shift:
                scheduler.set_shift(settings["shift"])
            _set_timesteps(scheduler, settings["steps"], settings["arguments"])
        except BadInput:
            raise
        except Exception as error:  # whatever a scheduler raises at settings that it does not take
            raise BadInput(f"{self.class_name} does not take these settings: {_line(error)}") from error
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # two steps may have one integer time: the first call is of the first
        return scheduler


def _whole(number) -> int:
    """A whole number as an int; anything else is 0."""
    try:
        return operator.index(number)
    except TypeError:
        return 0


def _scheduler_class(name: str) -> type:
    """diffusers' scheduler class of that name. Names come from files too: nothing else is looked up, nothing else is called."""
    import diffusers  # here and not above: it takes seconds

    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise BadInput(f"{name[:80]!r} is no scheduler of diffusers; use one of its classes, such as {DETERMINISTIC}")
    return found


def _argument(value):
    """An argument of set_timesteps for JSON. Arrays keep their type: UniPC computes in it."""
    array = np.asarray(value)
    return {"values": array.tolist(), "dtype": array.dtype.name} if array.ndim else value


def _plain(value):
    """Arrays, tensors and numpy's numbers for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _set_timesteps(scheduler, steps: int, arguments: dict) -> None:
    """As diffusers' pipelines do (`retrieve_timesteps`): with sigmas or timesteps of one's own, the number of steps is not given."""
    name, accepted = type(scheduler).__name__, inspect.signature(scheduler.set_timesteps).parameters
    unknown = sorted(set(arguments) - set(accepted))
    if unknown:
        raise BadInput(f"{name} takes no {', '.join(unknown)}; its steps are set by {', '.join(accepted)}")
    own = [key for key in ("timesteps", "sigmas") if key in arguments]
    if len(own) == 2:
        raise BadInput(f"{name} was given timesteps and sigmas; give one of them")
    # Lists become arrays, because UniPC multiplies what it is given.
    given = {key: np.array(value["values"], value["dtype"]) if isinstance(value, dict) else value for key, value in arguments.items()}
    if not own:
        scheduler.set_timesteps(steps, **given)
        return
    scheduler.set_timesteps(**given)
    made = getattr(scheduler, "num_inference_steps", None) or len(scheduler.timesteps)
    if made != steps:
        raise BadInput(f"{name} makes {made} steps of these {len(given[own[0]])} {own[0]}; give the {own[0]} of {steps} steps")


def run(scheduler, noise_W: Tensor, output_TW: Tensor) -> tuple[Tensor, Tensor]:
    """The real steps, once through. Returns latents (T+1, W) and what the model was given of them (T, W), in float64."""
    image = (1, 1, 1, len(noise_W))  # what every scheduler knows
    latent, latents, inputs = noise_W.reshape(image), [noise_W], []
    for time, output_W in zip(scheduler.timesteps, output_TW, strict=True):
        scaled = scheduler.scale_model_input(latent, time) if hasattr(scheduler, "scale_model_input") else latent
        latent = scheduler.step(output_W.reshape(image), time, latent, return_dict=False)[0].double()
        inputs.append(scaled.flatten().double())
        latents.append(latent.flatten())
    return torch.stack(latents), torch.stack(inputs)


def coefficients(sampler: Sampler) -> tuple[Tensor, Tensor, float]:
    """What `sampler` does to the noise and to each output, from three runs of the real scheduler.

    Returns coef_TU (T+1, 1+T), row t: x_t; input_scale_T (T,), what the model's input is multiplied by; and the relative difference
    that the scheduler's rounding makes. Raises BadInput for a scheduler that is stochastic, not linear, not finite, or that needs more
    than (output, time, latent). The global random numbers are left as they were."""
    name, scheduler = sampler.class_name, sampler.build()
    calls = len(scheduler.timesteps)
    basis_UU = torch.eye(calls + 1, dtype=torch.float64)
    basis_UU[0] *= float(getattr(scheduler, "init_noise_sigma", 1.0))  # diffusers' pipelines begin with noise times this
    probe_UW = PROBE_SCALE * torch.randn(calls + 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start_W = basis_UU[0, 0] * probe_UW[0]
    try:
        with torch.random.fork_rng(devices=[]):
            coef_TU, input_TU = run(scheduler, basis_UU[0], basis_UU[1:])
            again_TU, _ = run(sampler.build(), basis_UU[0], basis_UU[1:])
            latent_TW, input_TW = run(sampler.build(), start_W, probe_UW[1:])
    except Exception as error:  # whatever a scheduler raises that wants more than we have
        raise BadInput(f"{name} cannot step with an output, a time and a latent alone ({_line(error)}); use {DETERMINISTIC}") from error
    finite_T = torch.isfinite(coef_TU[1:]).all(1) & torch.isfinite(input_TU).all(1)
    if not bool(finite_T.all()):
        raise BadInput(f"{name} divides by zero at step {int(finite_T.int().argmin()) + 1} of {calls} with these settings; change its "
                       "final_sigmas_type, solver_type, prediction_type or the number of steps")
    if not torch.equal(coef_TU, again_TU):
        raise BadInput(f"{name} draws noise at its steps; use a deterministic sampler ({DETERMINISTIC}), and no stochastic setting of it")
    input_scale_T = (input_TU * coef_TU[:-1]).sum(1) / coef_TU[:-1].square().sum(1)
    size_TW = coef_TU.abs() @ probe_UW.abs()
    rounding = _relative(latent_TW - coef_TU @ probe_UW, size_TW)
    scaling = _relative(input_TW - input_scale_T[:, None] * latent_TW[:-1], latent_TW[:-1])
    if not (rounding <= LINEAR_TOLERANCE and scaling <= LINEAR_TOLERANCE):
        raise BadInput(f"{name} is not linear in its latents and the model's outputs (off by {max(rounding, scaling):.0e}); turn its "
                       "clip_sample and thresholding off")
    return coef_TU, input_scale_T, rounding


def _relative(difference_TW: Tensor, size_TW: Tensor) -> float:
    """Largest relative difference of a row."""
    return float((difference_TW.norm(dim=1) / size_TW.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)).max())


def noise_levels(scheduler, input_scale_T: Tensor) -> Tensor:
    """sigma_T1 (T+1,) float32, not rising and 0 at the end: a call's noise level, 1 to 0 in flow matching, otherwise noise over signal.

    The end is 0 by definition, also where `final_sigmas_type` leaves some noise. Raises BadInput if the scheduler knows no noise levels, or
    if they rise (an inverting scheduler)."""
    name, sigmas, alphas_cumprod = type(scheduler).__name__, getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None and len(sigmas) == len(input_scale_T) + 1:
        sigma_T = torch.as_tensor(sigmas)[:-1].double()
        if scheduler.config.get("invert_sigmas"):
            sigma_T = 1 - sigma_T  # Mochi counts from 0 (noise) to 1 (clean)
    elif bool((input_scale_T != 1).any()):
        sigma_T = (input_scale_T**-2 - 1).sqrt()  # KDPM2 calls the model between its sigmas; the scale is 1 / sqrt(sigma^2 + 1)
    elif alphas_cumprod is not None:
        alpha_T = alphas_cumprod[scheduler.timesteps.long()].double().clamp(min=MIN_ALPHA_CUMPROD)
        sigma_T = ((1 - alpha_T) / alpha_T).sqrt()
    else:
        raise BadInput(f"{name} has no sigmas and no alphas_cumprod, which plans are keyed by; use {DETERMINISTIC}")
    sigma_T1 = torch.cat([sigma_T, torch.zeros(1, dtype=torch.float64)]).float().cpu()
    if not bool((sigma_T1[1:] <= sigma_T1[:-1]).all()):
        raise BadInput(f"the noise of {name} rises from step to step; use a sampler that denoises ({DETERMINISTIC})")
    return sigma_T1


def clean_coefficients(scheduler, sigma_T1: Tensor, input_scale_T: Tensor) -> Tensor:
    """clean_T2 (T, 2): x_0 = clean[t, 0] x_t + clean[t, 1] output_t by the scheduler's prediction type; NaN where it is not known."""
    sigma_T = sigma_T1[:-1].double()
    one_T, zero_T = torch.ones_like(sigma_T), torch.zeros_like(sigma_T)
    if hasattr(scheduler, "precondition_outputs"):  # EDM: the output is a residual of the clean latent
        return torch.stack([scheduler.precondition_outputs(*pair, sigma_T) for pair in ((one_T, zero_T), (zero_T, one_T))], 1)
    flow = "flow" in type(scheduler).__name__.lower()
    prediction = scheduler.config.get("prediction_type", "flow_prediction" if flow else None)
    if prediction == "flow_prediction":
        # Where sigmas are inverted the velocity points at the clean latent.
        return torch.stack([one_T, sigma_T if scheduler.config.get("invert_sigmas") else -sigma_T], 1)
    alpha_T = 1 - sigma_T if scheduler.config.get("use_flow_sigmas") else (sigma_T.square() + 1).rsqrt()
    noise_T = sigma_T if scheduler.config.get("use_flow_sigmas") else sigma_T * alpha_T
    known = {"epsilon": (one_T / alpha_T, -noise_T / alpha_T), "v_prediction": (alpha_T, -noise_T), "sample": (zero_T, one_T)}
    latent_T, output_T = known.get(prediction, (torch.full_like(one_T, torch.nan),) * 2)
    return torch.stack([latent_T * input_scale_T, output_T], 1)  # x_t times its scale has variance 1 in all of these


def pair_form(coef_TU: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """x_{t+1} = sum_{j<p} latent[t, j] x_{t-j} + output[t, j] output_{t-j}: (T, p) each, with the smallest p <= 6 that reproduces coef_TU.

    A form is accepted when following it from the noise reproduces every row to ten times the scheduler's own `rounding`, 1e-11 at
    least. If there is none, p = T and every latent is written by the noise and all outputs."""
    calls = len(coef_TU) - 1
    for pairs in range(1, min(MAX_PAIRS, calls) + 1):
        found = _fit_pairs(coef_TU, pairs, max(MIN_TOLERANCE, 10 * rounding))
        if found is not None:
            return found
    latent_TJ, output_TJ = torch.zeros(2, calls, calls, dtype=torch.float64)
    for step in range(calls):
        latent_TJ[step, step] = coef_TU[step + 1, 0] / coef_TU[0, 0]
        output_TJ[step, :step + 1] = coef_TU[step + 1, 1:step + 2].flip(0)
    return latent_TJ, output_TJ


def _fit_pairs(coef_TU: Tensor, pairs: int, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Least squares of least norm, a row at a time; None as soon as following the form leaves `coef_TU`."""
    latent_TJ, output_TJ = torch.zeros(2, len(coef_TU) - 1, pairs, dtype=torch.float64)
    followed_TU = coef_TU.clone()
    for step in range(len(coef_TU) - 1):
        ages = range(min(pairs, step + 1))
        target_U, latent_JU = coef_TU[step + 1, :step + 1], coef_TU[[step - age for age in ages], :step + 1]
        size_J = latent_JU.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        if len(ages) == 1:  # exactly 1 where the row repeats, so that Euler's arithmetic is Euler's to the bit
            latent_TJ[step, 0] = (latent_JU[0] @ target_U) / latent_JU[0].square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        else:
            older_JU = torch.zeros(len(ages) - 1, step + 1, dtype=torch.float64)
            older_JU[range(len(ages) - 1), [step - age for age in ages[:-1]]] = 1
            rows = torch.cat([latent_JU / size_J[:, None], older_JU])
            solved = torch.linalg.lstsq(rows.T, target_U[:, None], rcond=tolerance, driver="gelsd").solution[:, 0]
            latent_TJ[step, :len(ages)] = solved[:len(ages)] / size_J
            output_TJ[step, 1:len(ages)] = solved[len(ages):]
        output_TJ[step, 0] = coef_TU[step + 1, step + 1]  # no other row of this pair reaches the newest output
        followed_U = torch.zeros_like(followed_TU[0])
        for age in ages:
            followed_U += latent_TJ[step, age] * followed_TU[step - age]
            followed_U[step + 1 - age] += output_TJ[step, age]
        followed_TU[step + 1] = followed_U
        if not _relative((followed_U - coef_TU[step + 1])[None], coef_TU[step + 1][None]) <= tolerance:
            return None
    return latent_TJ, output_TJ
