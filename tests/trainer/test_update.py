"""An update of the trainer is the algorithm's loss over the whole generation batch, however it is computed."""

import pytest
import torch
from tiny_models import tiny_sd3_pipeline
from tiny_training import distance, prompts, tiny_lora, tiny_stages, tiny_trainer, trained_weights, warnings_of

from trl_flow import FlowGRPOConfig, GuardConfig, SLASConfig, VGPOConfig


REWARDS = {"a cat": [0.1, 0.5, 0.2, 0.9], "two dogs": [0.4, 0.3, 0.8, 0.7]}


def fixed_rewards(prompts, images, **kwargs):
    """Of complete groups, whichever comes first."""
    return [value for prompt in prompts[::4] for value in REWARDS[prompt]]


def logged(trainer, step: int) -> dict[str, float]:
    return next(logs for logs in trainer.state.log_history if logs["step"] == step)


# ---- The gradient ----


@pytest.mark.parametrize("layout", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}], ids=str)
def test_an_update_is_a_step_along_the_gradient_of_the_loss(layout, tmp_path):
    """By plain descent, the weights move by minus the gradient of the mean over all samples and steps."""
    # a LoRA that does something from the start, so that both of its matrices have gradients
    fields = {"lora": tiny_lora(init_lora_weights=False), "shuffle_dataset": False}
    descent = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 1e9, "max_steps": 1}
    data = {"reward_funcs": fixed_rewards, "train_dataset": prompts(2)}
    trainer = tiny_trainer(tmp_path / "trained", **fields, **data, **descent, **layout)
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    stages = tiny_stages(tmp_path / "by hand", **fields)
    (batch,) = stages.micro_batches([value for group in REWARDS.values() for value in group])
    expected = stages.gradients(torch.stack([out.loss.mean() for out in stages.losses(batch).values()]).mean())
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-5
    for name, gradient in expected.items():
        # weights of the size of 1 are rounded to 6e-8
        torch.testing.assert_close(before[name] - after[name], gradient, rtol=1e-3, atol=2e-7 + 1e-3 * largest)
    norm = torch.stack([gradient.square().sum() for gradient in expected.values()]).sum().sqrt().item()
    assert logged(trainer, 1)["grad_norm"] == pytest.approx(norm, rel=1e-3)


# ---- The ratio before the first update ----


def first_deviation(tmp_path, **fields) -> tuple[float, list[str]]:
    trainer = tiny_trainer(tmp_path, max_steps=1, **fields)
    with warnings_of("trl_flow") as warnings:
        trainer.train()
    return logged(trainer, 1)["ratio/first_update_deviation"], [w for w in warnings if "importance ratio" in w]


@pytest.mark.parametrize(
    "fields",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
        {"gradient_checkpointing": True},
        {"guidance_scale": 1.0},
        {"lora": None},
        {"lora": tiny_lora(init_lora_weights=False, lora_dropout=0.5)},
        {"bf16": True, "lora": tiny_lora(init_lora_weights=False)},
        {"bf16": True, "lora": None},
        {"bf16": True, "lora": tiny_lora(init_lora_weights=False), "half": True},
    ],
    ids=str,
)
def test_the_ratio_is_1_however_it_is_computed(fields, tmp_path):
    fields = dict(fields)
    if fields.pop("half", False):  # the frozen weights, too
        fields["pipeline"] = tiny_sd3_pipeline().to(torch.bfloat16)
    deviation, warnings = first_deviation(tmp_path, **fields)
    assert deviation < 1e-6
    assert warnings == []


def test_a_ratio_that_is_off_is_reported_with_its_size_and_the_likely_causes(tmp_path):
    fields = {"lora": tiny_lora(init_lora_weights=False, lora_dropout=0.5), "disable_dropout": False}
    deviation, warnings = first_deviation(tmp_path / "off", epsilon=2e-4, scale_epsilon=False, **fields)
    assert deviation > 1e-4
    (warning,) = warnings
    assert f"{deviation:.2e}" in warning
    assert "clip range 0.0002" in warning
    for cause in ("dropout", "half precision", "torch.compile"):
        assert cause in warning
    # but for less than clipping sees
    deviation, warnings = first_deviation(tmp_path / "wide", epsilon=100.0, **fields)
    assert deviation > 1e-4
    assert warnings == []


