"""A predicting model, noise and a plan of the steps in, [`Rollout`] out: one batch, sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from trl_flow.backbones import Backbone
from trl_flow.backbones.contract import decoded
from trl_flow.dynamics import Dynamics
from trl_flow.images import Sample


class RandomStream(IntEnum):
    """What a random number is for: with the seed and the sample's index it makes the key of [`sample_generator`]."""

    STEPS = 1
    INITIAL_NOISE = 2
    TRANSITIONS = 3
    EVALUATION = 4
    NOISED = 5
    PROMPTS = 6


@dataclass(frozen=True)
class StepPlan:
    """
    What happens in the steps of one sampling phase, by their indices in the schedule. All other steps are ODE steps.

    Attributes:
        stochastic (`tuple[int, ...]`): steps that add noise, ascending.
        kept (`tuple[int, ...]`): those whose latents and means are kept, ascending; all of them stochastic.
        kept_per_sample (`int`, *optional*): each sample keeps only so many of them, drawn by its own generator.
        project (`bool`): whether the predicted clean latents after each step are kept.

    Example:

    ```pycon
    >>> from trl_flow.algorithms import StepPlan
    >>> StepPlan(stochastic=(0, 1, 2, 3), kept=(1, 2))  # noise in the first four steps, of which two are trained
    StepPlan(stochastic=(0, 1, 2, 3), kept=(1, 2), kept_per_sample=None, project=False)
    ```
    """

    stochastic: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    kept_per_sample: int | None = None
    project: bool = False

    def __post_init__(self):
        if not set(self.kept) <= set(self.stochastic):
            raise ValueError(f"The kept steps {self.kept} must all be among the stochastic ones {self.stochastic}.")


@dataclass(frozen=True)
class Rollout:
    """
    One batch of `B` samples, with the `S` steps that each keeps. All tensors but `chosen` are float32.

    Attributes:
        steps (`tuple[int, ...]`): indices of the plan's kept steps in the schedule, ascending.
        latents (`torch.Tensor`): `x_t` before each kept step, `(B, S, ...)`.
        next_latents (`torch.Tensor`): the sampled `x_{t'}`, `(B, S, ...)`.
        means (`torch.Tensor`): mean of the transition at sampling time, `(B, S, ...)`.
        final (`torch.Tensor`): latents of the finished samples, `(B, ...)`.
        pred_original_samples (`torch.Tensor` or `None`): the predicted clean latents after each of the `T` steps,
            `(B, T, ...)`; the last is `final`. Of a part of the steps, those that its predictions give.
        chosen (`torch.Tensor` or `None`): with `plan.kept_per_sample`, the places in `steps` of those that each sample
            keeps, int64, `(B, S)`, ascending.
    """

    steps: tuple[int, ...]
    latents: torch.Tensor
    next_latents: torch.Tensor
    means: torch.Tensor
    final: torch.Tensor
    pred_original_samples: torch.Tensor | None = None
    chosen: torch.Tensor | None = None


def sample_generator(*key: int) -> torch.Generator:
    """A generator that depends on `key` alone (seed, generation, stream, sample: non-negative numbers), not on the
    process or on what was drawn before. Different keys give independent streams."""
    # With the length, as numpy takes a key and the same with zeros behind it for equal
    state = np.random.SeedSequence([len(key), *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed((int(state[0]) << 32 | int(state[1])) & (2**63 - 1))


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device) -> torch.Tensor:
    """Unit Gaussian noise `(B, *shape)`, float32: one generator for each sample, drawn on the CPU so that every device
    gets the same numbers."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators]).to(device)


@torch.inference_mode()
def decode(backbone: Backbone, latents: torch.Tensor) -> list[Sample]:
    """Images, or videos, of final latents `(B, ...)`, which may be on any device. Raises `FloatingPointError` if the
    VAE's pixels are not finite, and `TypeError` if the backbone makes neither."""
    parts = latents.split(backbone.decoded_at_once)
    return [sample for part in parts for sample in decoded(backbone, part.to(backbone.device))]


@torch.no_grad()
def rollout(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    dynamics: Dynamics,
    latents: torch.Tensor,
    plan: StepPlan,
    *,
    generators: Sequence[torch.Generator] = (),
    first_step: int = 0,
    last_step: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Rollout:
    """
    Samples one batch.

    Args:
        predict (`Callable`): what the model predicts, `(B, ...)`, guidance included, for latents `(B, ...)` and one
            value of the schedule's `timesteps`.
        dynamics ([`FlowDynamics`] or [`DDIMDynamics`]): the transitions.
        latents (`torch.Tensor`): `x_1`, or the latents from which `first_step` goes on, float32, `(B, ...)`.
        plan ([`StepPlan`]): what happens in each step. The prediction that gives the clean latents after one step is
            the one that the next step makes anyway: no further forward is run for them.
        generators (`Sequence[torch.Generator]`): one for each sample, for the noise of stochastic steps.
        first_step, last_step (`int`): the steps `first_step ... last_step - 1` are taken; default: all. ODE steps that
            several samples have in common, from the same noise and prompt, need be taken once only.
        on_step (`Callable[[int], None]`, *optional*): called with the index of each step before it is taken.
    """
    schedule = dynamics.schedule
    last_step = schedule.num_steps if last_step is None else last_step
    kept: list[tuple[torch.Tensor, ...]] = []
    predicted: list[torch.Tensor] = []
    for step in range(first_step, last_step):
        if on_step is not None:
            on_step(step)
        prediction = predict(latents, schedule.timesteps[step])
        if plan.project and step > 0:
            predicted.append(dynamics.pred_original_sample(prediction, latents, step))
        if step in plan.stochastic:
            transition = dynamics.transition(prediction, latents, step)
            noise = draw_noise(latents.shape[1:], generators, latents.device)
            next_latents = transition.mean + transition.std.view(-1, *[1] * (latents.ndim - 1)) * noise
            if step in plan.kept:
                kept.append((latents, next_latents, transition.mean))
        else:
            next_latents = dynamics.ode_step(prediction, latents, step)
        latents = next_latents
    if last_step == schedule.num_steps:
        predicted.append(latents)

    def stacked(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(values, dim=1) if values else latents.new_zeros(len(latents), 0, *latents.shape[1:])

    of_steps, chosen = [stacked(values) for values in zip(*kept, strict=True)] or [stacked([])] * 3, None
    if plan.kept_per_sample is not None:
        permutations = [torch.randperm(len(plan.kept), generator=generator) for generator in generators]
        chosen = torch.stack(permutations)[:, : plan.kept_per_sample].sort().values.to(latents.device)
        samples = torch.arange(len(latents), device=latents.device)[:, None]
        of_steps = [tensor[samples, chosen] for tensor in of_steps]
    return Rollout(plan.kept, *of_steps, latents, stacked(predicted) if plan.project else None, chosen)
