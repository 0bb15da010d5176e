"""All families, each with its tiny pipeline and what it is drawn and trained with."""

from functools import partial

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from family_checks import Family
from tiny_flux import tiny_flux_pipeline, tiny_klein_pipeline, tiny_kontext_pipeline
from tiny_models import CLIP_TOKENS, tiny_sd3_pipeline
from tiny_qwen import tiny_qwen_edit_pipeline, tiny_qwen_image_pipeline, tiny_z_image_pipeline
from tiny_sd35 import tiny_sd35_pipeline
from tiny_unets import tiny_sd_pipeline, tiny_sdxl_pipeline
from tiny_wan import (
    FRAMES,
    tiny_wan_5b_pipeline,
    tiny_wan_experts_pipeline,
    tiny_wan_i2v_experts_pipeline,
    tiny_wan_i2v_pipeline,
    tiny_wan_pipeline,
)


def unpacked(backbone, noise):
    # FLUX.2's pipeline packs the latents that it is given
    return noise.mT.unflatten(2, backbone._grid())


SD3 = {"max_sequence_length": CLIP_TOKENS}
SD35 = SD3 | {"size": (64, 64), "other_size": (48, 96), "guidance_scale": 4.5}
UNET = {"size": (32, 32), "other_size": (24, 40), "max_sequence_length": CLIP_TOKENS, "guidance_scale": 7.5}
UNET |= {"atol": 1e-4}
KLEIN = {"max_sequence_length": 34, "latents": unpacked, "guidance_scale": 4.0}
EDIT = {"size": (64, 64), "other_size": (96, 32), "max_sequence_length": 20, "in_batches": False}
WAN = {"size": (16, 32), "other_size": (48, 16), "settings": {"num_frames": FRAMES}}
LOW = WAN | {"settings": WAN["settings"] | {"component": "transformer_2", "guidance_scale_2": 1.5}}
FAMILIES = {
    "sd3": Family(tiny_sd3_pipeline, **SD3),
    "sd35-medium": Family(partial(tiny_sd35_pipeline, "medium"), **SD35),
    "sd35-large": Family(partial(tiny_sd35_pipeline, "large"), **SD35),
    "sd": Family(tiny_sd_pipeline, **UNET),
    "sd-v": Family(partial(tiny_sd_pipeline, prediction_type="v_prediction"), **UNET),
    "sdxl": Family(tiny_sdxl_pipeline, **UNET),
    "sdxl-v": Family(partial(tiny_sdxl_pipeline, prediction_type="v_prediction"), **UNET),
    "flux-dev": Family(tiny_flux_pipeline, guidance_scale=3.5),
    "flux-schnell": Family(partial(tiny_flux_pipeline, guidance_embeds=False)),
    "kontext": Family(tiny_kontext_pipeline, in_batches=False),
    "klein-base": Family(tiny_klein_pipeline, **KLEIN),
    "klein": Family(partial(tiny_klein_pipeline, is_distilled=True), **KLEIN),
    "qwen-image": Family(tiny_qwen_image_pipeline, max_sequence_length=40),
    "qwen-image-edit": Family(partial(tiny_qwen_edit_pipeline, QwenImageEditPipeline), **EDIT),
    "qwen-image-edit-plus": Family(partial(tiny_qwen_edit_pipeline, QwenImageEditPlusPipeline), **EDIT),
    # Captions of up to 42 tokens, which the transformer fills up to 32 or 64
    "z-image": Family(tiny_z_image_pipeline, max_sequence_length=48, unguided=0.0),
    "wan21": Family(tiny_wan_pipeline, **WAN),
    "wan22-5b": Family(tiny_wan_5b_pipeline, **WAN | {"size": (32, 64), "other_size": (64, 32)}),
    "wan22-high": Family(tiny_wan_experts_pipeline, **WAN),
    "wan22-low": Family(tiny_wan_experts_pipeline, **LOW),
    "wan21-i2v": Family(tiny_wan_i2v_pipeline, **WAN, in_batches=False),
    "wan22-i2v": Family(tiny_wan_i2v_experts_pipeline, **LOW, in_batches=False),
}
