"""The FLUX backbones compute what the stock pipelines compute, and train with every config."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from family_checks import (
    STEPS,
    Family,
    assert_schedule_of_the_pipeline,
    check_adapter,
    check_noise_level_0,
    check_training,
    drawn_by_the_pipeline,
    images_to_edit,
    ode_latents,
    ratio_deviation,
)
from peft import LoraConfig, get_peft_model
from tiny_flux import (
    tiny_flux_components,
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_kontext_pipeline,
    tiny_kontext_sizes,
)
from tiny_training import PROMPTS

from trl_flow import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig
from trl_flow.backbones import Flux2KleinBackbone, FluxBackbone, FluxKontextBackbone, get_backbone


@pytest.fixture(autouse=True)
def small_pictures():
    with tiny_kontext_sizes():
        yield


def klein_call(backbone, noise, guidance_scale):
    # The pipeline packs the latents that it is given
    height, width = backbone._grid()
    return {"latents": noise.mT.unflatten(2, (height, width)), "guidance_scale": guidance_scale}


def kontext_call(backbone, noise, guidance_scale):
    return {"latents": noise, "guidance_scale": guidance_scale, "max_area": backbone.height * backbone.width}


FAMILIES = {
    "dev": Family(tiny_flux_pipeline, guidance_scale=3.5),
    "schnell": Family(lambda: tiny_flux_pipeline(guidance_embeds=False)),
    "klein-base": Family(tiny_klein_pipeline, max_sequence_length=24, call=klein_call, guidance_scale=4.0),
    "klein": Family(lambda: tiny_klein_pipeline(is_distilled=True), max_sequence_length=24, call=klein_call),
    "kontext": Family(tiny_kontext_pipeline, call=kontext_call, guidance_scale=2.5),
}
# Those whose steps of training differ; the others differ in the guidance only
TRAINED = ("dev", "klein-base", "kontext")
each_family = pytest.mark.parametrize("name", FAMILIES)


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


@each_family
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("size", [(16, 16), (24, 8)], ids=str)
def test_noise_level_0_draws_the_pipelines_own_images(name, size, guidance_scale):
    # The last digits: prompts are encoded one by one here, and true guidance is one forward, not two
    check_noise_level_0(FAMILIES[name], size, guidance_scale, atol=2e-6)


@each_family
def test_the_guidance_scale_changes_the_images_of_the_models_that_are_told_it(name):
    backbone = FAMILIES[name].backbone()
    few, much = (ode_latents(backbone, scale, PROMPTS[:2]) for scale in (1.5, 6.0))
    assert torch.equal(few, much) == (name in ("schnell", "klein"))


@each_family
def test_the_prompt_changes_the_image(name):
    backbone = FAMILIES[name].backbone()
    assert (ode_latents(backbone, 1.0, ["a cat"]) - ode_latents(backbone, 1.0, ["two dogs"])).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(16, 16), (24, 8)], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "shift_terminal": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TRAINED)
def test_every_scheduler_of_the_pipeline_keeps_its_noise_levels(name, config, size):
    pipeline = FAMILIES[name].make_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    backbone = FAMILIES[name].backbone(size, pipeline)
    drawn_by_the_pipeline(FAMILIES[name], backbone, 1.0, PROMPTS[:1])
    assert_schedule_of_the_pipeline(backbone)


@pytest.mark.parametrize("name", TRAINED)
def test_the_size_of_the_image_moves_the_schedule(name):
    small, large = (FAMILIES[name].backbone(size).schedule(STEPS).sigmas for size in [(16, 16), (64, 64)])
    assert (large[1:-1] > small[1:-1]).all()


@pytest.mark.parametrize(
    ("guidance_embeds", "parameters"),
    # "12 billion"; dev has two layers more, 256 x 3072 and 3072 x 3072 with their biases, to embed the guidance scale
    [(True, 11_901_408_320), (False, 11_901_408_320 - (256 * 3072 + 3072) - (3072 * 3072 + 3072))],
    ids=["dev", "schnell"],
)
def test_the_full_size(guidance_embeds, parameters):
    # FLUX.1's transformer has diffusers' default config; on the meta device, beside a VAE that makes pictures 8 times
    # smaller as the released one does
    components = tiny_flux_components(seed=0, guidance_embeds=guidance_embeds, vae_levels=4)
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


@each_family
def test_a_size_that_the_pipeline_would_round_is_refused(name):
    with pytest.raises(ValueError, match="18 x 16, but this model draws multiples of 4 pixels. Set height=16 and"):
        FAMILIES[name].backbone((18, 16))


# ---- Editing ----


def test_a_picture_is_seen_at_a_megapixel_as_in_the_pipeline(tmp_path):
    # 48 x 32 pixels at 1,216 x 832: of the model's own sizes the one closest to 2 / 3, in whole tokens of 64 pixels
    assert PREFERRED_KONTEXT_RESOLUTIONS[:2] == [(8, 24), (16, 16)]
    PREFERRED_KONTEXT_RESOLUTIONS[:] = [(832, 1248), (1024, 1024), (1248, 832)]
    family = Family(lambda: tiny_kontext_pipeline(vae_levels=6), call=kontext_call)
    backbone = family.backbone((192, 128))
    condition = backbone.encode_prompt("a cat", images_to_edit(1, (192, 128))[0])
    assert condition["image_latents"].shape == (1, 19 * 13, 16)
    check_noise_level_0(family, (192, 128), 2.5, atol=5e-6)
    # 96 x 64 is cut to whole tokens first, as in the pipeline: one, a square
    family.backbone((128, 128), backbone.pipeline).check_image_size(96, 64)


def test_the_picture_changes_the_image():
    backbone = FAMILIES["kontext"].backbone()
    one, other = images_to_edit(2, (16, 16))
    condition, another = (backbone.encode_prompt("a cat", image) for image in (one, other))
    latents, timestep = torch.randn(1, *backbone.latent_shape()), torch.tensor(500.0)
    with torch.no_grad():
        edits = [backbone.guided_prediction(backbone.model, latents, timestep, c) for c in (condition, another)]
    assert edits[0].shape == latents.shape
    assert (edits[0] - edits[1]).abs().max() > 1e-3


def test_the_released_sizes():
    released = [(672, 1568), (1024, 1024), (1568, 672)]
    PREFERRED_KONTEXT_RESOLUTIONS[:] = released
    pipeline = tiny_kontext_pipeline()
    wide = get_backbone(pipeline, height=256, width=512, max_sequence_length=16)
    wide.check_image_size(300, 700)
    with pytest.raises(ValueError, match="sees it at 1024 x 1024, but for drawn images of 256 x 512 it must be 672 x"):
        wide.check_image_size(700, 700)


# ---- Training ----


@pytest.mark.parametrize(
    ("cls", "dtype"),
    [
        (FlowGRPOConfig, torch.float32),
        (GuardConfig, torch.bfloat16),
        (SLASConfig, torch.float32),
        (VGPOConfig, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TRAINED)
def test_every_config_trains(name, cls, dtype, tmp_path):
    check_training(FAMILIES[name], cls, dtype, tmp_path)


@each_family
def test_another_batch_size_leaves_the_ratio_at_1(name):
    # Measured on a CPU: at most 1.2e-7 in float32 (one step of a float next to 1) and 0 in bf16
    assert ratio_deviation(FAMILIES[name], torch.float32) < 1e-6
    assert ratio_deviation(FAMILIES[name], torch.bfloat16) < 1e-5


@pytest.mark.parametrize(
    ("name", "blocks", "single"),
    [
        # Flow-GRPO's targets for FLUX.1-dev: "attn.to_q" and the like also name layers of the blocks with one stream
        (
            "dev",
            [f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
            + [f"attn.add_{part}_proj" for part in "qkv"]
            + [f"{ff}.{layer}" for ff in ("ff", "ff_context") for layer in ("net.0.proj", "net.2")],
            ["attn.to_q", "attn.to_k", "attn.to_v"],
        ),
        (
            "kontext",
            [f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
            + [f"attn.add_{part}_proj" for part in "qkv"]
            + [f"{ff}.{layer}" for ff in ("ff", "ff_context") for layer in ("net.0.proj", "net.2")],
            ["attn.to_q", "attn.to_k", "attn.to_v"],
        ),
        (
            "klein-base",
            [f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
            + [f"attn.add_{part}_proj" for part in "qkv"],
            ["attn.to_qkv_mlp_proj"],
        ),
    ],
)
def test_the_adapter_draws_the_same_images_in_the_stock_pipeline(name, blocks, single, tmp_path):
    adapted = check_adapter(FAMILIES[name], tmp_path)
    expected = {f"transformer_blocks.0.{layer}" for layer in blocks}
    expected |= {f"single_transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in single}
    assert adapted == expected
