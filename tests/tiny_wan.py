"""Tiny Wan pipelines of stock classes with random weights: everything real but the size."""

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_models import tiny_t5_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


TEXT_WIDTH = 16  # of the text encoder
IMAGE_WIDTH = 8  # of the image encoder
# Of a video's frames; 5 make two of latents
FRAMES = 5
# What differs in scheduler_config.json of Wan-AI/Wan2.1-T2V-14B-Diffusers from the class's defaults
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def tiny_wan_vae(z_dim: int = 4, **config) -> AutoencoderKLWan:
    """Frames of 8 times the latents' size (the 5B's: 16), one and four for each further frame of latents."""
    statistics = {"latents_mean": [0.1, -0.2] * (z_dim // 2), "latents_std": [0.8, 1.5] * (z_dim // 2)}
    sizes = {"base_dim": 4, "z_dim": z_dim, "num_res_blocks": 1, "dim_mult": [1, 2, 2, 2]}
    return AutoencoderKLWan(**sizes, **statistics, **config).eval()


def tiny_wan_transformer(
    seed: int = 0, in_channels: int = 4, out_channels: int = 4, **config
) -> WanTransformer3DModel:
    """Two blocks of two heads of 12."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        **config,
    )
    return transformer.eval()


def tiny_umt5(vocab_size: int) -> UMT5EncoderModel:
    """One layer of two heads of 8."""
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **sizes)).eval()


def _parts(vae: AutoencoderKLWan) -> dict:
    tokenizer = tiny_t5_tokenizer()
    scheduler = UniPCMultistepScheduler(**SCHEDULER)
    return {"tokenizer": tokenizer, "text_encoder": tiny_umt5(len(tokenizer)), "vae": vae, "scheduler": scheduler}


def _with_defaults(cls: type, **parts):
    pipeline = cls(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_wan_pipeline(seed: int = 0) -> WanPipeline:
    """Wan 2.1. The global random state is left as it was, here and below."""
    with torch.random.fork_rng(devices=[]):
        return _with_defaults(WanPipeline, transformer=tiny_wan_transformer(seed), **_parts(tiny_wan_vae()))


def tiny_wan_5b_pipeline() -> WanPipeline:
    """Wan 2.2's 5B: a time for each token, and a VAE of 2 x 2 patches."""
    with torch.random.fork_rng(devices=[]):
        transformer = tiny_wan_transformer(in_channels=6, out_channels=6)
        patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True}
        vae = tiny_wan_vae(6, decoder_base_dim=4, scale_factor_spatial=16, **patches)
        return _with_defaults(WanPipeline, transformer=transformer, expand_timesteps=True, **_parts(vae))


def tiny_wan_experts_pipeline() -> WanPipeline:
    """Wan 2.2's A14B: of three steps the first two are above the boundary."""
    with torch.random.fork_rng(devices=[]):
        experts = {"transformer": tiny_wan_transformer(), "transformer_2": tiny_wan_transformer(seed=1)}
        return _with_defaults(WanPipeline, **experts, boundary_ratio=0.8, **_parts(tiny_wan_vae()))


def tiny_wan_i2v_pipeline() -> WanImageToVideoPipeline:
    """Wan 2.1 from a first frame, which it reads by an image encoder, too."""
    with torch.random.fork_rng(devices=[]):
        images = {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": 24}
        transformer = tiny_wan_transformer(in_channels=12, **images)
        sizes = {"hidden_size": IMAGE_WIDTH, "intermediate_size": 16, "num_hidden_layers": 2}
        encoder = CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8)).eval()
        size = {"height": 16, "width": 16}
        processor = CLIPImageProcessorPil(size=size, crop_size=size)
        parts = {"transformer": transformer, "image_encoder": encoder, "image_processor": processor}
        return _with_defaults(WanImageToVideoPipeline, **parts, **_parts(tiny_wan_vae()))


def tiny_wan_i2v_experts_pipeline() -> WanImageToVideoPipeline:
    """Wan 2.2's A14B from a first frame."""
    with torch.random.fork_rng(devices=[]):
        experts = {
            f"transformer{end}": tiny_wan_transformer(seed, in_channels=12) for seed, end in enumerate(("", "_2"))
        }
        return _with_defaults(WanImageToVideoPipeline, **experts, boundary_ratio=0.8, **_parts(tiny_wan_vae()))
