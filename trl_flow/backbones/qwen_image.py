"""Qwen-Image, and Qwen-Image-Edit with one image to edit."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor, nn

from trl_flow.backbones.base import JOINT_ATTENTION, EditingBackbone, PackedBackbone, Shapes, Tensors, padded
from trl_flow.backbones.prompt_length import shortened


class QwenImageBackbone(PackedBackbone):
    """
    [`~diffusers.QwenImagePipeline`]: a vision-language model for a text encoder, a joint transformer on packed
    latents, rectified flow.

    `guidance_scale` is what the pipeline calls `true_cfg_scale`. Without a negative prompt the pipeline leaves
    guidance out, whatever the scale; here it is then the empty one, which draws the images of `negative_prompt=""`.

    Raises:
        ValueError: in addition to the causes of [`Backbone`], for a transformer with `guidance_embeds`, which
            diffusers' `QwenImageTransformer2DModel` can be configured with but not run.

    Example:

    ```pycon
    >>> from trl_flow.backbones import QwenImageBackbone
    >>> QwenImageBackbone.guidance_argument
    'true_cfg_scale'
    ```
    """

    # The attention of both streams but for the text's way out (`attn.to_add_out`): that of the last block leads
    # nowhere, and processes that reduce their gradients would wait for one that never comes
    lora_target_modules = [name for name in JOINT_ATTENTION if name != "attn.to_add_out"]
    sequence_length_limit = 1024
    guidance_argument = "true_cfg_scale"  # the name guidance_scale is kept for distilled models

    def __init__(self, pipeline: DiffusionPipeline, **settings: int | None):
        super().__init__(pipeline, **settings)
        if self.model.config.guidance_embeds:
            raise ValueError(
                "The transformer's config has guidance_embeds=True (a guidance-distilled model), but diffusers' "
                "QwenImageTransformer2DModel has no weights to embed a guidance scale with. Use a model without it."
            )

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        pipeline = self.pipeline
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        # What stands before the prompt is dropped when it has been read
        dropped = pipeline.prompt_template_encode_start_idx
        return [len(ids) - dropped for ids in pipeline.tokenizer(texts, verbose=False).input_ids]

    def _shortened(self, prompt: str) -> str:
        return shortened(self, self.pipeline.tokenizer, prompt, lambda text: self.prompt_tokens([text])[0])

    def encode_prompt(self, prompt: str) -> Tensors:
        prompt = self._shortened(prompt)
        embeds, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return self._condition(embeds, self.max_sequence_length)

    @staticmethod
    def _condition(embeds: Tensor, length: int) -> Tensors:
        embeds, mask = padded(embeds, length)
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}

    def condition_shapes(self) -> Shapes:
        length = self.max_sequence_length
        return {
            "encoder_hidden_states": ((length, self.model.config.joint_attention_dim), self.dtype),
            "encoder_hidden_states_mask": ((length,), torch.bool),
        }

    def _image_shapes(self) -> list[tuple[int, int, int]]:
        """Frames, height and width in tokens of the images that `predict` gets one after another."""
        return [(1, *self._grid())]

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        return model(
            hidden_states=latents.to(self.dtype),
            # Rounded before it is divided, as in the pipeline
            timestep=timestep.expand(len(latents)).to(self.dtype) / 1000,
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            encoder_hidden_states_mask=condition["encoder_hidden_states_mask"],
            img_shapes=[self._image_shapes()] * len(latents),
            return_dict=False,
        )[0]

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        guided = super().guide(conditional, unconditional, guidance_scale)
        # The guided prediction of each token keeps the length of the one without guidance
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def call_arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        arguments = super().call_arguments(settings)
        # The pipeline guides with a negative prompt only
        if self.uses_guidance(arguments.get(self.guidance_argument, 1.0)):
            arguments.setdefault("negative_prompt", "")
        return arguments

    def decode(self, latents: Tensor) -> list[Image.Image]:
        vae, factor = self.pipeline.vae, self.pipeline.vae_scale_factor
        latents = self.pipeline._unpack_latents(latents, self.height, self.width, factor).to(vae.dtype)
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(latents) for values in statistics)
        # A video of one frame; divided by the inverse as in the pipeline
        pixels = vae.decode(latents / (1 / std) + mean, return_dict=False)[0][:, :, 0]
        return self._images(pixels)


class QwenImageEditBackbone(EditingBackbone, QwenImageBackbone):
    """
    [`~diffusers.QwenImageEditPipeline`]: [`QwenImageBackbone`] with an image to edit, which the text encoder sees and
    whose latents stand beside those that are drawn.

    The pipeline scales the image to a megapixel and keeps its aspect ratio; the transformer takes batches of one shape
    only. So all images to edit must have the aspect ratio of the drawn ones (to 32 pixels in about a thousand).

    `max_sequence_length` counts the tokens of the prompt alone; the pipeline takes prompts of any length.

    Example:

    ```pycon
    >>> from trl_flow.backbones import QwenImageEditBackbone
    >>> QwenImageEditBackbone.takes_image
    True
    ```
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
        areas = (self.input_area, self.seen_area)
        if any(self._scaled(area, height, width) != self._scaled(area, self.height, self.width) for area in areas):
            raise ValueError(
                f"It is {height} pixels high and {width} wide, but must have the aspect ratio of the drawn images, "
                f"{self.height} x {self.width}: a batch holds one shape only. Crop the images, or set height and "
                "width to their aspect ratio."
            )

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.pipeline.tokenizer(list(prompts), verbose=False).input_ids]

    def encode_prompt(self, prompt: str, image: Image.Image) -> Tensors:
        """As [`Backbone.encode_prompt`]; raises `ValueError` if the image has too different an aspect ratio."""
        prompt = self._shortened(prompt)
        self.check_image_size(image.height, image.width)
        processor, size = self.pipeline.image_processor, (image.height, image.width)
        seen = processor.resize(image, *self._scaled(self.seen_area, *size))
        embeds, _ = self.pipeline.encode_prompt(prompt, image=[seen], device=self.device)
        image_latents = self._image_latents(processor.preprocess(image, *self._input_size(*size)).unsqueeze(2))
        # Special tokens stand before and behind the prompt, so it has as many of its own within the template
        length = embeds.shape[1] - self.prompt_tokens([prompt])[0] + self.max_sequence_length
        return self._condition(embeds, length) | {"image_latents": image_latents}

    def _image_shapes(self) -> list[tuple[int, int, int]]:
        return [(1, *self._grid()), (1, *self._input_grid())]


class QwenImageEditPlusBackbone(QwenImageEditBackbone):
    """[`~diffusers.QwenImageEditPlusPipeline`] (2509, 2511): the text encoder sees the image at a smaller size.

    Example:

    ```pycon
    >>> from trl_flow.backbones import QwenImageEditPlusBackbone
    >>> QwenImageEditPlusBackbone.takes_image
    True
    ```
    """

    input_area = pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE
    seen_area = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
