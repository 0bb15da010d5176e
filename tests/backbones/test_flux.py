"""What is particular to the FLUX backbones."""

from functools import partial

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from family_checks import Family, check_own_images, images_to_edit, ode_latents, random_lora
from peft import LoraConfig, get_peft_model
from tiny_flux import (
    tiny_flux_components,
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_kontext_pipeline,
)
from tiny_training import PROMPTS

from trl_flow.backbones import Flux2KleinBackbone, FluxBackbone, FluxKontextBackbone, get_backbone


@pytest.mark.parametrize(
    ("pipeline", "cls"),
    [
        (tiny_flux_pipeline, FluxBackbone),
        (tiny_klein_pipeline, Flux2KleinBackbone),
        (tiny_kontext_pipeline, FluxKontextBackbone),
    ],
)
def test_the_pipelines_class_chooses_the_backbone(pipeline, cls):
    assert type(get_backbone(pipeline(), height=16, width=16, max_sequence_length=16)) is cls


# ---- The stock pipeline's images ----


@pytest.mark.parametrize(
    ("make", "guided"),
    [
        (tiny_flux_pipeline, True),
        (partial(tiny_flux_pipeline, guidance_embeds=False), False),
        (tiny_klein_pipeline, True),
        (partial(tiny_klein_pipeline, is_distilled=True), False),
    ],
    ids=["dev", "schnell", "klein-base", "klein"],
)
def test_the_guidance_scale_changes_the_images_of_the_models_that_take_it(make, guided):
    backbone = Family(make, max_sequence_length=24).backbone()
    few, much = (ode_latents(backbone, scale, PROMPTS[:2]) for scale in (1.5, 6.0))
    assert ((few - much).abs().max() > 1e-3) == guided


@pytest.mark.parametrize(
    ("guidance_embeds", "parameters"),
    # "12 billion"; dev has two layers more, 256 x 3072 and 3072 x 3072 with their biases, to embed the guidance scale
    [(True, 11_901_408_320), (False, 11_901_408_320 - (256 * 3072 + 3072) - (3072 * 3072 + 3072))],
    ids=["dev", "schnell"],
)
def test_the_full_size(guidance_embeds, parameters):
    # FLUX.1's transformer has diffusers' default config; on the meta device, beside a VAE that makes images 8 times
    # smaller as the released one does
    components = tiny_flux_components(seed=0, guidance_embeds=guidance_embeds, vae_levels=4)
    components["vae"].register_to_config(latent_channels=16)
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=guidance_embeds)
    pipeline = FluxPipeline(**components | {"transformer": model})
    assert sum(p.numel() for p in model.parameters()) == parameters
    backbone = get_backbone(pipeline, height=512, width=768, max_sequence_length=512)
    assert backbone.latent_shape() == (32 * 48, 64)
    with torch.device("meta"):
        policy = get_peft_model(model, LoraConfig(r=64, target_modules=backbone.lora_target_modules))
    adapted = [name for name, _ in policy.named_parameters() if name.endswith("lora_A.default.weight")]
    # 12 layers in each of the 19 blocks of two streams, 3 in each of the 38 others
    assert len(adapted) == 12 * 19 + 3 * 38


def test_the_schedule_of_dev_by_hand():
    # 512 x 512 in 6 steps, as the papers train: 1,024 tokens, so mu = 0.5 + 0.65 (1024 - 256) / (4096 - 256) = 0.63,
    # and t becomes e^mu / (e^mu + 1 / t - 1)
    pipeline = FluxPipeline(**tiny_flux_components(seed=0, guidance_embeds=True, vae_levels=4))
    sigmas = get_backbone(pipeline, height=512, width=512, max_sequence_length=512).schedule(6).sigmas
    shift = torch.tensor(0.63, dtype=torch.float64).exp()
    even = torch.arange(6, 0, -1, dtype=torch.float64) / 6
    expected = torch.cat([shift / (shift + 1 / even - 1), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(sigmas, expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny_flux_pipeline, tiny_klein_pipeline, tiny_kontext_pipeline])
def test_a_size_that_the_pipeline_would_round_is_refused(make):
    with pytest.raises(ValueError, match="18 x 16, but this model draws multiples of 4 pixels. Set height=16 and"):
        Family(make).backbone((18, 16))


# ---- Editing ----


def test_an_image_is_seen_at_a_megapixel_as_in_the_pipeline():
    # 384 x 256 pixels at 1,216 x 832: of the model's own sizes the one closest to 2 / 3, in whole tokens of 64 pixels
    family = Family(partial(tiny_kontext_pipeline, vae_levels=6), in_batches=False)
    backbone = family.backbone((192, 128))
    condition = backbone.encode_prompt("a cat", images_to_edit(1, (192, 128))[0])
    assert condition["image_latents"].shape == (1, 19 * 13, 16)
    check_own_images(family, (192, 128), 2.5)
    # 96 x 64 is cut to whole tokens first, as in the pipeline: one, a square
    family.backbone((128, 128), backbone.pipeline).check_image_size(96, 64)


@pytest.mark.usefixtures("small_input_images")
def test_the_edited_image_changes_the_prediction():
    backbone = Family(tiny_kontext_pipeline).backbone()
    one, other = images_to_edit(2, (16, 16))
    condition, another = (backbone.encode_prompt("a cat", image) for image in (one, other))
    latents, timestep = torch.randn(1, *backbone.latent_shape()), torch.tensor(500.0)
    with torch.no_grad():
        edits = [backbone.guided_prediction(backbone.model, latents, timestep, c) for c in (condition, another)]
    assert edits[0].shape == latents.shape
    assert (edits[0] - edits[1]).abs().max() > 1e-3


def test_an_image_is_seen_at_the_released_size_that_is_closest():
    pipeline = tiny_kontext_pipeline()
    wide = get_backbone(pipeline, height=256, width=512, max_sequence_length=16)
    wide.check_image_size(350, 700)
    with pytest.raises(ValueError, match="sees it at 1024 x 1024, but for drawn images of 256 x 512 it must be 720 x"):
        wide.check_image_size(700, 700)


# ---- Adapters ----


JOINT = [f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
JOINT += [f"attn.add_{part}_proj" for part in "qkv"]
# Flow-GRPO's targets for FLUX.1-dev: "attn.to_q" and the like also name layers of the blocks with one stream
DEV = JOINT + [f"{ff}.{layer}" for ff in ("ff", "ff_context") for layer in ("net.0.proj", "net.2")]


@pytest.mark.parametrize(
    ("make", "blocks", "single"),
    [
        (tiny_flux_pipeline, DEV, ["attn.to_q", "attn.to_k", "attn.to_v"]),
        (tiny_kontext_pipeline, DEV, ["attn.to_q", "attn.to_k", "attn.to_v"]),
        (tiny_klein_pipeline, JOINT, ["attn.to_qkv_mlp_proj"]),
    ],
    ids=["dev", "kontext", "klein"],
)
def test_the_default_targets(make, blocks, single):
    model = random_lora(Family(make).backbone())
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    expected = {f"transformer_blocks.0.{layer}" for layer in blocks}
    expected |= {f"single_transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in single}
    assert {name.removeprefix("base_model.model.") for name in adapted} == expected
