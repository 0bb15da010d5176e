"""FLUX.1, dev and schnell."""

import torch
from PIL import Image

from trl_flow.backbones.base import Shapes
from trl_flow.backbones.packed import PackedBackbone


class FluxBackbone(PackedBackbone):
    """
    [`~diffusers.FluxPipeline`]: CLIP and T5 for text encoders, a joint transformer on packed latents, rectified flow.

    `guidance_scale` is the pipeline's argument of this name: dev, which was distilled from guided samples, takes the
    scale as an input and runs one forward; in schnell, which has no such input, it has no effect. The pipeline's
    `true_cfg_scale`, guidance by a second forward, is left at 1, and so there is no negative prompt.
    """

    # Flow-GRPO's choice: the attention of all blocks, and the feed-forward layers of those with two streams
    lora_target_modules = [
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ]
    sequence_length_limit = 512
    takes_negative_prompt = False

    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
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

    def _image_ids(self, device: torch.device) -> torch.Tensor:
        """Where the tokens of the latents stand, `(L, 3)`: the first number is 0, then come row and column."""
        return self.pipeline._prepare_latent_image_ids(1, *self._grid(), device, self.dtype)

    def predict(
        self, model: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
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

    def guided_prediction(
        self,
        model: torch.nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        condition: dict[str, torch.Tensor],
        negative_condition: dict[str, torch.Tensor] | None = None,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        if self.model.config.guidance_embeds:
            condition = condition | {"guidance": torch.full((len(latents),), guidance_scale, device=latents.device)}
        return self.predict(model, latents, timestep, condition).float()

    def uses_guidance(self, guidance_scale: float) -> bool:
        return False  # not by a negative prompt

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        config = self.pipeline.vae.config
        latents = self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
        return self._decode(latents / config.scaling_factor + config.shift_factor)
