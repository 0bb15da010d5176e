"""Wan 2.1 and 2.2: videos from text, and from text and a first frame."""

import math
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import is_ftfy_available
from PIL import Image
from torch import Tensor, nn

from trl_flow.backbones.base import Backbone, Shapes, Tensors
from trl_flow.backbones.schedules import Schedule
from trl_flow.images import Sample


EXPERTS = ("transformer", "transformer_2")  # of Wan 2.2's A14B: for the noisier steps, and for the others


class WanBackbone(Backbone):
    """
    [`~diffusers.WanPipeline`]: a T5 for a text encoder, a transformer on videos' latents `(C, F, H, W)`, rectified
    flow. Wan 2.1; 2.2's 5B, which has a time for each token (`expand_timesteps`); 2.2's A14B with two experts.

    Sampling takes Euler steps on the noise levels that the pipeline's own scheduler sets. Wan is released with UniPC,
    whose first order without a corrector these steps are: that scheduler is in `scheduler`, and with it the pipeline
    draws an evaluation's videos again to rounding. With its own, of second order, the trained weights serve as well.

    Args:
        num_frames (`int`, *optional*): frames of a video, one and a multiple of the VAE's four; default: the
            pipeline's own.
        component (`str`, *optional*): of two experts the one that is trained, `"transformer"`, which takes the steps
            above the pipeline's `boundary_ratio`, or `"transformer_2"`. The other one takes its own steps as it is.
        guidance_scale_2 (`float`, *optional*): guidance in the steps of `transformer_2`; default: the same.

    Raises:
        ValueError: in addition to the causes of [`Backbone`], for a number of frames that the VAE cannot make, an
            expert that is not there, or a scheduler that does not set a flow's noise levels.

    Example:

    ```pycon
    >>> from trl_flow.backbones import BACKBONES, WanBackbone
    >>> BACKBONES["WanPipeline"] is WanBackbone
    True
    ```
    """

    lora_target_modules = ["to_k", "to_out.0", "to_q", "to_v"]  # self- and cross-attention
    decoded_at_once = 1
    settings = (*Backbone.settings, "num_frames", "guidance_scale_2", "component")

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        num_frames: int | None = None,
        component: str | None = None,
        guidance_scale_2: float | None = None,
        **settings: int | None,
    ):
        self._boundary = pipeline.config.boundary_ratio  # `None`: one transformer takes all steps
        self._check_experts(pipeline, component, guidance_scale_2)
        self.component, self.guidance_scale_2 = component or EXPERTS[0], guidance_scale_2
        super().__init__(pipeline, **settings)
        self.num_frames = self.call_default("num_frames") if num_frames is None else num_frames
        factor = pipeline.vae_scale_factor_temporal
        if (rest := (self.num_frames - 1) % factor) != 0 or self.num_frames < 1:
            near = max(1, self.num_frames - rest)
            raise ValueError(
                f"num_frames is {self.num_frames}, but this model draws one frame and a multiple of {factor}. Set "
                f"num_frames={near} or {near + factor}."
            )
        self.scheduler = _euler(pipeline.scheduler)

    def _check_experts(self, pipeline: DiffusionPipeline, component: str | None, scale: float | None) -> None:
        known = EXPERTS if self._boundary is not None else EXPERTS[:1]
        if component is not None and component not in known:
            raise ValueError(
                f"component is {component!r}, but what can be trained of this pipeline is {' or '.join(known)}."
            )
        if missing := [name for name in known if getattr(pipeline, name) is None]:
            raise ValueError(
                f"The pipeline has no {' and no '.join(missing)}, which sampling needs (its boundary_ratio is "
                f"{self._boundary}). Load it with all its parts."
            )
        if scale is not None and self._boundary is None:
            raise ValueError(
                f"guidance_scale_2 is {scale:g}, but this {type(pipeline).__name__} has no second expert. Leave "
                "guidance_scale_2 out."
            )

    @property
    def sampled_models(self) -> list[nn.Module]:
        return [self.model] if self._boundary is None else [getattr(self.pipeline, name) for name in EXPERTS]

    @property
    def frames_per_second(self) -> float:
        # As in diffusers' examples: the 5B's videos have 24, those of all others 16
        return 24.0 if self.pipeline.config.expand_timesteps else 16.0

    # ---- Sizes ----

    @classmethod
    def default_size(cls, pipeline: DiffusionPipeline) -> tuple[int, int]:
        defaults = signature(type(pipeline).__call__).parameters
        return defaults["height"].default, defaults["width"].default

    def check_size(self, height: int, width: int) -> None:
        # The pipelines ask for 16, whatever the VAE is
        factor, patch = self.pipeline.vae_scale_factor_spatial, self.model.config.patch_size
        multiples = [math.lcm(16, factor * length) for length in patch[1:]]
        if height % multiples[0] or width % multiples[1]:
            near = [max(1, round(n / m)) * m for n, m in zip((height, width), multiples, strict=True)]
            raise ValueError(
                f"height and width are {height} x {width}, but this model draws multiples of {multiples[0]} x "
                f"{multiples[1]} pixels. Set height={near[0]} and width={near[1]}."
            )

    def latent_shape(self) -> tuple[int, ...]:
        pipeline, factor = self.pipeline, self.pipeline.vae_scale_factor_spatial
        frames = (self.num_frames - 1) // pipeline.vae_scale_factor_temporal + 1
        return (self._latent_channels(), frames, self.height // factor, self.width // factor)

    # ---- Prompts ----

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.pipeline.tokenizer(list(map(prompt_clean, prompts)), verbose=False).input_ids]

    def encode_prompt(self, prompt: str) -> Tensors:
        embeds, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return {"encoder_hidden_states": embeds}

    def condition_shapes(self) -> Shapes:
        return {"encoder_hidden_states": ((self.max_sequence_length, self.model.config.text_dim), self.dtype)}

    # ---- Sampling ----

    def schedule(self, num_inference_steps: int) -> Schedule:
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            schedule = Schedule.of(self.scheduler, self.device)
        else:
            sigmas = self.scheduler.sigmas.to(self.device, torch.float32)
            sigmas[0] = 1  # UniPC begins a millionth below, so as to take logarithms
            schedule = Schedule(sigmas, self.scheduler.timesteps.to(self.device))
        frozen = [i for i, t in enumerate(schedule.timesteps.tolist()) if self._expert(t) != self.component]
        return replace(schedule, frozen=tuple(frozen))

    def _expert(self, timestep: float) -> str:
        """The transformer that takes the step at `timestep`."""
        if self._boundary is None:
            return EXPERTS[0]
        return EXPERTS[timestep < self._boundary * self.pipeline.scheduler.config.num_train_timesteps]

    def guided_prediction(self, model, latents, timestep, condition, negative_condition=None, guidance_scale=1.0):
        # Of a batch with several times all are the trained expert's; without data, for the memory estimate, any does
        if self._boundary is not None and not timestep.is_meta:
            expert = self._expert(timestep.flatten()[0].item())
            model = model if expert == self.component else getattr(self.pipeline, expert)
            if expert == EXPERTS[1] and self.guidance_scale_2 is not None:
                guidance_scale = self.guidance_scale_2
        return super().guided_prediction(model, latents, timestep, condition, negative_condition, guidance_scale)

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        others = [part for part in map(self.pipeline.components.get, EXPERTS) if part is not self.model]
        dtype = model.dtype if any(model is other for other in others) else self.dtype
        timestep = timestep.expand(len(latents))
        if self.pipeline.config.expand_timesteps:
            tokens = math.prod(n // p for n, p in zip(latents.shape[2:], self.model.config.patch_size, strict=True))
            timestep = timestep.float()[:, None].expand(-1, tokens)
        return model(
            hidden_states=self._input(latents, condition).to(dtype),
            timestep=timestep,
            return_dict=False,
            **{name: value.to(dtype) for name, value in condition.items() if name != "image_latents"},
        )[0]

    def _input(self, latents: Tensor, condition: Tensors) -> Tensor:
        return latents

    def decode(self, latents: Tensor) -> list[Sample]:
        vae = self.pipeline.vae
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, vae.dtype) for values in statistics)
        # Divided by the inverse as in the pipeline
        pixels = vae.decode(latents.to(vae.dtype) / (1 / std) + mean, return_dict=False)[0]
        frames = self._images(pixels.transpose(1, 2).flatten(0, 1))
        return [frames[first : first + self.num_frames] for first in range(0, len(frames), self.num_frames)]

    @property
    def _processor(self) -> VaeImageProcessor:
        return self.pipeline.video_processor

    # ---- Sharing ----

    @property
    def scheduler_code(self) -> str:
        kind, config = type(self.scheduler).__name__, self.scheduler.config
        options = f"shift={config.shift}" if "shift" in config else f"flow_shift={config.flow_shift}, {_FIRST_ORDER}"
        return (
            f"from diffusers import {kind}\n"
            f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config, {options})"
        )


