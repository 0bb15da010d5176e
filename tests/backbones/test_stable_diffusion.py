"""Stable Diffusion 1.x, 2.x and XL: the backbones compute what the stock pipelines compute with a DDIM scheduler."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from family_checks import (
    STEPS,
    assert_equal_images,
    assert_same_images,
    conditions,
    initial_noise,
    ode_latents,
)
from tiny_models import CLIP_TOKENS
from tiny_training import (
    assert_equal,
    brightness,
    distance,
    prompts,
    tiny_config,
    tiny_lora,
    tiny_trainer,
    trained_weights,
    warnings_of,
)
from tiny_unets import SCHEDULER_CONFIG, tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_unet, tiny_vae

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer, GuardConfig, SLASConfig, VGPOConfig
from trl_flow.backbones import StableDiffusionBackbone, StableDiffusionXLBackbone, get_backbone
from trl_flow.rollout import Dynamics, draw_noise, rollout, sample_generator


FAMILIES = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}
PREDICTION_TYPES = ["epsilon", "v_prediction"]
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
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("size", [{}, {"height": 24, "width": 40}], ids=str)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_rollout_without_noise_draws_the_pipelines_own_images(make, prediction_type, size, guidance_scale):
    backbone = make_backbone(make(prediction_type=prediction_type), **size)
    final = ode_latents(backbone, guidance_scale, PROMPTS)
    expected = drawn_by_the_pipeline(backbone, guidance_scale, "latent")
    assert final.abs().max() > 0.5
    # To the last digits only: prompts are encoded one by one here
    torch.testing.assert_close(final, expected, rtol=0, atol=3e-5)
    images, others = backbone.decode(final), drawn_by_the_pipeline(backbone, guidance_scale, "pil")
    assert_same_images(images, others, (backbone.height, backbone.width))


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
    torch.testing.assert_close(ode_latents(backbone, 7.5, PROMPTS), expected, rtol=1e-5, atol=1e-4)


@each_family
def test_a_negative_prompt_is_the_pipelines(make):
    backbone = make_backbone(make())
    final = ode_latents(backbone, 7.5, PROMPTS, negative_prompt="blurred")
    expected = drawn_by_the_pipeline(backbone, 7.5, "latent", negative_prompt="blurred")
    torch.testing.assert_close(final, expected, rtol=0, atol=3e-5)
    assert (final - ode_latents(backbone, 7.5, PROMPTS)).abs().max() > 1e-3


@pytest.mark.parametrize("force_zeros", [True, False])
def test_without_a_negative_prompt_xl_is_guided_away_from_what_its_pipeline_says(force_zeros):
    pipeline = tiny_sdxl_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    backbone = make_backbone(pipeline)
    torch.testing.assert_close(
        ode_latents(backbone, 7.5, PROMPTS), drawn_by_the_pipeline(backbone, 7.5, "latent"), rtol=0, atol=3e-5
    )
    condition = backbone.encode_prompt("")
    assert bool(condition["encoder_hidden_states"].any()) is not force_zeros
    assert bool(condition["text_embeds"].any()) is not force_zeros


def test_xl_is_told_the_size_of_the_image():
    condition = make_backbone(tiny_sdxl_pipeline(), height=24, width=40).encode_prompt("a cat")
    # original size, crop, target size, as the pipeline's defaults have them
    assert condition["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]]


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_pipelines_images_come_from_the_same_latents_to_the_last_bit(make, dtype):
    backbone = make_backbone(make().to(dtype))
    latents = initial_noise(backbone, len(PROMPTS)) * 3
    vae = backbone.pipeline.vae
    images = backbone.decode(latents)
    pixels = vae.decode((latents / vae.config.scaling_factor).to(dtype)).sample
    others = backbone.pipeline.image_processor.postprocess(pixels.float())
    assert_equal_images(images, others)


def test_latents_that_are_normalised_channel_by_channel():
    pipeline = tiny_sdxl_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipeline.register_modules(
            vae=tiny_vae(latents_mean=[-1.5, 0.5, 1.0, 0.0], latents_std=[8.0, 5.0, 6.0, 4.0], scaling_factor=0.5)
        )
    backbone = make_backbone(pipeline)
    images = backbone.decode(ode_latents(backbone, 1.0, PROMPTS))
    for image, other in zip(images, drawn_by_the_pipeline(backbone, 1.0, "pil"), strict=True):
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


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
def test_schedulers_that_ddim_can_not_stand_in_for(scheduler, message):
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
@pytest.mark.parametrize(
    ("cls", "prediction_type"),
    [
        (FlowGRPOConfig, "epsilon"),
        (GuardConfig, "epsilon"),
        (GuardConfig, "v_prediction"),
        (SLASConfig, "epsilon"),
        (VGPOConfig, "epsilon"),
    ],
)
def test_every_config_trains(cls, make, prediction_type, tmp_path):
    with warnings_of("trl_flow") as messages:
        trainer, moved = train(tmp_path, make(prediction_type=prediction_type), cls=cls, beta=0.04)
    assert messages == []
    assert moved > 1e-4
    logs = trainer.state.log_history
    assert logs[0]["ratio/first_update_deviation"] == 0
    assert logs[0]["grad_norm"] > 0
    assert logs[0]["kl"] == 0
    assert logs[1]["kl"] > 0
    assert all(value.isfinite().all() for value in trained_weights(trainer).values())


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


@each_family
@pytest.mark.parametrize(
    ("dtype", "fields"),
    [(torch.float32, {"per_device_train_batch_size": 2, "steps_per_generation": 4}), (torch.bfloat16, {})],
    ids=str,
)
def test_the_ratio_is_one_before_the_first_update(make, dtype, fields, tmp_path):
    pipeline = make()
    pipeline.unet.to(dtype)
    half = dtype == torch.bfloat16
    trainer, moved = train(tmp_path, pipeline, bf16=half, max_steps=1, importance_ratio="ratio_norm", **fields)
    assert trainer.state.log_history[0]["ratio/first_update_deviation"] == 0
    assert moved > 1e-4


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ratio_hardly_depends_on_the_batch(make, dtype):
    pipeline = make()
    pipeline.unet.to(dtype)
    backbone = make_backbone(pipeline)
    dynamics = Dynamics(backbone.schedule(STEPS), sde_type="flow", noise_level=0.7)
    texts, steps = [*PROMPTS, "a cat", "dogs"], range(STEPS)
    condition, negative = conditions(backbone, texts), conditions(backbone, [""] * 4)
    t = rollout(
        backbone,
        backbone.model,
        dynamics,
        condition,
        negative,
        guidance_scale=7.5,
        initial_noise=initial_noise(backbone, 4),
        generators=[sample_generator(2, i) for i in range(4)],
        stochastic_steps=steps,
        trained_steps=steps,
    )

    def log_ratios(step: int, part: slice) -> torch.Tensor:
        own, negative_own = ({key: value[part] for key, value in c.items()} for c in (condition, negative))
        x = t.latents[part, step]
        prediction = backbone.guided_prediction(
            backbone.model, x, dynamics.schedule.timesteps[step], own, negative_own, 7.5
        )
        transition = dynamics.transition(prediction, x, step)
        return dynamics.log_prob(t.next_latents[part, step], transition) - t.log_probs[part, step]

    for step in steps:
        assert log_ratios(step, slice(0, 4)).abs().max() == 0
        for row in range(4):
            # Matrix products of other shapes add up in another order. Measured: at most 1e-6.
            assert log_ratios(step, slice(row, row + 1)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "cls"), [(tiny_sd_pipeline, FlowGRPOConfig), (tiny_sdxl_pipeline, VGPOConfig)], ids=["sd", "sdxl"]
)
def test_a_last_step_without_noise_is_not_trained(cls, make, tmp_path):
    pipeline = make()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    trainer, moved = train(tmp_path, pipeline, cls=cls, max_steps=1)
    assert moved > 1e-4
    steps = {name for name in trainer.state.log_history[0] if name.startswith("ratio/mean_step_")}
    assert steps == {"ratio/mean_step_0", "ratio/mean_step_1"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_inference_steps": 1}, "num_inference_steps is 1, and on this model's schedule no step adds noise"),
        ({"sde_window_size": 3}, r"sde_window_range is \[0, 3\], but on this model's schedule the last of 3 steps"),
        ({"sde_window_size": 1, "sde_window_range": [2, 3]}, "a window of 1 steps does not fit"),
        ({"noise_level": 1.5}, "noise_level is 1.5: it must be a finite number, between 0 and 1"),
    ],
    ids=str,
)
def test_what_a_schedule_without_noise_at_the_end_can_not_do_is_refused(fields, message, tmp_path):
    pipeline = tiny_sd_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, pipeline=pipeline, **SIZE | fields)


def test_a_window_keeps_clear_of_a_last_step_without_noise(tmp_path):
    pipeline = tiny_sd_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    trainer = tiny_trainer(tmp_path, pipeline=pipeline, sde_window_size=1, **SIZE)
    windows = {tuple(trainer._choose_steps(generation)[0]) for generation in range(40)}
    assert windows == {(0,), (1,)}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    weights = []
    for on in (False, True):
        trainer, moved = train(tmp_path / str(on), tiny_sdxl_pipeline(), gradient_checkpointing=on, max_steps=1)
        assert trainer.backbone.model.is_gradient_checkpointing is on
        assert moved > 1e-4
        weights.append(trained_weights(trainer))
    assert_equal(*weights)


# ---- Saving ----


@each_family
def test_the_model_cards_code_draws_as_in_training(make, tmp_path):
    base = make()
    base.save_pretrained(tmp_path / "base")
    trainer = tiny_trainer(tmp_path / "run", pipeline=str(tmp_path / "base"), max_steps=1, **SIZE)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    code = (tmp_path / "run" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("path/to", str(tmp_path)), names)
    assert names["image"].size == (32, 32)
    scheduler = names["pipeline"].scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert {**scheduler.config, "_class_name": None} == {**trainer.backbone.scheduler.config, "_class_name": None}
    assert set(names["pipeline"].unet.peft_config) == {"default_0"}


def images_of(pipeline):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(PROMPTS, **SIZE, num_inference_steps=STEPS, guidance_scale=7.5, generator=generator).images
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize(
    ("make", "init", "use_ema"),
    [
        (tiny_sd_pipeline, {"safety_checker": None, "requires_safety_checker": False}, False),
        (tiny_sdxl_pipeline, {"add_watermarker": False}, True),
    ],
    ids=["sd", "sdxl"],
)
def test_the_adapter_draws_the_same_images_in_the_stock_pipeline(make, init, use_ema, tmp_path):
    base = make()
    untrained = images_of(base)
    base.save_pretrained(tmp_path / "base")
    trainer = FlowGRPOTrainer(
        model=str(tmp_path / "base"),
        reward_funcs=brightness,
        args=tiny_config(
            tmp_path / "run",
            max_steps=3,
            save_strategy="steps",
            save_steps=3,
            use_ema=use_ema,
            model_init_kwargs=init,
            **SIZE,
        ),
        train_dataset=prompts(),
        peft_config=tiny_lora(lora_alpha=16),  # not the rank
    )
    trainer.train()
    with trainer._averaged_weights():
        expected = images_of(trainer.pipeline)

    loaded = type(base).from_pretrained(tmp_path / "base")
    loaded.set_progress_bar_config(disable=True)
    loaded.load_lora_weights(tmp_path / "run")
    for image, other, before in zip(images_of(loaded), expected, untrained, strict=True):
        assert np.array_equal(image, other)
        assert not np.array_equal(image, before)


@each_family
def test_all_weights_are_trained_and_saved_as_a_u_net(make, tmp_path):
    base = make()
    base.save_pretrained(tmp_path / "base")
    run = {
        "lora": None,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
        "beta": 0.04,
        "use_ema": True,
    }
    trainer, moved = train(tmp_path / "run", str(tmp_path / "base"), **run)
    assert moved > 1e-4
    assert (tmp_path / "run" / "checkpoint-1" / "diffusion_pytorch_model.safetensors").is_file()
    unet = type(base.unet).from_pretrained(tmp_path / "run")
    with trainer._averaged_weights():
        assert_equal(dict(unet.named_parameters()), trained_weights(trainer))
    resumed = tiny_trainer(tmp_path / "run", pipeline=str(tmp_path / "base"), **SIZE | run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert_equal(trained_weights(resumed), trained_weights(trainer))


@each_family
def test_evaluation_draws_the_stock_pipelines_images(make, tmp_path):
    pipeline = make()
    scored = []

    def keep(prompts, images, **kwargs):
        scored.extend(np.asarray(image) for image in images)
        return [1.0] * len(images)

    trainer = tiny_trainer(
        tmp_path, pipeline=pipeline, reward_funcs=keep, eval_dataset=prompts(2), eval_num_inference_steps=STEPS, **SIZE
    )
    trainer.evaluate()
    latents = draw_noise((4, 8, 8), [sample_generator(trainer.seed, 4, i) for i in range(2)], torch.device("cpu"))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(
        list(prompts(2)["prompt"]), **SIZE, num_inference_steps=STEPS, guidance_scale=2.0, latents=latents
    ).images
    for image, other in zip(scored, images, strict=True):
        assert np.abs(image.astype(int) - np.asarray(other, dtype=int)).max() <= 1
