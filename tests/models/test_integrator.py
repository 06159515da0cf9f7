"""Integrator and Adjoint against diffusers' own loop: every latent, every gradient through it, and every bit where bits are promised."""

import weakref

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from tests.models.samplers import BY_NAME, CASES, FLOW, OWN_SIGMAS, WIDTH, Toy, noise, relative, scheduler_loop
from workbench.models.integrator import Adjoint, Integrator, State, deviation
from workbench.options import BadInput
from workbench.runs import Run, freeze, thaw

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]  # diffusers' and numpy's
EULER = BY_NAME["FlowMatchEulerDiscrete-shift"]
ALL = pytest.mark.parametrize("case", CASES, ids=str)
# One of every order and kind: pairs 1 to 4, calls that share a time, a scaled model input, all outputs at once.
KINDS = [BY_NAME[name] for name in (
    "FlowMatchEulerDiscrete-shift", "DPMSolverMultistep-eps-2", "FlowMatchHeunDiscrete-2", "UniPCMultistep-flow-2",
    "DPMSolverMultistep-flow-3", "UniPCMultistep-flow-3", "LMSDiscrete-4", "PNDM-all")]


def asked(integrator, model):
    """`model` as a denoiser asks it: of the scaled latent."""
    return lambda x, step: model(integrator.input_scale_T[step] * x, step)


def rollout(integrator, model, state, first=0):
    """States after each step from `first` on, by pairs."""
    states = []
    for step in range(first, integrator.steps):
        state = integrator.advance(state, model(state.latent, step), step)
        states.append(state)
    return states


def walk(integrator, model, latents, r):
    """The adjoint along `latents`, for r (R, S, D): mu by step, and the co-states of every step from -1 on."""
    adjoint, mu = Adjoint(integrator, r), {}
    costates = {integrator.steps - 1: adjoint.costates(integrator.steps - 1)}
    for step in reversed(range(integrator.steps)):
        mu[step] = adjoint.seed(step)
        x = latents[step].clone().requires_grad_()
        output = model(x, step)
        adjoint.add(step, torch.stack([torch.autograd.grad(output, x, one, retain_graph=True)[0] for one in mu[step]]))
        costates[step - 1] = adjoint.costates(step - 1)
        assert all(torch.equal(now, before) for now, before in zip(adjoint.costates(step), costates[step], strict=True))
    return mu, costates


@ALL
def test_latents_from_all_outputs_and_from_pairs_are_the_schedulers(case):
    integrator, start, model = case.integrator(), noise(2, WIDTH), Toy()
    latents, outputs = scheduler_loop(case, model, start)
    states = rollout(integrator, asked(integrator, model), integrator.start(start))
    assert integrator.order == case.order and integrator.steps == len(outputs)
    assert torch.equal(integrator.time_T, case.ready().timesteps) and integrator.time_T.dtype == case.ready().timesteps.dtype
    for step, latent in enumerate(latents):
        assert relative(integrator.latent(step, start, outputs), latent) < case.tolerance
    for state, latent in zip(states, latents[1:], strict=True):
        assert relative(state.latent, latent) < case.tolerance


