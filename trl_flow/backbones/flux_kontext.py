"""FLUX.1 Kontext, which edits images."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor

from trl_flow.backbones.base import Tensors
from trl_flow.backbones.flux import FluxBackbone
from trl_flow.backbones.packed import EditingBackbone


class FluxKontextBackbone(EditingBackbone, FluxBackbone):
    """
    [`~diffusers.FluxKontextPipeline`]: [`FluxBackbone`] with an image to edit, whose latents stand beside those that
    are drawn.

    As in the pipeline, the image is scaled to that of the model's sizes, of about a megapixel, whose aspect ratio is
    closest to its own. The transformer takes batches of one shape only, so all images to edit must lead to the same
    size as the drawn ones would. `height` and `width` are those of the drawn images; the pipeline draws them at
    `max_area=height * width`.
    """

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        # Rounded down to whole tokens before and after, as in the pipeline
        processor = self.pipeline.image_processor
        height, width = processor.get_default_height_width(None, height, width)
        ratio = width / height
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return processor.get_default_height_width(None, height, width)

    def check_image_size(self, height: int, width: int) -> None:
        least = self.pipeline.vae_scale_factor * 2
        if min(height, width) < least:
            raise ValueError(f"It is {height} pixels high and {width} wide, but must have {least} pixels each way.")
        own, expected = self._input_size(height, width), self._input_size(self.height, self.width)
        if own != expected:
            raise ValueError(
                f"It is {height} pixels high and {width} wide, and this model sees it at {own[0]} x {own[1]}, but for "
                f"drawn images of {self.height} x {self.width} it must be {expected[0]} x {expected[1]}: a batch "
                "holds one shape only. Crop the images, or set height and width to their aspect ratio."
            )

    def encode_prompt(self, prompt: str, image: Image.Image) -> Tensors:
        """As [`Backbone.encode_prompt`]; raises `ValueError` if the image has too different an aspect ratio."""
        self.check_image_size(image.height, image.width)
        height, width = self._input_size(self.height, self.width)
        processor = self.pipeline.image_processor
        image_latents = self._image_latents(
            processor.preprocess(processor.resize(image, height, width), height, width)
        )
        return super().encode_prompt(prompt) | {"image_latents": image_latents}

    def _image_ids(self, device: torch.device) -> Tensor:
        own = super()._image_ids(device)
        image_ids = self.pipeline._prepare_latent_image_ids(1, *self._input_grid(), device, self.dtype)
        # As in the pipeline's `prepare_latents`: the first number tells the image from the drawn latents
        image_ids[:, 0] = 1
        return torch.cat([own, image_ids])

    def call_arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        arguments = super().call_arguments(settings)
        if "height" in arguments and "width" in arguments:
            # To which the pipeline would scale its images otherwise
            arguments["max_area"] = arguments["height"] * arguments["width"]
        return arguments
