"""Backbone and prompts in, [`Trajectory`] out: what was sampled, and all that training on it needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trl_flow.backbones.base import Backbone, DDIMSchedule, Schedule
from trl_flow.functional import (
    Transition,
    cps_transition,
    dance_sde_transition,
    ddim_transition,
    flow_sde_transition,
    gaussian_log_prob,
    ode_transition,
    project_to_data,
)


@dataclass(frozen=True)
class Dynamics:
    """
    The Gaussian transitions of one sampling run, whose kind the schedule decides: flow models have a [`Schedule`] and
    the SDE of `sde_type`, U-Nets that predict noise have a [`DDIMSchedule`] and the transitions of DDIM.

    Attributes:
        schedule ([`Schedule`] or [`DDIMSchedule`]): `T` steps.
        sde_type (`str`): `"flow"`, `"dance"` or `"cps"`; of no effect with a [`DDIMSchedule`].
        noise_level (`float`): η; with a [`DDIMSchedule`] DDIM's η, at most 1.
        variance_free (`bool`): whether log-probabilities drop the variance, `-mean((x' - mean)^2)`, as Flow-CPS
            publishes it; else the Gaussian one. DDIM always has the Gaussian one.
    """

    schedule: Schedule | DDIMSchedule
    sde_type: str
    noise_level: float
    variance_free: bool = False

    @property
    def is_ddim(self) -> bool:
        return isinstance(self.schedule, DDIMSchedule)

    @property
    def stochastic_steps(self) -> list[int]:
        """
        The steps that add noise. The others can not be trained: the last one of CPS, and that of DDIM where it ends at
        `a' = 1` or does not move at all (`set_alpha_to_one` and `steps_offset` of the scheduler).
        """
        probe = self.schedule.timesteps.new_zeros(1, 1, dtype=torch.float32)
        return [step for step in range(self.schedule.num_steps) if self.transition(probe, probe, step).std.item() > 0]

    def transition(self, prediction: torch.Tensor, latents: torch.Tensor, step: int) -> Transition:
        """The stochastic transition of `step` from `latents`, given what the model predicts, both `(B, ...)`."""
        if self.is_ddim:
            return self._ddim(prediction, latents, step, self.schedule.alphas_cumprod_next[step], self.noise_level)
        sigma, sigma_next = self.schedule.sigmas[step], self.schedule.sigmas[step + 1]
        if self.sde_type == "flow":
            return flow_sde_transition(
                prediction,
                latents,
                sigma,
                sigma_next,
                noise_level=self.noise_level,
                sigma_max=self.schedule.sigmas[1],
            )
        function = {"dance": dance_sde_transition, "cps": cps_transition}[self.sde_type]
        return function(prediction, latents, sigma, sigma_next, noise_level=self.noise_level)

    def ode_step(self, prediction: torch.Tensor, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The latents after `step` without noise: an Euler step of the flow's ODE, or deterministic DDIM."""
        if self.is_ddim:
            return self._ddim(prediction, latents, step, self.schedule.alphas_cumprod_next[step], 0.0).mean
        return ode_transition(prediction, latents, self.schedule.sigmas[step], self.schedule.sigmas[step + 1]).mean

    def project(self, prediction: torch.Tensor, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The clean latents that the model predicts before `step` (VGPO, Eq. 10), `(B, ...)`: one step to the end."""
        if self.is_ddim:
            return self._ddim(prediction, latents, step, 1.0, 0.0).mean
        return project_to_data(latents, self.schedule.sigmas[step], prediction)

    def _ddim(
        self,
        prediction: torch.Tensor,
        latents: torch.Tensor,
        step: int,
        alpha_cumprod_next: torch.Tensor | float,
        noise_level: float,
    ) -> Transition:
        return ddim_transition(
            prediction,
            latents,
            self.schedule.alphas_cumprod[step],
            alpha_cumprod_next,
            noise_level=noise_level,
            prediction_type=self.schedule.prediction_type,
        )

    def log_prob(self, sample: torch.Tensor, transition: Transition) -> torch.Tensor:
        """Log-probability of `sample` under `transition`, a mean over the latent's dimensions, shape `(B,)`."""
        if self.variance_free and not self.is_ddim:
            return -(sample - transition.mean).square().flatten(1).mean(1)
        return gaussian_log_prob(sample, transition)

    def dt(self, step: int) -> torch.Tensor:
        """
        The length of a step, above 0, a scalar: `t - t'`, by which the velocity enters the mean of Flow-SDE but for a
        constant factor.

        DDIM has no other length than that factor itself, `-d mean / d prediction`. With `e` the predicted noise it is
        `c = sqrt(a' (1 - a) / a) - sqrt(1 - a' - std^2)`, and `sqrt(a) c` for v-prediction; at η = 0 `c` is
        `sqrt(a')` times the step in `sqrt((1 - a) / a)`. RatioNorm's gradient (GRPO-Guard, Eq. 8) is
        `-c mean(noise * d prediction)`, so that the weight `1 / dt` makes it equal over the steps.
        """
        if self.is_ddim:
            # The mean is linear in the prediction
            one = self.schedule.alphas_cumprod.new_ones(1, 1)
            return -self.transition(one, torch.zeros_like(one), step).mean.squeeze()
        return self.schedule.sigmas[step] - self.schedule.sigmas[step + 1]

    def beta(self, step: int) -> torch.Tensor:
        """
        `1 + η² (1 - t) / (2 t)`: the factor of Dance-SDE's mean beside `dt` (GRPO-Guard), a scalar. 1 for DDIM, whose
        `dt` holds all of it: each of `"inverse_dt"`, `"beta_over_dt"` and `"inverse_beta_dt"` is `1 / dt` there.
        """
        if self.is_ddim:
            return torch.ones_like(self.schedule.alphas_cumprod[step])
        sigma = self.schedule.sigmas[step]
        return 1 + self.noise_level**2 * (1 - sigma) / (2 * sigma)

    def diffusion(self, transition: Transition, step: int) -> torch.Tensor:
        """
        What the KL measures the difference of two means in, `(B,)`: the diffusion coefficient `std / sqrt(dt)`, as in
        Flow-GRPO; for DDIM the `std` itself, which gives the Gaussians' own KL (DPOK, arXiv:2305.16381).
        """
        return transition.std if self.is_ddim else transition.std / self.dt(step).sqrt()


@dataclass(frozen=True)
class Trajectory:
    """
    One batch of `B` samples, with the `S` steps that are trained. All tensors are float32.

    Attributes:
        steps (`tuple[int, ...]`): indices of the trained steps in the schedule, ascending, length `S`.
        latents (`torch.Tensor`): `x_t` at each trained step, `(B, S, ...)`.
        next_latents (`torch.Tensor`): the sampled `x_{t'}`, `(B, S, ...)`.
        means (`torch.Tensor`): mean of the transition at sampling time, `(B, S, ...)`.
        log_probs (`torch.Tensor`): log-probability of `next_latents` at sampling time, `(B, S)`.
        final (`torch.Tensor`): latents of the finished images, `(B, ...)`.
        projections (`torch.Tensor` or `None`): with dense rewards the one-step projection to the data after each step
            from the first trained one on, `(B, T - steps[0], ...)`; the last is `final`.
    """

    steps: tuple[int, ...]
    latents: torch.Tensor
    next_latents: torch.Tensor
    means: torch.Tensor
    log_probs: torch.Tensor
    final: torch.Tensor
    projections: torch.Tensor | None = None


def sample_generator(*key: int) -> torch.Generator:
    """
    A generator that depends on `key` alone (seed, batch, sample, ...), not on the process or on what was drawn before.

    Args:
        key (`int`): non-negative numbers; different keys give independent streams.
    """
    # With the length, as numpy takes a key and the same with zeros behind it for equal
    state = np.random.SeedSequence([len(key), *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed((int(state[0]) << 32 | int(state[1])) & (2**63 - 1))


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device) -> torch.Tensor:
    """Unit Gaussian noise `(B, *shape)`, float32: one generator for each sample, drawn on the CPU so that every device
    gets the same numbers."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators]).to(device)


@torch.no_grad()
def rollout(
    backbone: Backbone,
    model: torch.nn.Module,
    dynamics: Dynamics,
    condition: dict[str, torch.Tensor],
    negative_condition: dict[str, torch.Tensor] | None,
    *,
    guidance_scale: float,
    initial_noise: torch.Tensor,
    generators: Sequence[torch.Generator],
    stochastic_steps: Sequence[int],
    trained_steps: Sequence[int],
    keep_projections: bool = False,
    first_step: int = 0,
    num_steps: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Trajectory:
    """
    Samples one batch, stochastically in `stochastic_steps` and by the ODE elsewhere.

    Args:
        backbone ([`Backbone`]): the pipeline.
        model (`torch.nn.Module`): the trained module, possibly wrapped.
        dynamics ([`Dynamics`]): the transitions.
        condition, negative_condition (`dict[str, torch.Tensor]`): of the `B` prompts; no negative one, no guidance.
        guidance_scale (`float`): strength of the guidance.
        initial_noise (`torch.Tensor`): `x_1`, or the latents from which `first_step` goes on, float32, `(B, ...)`.
        generators (`Sequence[torch.Generator]`): one for each sample, for the noise of its transitions.
        stochastic_steps, trained_steps (`Sequence[int]`): indices into the schedule; all trained steps must be
            stochastic.
        keep_projections (`bool`): whether to keep the one-step projections (VGPO, Eq. 9). The velocity that projects
            the result of one step is the one that the next step computes anyway: no further forward is run.
        first_step (`int`): the step to begin with. ODE steps that several samples have in common, from the same noise
            and prompt, need be taken once only.
        num_steps (`int`, *optional*): the number of steps to take; default: all that are left.
        on_step (`Callable[[int], None]`, *optional*): called with the index of each step before it is taken.

    Raises:
        ValueError: if a trained step is not stochastic.
    """
    if not set(trained_steps) <= set(stochastic_steps):
        raise ValueError(
            f"trained_steps {list(trained_steps)} must all be in stochastic_steps {list(stochastic_steps)}."
        )
    schedule = dynamics.schedule
    latents = initial_noise
    stored: dict[str, list[torch.Tensor]] = {"latents": [], "next_latents": [], "means": [], "log_probs": []}
    projections: list[torch.Tensor] = []
    first_trained = min(trained_steps, default=schedule.num_steps)
    end = schedule.num_steps if num_steps is None else first_step + num_steps
    for step in range(first_step, end):
        if on_step is not None:
            on_step(step)
        velocity = backbone.guided_prediction(
            model, latents, schedule.timesteps[step], condition, negative_condition, guidance_scale
        )
        if keep_projections and step > first_trained:
            projections.append(dynamics.project(velocity, latents, step))
        if step in stochastic_steps:
            transition = dynamics.transition(velocity, latents, step)
            noise = draw_noise(latents.shape[1:], generators, latents.device)
            std = transition.std.reshape(-1, *[1] * (latents.ndim - 1))
            next_latents = transition.mean + std * noise
            if step in trained_steps:
                stored["latents"].append(latents)
                stored["next_latents"].append(next_latents)
                stored["means"].append(transition.mean)
                stored["log_probs"].append(dynamics.log_prob(next_latents, transition))
        else:
            next_latents = dynamics.ode_step(velocity, latents, step)
        latents = next_latents
    if keep_projections:
        projections.append(latents)
    empty = latents.new_zeros(len(latents), 0)
    return Trajectory(
        steps=tuple(sorted(trained_steps)),
        **{name: torch.stack(values, dim=1) if values else empty for name, values in stored.items()},
        final=latents,
        projections=torch.stack(projections, dim=1) if keep_projections else None,
    )
