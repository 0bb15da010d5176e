"""A faster decoder for images that are only scored."""

import copy

import pytest
import torch
from diffusers import AutoencoderTiny
from families import FAMILIES
from tiny_models import tiny_sd3_pipeline
from tiny_training import tiny_trainer

from trl_flow import FlowGRPOConfig
from trl_flow.backbones.projection import decoding_with, load_projection_vae


def tiny_decoder(channels: int, levels: int = 2) -> AutoencoderTiny:
    """Draws `2 ** (levels - 1)` times as large as its latents."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(8,) * levels,
            num_encoder_blocks=(0,) * levels,
            decoder_block_out_channels=(8,) * levels,
            num_decoder_blocks=(1,) * levels,
        )


def channels_of(backbone) -> int:
    return backbone.pipeline.vae.config.latent_channels


@pytest.mark.parametrize("name", ["sd3", "sd", "sdxl", "flux-dev", "kontext", "klein", "z-image"])
@torch.no_grad()
def test_every_family_with_a_vae_for_images_decodes_with_a_tiny_one(name):
    backbone = FAMILIES[name].backbone()
    own = backbone.pipeline.vae
    latents = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    before = backbone.decode(latents)
    vae = load_projection_vae(tiny_decoder(channels_of(backbone), levels=2), backbone)
    with decoding_with(backbone, vae):
        drawn = backbone.decode(latents)
    assert len(drawn) == 2 and drawn != before
    assert backbone.pipeline.vae is own and backbone.decode(latents) == before


@torch.no_grad()
def test_it_takes_latents_as_they_are_scaled_for_the_transformer():
    # As in diffusers, where its scaling factor is 1 and its shift 0
    backbone = FAMILIES["sd3"].backbone()
    latents = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    vae = load_projection_vae(tiny_decoder(channels_of(backbone)), backbone)
    expected = backbone.pipeline.image_processor.postprocess(vae.decode(latents).sample, output_type="pil")
    with decoding_with(backbone, vae):
        assert backbone.decode(latents) == expected


def test_a_folder_is_loaded_and_an_error_leaves_the_vae_in_its_place(tmp_path):
    backbone = FAMILIES["sd3"].backbone()
    own = backbone.pipeline.vae
    tiny_decoder(channels_of(backbone)).save_pretrained(tmp_path)
    vae = load_projection_vae(tmp_path, backbone)
    with pytest.raises(ZeroDivisionError), decoding_with(backbone, vae):
        assert backbone.pipeline.vae is vae
        raise ZeroDivisionError
    assert backbone.pipeline.vae is own
    with decoding_with(backbone, None):
        assert backbone.pipeline.vae is own


@pytest.mark.parametrize(
    "family, given, message",
    [
        ("sd3", "no/such/model", "(?s)'no/such/model', which cannot be loaded as an AutoencoderTiny.*taesd3"),
        ("sd3", tiny_decoder(3), "latents of 3 channels, but those of the VAE of StableDiffusion3Pipeline have"),
        ("sd3", torch.nn.Linear(1, 1), "is a Linear, but .* is an AutoencoderKL. Give an AutoencoderTiny"),
        ("wan21", tiny_decoder(4), "is an AutoencoderKLWan, whose latents have an axis for time. Give a smaller"),
    ],
)
def test_what_decodes_other_latents_is_refused(family, given, message):
    backbone = FAMILIES[family].backbone()
    with pytest.raises(ValueError, match=message):
        load_projection_vae(given, backbone)


def test_a_smaller_vae_of_a_video_familys_own_class_is_taken():
    backbone = FAMILIES["wan21"].backbone()
    other = copy.deepcopy(backbone.pipeline.vae)
    assert load_projection_vae(other, backbone) is other


def test_only_unfinished_images_are_decoded_by_it(tmp_path):
    sizes = []

    def reward(prompts, images, **kwargs):
        sizes.append({image.size for image in images})
        return [float(i) for i in range(len(images))]

    pipeline = tiny_sd3_pipeline()
    vae = tiny_decoder(pipeline.vae.config.latent_channels, levels=1)  # half as large as the VAE's images
    fields = {"num_inference_steps": 3, "max_steps": 1, "dense_rewards": True, "projection_vae": vae}
    trainer = tiny_trainer(tmp_path, pipeline=pipeline, reward_funcs=reward, **fields)
    trainer.train()
    assert sizes == [{(16, 16)}, {(8, 8)}, {(8, 8)}]
    assert trainer.args.projection_vae == "AutoencoderTiny"


def test_without_unfinished_images_it_is_refused():
    with pytest.raises(ValueError, match="projection_vae is set, but dense_rewards is False"):
        FlowGRPOConfig("unused", projection_vae="madebyollin/taesd3", use_cpu=True)
