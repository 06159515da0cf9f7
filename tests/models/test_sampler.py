"""Schedulers read, rebuilt and refused: what comes in is left alone, and what cannot be integrated is told so in one line."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from tests.models.samplers import BY_NAME, FLOW, OWN_SIGMAS, WIDTH, Toy, noise, relative, scheduler_loop
from workbench.models.integrator import Integrator
from workbench.models.sampler import Sampler, pair_form
from workbench.options import BadInput

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]  # diffusers' and numpy's
NO_CLIP = {"clip_sample": False}


class FlowMatchEulerDiscreteScheduler(diffusers.FlowMatchEulerDiscreteScheduler):
    """Somebody's own, under diffusers' name."""


class Scribbler(diffusers.FlowMatchEulerDiscreteScheduler):
    """Somebody's own."""


REFUSED = {
    "stochastic_sampling": ("draws noise", lambda: (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 9, {})),
    "ancestral": ("draws noise", lambda: (diffusers.EulerAncestralDiscreteScheduler(), 9, {})),
    "lcm": ("draws noise", lambda: (diffusers.LCMScheduler(), 9, {})),
    "flow lcm": ("draws noise", lambda: (diffusers.FlowMatchLCMScheduler(), 9, {})),
    "ddpm": ("draws noise", lambda: (diffusers.DDPMScheduler(**NO_CLIP), 9, {})),
    "sde": ("draws noise", lambda: (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 9, {})),
    "tcd": ("draws noise", lambda: (diffusers.TCDScheduler(), 9, {})),
    "sa": ("draws noise", lambda: (diffusers.SASolverScheduler(), 9, {})),
    "clipping": ("not linear .* clip_sample", lambda: (diffusers.DDIMScheduler(), 9, {})),
    "clipping far": ("not linear", lambda: (diffusers.DDIMScheduler(clip_sample_range=500.0), 9, {})),
    "thresholding": ("not linear .* thresholding", lambda: (diffusers.DPMSolverMultistepScheduler(thresholding=True), 9, {})),
    "thresholding far": ("not linear", lambda: (diffusers.UniPCMultistepScheduler(thresholding=True, sample_max_value=500.0), 9, {})),
    "wants more": ("cannot step .*timestep_back", lambda: (diffusers.CogVideoXDPMScheduler(), 9, {})),
    "wants a mask": ("cannot step .*mask", lambda: (diffusers.RePaintScheduler(), 9, {})),
    "zero snr": ("divides by zero at step 1 of 9", lambda: (
        diffusers.DDIMScheduler(**NO_CLIP, rescale_betas_zero_snr=True, timestep_spacing="trailing"), 9, {})),
    "bh1": ("divides by zero at step 9 of 9", lambda: (diffusers.UniPCMultistepScheduler(solver_type="bh1", **FLOW), 9, {})),
    "inverse": ("rises", lambda: (diffusers.DDIMInverseScheduler(**NO_CLIP), 9, {})),
    "no sigmas": ("no sigmas and no alphas_cumprod", lambda: (diffusers.IPNDMScheduler(), 9, {})),
    "no steps": ("cannot take 0 steps; give a whole number from 1 to 1000", lambda: (diffusers.DDIMScheduler(**NO_CLIP), 0, {})),
    "negative": ("cannot take -1 steps", lambda: (diffusers.DDIMScheduler(**NO_CLIP), -1, {})),
    "too many": ("cannot take 51 steps; .* to 50", lambda: (diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=50), 51, {})),
    "half a step": ("cannot take 2.5 steps", lambda: (diffusers.FlowMatchEulerDiscreteScheduler(), 2.5, {})),
    "no mu": ("`mu` must be passed", lambda: (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 9, {})),
    "sigmas of another": ("takes no sigmas; its steps are set by num_inference_steps",
                          lambda: (diffusers.DDIMScheduler(**NO_CLIP), 9, {"sigmas": OWN_SIGMAS})),
    "misspelt": ("takes no sigma;", lambda: (diffusers.FlowMatchEulerDiscreteScheduler(), 9, {"sigma": OWN_SIGMAS})),
    "both": ("give one of them", lambda: (diffusers.FlowMatchEulerDiscreteScheduler(), 9, {"sigmas": OWN_SIGMAS, "timesteps": [1] * 9})),
    "other number": ("makes 9 steps of these 9 sigmas; give the sigmas of 8 steps",
                     lambda: (diffusers.FlowMatchEulerDiscreteScheduler(), 8, {"sigmas": OWN_SIGMAS})),
    "rising sigmas": ("rises", lambda: (diffusers.FlowMatchEulerDiscreteScheduler(), 9, {"sigmas": OWN_SIGMAS[::-1]})),
    "nan sigmas": ("divides by zero", lambda: (diffusers.FlowMatchEulerDiscreteScheduler(), 9, {"sigmas": OWN_SIGMAS * np.nan})),
    "an object": ("cannot be written down: it holds a object", lambda: (diffusers.FlowMatchEulerDiscreteScheduler(), 9, {"mu": object()})),
    "a part": ("cannot be written down: it holds a DDIMScheduler",
               lambda: (diffusers.UniPCMultistepScheduler(solver_p=diffusers.DDIMScheduler()), 9, {})),
    "same name": ("another class than diffusers' own", lambda: (FlowMatchEulerDiscreteScheduler(), 9, {})),
    "own class": ("'Scribbler' is no scheduler of diffusers", lambda: (Scribbler(), 9, {})),
    "no scheduler": ("'object' is no scheduler", lambda: (object(), 9, {})),
    "nothing": ("'NoneType' is no scheduler", lambda: (None, 9, {})),
    "a module": ("'Linear' is no scheduler", lambda: (torch.nn.Linear(2, 2), 9, {})),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_integrated_is_refused_in_one_line_that_names_it(why):
    says, make = REFUSED[why]
    scheduler, steps, arguments = make()
    before = torch.get_rng_state()
    with pytest.raises(BadInput, match=says) as refused:
        Integrator.of(scheduler, steps, **arguments)
    assert type(scheduler).__name__ in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert torch.equal(torch.get_rng_state(), before)


