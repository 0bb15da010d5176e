"""Tiny pipelines of the FLUX families with random weights: everything real but the size."""

import contextlib
from collections.abc import Iterator

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from tiny_models import (
    CLIP_WIDTH,
    JOINT_WIDTH,
    tiny_clip_config,
    tiny_clip_tokenizer,
    tiny_flow_vae,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_vae_config,
)
from tiny_qwen import TEXT_WIDTH, tiny_qwen3_config, tiny_qwen_tokenizer
from transformers import CLIPTextModel, Qwen3ForCausalLM


# As FLUX.1-dev's; schnell's has neither the shifting nor the shift: {"shift": 1.0}
FLUX_SCHEDULER = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


def tiny_flux_transformer(*, guidance_embeds: bool) -> FluxTransformer2DModel:
    """One block of two streams and two of one, of two heads of 8; packed latents of 4 x 2 x 2 channels."""
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def tiny_flux_components(*, seed: int, guidance_embeds: bool, vae_levels: int) -> dict:
    """The parts of a FLUX.1 pipeline; the VAE makes images `2 ** (vae_levels - 1)` times smaller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = tiny_flux_transformer(guidance_embeds=guidance_embeds)
        tokenizer, tokenizer_2 = tiny_clip_tokenizer(), tiny_t5_tokenizer()
        text_encoder = CLIPTextModel(tiny_clip_config(tokenizer)).eval()
        text_encoder_2 = tiny_t5(tokenizer_2)
        vae = tiny_flow_vae(vae_levels)
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "text_encoder_2": text_encoder_2,
        "tokenizer_2": tokenizer_2,
    }


def tiny_flux_pipeline(seed: int = 0, *, guidance_embeds: bool = True) -> FluxPipeline:
    """
    A complete FLUX.1 pipeline with random float32 weights, in evaluation mode: dev, or schnell without
    `guidance_embeds`.

    It draws 16 x 16 images from packed latents of shape `(16, 16)`. The global random state is left as it was.
    """
    components = tiny_flux_components(seed=seed, guidance_embeds=guidance_embeds, vae_levels=2)
    if not guidance_embeds:
        components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline = FluxPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def tiny_kontext_sizes() -> Iterator[None]:
    """In place of the sizes of a megapixel at which Kontext sees images, three of some 200 pixels."""
    released = PREFERRED_KONTEXT_RESOLUTIONS[:]
    PREFERRED_KONTEXT_RESOLUTIONS[:] = [(8, 24), (16, 16), (24, 8)]
    try:
        yield
    finally:
        PREFERRED_KONTEXT_RESOLUTIONS[:] = released


def tiny_kontext_pipeline(seed: int = 0, *, vae_levels: int = 2) -> FluxKontextPipeline:
    """
    A complete FLUX.1 Kontext pipeline with random float32 weights, in evaluation mode.

    It sees images at a megapixel, as the real one does: either within `tiny_kontext_sizes`, or with 6 `vae_levels`,
    of which a token is 64 x 64 pixels. The global random state is left as it was.
    """
    pipeline = FluxKontextPipeline(**tiny_flux_components(seed=seed, guidance_embeds=True, vae_levels=vae_levels))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_klein_pipeline(seed: int = 0, *, is_distilled: bool = False) -> Flux2KleinPipeline:
    """
    A complete FLUX.2 klein pipeline with random float32 weights, in evaluation mode.

    It draws 16 x 16 images from packed latents of shape `(16, 16)`. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=3 * TEXT_WIDTH,  # of three of the text encoder's layers
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ).eval()
        vae = AutoencoderKLFlux2(**tiny_vae_config()).eval()
        # Each channel of the packed latents has a mean and a spread of its own
        torch.nn.init.normal_(vae.bn.running_mean)
        torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
        tokenizer = tiny_qwen_tokenizer()
        # The pipeline reads the 9th, 18th and 27th layer
        text_encoder = Qwen3ForCausalLM(tiny_qwen3_config(tokenizer, num_hidden_layers=27)).eval()
    pipeline = Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