class WanImageToVideoBackbone(WanBackbone):
    """
    [`~diffusers.WanImageToVideoPipeline`] (2.1, and 2.2's A14B): [`WanBackbone`] with the first frame, whose latents
    stand beside those that are drawn, and which 2.1 also reads by an image encoder. Images of any size are scaled to
    the video's. `ValueError` for the 5B: its first frame is never drawn. Train it with `WanPipeline`, which has the
    same transformer.

    Example:

    ```pycon
    >>> from trl_flow.backbones import WanImageToVideoBackbone
    >>> WanImageToVideoBackbone.takes_image
    True
    ```
    """

    takes_image = True

    def __init__(self, pipeline: DiffusionPipeline, **settings: Any):
        if pipeline.config.expand_timesteps:
            raise ValueError(
                "The pipeline has expand_timesteps (Wan 2.2's 5B), whose first frame is given and not drawn, which is "
                "not supported. Train it from text, WanPipeline.from_pipe(pipeline): the transformer is the same, and "
                "the adapter serves for both."
            )
        if not is_ftfy_available():
            raise ImportError("diffusers' WanImageToVideoPipeline needs ftfy: pip install trl_flow[wan].")
        super().__init__(pipeline, **settings)
        if self._reads_image:
            self.lora_target_modules = ["add_k_proj", "add_v_proj", *WanBackbone.lora_target_modules]

    @property
    def _reads_image(self) -> bool:
        return self.model.config.image_dim is not None

    def _latent_channels(self, per_token: int = 1) -> int:
        drawn, taken = self.pipeline.vae.config.z_dim, self.model.config.in_channels
        expected = 2 * drawn + self.pipeline.vae_scale_factor_temporal
        if taken != expected:
            raise ValueError(
                f"The {self.component} takes {taken} channels, but the drawn latents, those of the first frame and "
                f"its mask have {expected}. Load a model that draws videos from a first frame."
            )
        return drawn

    def encode_prompt(self, prompt: str, image: Image.Image) -> Tensors:
        pipeline, size = self.pipeline, {"height": self.height, "width": self.width}
        condition = super().encode_prompt(prompt)
        if self._reads_image:
            condition["encoder_hidden_states_image"] = pipeline.encode_image(image, self.device)
        pixels = pipeline.video_processor.preprocess(image, **size).to(self.device, torch.float32)
        options = {"num_channels_latents": pipeline.vae.config.z_dim, "num_frames": self.num_frames, **size}
        options |= {"dtype": torch.float32, "device": self.device}
        none = torch.empty(0)  # in place of latents to draw from, which the pipeline would make otherwise
        condition["image_latents"] = pipeline.prepare_latents(pixels, 1, latents=none, **options)[1]
        return condition

    def condition_shapes(self) -> Shapes:
        drawn, *size = self.latent_shape()
        shapes = super().condition_shapes()
        shapes["image_latents"] = ((self.model.config.in_channels - drawn, *size), torch.float32)
        if self._reads_image:
            config = self.pipeline.image_encoder.config
            tokens = (config.image_size // config.patch_size) ** 2 + 1
            shapes["encoder_hidden_states_image"] = ((tokens, config.hidden_size), self.dtype)
        return shapes

    def _input(self, latents: Tensor, condition: Tensors) -> Tensor:
        return torch.cat([latents, condition["image_latents"].to(latents.dtype)], dim=1)


_FIRST_ORDER = "solver_order=1, disable_corrector=list(range(1000))"


def _euler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler of Euler steps on the noise levels that a pipeline's scheduler sets."""
    config = scheduler.config
    if isinstance(scheduler, UniPCMultistepScheduler) and config.use_flow_sigmas:
        return UniPCMultistepScheduler.from_config(config, solver_order=1, disable_corrector=list(range(1000)))
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    raise ValueError(
        f"The pipeline's scheduler is a {type(scheduler).__name__}, which sets no noise levels of a flow. Give it the "
        "one that Wan is released with, a UniPCMultistepScheduler with use_flow_sigmas=True, or a "
        "FlowMatchEulerDiscreteScheduler."
    )
