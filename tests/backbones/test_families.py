"""What all families have in common: the stock pipelines' own images, training by every config, and sharing."""

from inspect import signature

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from families import FAMILIES
from family_checks import (
    STEPS,
    assert_schedule_of_the_pipeline,
    check_batches,
    check_card,
    check_negative_prompt,
    check_own_images,
    check_training,
    conditions,
    drawn_by_the_pipeline,
    family_trainer,
    initial_noise,
    ode_latents,
    random_lora,
)
from tiny_training import PROMPTS, distance, trained_weights

from trl_flow import AWMConfig, DiffusionNFTConfig, GuardConfig, VGPOConfig


EDITING = ("kontext", "qwen-image-edit", "qwen-image-edit-plus")
# The others differ from these in the guidance only
TRAINED = [name for name in FAMILIES if name not in ("flux-schnell", "klein", "sdxl-v")]
each_family = pytest.mark.parametrize("name", FAMILIES)
each_trained_family = pytest.mark.parametrize("name", TRAINED)

pytestmark = pytest.mark.usefixtures("small_input_images")


@each_family
@pytest.mark.parametrize(("size", "guided"), [("size", True), ("size", False), ("other_size", True)])
def test_a_rollout_without_noise_draws_the_pipelines_own_images(name, size, guided):
    family = FAMILIES[name]
    check_own_images(family, getattr(family, size), family.guidance_scale if guided else family.unguided)


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in ("flux-dev", "kontext", "klein-base")])
def test_a_negative_prompt_is_the_pipelines(name):
    check_negative_prompt(FAMILIES[name])


@each_trained_family
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(name):
    check_batches(FAMILIES[name])


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "max_shift": 2.0},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["sd3", "flux-dev", "kontext", "klein-base", "qwen-image", "z-image"])
def test_every_scheduler_of_the_pipeline_keeps_its_noise_levels(name, config):
    family, pipeline = FAMILIES[name], FAMILIES[name].make_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    backbone = family.backbone(family.other_size, pipeline)
    drawn_by_the_pipeline(family, backbone, family.unguided, PROMPTS[:1])
    assert_schedule_of_the_pipeline(backbone)


@pytest.mark.parametrize("name", ["flux-dev", "kontext", "klein-base", "qwen-image"])
def test_the_size_of_the_image_moves_the_schedule(name):
    small, large = (FAMILIES[name].backbone(size).schedule(3).sigmas for size in [(16, 16), (64, 64)])
    assert large[1] > small[1] + 1e-3


@each_family
def test_sizes_and_lengths_that_are_not_given_are_the_pipelines(name):
    pipeline = FAMILIES[name].make_pipeline()
    cls = type(FAMILIES[name].backbone(pipeline=pipeline))
    length = signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    assert cls.default_sequence_length == (77 if length is None else length.default)
    if name.startswith("wan"):
        assert cls.default_size(pipeline) == (480, 832)
        backbone = cls(pipeline)
        assert (backbone.height, backbone.width, backbone.num_frames) == (480, 832, 81)
        assert backbone.max_sequence_length == 512
        return
    side = {"sd3": 16, "sd35-medium": 64, "sd35-large": 64, "z-image": 1024}.get(name)
    # U-Nets say their own size; the others draw 128 latents each way, whatever their VAE
    side = side or (32 if name.startswith("sd") else 128 * pipeline.vae_scale_factor)
    assert cls.default_size(pipeline) == (side, side)
    if name != "z-image":  # whose tiny transformer draws 64 pixels at most
        backbone = cls(pipeline)
        assert (backbone.height, backbone.width) == (side, side)
        assert backbone.max_sequence_length == cls.default_sequence_length


# ---- Training and sharing ----


@each_trained_family
def test_every_part_of_the_configs_trains(name, tmp_path):
    fields = {"importance_ratio": "ratio_norm", "timestep_weighting": "inverse_dt", "advantage_power": 0.5}
    check_training(FAMILIES[name], VGPOConfig, torch.float32, tmp_path, **fields)


@each_trained_family
@pytest.mark.parametrize(
    ("cls", "sampling"), [(DiffusionNFTConfig, "schedule"), (AWMConfig, "logit_normal")], ids=["nft", "awm"]
)
def test_learning_on_noised_images(name, cls, sampling, tmp_path):
    fields = {"timestep_sampling": sampling, "timesteps_per_sample": 2, "guidance_scale": FAMILIES[name].unguided}
    fields["guidance_scale_2"] = None
    trainer = family_trainer(FAMILIES[name], tmp_path, cls=cls, gradient_checkpointing=True, **fields)
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    assert distance(after, before) > 1e-4 and all(value.isfinite().all() for value in after.values())
    first, second = trainer.state.log_history[:2]
    assert first["kl"] < 1e-10 < second["kl"]


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in ("sd35-large", "sd-v", "qwen-image-edit")])
def test_training_in_half_precision(name, tmp_path):
    check_training(FAMILIES[name], GuardConfig, torch.bfloat16, tmp_path)


@each_trained_family
def test_every_weight_of_the_default_lora_is_reached_by_the_gradient(name):
    # One that is not would keep processes waiting for each other, see `ddp_find_unused_parameters`
    backbone = FAMILIES[name].backbone()
    with torch.no_grad():
        condition = conditions(backbone, ["a cat"])
    model = random_lora(backbone)
    schedule, gradients = backbone.schedule(STEPS), []
    step = next(step for step in range(STEPS) if step not in schedule.frozen)
    for checkpointing in (False, True):
        if checkpointing:
            backbone.model.enable_gradient_checkpointing()
            model.train()
        model.zero_grad()
        latents, timestep = initial_noise(backbone, 1), schedule.timesteps[step]
        prediction = backbone.guided_prediction(model, latents, timestep, condition)
        prediction.square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert [key for key, gradient in gradients[0].items() if gradient is None] == []
    # And checkpointing, with which models are trained by default, changes no gradient
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6)


@each_family
def test_the_cards_code_draws_with_the_adapter_as_in_evaluation(name, tmp_path, monkeypatch):
    check_card(FAMILIES[name], tmp_path, monkeypatch)


@each_family
def test_the_prompt_changes_the_image(name):
    family = FAMILIES[name]
    backbone = family.backbone()
    assert (ode_latents(backbone, 1.0, ["a cat"]) - ode_latents(backbone, 1.0, ["two dogs"])).abs().max() > 1e-3
