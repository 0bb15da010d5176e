"""Stable Diffusion 1.x, 2.x and XL: the backbones compute what the stock pipelines compute with a DDIM scheduler."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from family_checks import (
    STEPS,
    assert_same_images,
    initial_noise,
    ode_latents,
)
from tiny_models import CLIP_TOKENS
from tiny_training import (
    assert_equal,
    distance,
    tiny_trainer,
    trained_weights,
    warnings_of,
)
from tiny_unets import SCHEDULER_CONFIG, tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_unet, tiny_vae

from trl_flow import FlowGRPOConfig, VGPOConfig
from trl_flow.backbones import StableDiffusionBackbone, StableDiffusionXLBackbone, get_backbone


FAMILIES = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}
PROMPTS = ["a red circle", "two blue squares"]

each_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def no_grad(request):
    # as the trainer calls a backbone
    with torch.set_grad_enabled("tmp_path" in request.fixturenames):
        yield


def make_backbone(pipeline, **size) -> StableDiffusionBackbone:
    return get_backbone(pipeline, **{"height": 32, "width": 32, "max_sequence_length": CLIP_TOKENS} | size)


def drawn_by_the_pipeline(backbone, guidance_scale: float, output_type: str, negative_prompt: str | None = None):
    """The same by the stock pipeline, whose scheduler becomes DDIM as its users write it."""
    pipeline = backbone.pipeline
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline(
        PROMPTS,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(PROMPTS),
        height=backbone.height,
        width=backbone.width,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=initial_noise(backbone, len(PROMPTS)),
        output_type=output_type,
    ).images


# ---- Images ----


@each_family
@pytest.mark.parametrize(
    "config",
    [
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"set_alpha_to_one": True},
        {"beta_schedule": "linear", "steps_offset": 0},
    ],
    ids=str,
)
def test_every_ddim_schedule_of_the_pipeline_is_kept(make, config):
    # 1000 is not divisible by 3: rounded, steps end beside the next one's timestep
    pipeline = make()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **config)
    backbone = make_backbone(pipeline)
    expected = drawn_by_the_pipeline(backbone, 7.5, "latent")
    torch.testing.assert_close(ode_latents(backbone, 7.5, PROMPTS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_without_a_negative_prompt_xl_is_guided_away_from_what_its_pipeline_says(force_zeros):
    pipeline = tiny_sdxl_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    backbone = make_backbone(pipeline)
    torch.testing.assert_close(
        ode_latents(backbone, 7.5, PROMPTS), drawn_by_the_pipeline(backbone, 7.5, "latent"), rtol=0, atol=1e-4
    )
    condition = backbone.encode_prompt("")
    assert bool(condition["encoder_hidden_states"].any()) is not force_zeros
    assert bool(condition["text_embeds"].any()) is not force_zeros


def test_xl_gets_the_size_of_the_image():
    condition = make_backbone(tiny_sdxl_pipeline(), height=24, width=40).encode_prompt("a cat")
    # original size, crop, target size, as the pipeline's defaults have them
    assert condition["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]]


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_images_are_decoded_in_the_vaes_dtype(make, dtype):
    backbone = make_backbone(make().to(dtype))
    latents = initial_noise(backbone, len(PROMPTS)) * 3
    vae = backbone.pipeline.vae
    images = backbone.decode(latents)
    pixels = vae.decode((latents / vae.config.scaling_factor).to(dtype)).sample
    others = backbone.pipeline.image_processor.postprocess(pixels.float())
    assert_same_images(images, others, (32, 32))


def test_latents_that_are_normalized_channel_by_channel():
    pipeline = tiny_sdxl_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipeline.register_modules(
            vae=tiny_vae(latents_mean=[-1.5, 0.5, 1.0, 0.0], latents_std=[8.0, 5.0, 6.0, 4.0], scaling_factor=0.5)
        )
    backbone = make_backbone(pipeline)
    images = backbone.decode(ode_latents(backbone, 1.0, PROMPTS))
    assert_same_images(images, drawn_by_the_pipeline(backbone, 1.0, "pil"), (32, 32))


def test_xl_decodes_in_float32_where_its_vae_would_overflow():
    backbone = make_backbone(tiny_sdxl_pipeline().to(torch.float16))
    assert backbone.pipeline.vae.dtype == torch.float32
    assert backbone.model.dtype == torch.float16
    # others decode in what they are loaded in
    assert make_backbone(tiny_sd_pipeline().to(torch.float16)).pipeline.vae.dtype == torch.float16


# ---- Schedulers and sizes ----


@each_family
def test_the_pipelines_own_scheduler_is_left_alone(make):
    pipeline = make()
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(STEPS + 1)
    timesteps = scheduler.timesteps.clone()
    make_backbone(pipeline).schedule(STEPS)
    assert pipeline.scheduler is scheduler
    assert torch.equal(scheduler.timesteps, timesteps)


def test_a_scheduler_that_does_not_know_of_clipping_does_not_clip():
    # PNDM has no such option, and that of DDIM is on by default
    pipeline = tiny_sd_pipeline()
    config = {name: value for name, value in SCHEDULER_CONFIG.items() if name != "clip_sample"}
    pipeline.scheduler = PNDMScheduler.from_config(config)
    assert DDIMScheduler.from_config(pipeline.scheduler.config).config.clip_sample is True
    assert make_backbone(pipeline).scheduler.config.clip_sample is False


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler with prediction_type None"),
        (EDMEulerScheduler(), "EDMEulerScheduler with prediction_type 'epsilon', from which no DDIMScheduler"),
        (DDIMScheduler(clip_sample=False, prediction_type="sample"), "DDIMScheduler with prediction_type 'sample'"),
        (DDPMScheduler(), "DDPMScheduler has clip_sample=True and thresholding=False"),
        (DDIMScheduler(clip_sample=False, thresholding=True), "clip_sample=False and thresholding=True"),
    ],
    ids=["flow", "edm", "sample", "clipping", "thresholding"],
)
def test_schedulers_that_ddim_cannot_stand_in_for(scheduler, message):
    pipeline = tiny_sdxl_pipeline()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        make_backbone(pipeline)


def test_a_distilled_u_net_is_refused():
    pipeline = tiny_sd_pipeline()
    pipeline.register_modules(unet=tiny_unet(time_cond_proj_dim=8), scheduler=LCMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="is distilled for a few steps"):
        make_backbone(pipeline)


@each_family
@pytest.mark.parametrize(("scale", "uses"), [(0.0, False), (1.0, False), (1.01, True), (7.5, True)])
def test_guidance_is_used_where_the_pipeline_uses_it(make, scale, uses):
    backbone = make_backbone(make())
    backbone.pipeline._guidance_scale = scale
    assert backbone.pipeline.do_classifier_free_guidance is uses
    assert backbone.uses_guidance(scale) is uses


@each_family
@pytest.mark.parametrize("size", [{"height": 20}, {"width": 36}], ids=str)
def test_sizes_that_the_pipeline_refuses(make, size):
    with pytest.raises(ValueError, match="multiples of 8 pixels; its own size is 32 x 32. Set height=32 and width=32"):
        make_backbone(make(), **size)


def test_images_far_below_the_models_own_size_are_warned_of():
    with warnings_of("trl_flow") as messages:
        make_backbone(tiny_sdxl_pipeline(), height=24, width=24)
        assert messages == []
        make_backbone(tiny_sdxl_pipeline(), height=16, width=16)
    assert len(messages) == 1
    assert "height and width are 16 x 16, but this model was trained on 32 x 32" in messages[0]


def test_the_u_nets_own_size_may_have_two_sides():
    pipeline = tiny_sd_pipeline()
    pipeline.register_modules(unet=tiny_unet(sample_size=[8, 16]))
    with pytest.raises(ValueError, match="its own size is 32 x 64"):
        make_backbone(pipeline, height=20)


@each_family
def test_a_u_net_that_does_not_say_its_size_is_refused(make):
    pipeline = make()
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match=r"no sample_size .*unet\.register_to_config\(sample_size=64\) for"):
        make_backbone(pipeline)
    # What the message says helps
    pipeline.unet.register_to_config(sample_size=8)
    assert make_backbone(pipeline).latent_shape() == (4, 8, 8)


@each_family
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_predicted_noise_is_refused_where_there_is_nothing_else(make, spacing):
    pipeline = make()
    own = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(own, rescale_betas_zero_snr=True, timestep_spacing=spacing)
    with pytest.raises(ValueError, match=f"begins at pure noise .*'{spacing}'.* prediction_type='v_prediction'"):
        make_backbone(pipeline).schedule(STEPS)
    # Each way out that the message names, and a spacing that leaves the noisiest timestep out
    config = pipeline.scheduler.config
    for changed in (
        {"rescale_betas_zero_snr": False},
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "leading"},
    ):
        pipeline.scheduler = DDIMScheduler.from_config(config, **changed)
        assert make_backbone(pipeline).schedule(STEPS).num_steps == STEPS


def test_the_class_of_the_pipeline_chooses():
    assert type(make_backbone(tiny_sd_pipeline())) is StableDiffusionBackbone
    assert type(make_backbone(tiny_sdxl_pipeline())) is StableDiffusionXLBackbone


# ---- Training ----

SIZE = {"height": 32, "width": 32}


def train(folder, pipeline, **fields):
    trainer = tiny_trainer(folder, pipeline=pipeline, **SIZE | fields)
    before = trained_weights(trainer)
    trainer.train()
    return trainer, distance(trained_weights(trainer), before)


@each_family
def test_the_default_targets_are_all_attentions(make, tmp_path):
    names = trained_weights(tiny_trainer(tmp_path, pipeline=make(), **SIZE))
    attentions = [name for name, module in make().unet.named_modules() if name.endswith(("attn1", "attn2"))]
    assert len(attentions) > 2
    assert len(names) == len(attentions) * 4 * 2
    for name in attentions:
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            for part in "AB":
                assert f"base_model.model.{name}.{layer}.lora_{part}.default.weight" in names


THREE_STEPS = {"num_inference_steps": 3, "train_last_step": True}


@pytest.mark.parametrize(
    ("make", "cls"), [(tiny_sd_pipeline, FlowGRPOConfig), (tiny_sdxl_pipeline, VGPOConfig)], ids=["sd", "sdxl"]
)
def test_a_last_step_without_noise_is_not_trained(cls, make, tmp_path):
    pipeline = make()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    trainer, moved = train(tmp_path, pipeline, cls=cls, max_steps=1, **THREE_STEPS)
    assert moved > 1e-4
    steps = {name for name in trainer.state.log_history[0] if name.startswith("ratio/mean_step_")}
    assert steps == {"ratio/mean_step_0", "ratio/mean_step_1"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_inference_steps": 1}, "num_inference_steps is 1, and no step of this model's schedule adds noise"),
        ({"sde_window_size": 3}, r"sde_window_range is \[0, 3\], but on this model's schedule the last of 3 steps"),
        ({"sde_window_size": 1, "sde_window_range": [2, 3]}, "a window of 1 steps does not fit"),
        ({"noise_level": 1.5}, "noise_level is 1.5: it must be a finite number, between 0 and 1"),
    ],
    ids=str,
)
def test_what_a_schedule_without_noise_at_the_end_cannot_do_is_refused(fields, message, tmp_path):
    pipeline = tiny_sd_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, pipeline=pipeline, **SIZE | THREE_STEPS | fields)


def test_a_window_keeps_clear_of_a_last_step_without_noise(tmp_path):
    pipeline = tiny_sd_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    trainer = tiny_trainer(tmp_path, pipeline=pipeline, sde_window_size=1, **SIZE | THREE_STEPS)
    windows = {trainer.algorithm.plan(generation).stochastic for generation in range(40)}
    assert windows == {(0,), (1,)}


def test_all_weights_are_trained_and_saved_as_a_u_net(tmp_path):
    trainer, moved = train(tmp_path, tiny_sd_pipeline(), lora=None, learning_rate=1e-3, max_steps=1, beta=0.04)
    assert moved > 1e-4
    trainer.save_model()
    unet = UNet2DConditionModel.from_pretrained(tmp_path)
    assert_equal(dict(unet.named_parameters()), trained_weights(trainer))
