"""Qwen-Image-Edit, with one image to edit."""

import math

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers.utils import logging

from trl_flow.backbones.base import Shapes
from trl_flow.backbones.qwen_image import QwenImageBackbone


logger = logging.get_logger(__name__)


class QwenImageEditBackbone(QwenImageBackbone):
    """
    [`~diffusers.QwenImageEditPipeline`]: [`QwenImageBackbone`] with an image to edit, which the text encoder sees and
    whose latents stand beside those that are drawn.

    The pipeline scales the image to a megapixel and keeps its aspect ratio; the transformer takes batches of one shape
    only. So all images to edit must have the aspect ratio of the drawn ones (to 32 pixels in about a thousand).

    `max_sequence_length` counts the tokens of the prompt alone; the pipeline takes prompts of any length.
    """

    takes_image = True

    def check_image_size(self, height: int, width: int) -> None:
        own, expected = (
            (self._input_size(ratio), self._seen_size(ratio)) for ratio in (width / height, self.width / self.height)
        )
        if own != expected:
            raise ValueError(
                f"It is {height} pixels high and {width} wide, but must have the aspect ratio of the drawn images, "
                f"{self.height} x {self.width}: a batch holds one shape only. Crop the images, or set height and "
                "width to their aspect ratio."
            )

    def encode_prompt(self, prompt: str, image: Image.Image) -> dict[str, torch.Tensor]:
        """
        The condition of one prompt and the image to edit, batch size 1, on the pipeline's device.

        Raises:
            ValueError: if the image has another aspect ratio than the drawn images.
        """
        self.check_image_size(image.height, image.width)
        processor, ratio = self.pipeline.image_processor, image.width / image.height
        width, height = self._seen_size(ratio)
        seen = processor.resize(image, height, width)
        embeds, _ = self.pipeline.encode_prompt(prompt, image=[seen], device=self.device)
        width, height = self._input_size(ratio)
        _, image_latents = self.pipeline.prepare_latents(
            processor.preprocess(image, height, width).unsqueeze(2),
            1,
            self.model.config.in_channels // 4,
            self.height,
            self.width,
            self.pipeline.vae.dtype,
            self.device,
            generator=None,
            latents=torch.empty(0),  # else the pipeline would draw some
        )
        # Special tokens stand before and behind the prompt, so it has as many of its own within the template
        tokens = len(self.pipeline.tokenizer(prompt).input_ids)
        if tokens > self.max_sequence_length:
            logger.warning(
                f"The prompt {prompt!r} has {tokens} tokens: what is beyond max_sequence_length "
                f"({self.max_sequence_length}) is cut off, which the pipeline does not do."
            )
        length = embeds.shape[1] - tokens + self.max_sequence_length
        return self._padded(embeds[:, :length], length) | {"image_latents": image_latents}

    def _input_size(self, ratio: float) -> tuple[int, int]:
        """Width and height to which the pipeline scales an image of this aspect ratio for the VAE."""
        return pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, ratio)[:2]

    def _seen_size(self, ratio: float) -> tuple[int, int]:
        """The same for the text encoder."""
        return self._input_size(ratio)

    def condition_shapes(self) -> Shapes:
        # The tokens of the template and the image, which the text encoder adds to the prompt's, are left out
        tokens = math.prod(self._input_grid())
        return super().condition_shapes() | {"image_latents": ((tokens, self.model.config.in_channels), torch.float32)}

    def _input_grid(self) -> tuple[int, int]:
        """Height and width in tokens of the image to edit."""
        multiple = self.pipeline.vae_scale_factor * 2
        width, height = self._input_size(self.width / self.height)
        return height // multiple, width // multiple

    def predict(
        self, model: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        tokens = torch.cat([latents, condition["image_latents"].to(latents.dtype)], dim=1)
        shapes = [(1, *self._grid()), (1, *self._input_grid())]
        velocities = self._forward(model, tokens, timestep, condition, shapes)
        return velocities[:, : latents.shape[1]]


class QwenImageEditPlusBackbone(QwenImageEditBackbone):
    """[`~diffusers.QwenImageEditPlusPipeline`] (2509, 2511): the text encoder sees the image at a smaller size."""

    def _input_size(self, ratio: float) -> tuple[int, int]:
        return pipeline_qwenimage_edit_plus.calculate_dimensions(pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE, ratio)

    def _seen_size(self, ratio: float) -> tuple[int, int]:
        area = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
        return pipeline_qwenimage_edit_plus.calculate_dimensions(area, ratio)
