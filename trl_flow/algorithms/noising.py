"""Noise levels and noised images, for learning without the trajectories of sampling."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_flow.backbones import Backbone
from trl_flow.backbones.schedules import DDIMSchedule, Schedule
from trl_flow.functional._tensors import over_latent


# Below this level there is next to nothing to learn, and the data follow from the latents themselves
LOWEST_LEVEL = 0.01


@dataclass(frozen=True)
class NoisedLatents:
    """
    `B` finished latents, each noised to a level of its own.

    Attributes:
        latents (`torch.Tensor`): what the model is given, `(B, ...)`.
        timestep (`torch.Tensor`): its input besides, `(B,)`.
        target (`torch.Tensor`): what it is to predict, `(B, ...)`: the velocity, or a U-Net's noise or `v`.
        level (`torch.Tensor`): the share of noise `t` in `(1 - t) x_0 + t e`, to which the latents are in proportion,
            `(B,)`, in (0, 1].
        scaled (`torch.Tensor`), scale (`torch.Tensor`): with which a prediction means the data `scaled - scale *
            prediction`, `(B, ...)` and `(B,)`.
    """

    latents: Tensor
    timestep: Tensor
    target: Tensor
    level: Tensor
    scaled: Tensor
    scale: Tensor


class Noising:
    """Noises latents to levels that are places between 0, the first and noisiest of a schedule's `T` steps, and
    `last_place`: whatever the density of the places is, the schedule's shift is in the levels."""

    def __init__(self, schedule: Schedule | DDIMSchedule, backbone: Backbone):
        self.schedule = schedule
        if isinstance(schedule, DDIMSchedule):
            self._alphas = backbone.scheduler.alphas_cumprod.to(schedule.alphas_cumprod)
            self.last_place = float(schedule.num_steps)
        else:
            # Between the last step's level and 0
            self.last_place = schedule.num_steps - min(1.0, LOWEST_LEVEL / schedule.sigmas[-2].item())

    def __call__(self, clean: Tensor, noise: Tensor, places: Tensor) -> NoisedLatents:
        """`clean` and `noise` are `(B, ...)`, float32, `places` `(B,)`: whole numbers are steps of the schedule."""
        if isinstance(self.schedule, DDIMSchedule):
            return self._of_unet(clean, noise, places)
        level, timestep = (
            self._between(values, places).to(clean) for values in (self.schedule.sigmas[:-1], self.schedule.timesteps)
        )
        t = over_latent(level, clean)
        latents = (1 - t) * clean + t * noise
        return NoisedLatents(latents, timestep, noise - clean, level, scaled=latents, scale=level)

    def _of_unet(self, clean: Tensor, noise: Tensor, places: Tensor) -> NoisedLatents:
        timestep = self._between(self.schedule.timesteps, places).round().long()
        alpha = self._alphas[timestep]
        signal, amplitude = alpha.sqrt(), (1 - alpha).sqrt()
        a, b = over_latent(signal, clean), over_latent(amplitude, clean)
        latents, level = a * clean + b * noise, amplitude / (signal + amplitude)
        if self.schedule.prediction_type == "epsilon":
            return NoisedLatents(latents, timestep, noise, level, scaled=latents / a, scale=amplitude / signal)
        return NoisedLatents(latents, timestep, a * noise - b * clean, level, scaled=a * latents, scale=amplitude)

    @staticmethod
    def _between(values: Tensor, places: Tensor) -> Tensor:
        """The values of a schedule's steps at places between them; after the last comes 0."""
        values = torch.cat([values, values.new_zeros(1)]).to(places)
        before = places.floor().long().clamp(max=len(values) - 2)
        return torch.lerp(values[before], values[before + 1], places - before)


def draw_places(kind: str, number: int, first: int, end: float, generator: torch.Generator) -> Tensor:
    """
    The places of `number` noise levels of one sample, float64, `(number,)`, in random order.

    Args:
        kind (`str`): `"schedule"`, the steps `first ... end - 1` of the schedule, each at most once; or between
            `first` and `end` one level from each of `number` equally likely parts of `"uniform"`, uniform over the
            places, or `"logit_normal"`, mostly in the middle (Stable Diffusion 3).
        number (`int`), first (`int`), end (`float`): for `"schedule"` there are at least `number` steps.
        generator (`torch.Generator`): on the CPU.
    """
    if kind == "schedule":
        return first + torch.randperm(int(end) - first, generator=generator)[:number].double()
    parts = torch.randperm(number, generator=generator)
    share = (parts + torch.rand(number, generator=generator, dtype=torch.float64)) / number
    if kind == "logit_normal":
        # The quantile function of the standard normal, and the logistic of it
        share = torch.sigmoid(math.sqrt(2) * torch.erfinv((2 * share - 1).clamp(-1 + 1e-12, 1 - 1e-12)))
    return first + share * (end - first)