def state_of(scheduler):
    """Everything a scheduler holds, as text."""
    return {key: str(value.tolist() if isinstance(value, torch.Tensor) else value) for key, value in vars(scheduler).items()}


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete-dynamic", "UniPCMultistep-flow-3", "DPMSolverMultistep-eps-3",
                                  "FlowMatchHeunDiscrete-2", "EulerDiscrete-1"])
def test_a_scheduler_in_use_is_only_read_and_its_integrators_do_not_meet(name):
    case = BY_NAME[name]
    scheduler = case.ready()
    latents, outputs = scheduler_loop(case, Toy(), noise(2, WIDTH))
    for step in range(4):
        scheduler.scale_model_input(latents[step], scheduler.timesteps[step]) if hasattr(scheduler, "scale_model_input") else None
        scheduler.step(outputs[step], scheduler.timesteps[step], latents[step])
    before = state_of(scheduler)
    one, other = Integrator.of(scheduler, case.steps, **case.settings), Integrator.of(scheduler, 5, **{
        key: value for key, value in case.settings.items() if key != "sigmas"})
    steppers = [one.exact(), other.exact(), one.exact()]
    for step, (output, latent, wanted) in enumerate(zip(outputs, latents, latents[1:])):
        assert torch.equal(steppers[0].step(output, latent), wanted) and torch.equal(steppers[2].step(output, latent), wanted)
        if step < other.steps:
            steppers[1].step(output, latent)
    assert torch.equal(one.coef_TU, case.integrator().coef_TU) and state_of(scheduler) == before


def test_the_global_random_numbers_are_left_alone():
    torch.manual_seed(3)
    wanted = torch.randn(4)
    torch.manual_seed(3)
    BY_NAME["UniPCMultistep-flow-2"].integrator()
    assert torch.equal(torch.randn(4), wanted)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
@pytest.mark.parametrize("name", ["DPMSolverMultistep-eps-2", "DDIM-1"])
def test_a_learned_variance_is_taken_as_split_off(name, kind):
    case = BY_NAME[name]
    scheduler = case.scheduler()
    scheduler.register_to_config(variance_type=kind)
    integrator = Integrator.of(scheduler, case.steps)
    assert torch.equal(integrator.coef_TU, case.integrator().coef_TU) and scheduler.config.variance_type == kind
    x, output = noise(2, 8, 3, 5), noise(2, 8, 3, 5, seed=1)
    assert relative(integrator.exact().step(output, x), integrator.advance(integrator.start(x), output, 0).latent) < case.tolerance


def test_a_shift_that_was_set_later_counts():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(5.0)
    integrator = Integrator.of(scheduler, 9)
    scheduler.set_timesteps(9)
    assert torch.equal(integrator.sigma_T1, scheduler.sigmas) and torch.equal(integrator.exact().scheduler.sigmas, scheduler.sigmas)
    assert not torch.equal(integrator.sigma_T1, Integrator.of(diffusers.FlowMatchEulerDiscreteScheduler(), 9).sigma_T1)


