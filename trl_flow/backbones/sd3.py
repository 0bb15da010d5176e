"""Stable Diffusion 3 and 3.5."""

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift, retrieve_timesteps
from PIL import Image

from trl_flow.backbones.base import Backbone, Schedule, Shapes, shift_limits


class StableDiffusion3Backbone(Backbone):
    """[`~diffusers.StableDiffusion3Pipeline`]: three text encoders, a joint transformer, rectified flow."""

    # Flow-GRPO's choice: the attention of both streams
    lora_target_modules = [
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    ]
    default_sequence_length = 256
    sequence_length_limit = 512

    def check_size(self, height: int, width: int) -> None:
        multiple = self.pipeline.vae_scale_factor * self.pipeline.patch_size
        largest = self.model.config.pos_embed_max_size * multiple
        if height % multiple or width % multiple or max(height, width) > largest:
            own_height, own_width = self.default_size(self.pipeline)
            raise ValueError(
                f"height and width are {height} x {width}, but this model draws multiples of {multiple} pixels up to "
                f"{largest}; its own size is {own_height} x {own_width}. Set height={own_height} and "
                f"width={own_width}."
            )

    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompt,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled_prompt_embeds}

    def condition_shapes(self) -> Shapes:
        config = self.model.config
        tokens = self.pipeline.text_encoder.config.max_position_embeddings + self.max_sequence_length
        return {
            "encoder_hidden_states": ((tokens, config.joint_attention_dim), self.dtype),
            "pooled_projections": ((config.pooled_projection_dim,), self.dtype),
        }

    def schedule(self, num_inference_steps: int) -> Schedule:
        scheduler = self.pipeline.scheduler
        kwargs = {}
        if scheduler.config.get("use_dynamic_shifting", None):
            _, height, width = self.latent_shape()
            kwargs["mu"] = calculate_shift(
                (height // self.pipeline.patch_size) * (width // self.pipeline.patch_size),
                *shift_limits(scheduler, max_shift=1.16),
            )
        retrieve_timesteps(scheduler, num_inference_steps, self.device, **kwargs)
        return Schedule.of(scheduler, self.device)

    def predict(
        self, model: torch.nn.Module, latents: torch.Tensor, timestep: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        return model(
            hidden_states=latents.to(self.dtype),
            timestep=timestep.expand(len(latents)),
            return_dict=False,
            **{key: value.to(self.dtype) for key, value in condition.items()},
        )[0]

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        config = self.pipeline.vae.config
        return self._decode(latents / config.scaling_factor + config.shift_factor)
