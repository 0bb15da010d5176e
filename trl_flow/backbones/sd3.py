"""Stable Diffusion 3 and 3.5."""

from collections.abc import Sequence

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps
from torch import Tensor, nn

from trl_flow.backbones.base import JOINT_ATTENTION, Backbone, Shapes, Tensors
from trl_flow.backbones.schedules import Schedule, dynamic_shift


class StableDiffusion3Backbone(Backbone):
    """[`~diffusers.StableDiffusion3Pipeline`]: three text encoders, a joint transformer, rectified flow.

    Example:

    ```pycon
    >>> from trl_flow.backbones import StableDiffusion3Backbone
    >>> StableDiffusion3Backbone.lora_target_modules[:2]
    ['attn.add_k_proj', 'attn.add_q_proj']
    ```
    """

    lora_target_modules = JOINT_ATTENTION  # Flow-GRPO's choice
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

    @property
    def token_limit(self) -> int:
        # Without the T5 encoder, which may be left out, what CLIP reads is all
        return self.max_sequence_length if self._has_t5 else self.pipeline.tokenizer.model_max_length

    @property
    def _has_t5(self) -> bool:
        return self.pipeline.text_encoder_3 is not None

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        tokenizer = self.pipeline.tokenizer_3 if self._has_t5 else self.pipeline.tokenizer
        return [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]

    def encode_prompt(self, prompt: str) -> Tensors:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            *(prompt, None, None, self.device),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def condition_shapes(self) -> Shapes:
        config = self.model.config
        tokens = self.pipeline.text_encoder.config.max_position_embeddings + self.max_sequence_length
        return {
            "encoder_hidden_states": ((tokens, config.joint_attention_dim), self.dtype),
            "pooled_projections": ((config.pooled_projection_dim,), self.dtype),
        }

    def schedule(self, num_inference_steps: int) -> Schedule:
        scheduler, patch, kwargs = self.pipeline.scheduler, self.pipeline.patch_size, {}
        if scheduler.config.get("use_dynamic_shifting", None):
            _, height, width = self.latent_shape()
            kwargs["mu"] = dynamic_shift(scheduler, (height // patch) * (width // patch), max_shift=1.16)
        retrieve_timesteps(scheduler, num_inference_steps, self.device, **kwargs)
        return Schedule.of(scheduler, self.device)

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        return model(
            hidden_states=latents.to(self.dtype),
            timestep=timestep.expand(len(latents)),
            return_dict=False,
            **{key: value.to(self.dtype) for key, value in condition.items()},
        )[0]
