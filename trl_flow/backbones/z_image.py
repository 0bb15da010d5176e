"""Z-Image."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas, retrieve_timesteps
from torch import Tensor, nn

from trl_flow.backbones.base import Backbone, Shapes, Tensors, padded
from trl_flow.backbones.prompt_length import chat_length, shortened
from trl_flow.backbones.schedules import Schedule, dynamic_shift


class ZImageBackbone(Backbone):
    """
    [`~diffusers.ZImagePipeline`]: a language model for a text encoder, a single-stream transformer, rectified flow.

    Guidance is the pipeline's, `c + guidance_scale (c - u)`: it is off at a scale of 0, not 1. As by default there, it
    is neither normalized nor cut short.

    Example:

    ```pycon
    >>> from trl_flow.backbones import ZImageBackbone
    >>> ZImageBackbone.default_sequence_length
    512
    ```
    """

    # The attention of all blocks, the refiners' too
    lora_target_modules = ["attention.to_k", "attention.to_out.0", "attention.to_q", "attention.to_v"]

    @classmethod
    def default_size(cls, pipeline: DiffusionPipeline) -> tuple[int, int]:
        return 1024, 1024

    def check_size(self, height: int, width: int) -> None:
        multiple = self.pipeline.vae_scale_factor * 2
        largest = [length * multiple for length in self.model.config.axes_lens[1:]]
        if height % multiple or width % multiple or height > largest[0] or width > largest[1]:
            raise ValueError(
                f"height and width are {height} x {width}, but this model draws multiples of {multiple} pixels up to "
                f"{largest[0]} x {largest[1]}. Set height and width to such."
            )

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [chat_length(self.pipeline.tokenizer, prompt, enable_thinking=True) for prompt in prompts]

    def encode_prompt(self, prompt: str) -> Tensors:
        prompt = shortened(self, self.pipeline.tokenizer, prompt, lambda text: self.prompt_tokens([text])[0])
        (embeds,), _ = self.pipeline.encode_prompt(
            prompt, self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        embeds, mask = padded(embeds[None], self.max_sequence_length)
        return {"embeds": embeds, "mask": mask}

    def condition_shapes(self) -> Shapes:
        length = self.max_sequence_length
        return {"embeds": ((length, self.model.config.cap_feat_dim), self.dtype), "mask": ((length,), torch.bool)}

    def schedule(self, num_inference_steps: int) -> Schedule:
        scheduler = self.pipeline.scheduler
        _, height, width = self.latent_shape()
        mu = dynamic_shift(scheduler, (height // 2) * (width // 2))
        sigmas = get_default_z_image_sigmas(num_inference_steps)
        retrieve_timesteps(scheduler, device=self.device, sigmas=sigmas, mu=mu)
        return Schedule.of(scheduler, self.device)

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        mask = condition["mask"]
        # Without data, where memory is estimated, prompts are as long as they may be
        lengths = [mask.shape[1]] * len(mask) if mask.is_meta else mask.sum(dim=1).tolist()
        embeds = condition["embeds"].to(self.dtype)
        velocities = model(
            # A list of videos of one frame
            list(latents.to(self.dtype).unsqueeze(2)),
            # The model's time runs from noise to data, and so does its velocity
            (1000 - timestep.expand(len(latents))) / 1000,
            [own[:length] for own, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(velocities).squeeze(2)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        return conditional + guidance_scale * (conditional - unconditional)

    def uses_guidance(self, guidance_scale: float) -> bool:
        return guidance_scale > 0
