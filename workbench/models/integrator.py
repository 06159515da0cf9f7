"""How any deterministic sampler steps, forwards (Integrator) and backwards (Adjoint), for latents of any rank.

    x_t     = coef[t, 0] noise + sum_{i<t} coef[t, 1+i] output_i                         from the noise and all outputs
    x_{t+1} = sum_{j<p} latent_coef[t, j] x_{t-j} + output_coef[t, j] output_{t-j}       the same by the last p pairs

p is 1 for Euler and DDIM, 2 for DPM++ 2M and Heun, 3 for UniPC 2 and DPM++ 3M, 4 for UniPC 3. The coefficients are read off the real
diffusers scheduler (`sampler.py`); `exact` is that scheduler itself.
Letters: T calls of the model, 0 = noisiest (2n - 1 for n steps of Heun) · U = 1 + T, the noise and then each output · J a pair's age,
0 = the newest · S samples · R probes. Latents are (S, *shape), float32 or float64, on any device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.models import sampler as samplers
from workbench.models.sampler import Sampler
from workbench.options import BadInput


def combination(terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """sum of coefficient * tensor over one or more terms, in the tensors' type. A factor of 1 multiplies nothing and one of 0 adds nothing,
    so that Euler's step is x + h v to the bit."""
    total = None
    for coefficient, tensor in terms:
        factor, last = float(coefficient), tensor
        if factor != 0:
            part = tensor if factor == 1 else factor * tensor
            total = part if total is None else total + part
    return torch.zeros_like(last) if total is None else total


@dataclass(frozen=True, eq=False)
class State:
    """What the next step depends on: `latents`, the last `order` ones, and `outputs`, the last `order` - 1 ones, newest last, each
    (S, *shape); fewer at the first steps."""

    latents: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()

    @property
    def latent(self) -> Tensor:
        """(S, *shape), the newest."""
        return self.latents[-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Integrator:
    """A sampler with its steps set; equal only to itself.

    coef_TU (T+1, 1+T) float64, row t: x_t. time_T (T,) what the transformer is told, as the scheduler has it (float32 or int64).
    sigma_T1 (T+1,) float32, noise level of each call, not rising, 0 at the end; calls may share one (Heun). input_scale_T (T,) float64,
    what a denoiser multiplies the latent with before it asks the model: 1 but for EulerDiscrete and its kin. latent_coef_TJ and
    output_coef_TJ (T, order) float64. clean_coef_T2 (T, 2) float64, of the latent and the output in the estimate of x_0; NaN where it
    is not known."""

    coef_TU: Tensor
    time_T: Tensor
    sigma_T1: Tensor
    input_scale_T: Tensor
    latent_coef_TJ: Tensor
    output_coef_TJ: Tensor
    clean_coef_T2: Tensor
    sampler: Sampler

    def __post_init__(self):
        calls, pairs = self.latent_coef_TJ.shape
        shapes = {"coef_TU": (calls + 1, calls + 1), "time_T": (calls,), "sigma_T1": (calls + 1,), "input_scale_T": (calls,),
                  "output_coef_TJ": (calls, pairs), "clean_coef_T2": (calls, 2)}
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} is {tuple(getattr(self, name).shape)}, not {shape}")
        for name in ("coef_TU", "time_T", "sigma_T1", "input_scale_T", "latent_coef_TJ", "output_coef_TJ"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"{name} is not finite")

    @classmethod
    def of(cls, scheduler, steps: int, **set_timesteps) -> Integrator:
        """`steps` steps of a diffusers scheduler, which is only read; sigmas=, timesteps=, mu= as its pipeline gives them.

        Raises BadInput, one line with the class and what would be right, if the scheduler is not diffusers', stochastic, not linear (it
        clips), not finite, rising in noise, or needs more than an output, a time and a latent; if `steps` is below 1 or above its train
        timesteps; or if it does not take the settings. A learned variance must be split off the output before: it is taken as fixed."""
        sampler = Sampler.of(scheduler, steps, {key: value for key, value in set_timesteps.items() if value is not None})
        coef_TU, input_scale_T, rounding = samplers.coefficients(sampler)
        unused = sampler.build()
        sigma_T1 = samplers.noise_levels(unused, input_scale_T)
        latent_coef_TJ, output_coef_TJ = samplers.pair_form(coef_TU, rounding)
        return cls(coef_TU=coef_TU, time_T=unused.timesteps.cpu().clone(), sigma_T1=sigma_T1, input_scale_T=input_scale_T,
                   latent_coef_TJ=latent_coef_TJ, output_coef_TJ=output_coef_TJ, sampler=sampler,
                   clean_coef_T2=samplers.clean_coefficients(unused, sigma_T1, input_scale_T))

    @property
    def steps(self) -> int:
        """T, calls of the model."""
        return len(self.time_T)

    @property
    def order(self) -> int:
        """Pairs (latent, output) that a step needs."""
        return self.latent_coef_TJ.shape[1]

    def start(self, noise: Tensor) -> State:
        """The state before step 0 from unit noise (S, *shape); EulerDiscrete and its kin begin with a multiple of it."""
        return State((combination([(self.coef_TU[0, 0], noise)]),))

    def advance(self, state: State, output: Tensor, step: int) -> State:
        """The state after step `step`, by pairs; output (S, *shape) is what the model and its guidance gave at `state.latent`. Computes in
        the latent's type. Raises ValueError if `state` is not the one before `step`."""
        expected = (min(step + 1, self.order), min(step, self.order - 1))
        if not 0 <= step < self.steps or (len(state.latents), len(state.outputs)) != expected:
            raise ValueError(f"a state of {len(state.latents)} latents and {len(state.outputs)} outputs does not stand before step {step} "
                             f"of {self.steps}, where there are {expected[0]} and {expected[1]}")
        outputs = (*state.outputs, output.to(state.latent.dtype))
        latent = combination([*zip(self.latent_coef_TJ[step], reversed(state.latents)),
                              *zip(self.output_coef_TJ[step], reversed(outputs))])
        return State((*state.latents, latent)[-self.order:], outputs[max(0, len(outputs) - self.order + 1):])

    def clean(self, latent: Tensor, output: Tensor, step: int) -> Tensor:
        """The estimate of x_0 (S, *shape) from x_t and the model's output at `step`, for previews. Raises BadInput if the scheduler does
        not say what its model predicts."""
        if bool(self.clean_coef_T2[step].isnan().any()):
            raise BadInput(f"{self.sampler.class_name} does not say what its model predicts; previews need prediction_type epsilon, "
                           "v_prediction, sample or flow_prediction")
        return combination(zip(self.clean_coef_T2[step], (latent, output.to(latent.dtype))))

    def exact(self) -> Stepper:
        """The real scheduler at its first step. Raises BadInput if this diffusers has it no more or refuses its settings."""
        return Stepper(self.sampler.build())

    def latent(self, step: int, noise: Tensor, outputs) -> Tensor:
        """x_step (S, *shape), 0 <= step <= T, from the noise and at least `step` outputs: the reference for `advance`."""
        return combination(zip(self.coef_TU[step, :step + 1], (noise, *outputs[:step]), strict=True))


