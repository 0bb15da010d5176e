"""Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from trl_flow.backbones.base import Backbone, Shapes, Tensors
from trl_flow.backbones.schedules import DDIMSchedule


logger = logging.get_logger(__name__)


class StableDiffusionBackbone(Backbone):
    """
    [`~diffusers.StableDiffusionPipeline`]: one text encoder, a U-Net that predicts the noise or `v`.

    Sampling while training and evaluating is DDIM's, as in DDPO (arXiv:2305.13301) and in DanceGRPO's and SLAS's
    results on Stable Diffusion 1.4, whatever scheduler the pipeline came with (PNDM in the released 1.4 and 1.5, Euler
    in XL): a [`~diffusers.DDIMScheduler`] is made from that one's config, in `scheduler`, and the pipeline's own is
    left as it is. The trained weights serve with any scheduler; only `pipeline.scheduler = backbone.scheduler` draws
    an evaluation's images again to rounding.

    The safety checker, which would give rewards black images to score, is not run. There is no `max_sequence_length`:
    prompts always have the tokenizer's length.

    Raises:
        ValueError: in addition to the causes of [`Backbone`], if the scheduler's noise levels are not DDIM's, it clips
            the predicted data, or the U-Net takes another input than the prompt, such as the guidance scale (distilled
            LCM) or a class, or does not say its own size. From `schedule`, if it begins at pure noise and the U-Net
            predicts the noise.

    Example:

    ```pycon
    >>> from trl_flow.backbones import StableDiffusionBackbone
    >>> StableDiffusionBackbone.component
    'unet'
    ```
    """

    component = "unet"
    # DDPO's choice: self- and cross-attention
    lora_target_modules = ["to_k", "to_out.0", "to_q", "to_v"]
    default_sequence_length = 77
    _known_additions = ["text"]  # what the U-Net may get besides, by its config's `addition_embed_type`
    # Clipping, where the pipeline's scheduler does not know of it, would be on by default
    scheduler_code = (
        "from diffusers import DDIMScheduler\n"
        "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)"
    )

    def __init__(self, pipeline: DiffusionPipeline, **settings: int | None):
        super().__init__(pipeline, **settings)
        config = pipeline.scheduler.config
        if "beta_schedule" not in config or config.get("prediction_type") not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"The pipeline's scheduler is a {type(pipeline.scheduler).__name__} with prediction_type "
                f"{config.get('prediction_type')!r}, from which no DDIMScheduler for predicted noise (epsilon) or "
                "v_prediction can be made. Give the pipeline the scheduler that the U-Net was trained for."
            )
        if config.get("clip_sample", False) or config.get("thresholding", False):
            raise ValueError(
                f"The pipeline's {type(pipeline.scheduler).__name__} has clip_sample={config.get('clip_sample')} and "
                f"thresholding={config.get('thresholding')}: clipping is for pixels and would cut the latents off. "
                "Give the pipeline a scheduler without: pipeline.scheduler = DDIMScheduler.from_config("
                "pipeline.scheduler.config, clip_sample=False, thresholding=False)."
            )
        taken = {"num_class_embeds": [], "class_embed_type": [], "encoder_hid_dim_type": ["text_proj"]}
        for name, known in {**taken, "addition_embed_type": self._known_additions}.items():
            value = self.model.config.get(name)
            if value is not None and value not in known:
                raise ValueError(
                    f"The U-Net's config has {name}={value!r}: it takes an input besides the prompt, which is not "
                    "supported. Load a U-Net that draws from the prompt alone."
                )
        if self.model.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "The U-Net takes the guidance scale as an input (time_cond_proj_dim): it is distilled for a few steps "
                "of a consistency scheduler, and is not sampled with DDIM. Train the model that it was made from."
            )
        # PNDM has no clip_sample, and DDIM's default is to clip
        self.scheduler = DDIMScheduler.from_config(config, clip_sample=False)

    @classmethod
    def default_size(cls, pipeline: DiffusionPipeline) -> tuple[int, int]:
        own = pipeline.unet.config.sample_size
        if own is None:
            raise ValueError(
                "The U-Net's config has no sample_size (the height and width of the latents that it was trained on), "
                "from which its own image size is known. Say it: pipeline.unet.register_to_config(sample_size=64) "
                "for images of 512 x 512 pixels, 128 for 1024 x 1024."
            )
        height, width = (own, own) if isinstance(own, int) else own
        return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor

    def check_size(self, height: int, width: int) -> None:
        own_height, own_width = self.default_size(self.pipeline)
        multiple = max(8, self.pipeline.vae_scale_factor)
        if height % multiple or width % multiple:
            raise ValueError(
                f"height and width are {height} x {width}, but this model draws multiples of {multiple} pixels; its "
                f"own size is {own_height} x {own_width}. Set height={own_height} and width={own_width}."
            )
        if 2 * height * width < own_height * own_width:
            logger.warning(
                f"height and width are {height} x {width}, but this model was trained on {own_height} x {own_width}, "
                "and draws poor images when they are much smaller."
            )

    def compiled_parts(self, model: nn.Module) -> list[nn.Module]:
        return [model]  # half of the work is in its convolutions, of which each is another shape

    @property
    def fixed_sequence_length(self) -> int:
        return self.pipeline.text_encoder.config.max_position_embeddings

    @property
    def token_limit(self) -> int:
        return self.fixed_sequence_length

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.pipeline.tokenizer(list(prompts), verbose=False).input_ids]

    def encode_prompt(self, prompt: str) -> Tensors:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompt, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": prompt_embeds}

    def condition_shapes(self) -> Shapes:
        tokens = self.pipeline.text_encoder.config.max_position_embeddings
        return {"encoder_hidden_states": ((tokens, self.model.config.cross_attention_dim), self.dtype)}

    def schedule(self, num_inference_steps: int) -> DDIMSchedule:
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        # As in DDIMScheduler.step: rounded, a step may end a little beside the next one's timestep
        following = scheduler.timesteps - scheduler.config.num_train_timesteps // num_inference_steps
        alphas = scheduler.alphas_cumprod
        if scheduler.config.prediction_type == "epsilon" and not alphas[scheduler.timesteps].all():
            raise ValueError(
                "The scheduler begins at pure noise (rescale_betas_zero_snr, with timestep_spacing "
                f"{scheduler.config.timestep_spacing!r}), from which a U-Net that predicts the noise (epsilon) "
                "cannot step: there is no data in it. If the U-Net predicts v, set prediction_type='v_prediction' in "
                "the scheduler's config; else give the pipeline a scheduler without: pipeline.scheduler = "
                "DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=False)."
            )
        alphas_next = torch.where(following >= 0, alphas[following.clamp(min=0)], scheduler.final_alpha_cumprod)
        return DDIMSchedule(
            alphas_cumprod=alphas[scheduler.timesteps].to(self.device, torch.float32),
            alphas_cumprod_next=alphas_next.to(self.device, torch.float32),
            timesteps=scheduler.timesteps.to(self.device),
            prediction_type=scheduler.config.prediction_type,
        )

    def predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: Tensors) -> Tensor:
        added = {name: value.to(self.dtype) for name, value in condition.items()}  # besides the prompt: XL's
        return model(
            latents.to(self.dtype),
            timestep.expand(len(latents)),
            encoder_hidden_states=added.pop("encoder_hidden_states"),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """
    [`~diffusers.StableDiffusionXLPipeline`]: two text encoders, a U-Net that also gets the pooled prompt and the size
    of the image. As [`StableDiffusionBackbone`] in all else: DDIM, noise or `v` predicted.

    The released model draws well near 1024 x 1024 only. The empty prompt stands for none:
    where the pipeline's `force_zeros_for_empty_prompt` is set, it has embeddings of zeros, as in the pipeline without
    a negative prompt. No watermark is applied.

    Example:

    ```pycon
    >>> from trl_flow.backbones import StableDiffusionXLBackbone
    >>> StableDiffusionXLBackbone.component
    'unet'
    ```
    """

    _known_additions = ["text_time"]

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
