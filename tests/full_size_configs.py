"""Folders with the configuration files of released models, as their repositories on the Hub have them; no weights."""

import json
from pathlib import Path


CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "model_type": "clip_text_model",
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "model_type": "t5",
    "tie_word_embeddings": False,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
VAE_16 = VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": list(range(13)),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
SD35_LARGE = SD35_MEDIUM | {
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
    "num_attention_heads": 38,
    "num_layers": 38,
    "pos_embed_max_size": 192,
}
FLUX_DEV = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
SD14_UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "sample_size": 64,
}
FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def _sd35(transformer: dict) -> dict:
    return {
        "class": "StableDiffusion3Pipeline",
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", FLOW_SCHEDULER),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G),
        "text_encoder_3": ("transformers", "T5EncoderModel", T5_XXL),
        "tokenizer": ("transformers", "CLIPTokenizer", None),
        "transformer": ("diffusers", "SD3Transformer2DModel", transformer),
        "vae": ("diffusers", "AutoencoderKL", VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
    }


def _wan(transformer: dict) -> dict:
    umt5 = T5_XXL | {"vocab_size": 256384, "model_type": "umt5"}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "class": "WanPipeline",
        "scheduler": ("diffusers", "UniPCMultistepScheduler", {"_class_name": "UniPCMultistepScheduler"} | flow),
        "text_encoder": ("transformers", "UMT5EncoderModel", umt5),
        "tokenizer": ("transformers", "T5TokenizerFast", None),
        "transformer": ("diffusers", "WanTransformer3DModel", {"_class_name": "WanTransformer3DModel"} | transformer),
        "vae": ("diffusers", "AutoencoderKLWan", {"_class_name": "AutoencoderKLWan"}),
    }


# The classes' defaults are Wan 2.1's VAE and its transformer of 14B
MODELS = {
    "wan21-1.3b": _wan({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan21-14b": _wan({}),
    "sd35-medium": _sd35(SD35_MEDIUM),
    "sd35-large": _sd35(SD35_LARGE),
    "flux-dev": {
        "class": "FluxPipeline",
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", FLOW_SCHEDULER | {"use_dynamic_shifting": True}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "T5EncoderModel", T5_XXL),
        "tokenizer": ("transformers", "CLIPTokenizer", None),
        "transformer": ("diffusers", "FluxTransformer2DModel", FLUX_DEV),
        "vae": ("diffusers", "AutoencoderKL", VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
    },
    "sd14": {
        "class": "StableDiffusionPipeline",
        "scheduler": (
            "diffusers",
            "PNDMScheduler",
            {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"},
        ),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "tokenizer": ("transformers", "CLIPTokenizer", None),
        "unet": ("diffusers", "UNet2DConditionModel", SD14_UNET),
        "vae": ("diffusers", "AutoencoderKL", VAE | {"latent_channels": 4, "sample_size": 512}),
    },
}


def write_configs(name: str, folder: Path) -> Path:
    """Writes `model_index.json` and the configuration of each part of one of `MODELS`."""
    parts = dict(MODELS[name])
    index = {"_class_name": parts.pop("class"), "_diffusers_version": "0.42.0"}
    for part, (library, class_name, config) in parts.items():
        index[part] = [library, class_name]
        if config is not None:
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            (folder / part).mkdir(parents=True)
            (folder / part / file).write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