@ALL
def test_gradients_are_those_of_autograd_through_the_schedulers_own_steps(case):
    integrator, start, model = case.integrator(), noise(2, WIDTH).requires_grad_(), Toy()
    latents, outputs = scheduler_loop(case, model, start)
    r_RSD = noise(2, 2, WIDTH, seed=1)
    mu, costates = walk(integrator, asked(integrator, model), [x.detach() for x in latents], r_RSD)
    for probe, r_SD in enumerate(r_RSD):
        *wanted, wanted_start = torch.autograd.grad(latents[-1], [*outputs, start], r_SD, retain_graph=True)
        for step, gradient in enumerate(wanted):
            assert relative(mu[step][probe], gradient) < case.tolerance
        assert relative(costates[-1][0][probe] * integrator.coef_TU[0, 0], wanted_start) < case.tolerance


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_costates_say_what_a_change_of_each_part_of_the_state_does_to_the_end(case):
    integrator = case.integrator()
    model, parts = asked(integrator, Toy()), 2 * integrator.order - 1
    start = noise(1, WIDTH).expand(parts, WIDTH)  # one sample for each part that is changed
    first = integrator.start(start)
    states = [first, *rollout(integrator, model, first)]
    r_RSD = noise(2, 1, WIDTH, seed=1).expand(2, parts, WIDTH)
    _, costates = walk(integrator, model, [state.latent for state in states], r_RSD)
    for step in range(-1, integrator.steps - 1):
        state = states[step + 1]
        own = [*state.latents, *state.outputs]
        assert (len(state.latents), len(state.outputs)) == (min(step + 2, case.order), min(step + 1, case.order - 1))
        changes = [torch.zeros_like(part) for part in own]
        for number, change in enumerate(changes):
            change[number] = 1e-5 * noise(WIDTH, seed=number)
        ends, predicted_RS = [], 0
        for sign in (1, -1):
            moved = [part + sign * change for part, change in zip(own, changes)]
            moved = State(tuple(moved[:len(state.latents)]), tuple(moved[len(state.latents):]))
            ends.append(rollout(integrator, model, moved, step + 1)[-1].latent)
            predicted_RS = predicted_RS + sign * deviation(costates[step], moved, state)
        measured_RS = (r_RSD * (ends[0] - ends[1])).sum(-1)
        # The model's third derivatives leave 1e-9 of the change; the rounding of some hundred terms, 1e-14 of the latent.
        size_S = torch.stack([costate[0, k].norm() * change[k].norm() for k, (costate, change) in enumerate(zip(costates[step], changes))])
        assert ((predicted_RS - measured_RS).abs()[:, :len(own)] < 1e-6 * size_S + 3e-14 * ends[0].norm()).all()
        assert measured_RS.abs().max() > 1e-8  # of changes of 1e-5


def test_deviation_of_a_state_from_itself_is_nothing_and_states_of_other_orders_are_refused():
    costates = (noise(3, 2, 4, 5), noise(3, 2, 4, 5, seed=1), noise(3, 2, 4, 5, seed=2))
    state = State((noise(2, 4, 5), noise(2, 4, 5, seed=1)), (noise(2, 4, 5, seed=2),))
    moved = State(state.latents, (state.outputs[0] + 1,))
    assert torch.equal(deviation(costates, state, state), torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(deviation(costates, moved, state), costates[2].sum((2, 3)))
    with pytest.raises(ValueError):
        deviation(costates, State(state.latents), state)


def test_euler_in_float32_is_its_formula_to_the_bit_and_so_is_its_adjoint():
    integrator = EULER.integrator()
    sigma_T1 = EULER.ready().sigmas
    assert torch.equal(integrator.sigma_T1, sigma_T1) and (integrator.latent_coef_TJ == 1).all()
    start = noise(3, 7, 5, dtype=torch.float32)
    state, latent = integrator.start(start), start
    r_RSMD = noise(2, 3, 7, 5, seed=1, dtype=torch.float32)
    adjoint, lambda_RSMD = Adjoint(integrator, r_RSMD), r_RSMD
    for step in range(integrator.steps):
        velocity = noise(3, 7, 5, seed=step, dtype=torch.float32)
        state = integrator.advance(state, velocity, step)
        latent = latent + (sigma_T1[step + 1] - sigma_T1[step]) * velocity
        assert state.latent.dtype == torch.float32 and torch.equal(state.latent, latent)
    for step in reversed(range(integrator.steps)):
        assert len(adjoint.costates(step)) == 1 and torch.equal(adjoint.costates(step)[0], lambda_RSMD)
        assert torch.equal(adjoint.seed(step), (sigma_T1[step + 1] - sigma_T1[step]) * lambda_RSMD)
        nu = noise(2, 3, 7, 5, seed=step, dtype=torch.float32)
        lambda_RSMD = lambda_RSMD + nu
        adjoint.add(step, nu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 4, 2, 3, 5)], ids=["images", "video"])
@ALL
def test_exact_is_the_scheduler_to_the_bit(case, shape, dtype):
    start = noise(*shape, dtype=torch.float64).to(dtype)

    def model(x, step):
        return torch.tanh(x + 0.1 * step).flip(-1).to(dtype)

    latents, outputs = scheduler_loop(case, model, start)
    stepper, latent = case.integrator().exact(), latents[0]
    for step, wanted in enumerate(latents[1:]):
        assert torch.equal(model(stepper.model_input(latent), step), outputs[step])
        latent = stepper.step(outputs[step], latent)
        assert latent.dtype == wanted.dtype and torch.equal(latent, wanted)
    with pytest.raises(ValueError, match="steps are done"):
        stepper.step(outputs[-1], latent)


def test_a_scheduler_that_wants_to_be_asked_for_the_models_input_is_asked():
    stepper = BY_NAME["EulerDiscrete-1"].integrator().exact()  # it logs a warning at every step otherwise
    assert not stepper.scheduler.is_scale_input_called
    stepper.step(noise(2, WIDTH), noise(2, WIDTH))
    assert stepper.scheduler.is_scale_input_called


