"""What the families have in common whose transformer reads an image's latents packed, 2 x 2 of them in each token."""

import math
from abc import abstractmethod

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from torch import Tensor, nn

from trl_flow.backbones.base import Backbone, Schedule, Shapes, Tensors, dynamic_shift


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

    def _tokens(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in tokens of an image of this size."""
        multiple = self.pipeline.vae_scale_factor * 2
        return height // multiple, width // multiple

    def _grid(self) -> tuple[int, int]:
        """Height and width of the image in tokens."""
        return self._tokens(self.height, self.width)

    def latent_shape(self) -> tuple[int, ...]:
        return (math.prod(self._grid()), self.model.config.in_channels)

    def schedule(self, num_inference_steps: int) -> Schedule:
        scheduler = self.pipeline.scheduler
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        retrieve_timesteps(scheduler, device=self.device, sigmas=sigmas, mu=self._shift(num_inference_steps))
        return Schedule.of(scheduler, self.device)

    def _shift(self, num_inference_steps: int) -> float:
        """By how much the noise levels are moved for images of this size."""
        return dynamic_shift(self.pipeline.scheduler, math.prod(self._grid()))


class EditingBackbone(PackedBackbone):
    """A [`PackedBackbone`] whose transformer reads the tokens of an image to edit after those of the drawn one."""

    takes_image = True

    @abstractmethod
    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the transformer sees an image of this size."""

    def _input_grid(self) -> tuple[int, int]:
        """Height and width in tokens of the image to edit."""
        return self._tokens(*self._input_size(self.height, self.width))

    def _image_latents(self, pixels: Tensor) -> Tensor:
        """The tokens `(1, L, C)` of an image to edit, which the pipeline's processor has scaled."""
        channels, vae = self.model.config.in_channels // 4, self.pipeline.vae
        size = (self.height, self.width)
        none = torch.empty(0)  # in place of latents to draw from, which the pipeline would make otherwise
        return self.pipeline.prepare_latents(pixels, 1, channels, *size, vae.dtype, self.device, None, none)[1]

    def condition_shapes(self) -> Shapes:
        tokens = math.prod(self._input_grid())
        return super().condition_shapes() | {"image_latents": ((tokens, self.model.config.in_channels), torch.float32)}

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        both = torch.cat([latents, condition["image_latents"].to(latents.dtype)], dim=1)
        return super().predict(model, both, timestep, condition)[:, : latents.shape[1]]
