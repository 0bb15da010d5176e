"""FLUX.2 klein, the base models and the distilled ones."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn

from trl_flow.backbones.base import JOINT_ATTENTION, PackedBackbone, Shapes, Tensors
from trl_flow.backbones.prompt_length import chat_length, shortened


class Flux2KleinBackbone(PackedBackbone):
    """
    [`~diffusers.Flux2KleinPipeline`] without reference images: a language model for a text encoder, a joint
    transformer on packed latents, rectified flow.

    The base models are guided away from the empty prompt, the only negative one that the pipeline has; the distilled
    ones (`is_distilled` in the pipeline's config) are not guided, whatever `guidance_scale` is.

    Example:

    ```pycon
    >>> from trl_flow.backbones import Flux2KleinBackbone
    >>> Flux2KleinBackbone.takes_negative_prompt
    False
    ```
    """

    # The attention of the blocks with two streams, and the layer of the others that attention and feed-forward share
    lora_target_modules = [*JOINT_ATTENTION, "attn.to_qkv_mlp_proj"]
    takes_negative_prompt = False

    def __init__(self, pipeline: DiffusionPipeline, **settings: int | None):
        super().__init__(pipeline, **settings)
        # The latents are normalized by its statistics, whatever decodes them
        self._normalized_by = pipeline.vae

    @property
    def takes_guidance(self) -> bool:
        return not self.pipeline.config.is_distilled

    @property
    def distilled_steps(self) -> int | None:
        return None if self.takes_guidance else 4

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [chat_length(self.pipeline.tokenizer, prompt, enable_thinking=False) for prompt in prompts]

    def encode_prompt(self, prompt: str) -> Tensors:
        prompt = shortened(self, self.pipeline.tokenizer, prompt, lambda text: self.prompt_tokens([text])[0])
        embeds, text_ids = self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": embeds, "text_ids": text_ids}

    def condition_shapes(self) -> Shapes:
        length = self.max_sequence_length
        return {
            "encoder_hidden_states": ((length, self.model.config.joint_attention_dim), self.dtype),
            "text_ids": ((length, 4), torch.int64),
        }

    def _shift(self, num_inference_steps: int) -> float:
        return compute_empirical_mu(image_seq_len=self.latent_shape()[0], num_steps=num_inference_steps)

    def _image_ids(self, latents: Tensor) -> Tensor:
        """Where the tokens of the latents `(B, L, C)` stand, `(B, L, 4)`."""
        # Of the unpacked latents only the shape is read
        return self.pipeline._prepare_latent_ids(latents.new_empty(len(latents), 0, *self._grid())).to(latents.device)

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        return model(
            hidden_states=latents.to(self.dtype),
            timestep=timestep.expand(len(latents)).to(self.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            txt_ids=condition["text_ids"],
            img_ids=self._image_ids(latents),
            return_dict=False,
        )[0]

    def uses_guidance(self, guidance_scale: float) -> bool:
        return guidance_scale > 1 and self.takes_guidance

    def decode(self, latents: Tensor) -> list[Image.Image]:
        vae = self._normalized_by
        latents = self.pipeline._unpack_latents_with_ids(latents, self._image_ids(latents), *self._grid())
        # In the VAE's own normalization, kept in its batch norm
        mean, variance = (values.view(1, -1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
        std = torch.sqrt(variance + vae.config.batch_norm_eps).to(latents)
        return self._decode(self.pipeline._unpatchify_latents(latents * std + mean.to(latents)))