def test_pairs_step_latents_of_any_rank_in_their_own_type():
    integrator = BY_NAME["UniPCMultistep-flow-3"].integrator()
    for shape in ((2, 6), (2, 4, 3, 5), (1, 4, 2, 3, 5)):
        start, outputs = noise(*shape), [noise(*shape, seed=step) for step in range(integrator.steps)]
        wide, narrow = integrator.start(start), integrator.start(start.float())
        for step, output in enumerate(outputs):
            wide, narrow = integrator.advance(wide, output, step), integrator.advance(narrow, output, step)
            assert narrow.latent.dtype == torch.float32 and wide.latent.dtype == torch.float64
            assert relative(wide.latent, integrator.latent(step + 1, start, outputs)) < 1e-13
            assert relative(narrow.latent.double(), wide.latent) < 1e-5  # 17 terms of rounding 6e-8 a step, nine steps


@pytest.mark.parametrize("arguments", [{"sigmas": OWN_SIGMAS, "mu": 1.1}, {"sigmas": OWN_SIGMAS.tolist(), "mu": 1.1}, {"mu": 0.4}], ids=str)
def test_steps_are_set_as_a_pipeline_sets_them(arguments):
    ours = Integrator.of(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 9, **arguments)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    time_T, steps = retrieve_timesteps(theirs, None if "sigmas" in arguments else 9, **arguments)
    assert ours.steps == steps and torch.equal(ours.time_T, time_T) and torch.equal(ours.sigma_T1, theirs.sigmas)


def test_sigmas_are_computed_in_the_type_they_came_in():
    narrow = np.linspace(0.93, 0.07, 9).astype(np.float32)
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    scheduler.set_timesteps(sigmas=narrow.copy())
    assert torch.equal(Integrator.of(diffusers.UniPCMultistepScheduler(**FLOW), 9, sigmas=narrow).sigma_T1, scheduler.sigmas)
    scheduler.set_timesteps(sigmas=narrow.astype(np.float64))
    assert not torch.equal(Integrator.of(diffusers.UniPCMultistepScheduler(**FLOW), 9, sigmas=narrow).sigma_T1, scheduler.sigmas)


@ALL
def test_noise_levels_fall_to_zero(case):
    sigma_T1 = case.integrator().sigma_T1
    assert sigma_T1.dtype == torch.float32 and float(sigma_T1[-1]) == 0 and bool((sigma_T1[1:] <= sigma_T1[:-1]).all())
    assert bool((sigma_T1[:-1] > 0).all())


def test_noise_levels_are_the_schedulers_one_for_each_call():
    heun = BY_NAME["FlowMatchHeunDiscrete-2"]
    torch.testing.assert_close(heun.integrator().sigma_T1[:-1], heun.ready().timesteps / 1000)
    mochi = BY_NAME["FlowMatchEulerDiscrete-inverted"]
    torch.testing.assert_close(mochi.integrator().sigma_T1, 1 - mochi.ready().sigmas)
    ddim = BY_NAME["DDIM-1"]
    alpha_T = ddim.ready().alphas_cumprod[ddim.ready().timesteps]
    torch.testing.assert_close(ddim.integrator().sigma_T1[:-1], ((1 - alpha_T) / alpha_T).sqrt())
    between = BY_NAME["KDPM2Discrete-2"].integrator().sigma_T1  # the second call of a step is at the geometric mean of two sigmas
    torch.testing.assert_close(between[1:-1:2], (between[:-2:2] * between[2:-1:2]).sqrt())


def test_the_clean_estimate_is_the_schedulers_own():
    estimates = {
        "convert_model_output": ["DPMSolverMultistep-flow-2", "DPMSolverMultistep-eps-2", "DPMSolverMultistep-sample", "UniPCMultistep-v"],
        "pred_original_sample": ["DDIM-1", "DDIM-zero-snr", "EulerDiscrete-1", "EulerDiscrete-leading", "KDPM2Discrete-2",
                                 "LMSDiscrete-4", "EDMEuler-1"]}
    for source, names in estimates.items():
        for name in names:
            integrator, stepper = BY_NAME[name].integrator(), BY_NAME[name].integrator().exact()
            latent = noise(2, WIDTH)
            for step, time in enumerate(stepper.scheduler.timesteps):
                output = noise(2, WIDTH, seed=step + 1)
                stepper.model_input(latent)
                if source == "pred_original_sample":
                    wanted = stepper.scheduler.step(output, time, latent)[source]
                else:
                    stepper.step(output, latent)
                    wanted = stepper.scheduler.model_outputs[-1]
                # at zero SNR the signal is 0 for the scheduler and 2**-12 for us
                assert relative(integrator.clean(latent, output, step), wanted.double()) < (3e-4 if name == "DDIM-zero-snr" else 1e-5), name


