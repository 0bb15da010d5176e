"""Qwen-Image-Edit, with one image to edit."""

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from transformers.utils import logging

from trl_flow.backbones.base import Tensors
from trl_flow.backbones.packed import EditingBackbone
from trl_flow.backbones.qwen_image import QwenImageBackbone


logger = logging.get_logger(__name__)


class QwenImageEditBackbone(EditingBackbone, QwenImageBackbone):
    """
    [`~diffusers.QwenImageEditPipeline`]: [`QwenImageBackbone`] with an image to edit, which the text encoder sees and
    whose latents stand beside those that are drawn.

    The pipeline scales the image to a megapixel and keeps its aspect ratio; the transformer takes batches of one shape
    only. So all images to edit must have the aspect ratio of the drawn ones (to 32 pixels in about a thousand).

    `max_sequence_length` counts the tokens of the prompt alone; the pipeline takes prompts of any length.
    """

    # Pixels to which the pipeline scales the image for the VAE, and for the text encoder
    input_area = seen_area = 1024 * 1024

    @staticmethod
    def _scaled(area: int, height: int, width: int) -> tuple[int, int]:
        """Height and width to which the pipeline scales an image of this size."""
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(area, width / height)
        return height, width

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        return self._scaled(self.input_area, height, width)

    def check_image_size(self, height: int, width: int) -> None:
        if any(
            self._scaled(area, height, width) != self._scaled(area, self.height, self.width)
            for area in (self.input_area, self.seen_area)
        ):
            raise ValueError(
                f"It is {height} pixels high and {width} wide, but must have the aspect ratio of the drawn images, "
                f"{self.height} x {self.width}: a batch holds one shape only. Crop the images, or set height and "
                "width to their aspect ratio."
            )

    def encode_prompt(self, prompt: str, image: Image.Image) -> Tensors:
        """As [`Backbone.encode_prompt`]; raises `ValueError` if the image has too different an aspect ratio."""
        self.check_image_size(image.height, image.width)
        processor, size = self.pipeline.image_processor, (image.height, image.width)
        seen = processor.resize(image, *self._scaled(self.seen_area, *size))
        embeds, _ = self.pipeline.encode_prompt(prompt, image=[seen], device=self.device)
        image_latents = self._image_latents(processor.preprocess(image, *self._input_size(*size)).unsqueeze(2))
        # Special tokens stand before and behind the prompt, so it has as many of its own within the template
        tokens = len(self.pipeline.tokenizer(prompt).input_ids)
        if tokens > self.max_sequence_length:
            logger.warning(
                f"The prompt {prompt!r} has {tokens} tokens: what is beyond max_sequence_length "
                f"({self.max_sequence_length}) is cut off, which the pipeline does not do."
            )
        length = embeds.shape[1] - tokens + self.max_sequence_length
        return self._condition(embeds[:, :length], length) | {"image_latents": image_latents}

    def _image_shapes(self) -> list[tuple[int, int, int]]:
        return [(1, *self._grid()), (1, *self._input_grid())]


class QwenImageEditPlusBackbone(QwenImageEditBackbone):
    """[`~diffusers.QwenImageEditPlusPipeline`] (2509, 2511): the text encoder sees the image at a smaller size."""

    input_area = pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE
    seen_area = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
