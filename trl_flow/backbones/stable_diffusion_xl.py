"""Stable Diffusion XL."""

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from trl_flow.backbones.base import Shapes, Tensors
from trl_flow.backbones.stable_diffusion import StableDiffusionBackbone


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """
    [`~diffusers.StableDiffusionXLPipeline`]: two text encoders, a U-Net that also gets the pooled prompt and the size
    of the image. As [`StableDiffusionBackbone`] in all else: DDIM, noise or `v` predicted.

    The released model draws well near 1024 x 1024 only. The empty prompt stands for none:
    where the pipeline's `force_zeros_for_empty_prompt` is set, it has embeddings of zeros, as in the pipeline without
    a negative prompt. No watermark is applied.
    """

    def __init__(self, pipeline: DiffusionPipeline, **settings: int | None):
        super().__init__(pipeline, **settings)
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
            # It overflows in half precision; the pipeline, too, decodes with it in float32
            pipeline.vae.to(torch.float32)

    def encode_prompt(self, prompt: str) -> Tensors:
        prompt_embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if prompt == "" and self.pipeline.config.force_zeros_for_empty_prompt:
            prompt_embeds, pooled = torch.zeros_like(prompt_embeds), torch.zeros_like(pooled)
        size = (self.height, self.width)
        time_ids = self.pipeline._get_add_time_ids(size, (0, 0), size, prompt_embeds.dtype, pooled.shape[-1])
        time_ids = time_ids.to(prompt_embeds.device)
        return {"encoder_hidden_states": prompt_embeds, "text_embeds": pooled, "time_ids": time_ids}

    def condition_shapes(self) -> Shapes:
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        shapes = {"text_embeds": ((pooled,), self.dtype), "time_ids": ((6,), self.dtype)}
        return super().condition_shapes() | shapes

    def decode(self, latents: Tensor) -> list[Image.Image]:
        config = self.pipeline.vae.config
        latents_mean, latents_std = config.get("latents_mean"), config.get("latents_std")
        if latents_mean is not None and latents_std is not None:
            # Variants of the model whose latents are normalized channel by channel
            mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (latents_mean, latents_std))
            latents = latents * std + mean * config.scaling_factor
        return super().decode(latents)