class Stepper:
    """The real scheduler, once from the first step to the last: bit for bit what a diffusers pipeline does, in any type."""

    def __init__(self, scheduler):
        self.scheduler, self._step = scheduler, 0

    def model_input(self, latent: Tensor) -> Tensor:
        """(S, *shape): what the model is given of a latent at the current step."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return latent
        return self.scheduler.scale_model_input(latent, self.scheduler.timesteps[self._step])

    def step(self, output: Tensor, latent: Tensor) -> Tensor:
        """The next latent (S, *shape). Raises ValueError after the last step."""
        if self._step == len(self.scheduler.timesteps):
            raise ValueError(f"all {self._step} steps are done; start again from Integrator.exact()")
        self.model_input(latent)  # some schedulers want to have been asked
        time = self.scheduler.timesteps[self._step]
        self._step += 1
        return self.scheduler.step(output, time, latent, return_dict=False)[0]


class Adjoint:
    """Gradients of <r, x_T>, walked from the last step to the first in memory of `order` latents; r is (..., S, *shape), as a rule with R
    probes in front. With L_t the gradient with respect to x_t, L_T = r:

        mu_t = sum_{u=t}^{t+p-1} output_coef[u, u-t] L_{u+1}                            with respect to output_t
        L_t  = sum_{u=t}^{t+p-1} latent_coef[u, u-t] L_{u+1} + nu_t,   nu_t = J_t^T mu_t   through the pairs and through the model

    For Euler mu_t = h_t L_{t+1} and L_t = L_{t+1} + nu_t, to the bit."""

    def __init__(self, integrator: Integrator, r: Tensor):
        self.integrator = integrator
        self._step = integrator.steps  # the earliest latent whose gradient is known
        self._costate = {self._step: r}  # L by step

    def seed(self, step: int) -> Tensor:
        """mu_step, shaped as r. Steps are asked for latest first; raises ValueError in another order."""
        self._expect(step, self._step - 1)
        return self._pulled(self.integrator.output_coef_TJ, step, step)

    def add(self, step: int, nu: Tensor) -> None:
        """nu, shaped as r: the gradient of <mu_step, output_step> with respect to x_step. Raises ValueError out of order."""
        self._expect(step, self._step - 1)
        self._costate[step] = self._pulled(self.integrator.latent_coef_TJ, step, step) + nu
        self._step = step
        self._costate.pop(step + self.integrator.order + 1, None)

    def costates(self, step: int) -> tuple[Tensor, ...]:
        """The gradient with respect to each part of the State after `step`, shaped as r: its latents, then its outputs, newest last as in
        the State; step -1 is the start. To be asked for once every later step was added and before step - 1 is, else ValueError."""
        if self._step not in (step, step + 1):
            raise ValueError(f"co-states of step {step} are known once every later step was added, and until step {step - 1} is")
        now, order, of = step + 1, self.integrator.order, self.integrator
        older = [self._pulled(of.latent_coef_TJ, t, now) for t in range(max(0, now - order + 1), now)]
        outputs = [self._pulled(of.output_coef_TJ, t, now) for t in range(max(0, now - order + 1), now)]
        return (*older, self._costate[now], *outputs)

    def _pulled(self, coef_TJ: Tensor, step: int, first: int) -> Tensor:
        """What steps from `first` on hand back to a latent or an output of `step`."""
        uses = range(first, min(step + self.integrator.order, self.integrator.steps))
        if not uses:
            return torch.zeros_like(self._costate[self._step])
        return combination((coef_TJ[use, use - step], self._costate[use + 1]) for use in uses)

    def _expect(self, step: int, expected: int) -> None:
        if step != expected:
            raise ValueError(f"step {step} was given where {expected} comes next: the adjoint walks from the last step to the first")


def deviation(costates: tuple[Tensor, ...], state: State, reference: State) -> Tensor:
    """(..., S), as a rule (R, S): the change of <r, x_T>, to first order, that `state` being off `reference` will make. Both are states
    after the step that `costates` (..., S, *shape) belong to. Raises ValueError if their parts differ in number."""
    total = None
    for costate, part, other in zip(costates, (*state.latents, *state.outputs), (*reference.latents, *reference.outputs), strict=True):
        difference = part - other
        scored = (costate * difference).flatten(costate.dim() - difference.dim() + 1).sum(-1)
        total = scored if total is None else total + scored
    return total