# ---- KL ----


@pytest.mark.parametrize("lora", [tiny_lora(), None], ids=["lora", "all weights"])
def test_the_reference_runs_the_policys_arithmetic(lora, tmp_path):
    # Whatever the autocast: before the first update there is no divergence
    trainer = tiny_trainer(tmp_path, beta=0.04, lora=lora, bf16=True, max_steps=1)
    trainer.train()
    assert logged(trainer, 1)["kl"] < 1e-12


def test_kl_is_added_with_its_weight(tmp_path):
    # Advantages of 0 leave the KL alone in the loss, from a LoRA that is away from the reference at the start
    def equal(prompts, images, **kwargs):
        return [1.0] * len(images)

    fields = {"reward_funcs": equal, "max_steps": 1, "lora": tiny_lora(init_lora_weights=False)}
    trainer = tiny_trainer(tmp_path, beta=0.04, **fields)
    trainer.train()
    assert logged(trainer, 1)["kl"] > 1e-6
    assert logged(trainer, 1)["loss"] == pytest.approx(0.04 * logged(trainer, 1)["kl"], rel=1e-4)


def test_all_weights_of_a_pipeline_in_half_precision_are_trained_in_float32(tmp_path):
    trainer = tiny_trainer(tmp_path, pipeline=tiny_sd3_pipeline().to(torch.bfloat16), lora=None, max_steps=1)
    trainer.train()
    assert {weight.dtype for weight in trained_weights(trainer).values()} == {torch.float32}
    assert logged(trainer, 1)["ratio/first_update_deviation"] < 1e-6


# ---- Forwards ----


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 2 * (4 + 3)),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2}, 2 * 4 + 3),
        ({"num_iterations": 2}, 4 + 3),
        # the second update's ratios are not 1: in the first such one their rounding is measured
        ({"num_iterations": 2, "max_steps": 2}, 4 + 3 + 3 * 3),
        ({"num_iterations": 2, "max_steps": 6}, 3 * (4 + 3 + 3) + 2 * 2 * 3),  # in phases 1 and 2, not 3
        # and in half precision taken away in all
        ({"num_iterations": 2, "max_steps": 6, "bf16": True, "ratio_probe": 8}, 3 * (4 + 3 + 2 * 3) + 2 * 4 * 3),
    ],
    ids=str,
)
def test_forwards_by_hand(fields, number, tmp_path):
    trainer, calls = tiny_trainer(tmp_path, **{"max_steps": 1} | fields), []
    trainer.backbone.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == number


# ---- Recipes that test_combinations.py has not ----


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (GuardConfig, {"sde_type": "dance"}),
        (GuardConfig, {"sde_type": "cps"}),
        (VGPOConfig, {"timestep_fraction": 0.6, "sde_window_size": 2, "beta": 0.04, "lora": None, "use_ema": True}),
        (FlowGRPOConfig, {"timestep_weighting": "temp", "importance_ratio": "mean_revised", "scale_rewards": "none"}),
        (SLASConfig, {"timestep_weighting": "beta_over_dt", "importance_ratio": "ratio_norm", "num_iterations": 2}),
        (SLASConfig, {"advantage_power": "auto", "num_iterations": 2}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_every_recipe_trains(cls, fields, tmp_path):
    trainer = tiny_trainer(tmp_path, cls=cls, **fields)
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert distance(after, before) > 1e-4
    assert logged(trainer, 1)["grad_norm"] > 0


def test_the_adapted_power_follows_the_updates_and_is_logged(tmp_path):
    # a target far above what such updates cause, so that the power rises by its largest step in each phase
    fields = {"advantage_power": "auto", "target_kl": 1e6, "num_iterations": 2, "max_steps": 6}
    trainer = tiny_trainer(tmp_path, **fields)
    trainer.train()
    powers = [logs["advantage_power"] for logs in trainer.state.log_history if "advantage_power" in logs]
    assert powers == pytest.approx([0.0, 0.1, 0.2])
    # training anew begins at 0
    trainer.train()
    powers = [logs["advantage_power"] for logs in trainer.state.log_history if "advantage_power" in logs]
    assert powers == pytest.approx([0.0, 0.1, 0.2])
