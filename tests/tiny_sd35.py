"""Stable Diffusion 3.5 Medium and Large: the configs as released, and pipelines made small of them."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_models import JOINT_WIDTH, POOLED_WIDTH, tiny_sd3_pipeline


# transformer/config.json, vae/config.json and scheduler/scheduler_config.json of the two repositories. The last two
# are the same in both.
MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
    "qk_norm": "rms_norm",
}
LARGE = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}

# What makes them small: one block of each kind, two heads of 8. Positions stay 6 and 3 times the model's own size.
SMALL = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": JOINT_WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 2 * POOLED_WIDTH,
}
MODELS = {
    "medium": (MEDIUM, {"dual_attention_layers": (0,), "pos_embed_max_size": 24}),
    "large": (LARGE, {"pos_embed_max_size": 12}),
}


def tiny_sd35_pipeline(name: str) -> StableDiffusion3Pipeline:
    """A complete pipeline with random weights that draws 64 x 64 images from latents of shape `(16, 8, 8)`."""
    pipeline = tiny_sd3_pipeline()
    released, smaller = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(**released | SMALL | smaller).eval()
        vae = AutoencoderKL(**VAE | {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 4, "sample_size": 64})
    own = {"transformer": transformer, "vae": vae.eval(), "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER)}
    pipeline = StableDiffusion3Pipeline(**pipeline.components | own)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