def test_the_clean_estimate_of_flow_matching_undoes_its_noise():
    for name in ("FlowMatchEulerDiscrete-shift", "FlowMatchEulerDiscrete-inverted", "FlowMatchHeunDiscrete-2", "UniPCMultistep-flow-2"):
        integrator, x_0, eps = BY_NAME[name].integrator(), noise(2, WIDTH), noise(2, WIDTH, seed=1)
        for step in range(integrator.steps):
            sigma = integrator.sigma_T1[step].double()
            sign = -1 if "inverted" in name else 1  # Mochi's velocity points at the clean latent
            latent, output = (1 - sigma) * x_0 + sigma * eps, sign * (eps - x_0)
            assert relative(integrator.clean(latent, output, step), x_0) < 1e-6
            if step == 0 and sigma == 1:  # a constant velocity arrives at x_0
                assert relative(integrator.latent(integrator.steps, eps, [output] * integrator.steps), x_0) < 1e-6


def test_a_scheduler_that_does_not_say_what_its_model_predicts_has_no_previews_but_steps():
    integrator = Integrator.of(diffusers.MiniMaxH3Scheduler(), 9)
    assert integrator.advance(integrator.start(noise(2, WIDTH)), noise(2, WIDTH), 0).latent.shape == (2, WIDTH)
    with pytest.raises(BadInput, match="does not say what its model predicts"):
        integrator.clean(noise(2, WIDTH), noise(2, WIDTH), 0)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_an_integrator_survives_a_run_folder(case, tmp_path):
    integrator = case.integrator()
    tensors, node = freeze(integrator)
    Run(tmp_path).save("integrator", "k", integrator)
    for back in (thaw(Integrator, tensors, node), Run(tmp_path).load(Integrator, "integrator", "k")):
        assert back.sampler == integrator.sampler and back.order == integrator.order and back.steps == integrator.steps
        assert Run.key(back) == Run.key(integrator)
        latents, outputs = scheduler_loop(case, Toy(), noise(2, WIDTH))
        stepper = back.exact()
        assert torch.equal(stepper.step(outputs[0], latents[0]), latents[1])


def test_an_integrator_that_does_not_hold_together_is_refused():
    integrator = EULER.integrator()
    parts = {name: getattr(integrator, name) for name in Integrator.__dataclass_fields__}
    with pytest.raises(ValueError, match="time_T is"):
        Integrator(**{**parts, "time_T": integrator.time_T[1:]})
    with pytest.raises(ValueError, match="coef_TU is not finite"):
        Integrator(**{**parts, "coef_TU": integrator.coef_TU * torch.nan})


def test_what_comes_out_of_order_is_refused():
    integrator = BY_NAME["UniPCMultistep-flow-2"].integrator()
    start, output = integrator.start(noise(2, WIDTH)), noise(2, WIDTH)
    for state, step in ((start, 1), (start, -1), (integrator.advance(start, output, 0), 0), (start, integrator.steps)):
        with pytest.raises(ValueError, match="does not stand before step"):
            integrator.advance(state, output, step)
    adjoint = Adjoint(integrator, noise(2, WIDTH))
    for call in (lambda: adjoint.seed(0), lambda: adjoint.add(0, output), lambda: adjoint.costates(3)):
        with pytest.raises(ValueError):
            call()
    for step in (8, 7, 6):
        adjoint.add(step, output)
    with pytest.raises(ValueError, match="co-states of step 8"):
        adjoint.costates(8)
    with pytest.raises(ValueError, match="5 comes next"):
        adjoint.add(7, output)


@pytest.mark.parametrize("case", KINDS[:6], ids=str)
def test_the_adjoint_keeps_only_the_last_costates(case):
    integrator, r = case.integrator(), noise(1, 2, WIDTH)
    adjoint, gone = Adjoint(integrator, r), weakref.ref(r)
    del r
    for done, step in enumerate(reversed(range(integrator.steps))):
        assert (gone() is not None) == (done <= integrator.order)
        adjoint.add(step, adjoint.seed(step))
