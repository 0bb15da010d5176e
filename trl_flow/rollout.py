"""Backbone and prompts in, [`Trajectory`] out: what was sampled, and all that training on it needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trl_flow.backbones.base import Backbone, Schedule
from trl_flow.functional import (
    Transition,
    cps_transition,
    dance_sde_transition,
    flow_sde_transition,
    gaussian_log_prob,
    ode_transition,
    project_to_data,
)


@dataclass(frozen=True)
class Dynamics:
    """
    The Gaussian transitions of one sampling run.

    Attributes:
        schedule ([`Schedule`]): `T` steps.
        sde_type (`str`): `"flow"`, `"dance"` or `"cps"`.
        noise_level (`float`): η.
        variance_free (`bool`): whether log-probabilities drop the variance, `-mean((x' - mean)^2)`, as Flow-CPS
            publishes it; else the Gaussian one.
    """

    schedule: Schedule
    sde_type: str
    noise_level: float
    variance_free: bool = False

    def transition(self, velocity: torch.Tensor, latents: torch.Tensor, step: int) -> Transition:
        """The stochastic transition of `step` from `latents`, both `(B, ...)`."""
        sigma, sigma_next = self.schedule.sigmas[step], self.schedule.sigmas[step + 1]
        if self.sde_type == "flow":
            return flow_sde_transition(
                velocity,
                latents,
                sigma,
                sigma_next,
                noise_level=self.noise_level,
                sigma_max=self.schedule.sigmas[1],
            )
        function = {"dance": dance_sde_transition, "cps": cps_transition}[self.sde_type]
        return function(velocity, latents, sigma, sigma_next, noise_level=self.noise_level)

    def log_prob(self, sample: torch.Tensor, transition: Transition) -> torch.Tensor:
        """Log-probability of `sample` under `transition`, a mean over the latent's dimensions, shape `(B,)`."""
        if self.variance_free:
            return -(sample - transition.mean).square().flatten(1).mean(1)
        return gaussian_log_prob(sample, transition)

    def dt(self, step: int) -> torch.Tensor:
        """`t - t'` of a step, above 0, a scalar."""
        return self.schedule.sigmas[step] - self.schedule.sigmas[step + 1]

    def beta(self, step: int) -> torch.Tensor:
        """`1 + η² (1 - t) / (2 t)`: the factor of Dance-SDE's mean (GRPO-Guard), a scalar."""
        sigma = self.schedule.sigmas[step]
        return 1 + self.noise_level**2 * (1 - sigma) / (2 * sigma)


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
        initial_noise (`torch.Tensor`): `x_1`, float32, `(B, ...)`.
        generators (`Sequence[torch.Generator]`): one for each sample, for the noise of its transitions.
        stochastic_steps, trained_steps (`Sequence[int]`): indices into the schedule; all trained steps must be
            stochastic.
        keep_projections (`bool`): whether to keep the one-step projections (VGPO, Eq. 9). The velocity that projects
            the result of one step is the one that the next step computes anyway: no further forward is run.
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
    for step in range(schedule.num_steps):
        if on_step is not None:
            on_step(step)
        velocity = backbone.velocity(
            model, latents, schedule.timesteps[step], condition, negative_condition, guidance_scale
        )
        if keep_projections and step > first_trained:
            projections.append(project_to_data(latents, schedule.sigmas[step], velocity))
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
            next_latents = ode_transition(velocity, latents, schedule.sigmas[step], schedule.sigmas[step + 1]).mean
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
