"""What the families have in common whose transformer reads an image's latents packed, 2 x 2 of them in each token."""

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from trl_flow.backbones.base import Backbone, Schedule, shift_limits


class PackedBackbone(Backbone):
    """A [`Backbone`] whose latents are a sequence of tokens, `(L, C)`: row by row, 2 x 2 of the VAE's to each."""

    def check_size(self, height: int, width: int) -> None:
        multiple = self.pipeline.vae_scale_factor * 2
        if height % multiple or width % multiple:
            raise ValueError(
                f"height and width are {height} x {width}, but this model draws multiples of {multiple} pixels. "
                f"Set height={max(1, round(height / multiple)) * multiple} and "
                f"width={max(1, round(width / multiple)) * multiple}."
            )

    def _grid(self) -> tuple[int, int]:
        """Height and width of the image in tokens."""
        multiple = self.pipeline.vae_scale_factor * 2
        return self.height // multiple, self.width // multiple

    def latent_shape(self) -> tuple[int, ...]:
        height, width = self._grid()
        return (height * width, self.model.config.in_channels)

    def schedule(self, num_inference_steps: int) -> Schedule:
        scheduler = self.pipeline.scheduler
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        retrieve_timesteps(scheduler, device=self.device, sigmas=sigmas, mu=self._shift(num_inference_steps))
        return Schedule.of(scheduler, self.device)

    def _shift(self, num_inference_steps: int) -> float:
        """By how much the noise levels are moved for images of this size."""
        return calculate_shift(self.latent_shape()[0], *shift_limits(self.pipeline.scheduler))