def test_settings_that_a_pipeline_registered_count():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002)  # as Cosmos does
    integrator = Integrator.of(scheduler, 9)
    scheduler.set_timesteps(9)
    assert float(integrator.sigma_T1[0]) == 80 and torch.equal(integrator.sigma_T1, scheduler.sigmas)


def test_two_steps_of_one_integer_time_are_both_taken():
    crowded = {**FLOW, "flow_shift": 100.0}
    scheduler = diffusers.UniPCMultistepScheduler(**crowded)
    scheduler.set_timesteps(40)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]  # diffusers alone would begin at the second and run out of sigmas
    integrator = Integrator.of(diffusers.UniPCMultistepScheduler(**crowded), 40)
    assert integrator.steps == 40 and integrator.exact().scheduler.begin_index == 0


def test_own_timesteps_are_taken():
    own = [900, 700, 400, 100]
    integrator = Integrator.of(diffusers.DPMSolverMultistepScheduler(), 4, timesteps=own)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(timesteps=own)
    assert integrator.time_T.tolist() == own and torch.equal(integrator.sigma_T1, scheduler.sigmas)
    assert torch.equal(Integrator.of(diffusers.DPMSolverMultistepScheduler(), 4, timesteps=None).coef_TU,
                       Integrator.of(diffusers.DPMSolverMultistepScheduler(), 4).coef_TU)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete-plain", "UniPCMultistep-eps-2", "FlowMatchHeunDiscrete-2",
                                  "DPMSolverMultistep-eps-2"])
def test_one_step_and_many(name):
    one, many = (Integrator.of(BY_NAME[name].scheduler(), steps) for steps in (1, 250))
    assert one.steps == 1 and one.order == 1 and one.sigma_T1.shape == (2,)
    assert many.order == BY_NAME[name].order


@pytest.mark.parametrize("part", [
    {"class_name": "os"}, {"class_name": "utils.logging"}, {"class_name": "DiffusionPipeline"}, {"class_name": "__builtins__"},
    {"config": "{"}, {"config": "[]"}, {"config": '{"shift": "x"}'}, {"settings": "{}"},
    {"settings": '{"steps": 9, "arguments": {"mu": {}}, "shift": null}'},
], ids=str)
def test_a_description_from_a_file_makes_a_scheduler_or_one_line(part):
    sampler = replace(BY_NAME["FlowMatchEulerDiscrete-shift"].integrator().sampler, **part)
    with pytest.raises(BadInput) as refused:
        sampler.build()
    assert "\n" not in str(refused.value) and sampler.class_name in str(refused.value)
    assert ("is no scheduler of diffusers" in str(refused.value)) == ("class_name" in part)  # nothing else was called


def test_a_description_is_readable_text():
    sampler = Sampler.of(diffusers.UniPCMultistepScheduler(**FLOW), 9, {"sigmas": OWN_SIGMAS.astype(np.float32), "mu": np.float64(0.5)})
    config, settings = json.loads(sampler.config), json.loads(sampler.settings)
    assert config["flow_shift"] == 3.0 and not any(key.startswith("_") for key in config)
    assert settings["arguments"]["mu"] == 0.5 and settings["arguments"]["sigmas"]["dtype"] == "float32"


def test_the_fewest_pairs_are_found_for_rows_that_need_them():
    a_TJ = torch.tensor([[1.0, 0, 0], [0.7, 0.2, 0], [0.5, 0.1, 0.3], [0.9, -0.4, 0.2], [0.4, 0.4, 0.1]], dtype=torch.float64)
    b_TJ = torch.tensor([[0.5, 0, 0], [0.4, 0.3, 0], [0.2, -0.1, 0.3], [0.6, 0.1, -0.2], [0.3, 0.2, 0.1]], dtype=torch.float64)
    for pairs in (1, 2, 3):
        rows = [torch.eye(6, dtype=torch.float64)[0]]
        for step in range(5):
            row = torch.zeros(6, dtype=torch.float64)
            for age in range(min(pairs, step + 1)):
                row += a_TJ[step, age] * rows[step - age]
                row[1 + step - age] += b_TJ[step, age]
            rows.append(row)
        latent_TJ, output_TJ = pair_form(torch.stack(rows), 1e-16)
        assert latent_TJ.shape == output_TJ.shape == (5, pairs)
        if pairs == 1:
            torch.testing.assert_close(latent_TJ, a_TJ[:, :1], rtol=1e-14, atol=0)
            assert torch.equal(output_TJ, b_TJ[:, :1])
