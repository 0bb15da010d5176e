"""A faster decoder for predictions that are scored and thrown away."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import AutoencoderTiny
from torch import nn

from trl_flow.backbones.base import Backbone


def load_projection_vae(given: str | os.PathLike | nn.Module, backbone: Backbone) -> nn.Module:
    """
    The decoder that `projection_vae` names: a hub id or folder of an [`~diffusers.AutoencoderTiny`], or a module,
    which is that or of the class of the pipeline's VAE.

    Raises:
        ValueError: if it cannot be loaded, or decodes other latents than the pipeline's VAE does.
    """
    own = backbone.pipeline.vae
    vae = given
    if isinstance(given, str | os.PathLike):
        try:
            vae = AutoencoderTiny.from_pretrained(given, torch_dtype=own.dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"projection_vae is {str(given)!r}, which cannot be loaded as an AutoencoderTiny: {error}. Give a hub "
                "id such as 'madebyollin/taesd3' (SD3) or 'madebyollin/taef1' (FLUX), a folder of one, or a module."
            ) from error
    whose, own_class = f"the VAE of {type(backbone.pipeline).__name__}", type(own).__name__
    if not isinstance(vae, AutoencoderTiny | type(own)):
        raise ValueError(
            f"projection_vae is a {type(vae).__name__}, but {whose} is an {own_class}. Give an AutoencoderTiny, or "
            f"an {own_class} that decodes the same latents."
        )
    if isinstance(vae, AutoencoderTiny) and "z_dim" in own.config:
        raise ValueError(
            f"projection_vae is an AutoencoderTiny, but {whose} is an {own_class}, whose latents have an axis for "
            f"time. Give a smaller {own_class} that decodes the same latents, or leave projection_vae out."
        )
    channels, wanted = (config.get("latent_channels") or config.get("z_dim") for config in (vae.config, own.config))
    if channels != wanted:
        raise ValueError(
            f"projection_vae decodes latents of {channels} channels, but those of {whose} have {wanted}. Give one "
            "that was made for this model."
        )
    return vae.eval().requires_grad_(False)


@contextmanager
def decoding_with(backbone: Backbone, vae: nn.Module | None) -> Iterator[None]:
    """Within it `backbone.decode` decodes with another VAE; with its own if that is `None`."""
    # In the pipeline's place, as diffusers advises: so it holds for backbones of users' own, too
    pipeline, own = backbone.pipeline, backbone.pipeline.vae
    if vae is not None:
        pipeline.vae = vae.to(backbone.device)
    try:
        yield
    finally:
        pipeline.vae = own
