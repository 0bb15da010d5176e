"""A schedule and a noise level in, Gaussian transitions out: one class for flow models, one for U-Nets with DDIM.

A `step` is an index into the schedule, or a tensor `(B,)` with one for each sample.
"""

from dataclasses import dataclass
from functools import partial

import torch

from trl_flow import functional
from trl_flow.backbones.schedules import DDIMSchedule, Schedule
from trl_flow.functional import Transition


Step = int | torch.Tensor


class _Dynamics:
    @property
    def stochastic_steps(self) -> list[int]:
        """The steps that add noise; the others cannot be trained: the last one of CPS, and of DDIM where it ends at
        `a' = 1` or does not move at all (`set_alpha_to_one` and `steps_offset` of the scheduler); or because another
        model takes them."""
        probe = self.schedule.timesteps.new_zeros(1, 1, dtype=torch.float32)
        steps = [step for step in range(self.schedule.num_steps) if step not in self.schedule.frozen]
        return [step for step in steps if self.transition(probe, probe, step).std.item() > 0]

    def gain(self, step: Step) -> torch.Tensor:
        """The factor with which the prediction enters the mean, `-d mean / d prediction`, above 0, as `step`."""
        # The mean is linear in the prediction
        one = torch.ones_like(self.schedule.timesteps[step], dtype=torch.float32).view(-1, 1)
        return -self.transition(one, torch.zeros_like(one), step).mean.view_as(self.schedule.timesteps[step])


@dataclass(frozen=True)
class FlowDynamics(_Dynamics):
    """
    The transitions of a flow model, whose prediction is the velocity `v = x_1 - x_0`.

    Attributes:
        schedule ([`Schedule`]): `T` steps.
        sde_type (`str`): `"flow"` (Flow-GRPO), `"dance"` (DanceGRPO) or `"cps"` (Flow-CPS).
        noise_level (`float`): η.
    """

    schedule: Schedule
    sde_type: str
    noise_level: float

    def transition(self, prediction: torch.Tensor, latents: torch.Tensor, step: Step) -> Transition:
        """The stochastic transition of `step` from `latents`, both tensors `(B, ...)`."""
        sigma, sigma_next = self.schedule.sigmas[step], self.schedule.sigmas[step + 1]
        function = {
            "flow": partial(functional.flow_sde_transition, sigma_max=self.schedule.sigmas[1]),
            "dance": functional.dance_sde_transition,
            "cps": functional.cps_transition,
        }[self.sde_type]
        return function(prediction, latents, sigma, sigma_next, noise_level=self.noise_level)

    def ode_step(self, prediction: torch.Tensor, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The latents after `step` without noise, an Euler step of the ODE, `(B, ...)`."""
        sigma, sigma_next = self.schedule.sigmas[step], self.schedule.sigmas[step + 1]
        return functional.ode_transition(prediction, latents, sigma, sigma_next).mean

    def pred_original_sample(self, prediction: torch.Tensor, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The clean latents that the model predicts before `step`: one ODE step to the end (VGPO, Eq. 10)."""
        return functional.project_to_data(latents, self.schedule.sigmas[step], prediction)

    def dt(self, step: Step) -> torch.Tensor:
        """`t - t'`, above 0, a scalar or `(B,)` as `step` is."""
        return self.schedule.sigmas[step] - self.schedule.sigmas[step + 1]

    def beta(self, step: Step) -> torch.Tensor:
        """`1 + η² (1 - t) / (2 t)`, as `step`: the factor of Dance-SDE's mean besides `dt` (GRPO-Guard)."""
        sigma = self.schedule.sigmas[step]
        return 1 + self.noise_level**2 * (1 - sigma) / (2 * sigma)

    def diffusion(self, transition: Transition, step: Step) -> torch.Tensor:
        """The diffusion coefficient `std / sqrt(dt)`, `(B,)`: the unit of Flow-GRPO's KL."""
        return transition.std / self.dt(step).sqrt()


@dataclass(frozen=True)
class DDIMDynamics(_Dynamics):
    """
    The stochastic transitions of DDIM, for U-Nets whose prediction is the noise or `v` (`schedule.prediction_type`).

    Attributes:
        schedule ([`DDIMSchedule`]): `T` steps.
        noise_level (`float`): DDIM's η, at most 1.
    """

    schedule: DDIMSchedule
    noise_level: float

    def transition(self, prediction: torch.Tensor, latents: torch.Tensor, step: Step) -> Transition:
        """The stochastic transition of `step` from `latents`, both tensors `(B, ...)`."""
        return self._step(prediction, latents, step, self.schedule.alphas_cumprod_next[step], self.noise_level)

    def ode_step(self, prediction: torch.Tensor, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The latents after `step` of deterministic DDIM, `(B, ...)`."""
        return self._step(prediction, latents, step, self.schedule.alphas_cumprod_next[step], 0.0).mean

    def pred_original_sample(self, prediction: torch.Tensor, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The clean latents that the model predicts before `step` (VGPO, Eq. 10), `(B, ...)`."""
        return self._step(prediction, latents, step, 1.0, 0.0).mean

    def dt(self, step: Step) -> torch.Tensor:
        """
        The length of a step, as `step`: DDIM has none but [`gain`].

        With `e` the predicted noise that is `c = sqrt(a' (1 - a) / a) - sqrt(1 - a' - std^2)`, and `sqrt(a) c` for
        v-prediction; at η = 0 `c` is `sqrt(a')` times the step in `sqrt((1 - a) / a)`. RatioNorm's gradient
        (GRPO-Guard, Eq. 8) is `-c mean(noise * d prediction)`, so that the weight `1 / dt` makes it equal over steps.
        """
        return self.gain(step)

    def beta(self, step: Step) -> torch.Tensor:
        """1, as `step`: `dt` holds all of the factor, so that the weights of Dance-SDE are `1 / dt` here, too."""
        return torch.ones_like(self.schedule.alphas_cumprod[step])

    def diffusion(self, transition: Transition, step: Step) -> torch.Tensor:
        """`std`, `(B,)`, which gives the Gaussians' own KL (DPOK, arXiv:2305.16381)."""
        return transition.std

    def _step(
        self, prediction: torch.Tensor, latents: torch.Tensor, step: Step, alpha_next: torch.Tensor | float, eta: float
    ) -> Transition:
        options = {"noise_level": eta, "prediction_type": self.schedule.prediction_type}
        alpha = self.schedule.alphas_cumprod[step]
        return functional.ddim_transition(prediction, latents, alpha, alpha_next, **options)


Dynamics = FlowDynamics | DDIMDynamics


def make_dynamics(schedule: Schedule | DDIMSchedule, *, sde_type: str, noise_level: float) -> Dynamics:
    """The dynamics of a backbone's schedule. A U-Net has DDIM's, whatever `sde_type` is."""
    if isinstance(schedule, DDIMSchedule):
        return DDIMDynamics(schedule, noise_level)
    return FlowDynamics(schedule, sde_type, noise_level)
