"""What the tests of integrators share: schedulers to integrate, a small nonlinear model with guidance, and the scheduler's own loop."""

from dataclasses import dataclass, field
from functools import cache

import diffusers
import numpy as np
import torch

from workbench.models.integrator import Integrator

WIDTH = 12
# Of a scheduler that keeps float64, and of one that casts to float32: 6e-8 at each of 17 steps, there and back, twice that if small.
KEEPS, CASTS = 1e-11, 4e-6


@dataclass(frozen=True)
class Case:
    """A scheduler, how its steps are set, the pairs its state needs and the tolerance that its own arithmetic allows."""

    name: str
    config: dict
    order: int
    tolerance: float = KEEPS
    steps: int = 9
    settings: dict = field(default_factory=dict)
    tag: str = ""

    def __str__(self):
        return f"{self.name.removesuffix('Scheduler')}-{self.tag or self.order}"

    def scheduler(self):
        return getattr(diffusers, self.name)(**self.config)

    def ready(self):
        """The scheduler with its steps set as a diffusers pipeline sets them."""
        scheduler = self.scheduler()
        scheduler.set_timesteps(**({} if "sigmas" in self.settings else {"num_inference_steps": self.steps}), **self.settings)
        return scheduler

    def integrator(self):
        return made(str(self))


@cache
def made(name):
    """The integrator of a case: frozen, so one serves all tests."""
    case = BY_NAME[name]
    return Integrator.of(case.scheduler(), case.steps, **case.settings)


def euler(tag, settings=None, **config):
    return Case("FlowMatchEulerDiscreteScheduler", config, 1, CASTS, settings=settings or {}, tag=tag)


def unipc(tag, order, pairs, **config):
    return Case("UniPCMultistepScheduler", {"solver_order": order, **config}, pairs, tag=tag)


def dpm(tag, order, steps=9, **config):
    return Case("DPMSolverMultistepScheduler", {"solver_order": order, **config}, order, CASTS, steps=steps, tag=tag)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
OWN_SIGMAS = np.linspace(1.0, 1 / 9, 9)
CASES = [
    euler("plain"), euler("shift", shift=3.0), euler("karras", shift=3.0, use_karras_sigmas=True),
    euler("exponential", use_exponential_sigmas=True), euler("beta", use_beta_sigmas=True), euler("inverted", invert_sigmas=True),
    euler("own", {"sigmas": OWN_SIGMAS}, shift=2.0), euler("own-list", {"sigmas": OWN_SIGMAS.tolist()}),
    euler("dynamic", {"sigmas": OWN_SIGMAS, "mu": 0.8}, use_dynamic_shifting=True),
    euler("dynamic-default", {"mu": 0.8}, use_dynamic_shifting=True),
    euler("linear", {"mu": 1.7}, use_dynamic_shifting=True, time_shift_type="linear"),
    euler("terminal", {"mu": 0.8}, use_dynamic_shifting=True, shift_terminal=0.02),
    Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 2, CASTS),
    unipc("flow-2", 2, 3, **FLOW), unipc("flow-3", 3, 4, **FLOW), unipc("eps-2", 2, 3), unipc("eps-3", 3, 4),
    unipc("eps-bh1", 2, 3, solver_type="bh1", final_sigmas_type="sigma_min"), unipc("v", 2, 3, prediction_type="v_prediction"),
    unipc("noise-2", 2, 3, predict_x0=False, final_sigmas_type="sigma_min"),
    unipc("noise-3", 3, 4, predict_x0=False, final_sigmas_type="sigma_min"),
    unipc("noise-bh1", 3, 4, predict_x0=False, solver_type="bh1", final_sigmas_type="sigma_min"),
    Case("UniPCMultistepScheduler", {**FLOW, "use_dynamic_shifting": True}, 3, settings={"sigmas": OWN_SIGMAS, "mu": 0.8}, tag="flow-own"),
    dpm("flow-2", 2, **FLOW), dpm("flow-3", 3, **FLOW), dpm("eps-2", 2), dpm("eps-3", 3), dpm("sample", 2, prediction_type="sample"),
    dpm("heun", 2, solver_type="heun"), dpm("midpoint-3", 3, solver_type="midpoint", final_sigmas_type="sigma_min"),
    dpm("many", 3, steps=17, lower_order_final=False), dpm("euler-last", 2, euler_at_final=True, final_sigmas_type="sigma_min"),
    dpm("noise-3", 3, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), dpm("karras", 2, use_karras_sigmas=True),
    Case("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, 1),
    Case("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                           "timestep_spacing": "trailing"}, 1, tag="zero-snr"),
    Case("EulerDiscreteScheduler", {}, 1, CASTS), Case("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, 1, CASTS, tag="leading"),
    Case("LMSDiscreteScheduler", {}, 4), Case("KDPM2DiscreteScheduler", {}, 2), Case("EDMEulerScheduler", {}, 1, CASTS),
    Case("PNDMScheduler", {}, 18, tag="all"),  # Runge-Kutta starts again from older latents: no few pairs do
]
BY_NAME = {str(case): case for case in CASES}
assert len(BY_NAME) == len(CASES)


class Toy:
    """Guidance rescaled by the norm, as Qwen-Image's: nonlinear in both branches. Smooth, so that differences of it are exact to 1e-9."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.into, self.out = (torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator) / WIDTH**0.5 for _ in range(2))
        self.branches = torch.randn(2, WIDTH, dtype=torch.float64, generator=generator)

    def __call__(self, x, step):
        positive, negative = (torch.tanh(x @ self.into + branch + 0.1 * step) @ self.out for branch in self.branches)
        guided = negative + 3.0 * (positive - negative)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scheduler_loop(case, model, start):
    """The loop of a diffusers pipeline: latents before every step and after the last, and outputs, in their own graph."""
    scheduler = case.ready()
    latents, outputs = [start * getattr(scheduler, "init_noise_sigma", 1.0)], []
    for step, time in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(latents[-1], time) if hasattr(scheduler, "scale_model_input") else latents[-1]
        outputs.append(model(x, step))
        latents.append(scheduler.step(outputs[-1], time, latents[-1], return_dict=False)[0])
    return latents, outputs


def relative(found, wanted):
    """Relative difference; of nothing, the difference."""
    return float((found - wanted).norm() / (wanted.norm() or 1))
