"""Qwen-Image."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from trl_flow.backbones.base import Shapes
from trl_flow.backbones.packed import PackedBackbone


class QwenImageBackbone(PackedBackbone):
    """
    [`~diffusers.QwenImagePipeline`]: a vision-language model for a text encoder, a joint transformer on packed
    latents, rectified flow.

    `guidance_scale` is what the pipeline calls `true_cfg_scale`. Without a negative prompt the pipeline leaves
    guidance out, whatever the scale; here it is then the empty one, which draws the images of `negative_prompt=""`.

    Raises:
        ValueError: in addition to the causes of [`Backbone`], for a transformer with `guidance_embeds`, which
            diffusers' `QwenImageTransformer2DModel` can be configured with but not run.
    """

    # The attention of both streams but for the text's way out (`attn.to_add_out`): that of the last block leads
    # nowhere, and processes that reduce their gradients would wait for one that never comes
    lora_target_modules = [
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    ]
    sequence_length_limit = 1024

    def __init__(self, pipeline: DiffusionPipeline, **settings: int | None):
        super().__init__(pipeline, **settings)
        if self.model.config.guidance_embeds:
            raise ValueError(
                "The transformer's config has guidance_embeds=True (a guidance-distilled model), but diffusers' "
                "QwenImageTransformer2DModel has no weights to embed a guidance scale with. Use a model without it."
            )

    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return self._padded(embeds, self.max_sequence_length)

    @staticmethod
    def _padded(embeds: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """Embeddings `(1, L, D)` filled up to `length` tokens, as the pipeline fills up those of a batch, and their
        mask."""
        missing = length - embeds.shape[1]
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {
            "encoder_hidden_states": torch.nn.functional.pad(embeds, (0, 0, 0, missing)),
            "encoder_hidden_states_mask": torch.nn.functional.pad(mask, (0, missing)),
        }

    def condition_shapes(self) -> Shapes:
        length = self.max_sequence_length
        return {
            "encoder_hidden_states": ((length, self.model.config.joint_attention_dim), self.dtype),
            "encoder_hidden_states_mask": ((length,), torch.bool),
        }

    def predict(
        self, model: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        return self._forward(model, latents, timestep, condition, [(1, *self._grid())])

    def _forward(
        self,
        model: torch.nn.Module,
        tokens: torch.Tensor,
        timestep: torch.Tensor,
        condition: dict[str, torch.Tensor],
        shapes: list[tuple[int, int, int]],
    ) -> torch.Tensor:
        """The transformer's output for every one of `tokens`, those of the images of `shapes` (frames, height, width)
        one after another."""
        return model(
            hidden_states=tokens.to(self.dtype),
            # Rounded before it is divided, as in the pipeline
            timestep=timestep.expand(len(tokens)).to(self.dtype) / 1000,
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            encoder_hidden_states_mask=condition["encoder_hidden_states_mask"],
            img_shapes=[shapes] * len(tokens),
            return_dict=False,
        )[0]

    def guide(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        guided = super().guide(conditional, unconditional, guidance_scale)
        # The guided prediction of each token keeps the length of the one without guidance
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def call_arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        arguments = super().call_arguments(settings)
        # The pipeline keeps the name guidance_scale for distilled models, and guides with a negative prompt only
        scale = arguments.pop("guidance_scale", None)
        if scale is not None:
            arguments["true_cfg_scale"] = scale
            if self.uses_guidance(scale):
                arguments.setdefault("negative_prompt", "")
        return arguments

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        latents = self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
        latents = latents.to(vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        # A video of one frame; divided by the inverse as in the pipeline
        pixels = vae.decode(latents / (1 / std) + mean, return_dict=False)[0][:, :, 0]
        return self.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
