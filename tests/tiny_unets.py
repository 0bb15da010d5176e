"""Tiny Stable Diffusion and Stable Diffusion XL pipelines of stock classes with random weights."""

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_models import CLIP_WIDTH, POOLED_WIDTH, tiny_clip, tiny_clip_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel


# scheduler_config.json of the releases, the same in 1.4, 1.5 (PNDM), 2.x (PNDM, or DDIM for v) and XL (Euler)
SCHEDULER_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


def tiny_vae(**config) -> AutoencoderKL:
    """Four latent channels, halved twice: 32 x 32 pixels from 8 x 8."""
    return AutoencoderKL(
        **{
            "block_out_channels": (4, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 32,
            "scaling_factor": 0.18215,
        }
        | config
    ).eval()


def tiny_unet(**config) -> UNet2DConditionModel:
    """One attention block down and up, and one in the middle; latents of 4 channels, 8 x 8."""
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": CLIP_WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        }
        | config
    ).eval()


def tiny_clip_without_projection(tokenizer) -> CLIPTextModel:
    config = tiny_clip(tokenizer).config.to_dict()
    return CLIPTextModel(CLIPTextConfig(**config)).eval()


def tiny_sd_pipeline(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """
    A complete Stable Diffusion pipeline with the scheduler that 1.4 and 1.5 are released with, without safety checker.

    It draws 32 x 32 images from latents of shape `(4, 8, 8)`. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_clip_tokenizer()
        unet, vae, text_encoder = tiny_unet(), tiny_vae(), tiny_clip_without_projection(tokenizer)
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=PNDMScheduler.from_config(SCHEDULER_CONFIG, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl_pipeline(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """
    A complete Stable Diffusion XL pipeline with the scheduler that 1.0 is released with; as `tiny_sd_pipeline`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_clip_tokenizer()
        unet = tiny_unet(
            cross_attention_dim=2 * CLIP_WIDTH,
            attention_head_dim=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED_WIDTH,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        )
        vae = tiny_vae(scaling_factor=0.13025, force_upcast=True)
        text_encoder, text_encoder_2 = tiny_clip_without_projection(tokenizer), tiny_clip(tokenizer).eval()
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tiny_clip_tokenizer(),
        scheduler=EulerDiscreteScheduler.from_config(SCHEDULER_CONFIG, prediction_type=prediction_type),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
