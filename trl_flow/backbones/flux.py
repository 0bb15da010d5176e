"""FLUX.1: dev and schnell, and Kontext, which edits images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor, nn

from trl_flow.backbones.base import JOINT_ATTENTION, EditingBackbone, PackedBackbone, Shapes, Tensors


class FluxBackbone(PackedBackbone):
    """
    [`~diffusers.FluxPipeline`]: CLIP and T5 for text encoders, a joint transformer on packed latents, rectified flow.

    `guidance_scale` is the pipeline's argument of this name: dev, which was distilled from guided samples, takes the
    scale as an input and runs one forward; in schnell, which has no such input, it has no effect. The pipeline's
    `true_cfg_scale`, guidance by a second forward, is left at 1, and so there is no negative prompt.

    Example:

    ```pycon
    >>> from trl_flow.backbones import FluxBackbone
    >>> FluxBackbone.default_sequence_length
    512
    ```
    """

    # Flow-GRPO's choice: the attention of all blocks, and the feed-forward layers of those with two streams
    lora_target_modules = [
        *JOINT_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ]
    sequence_length_limit = 512
    takes_negative_prompt = False

    @property
    def takes_guidance(self) -> bool:
        return bool(self.model.config.guidance_embeds)

    @property
    def distilled_steps(self) -> int | None:
        return None if self.takes_guidance else 4  # schnell's

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        # T5's: CLIP's make one vector of a prompt
        return [len(ids) for ids in self.pipeline.tokenizer_2(list(prompts), verbose=False).input_ids]

    def encode_prompt(self, prompt: str) -> Tensors:
        embeds, pooled, text_ids = self.pipeline.encode_prompt(
            prompt, prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "text_ids": text_ids[None]}

    def condition_shapes(self) -> Shapes:
        length, config = self.max_sequence_length, self.model.config
        return {
            "encoder_hidden_states": ((length, config.joint_attention_dim), self.dtype),
            "pooled_projections": ((config.pooled_projection_dim,), self.dtype),
            "text_ids": ((length, 3), self.dtype),
        }

    def _image_ids(self, device: torch.device) -> Tensor:
        """Where the tokens of the latents stand, `(L, 3)`: the first number is 0, then come row and column."""
        return self.pipeline._prepare_latent_image_ids(1, *self._grid(), device, self.dtype)

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        return model(
            hidden_states=latents.to(self.dtype),
            timestep=timestep.expand(len(latents)).to(self.dtype) / 1000,
            guidance=condition.get("guidance"),
            pooled_projections=condition["pooled_projections"].to(self.dtype),
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            txt_ids=condition["text_ids"][0].to(self.dtype),
            img_ids=self._image_ids(latents.device),
            return_dict=False,
        )[0]

    def guided_prediction(self, model, latents, timestep, condition, negative_condition=None, guidance_scale=1.0):
        if self.model.config.guidance_embeds:
            condition = condition | {"guidance": torch.full((len(latents),), guidance_scale, device=latents.device)}
        return self.predict(model, latents, timestep, condition).float()

    def uses_guidance(self, guidance_scale: float) -> bool:
        return False  # not by a negative prompt

    def decode(self, latents: Tensor) -> list[Image.Image]:
        factor = self.pipeline.vae_scale_factor
        return super().decode(self.pipeline._unpack_latents(latents, self.height, self.width, factor))


class FluxKontextBackbone(EditingBackbone, FluxBackbone):
    """
    [`~diffusers.FluxKontextPipeline`]: [`FluxBackbone`] with an image to edit, whose latents stand beside those that
    are drawn.

    As in the pipeline, the image is scaled to that of the model's sizes, of about a megapixel, whose aspect ratio is
    closest to its own. The transformer takes batches of one shape only, so all images to edit must lead to the same
    size as the drawn ones would. `height` and `width` are those of the drawn images; the pipeline draws them at
    `max_area=height * width`.

    Example:

    ```pycon
    >>> from trl_flow.backbones import FluxKontextBackbone
    >>> FluxKontextBackbone.takes_image
    True
    ```
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
        pixels = processor.preprocess(processor.resize(image, height, width), height, width)
        return super().encode_prompt(prompt) | {"image_latents": self._image_latents(pixels)}

    def _image_ids(self, device: torch.device) -> Tensor:
        image_ids = self.pipeline._prepare_latent_image_ids(1, *self._input_grid(), device, self.dtype)
        # As in the pipeline's `prepare_latents`: the first number tells the image from the drawn latents
        image_ids[:, 0] = 1
        return torch.cat([super()._image_ids(device), image_ids])

    def call_arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        arguments = super().call_arguments(settings)
        if "height" in arguments and "width" in arguments:
            # To which the pipeline would scale its images otherwise
            arguments["max_area"] = arguments["height"] * arguments["width"]
        return arguments
