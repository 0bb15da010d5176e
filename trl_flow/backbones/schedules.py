"""The noise levels of a sampling run, as pipelines' schedulers have them."""

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """
    The noise levels of one sampling run of `T` steps.

    Attributes:
        sigmas (`torch.Tensor`): noise levels `t`, from the noisiest down to the data's, float32, shape `(T + 1,)`.
        timesteps (`torch.Tensor`): the model's input at each step, shape `(T,)`.
        frozen (`tuple[int, ...]`): steps that another model takes than the one that is trained: they follow the ODE.
    """

    sigmas: Tensor
    timesteps: Tensor
    frozen: tuple[int, ...] = ()

    def __post_init__(self):
        if self.sigmas.shape != (len(self.timesteps) + 1,) or self.timesteps.ndim != 1:
            shapes = f"{tuple(self.sigmas.shape)} and timesteps of shape {tuple(self.timesteps.shape)}"
            raise ValueError(
                f"A Schedule of T steps has sigmas of shape (T + 1,), the data's 0 at their end, and timesteps of "
                f"shape (T,), but these are sigmas of shape {shapes}."
            )
        if not self.sigmas.isfinite().all():
            raise ValueError(
                f"The scheduler's noise levels for {self.num_steps} step(s) are not finite: {self.sigmas.tolist()}. "
                "With shift_terminal, as Qwen-Image has it, a single step has none: take two or more."
            )

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @classmethod
    def of(cls, scheduler: SchedulerMixin, device: torch.device) -> "Schedule":
        """
        The noise levels that a pipeline's scheduler has set.

        Raises:
            ValueError: if the pipeline does not take Euler steps along the ODE with this scheduler, from noise to
                data: it would draw other images.
        """
        config = scheduler.config
        other = [name for name in ("stochastic_sampling", "invert_sigmas") if config.get(name)]
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or other:
            raise ValueError(
                f"The pipeline's scheduler is a {type(scheduler).__name__}"
                + (f" with {' and '.join(other)}" if other else "")
                + ", but must be the FlowMatchEulerDiscreteScheduler that flow models are released with, which takes "
                "Euler steps from noise to data. Train with that one; another may draw with the trained model."
            )
        return cls(sigmas=scheduler.sigmas.to(device, torch.float32), timesteps=scheduler.timesteps.to(device))


@dataclass(frozen=True)
class DDIMSchedule:
    """
    The noise levels of one sampling run of `T` steps of a U-Net that predicts the noise, `x_t = sqrt(a) x_0 +
    sqrt(1 - a) e`; its transitions are those of DDIM.

    Attributes:
        alphas_cumprod (`torch.Tensor`): `a` before each step, ascending, float32, shape `(T,)`.
        alphas_cumprod_next (`torch.Tensor`): `a` after each step, float32, shape `(T,)`. Mostly the `a` before the
            next one; not always, as diffusers' `DDIMScheduler` rounds the timesteps.
        timesteps (`torch.Tensor`): the U-Net's input at each step, shape `(T,)`.
        prediction_type (`str`): `"epsilon"` or `"v_prediction"`, what the U-Net predicts.
    """

    alphas_cumprod: Tensor
    alphas_cumprod_next: Tensor
    timesteps: Tensor
    prediction_type: str = "epsilon"
    frozen = ()  # as in `Schedule`: there is one U-Net

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def dynamic_shift(scheduler: SchedulerMixin, tokens: int, max_shift: float = 1.15) -> float:
    """By how much the pipelines move the noise levels for images of so many tokens, by the scheduler's config and with
    the pipelines' own defaults, of which `max_shift`, that at the most tokens, differs."""
    names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
    return calculate_shift(tokens, *(scheduler.config.get(name, default) for name, default in names.items()))
