"""DiffusionNFT and AWM as trainers: their gradients, the old policy, resuming, splits, and what is refused."""

import dataclasses
import random

import pytest
import torch
from tiny_models import tiny_sd3_pipeline
from tiny_painter import SIZE, tiny_painter_backbone
from tiny_training import (
    assert_equal,
    brightness,
    darkness,
    distance,
    prompts,
    tiny_config,
    tiny_lora,
    tiny_trainer,
    train,
    trained_weights,
)
from tiny_unets import tiny_sd_pipeline

from trl_flow import AWMConfig, AWMTrainer, DiffusionNFTConfig, DiffusionNFTTrainer, FlowGRPOConfig, GuardConfig
from trl_flow.algorithms import PhaseScores
from trl_flow.trainer.flow_rl_config import FlowRLConfig


METHODS = [DiffusionNFTConfig, AWMConfig]
each_method = pytest.mark.parametrize("cls", METHODS)
TWO_UPDATES = {"generation_batch_size": 16, "num_generations": 4}
SGD = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0}


def tiny(output_dir, cls, **fields):
    return tiny_trainer(output_dir, cls=cls, **{"guidance_scale": 1.0, "timesteps_per_sample": 2} | fields)


class Recorder:
    """Brightness, and all images that it was asked about."""

    def __init__(self):
        self.images = []
        self.__name__ = "recorder"

    def __call__(self, prompts, images, **kwargs):
        self.images.append(images)
        return brightness(prompts, images)


# ---- The gradient ----


def by_hand(trainer, cls, batch) -> torch.Tensor:
    """The loss of a micro-batch in the first update, from the papers' formulas on what the algorithm has noised."""
    args, policy, algorithm, total = trainer.args, trainer.policy, trainer.algorithm, 0.0
    condition, shape = policy.condition(batch.prompts), (-1, 1, 1, 1)
    for unit in range(args.timesteps_per_sample):
        noised = algorithm.noised(policy, batch, unit)
        t, x_0, advantage = noised.level.view(shape), batch.tensors["clean"], batch.advantages.view(shape)
        v = policy.predict(noised.latents, noised.timestep, condition)
        with policy.at("old"):
            old = policy.predict(noised.latents, noised.timestep, condition)
        with policy.at("reference"):
            ref = policy.predict(noised.latents, noised.timestep, condition)
        if cls is DiffusionNFTConfig:
            r = advantage / 2 + 0.5  # of their largest, 5
            errors = [noised.latents - t * ((1 - s) * old + s * v) - x_0 for s in (args.nft_beta, -args.nft_beta)]
            sizes = [error.detach().abs().mean((1, 2, 3), keepdim=True) for error in errors]
            loss = (r * errors[0] ** 2 / sizes[0] + (1 - r) * errors[1] ** 2 / sizes[1]) * 5 / args.nft_beta
        else:
            error = (v - noised.target).square().mean((1, 2, 3), keepdim=True)
            log_prob = -((error + 1e-10) ** 0.25 - 1e-10**0.25) * 4 * t
            loss = -advantage * (log_prob - log_prob.detach()).exp() + args.beta_old * (v - old) ** 2
        total = total + (loss + args.beta * (v - ref) ** 2).mean()
    return total / args.timesteps_per_sample


@each_method
def test_the_gradient_is_that_of_the_formulas(cls, tmp_path):
    seen = []

    class Watched(type(tiny(tmp_path, cls))):
        def training_step(self, model, inputs, num_items_in_batch=None):
            super().training_step(model, inputs, num_items_in_batch)
            weights = self.policy.trained_parameters
            batch = self.batch
            expected = torch.autograd.grad(by_hand(self, cls, batch), weights, allow_unused=True)
            for parameter, gradient in zip(weights, expected, strict=True):
                if gradient is not None:
                    scale = gradient.abs().max().item()
                    torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * scale + 1e-9)
                    seen.append(scale)
            return torch.zeros(())

        def _prepare_inputs(self, rows):
            self.batch = super()._prepare_inputs(rows)
            return self.batch

    args = tiny_config(
        tmp_path, cls=cls, guidance_scale=1.0, timesteps_per_sample=2, beta=0.1, max_steps=2, **{"nft_beta": 0.5}
        if cls is DiffusionNFTConfig else {},
    )  # fmt: skip
    Watched(tiny_sd3_pipeline(), brightness, args, prompts(), peft_config=tiny_lora()).train()
    assert max(seen) > 1e-5


@each_method
def test_equal_rewards_leave_the_policy_where_it_is(cls, tmp_path):
    trainer = tiny(tmp_path, cls, reward_funcs=lambda prompts, images, **kwargs: [1.0] * len(images), **SGD)
    before = trained_weights(trainer)
    trainer.train()
    # What is left of NFT's gradient is rounding: the two halves of a sample that is neither good nor bad
    assert distance(trained_weights(trainer), before) < 1e-6


# ---- The old policy ----


def test_nft_samples_with_the_old_policy_which_follows(tmp_path):
    recorder = Recorder()
    fields = {"max_steps": 3, "old_decay": 1.0, "old_decay_rate": 1.0}
    trainer = tiny(tmp_path, DiffusionNFTConfig, reward_funcs=recorder, shuffle_dataset=False, **fields)
    start = trained_weights(trainer)
    trainer.train()
    assert distance(trained_weights(trainer), start) > 1e-3
    with trainer.policy.at("old"):  # which keeps all of itself
        assert distance(trained_weights(trainer), start) == 0
    assert [log["old/decay"] for log in trainer.state.log_history[:3]] == [1.0] * 3
    untrained = Recorder()
    tiny(tmp_path, DiffusionNFTConfig, reward_funcs=untrained, shuffle_dataset=False, **fields | SGD | {
        "learning_rate": 1e-20}).train()  # fmt: skip
    assert recorder.images == untrained.images


def test_the_old_policy_moves_at_the_end_of_a_phase_by_the_share_that_grows(tmp_path):
    fields = TWO_UPDATES | {"max_steps": 4, "old_decay": 0.5, "old_decay_rate": 0.2, "old_decay_start": 1, "seed": 3}
    trainer = tiny(tmp_path, DiffusionNFTConfig, **fields)
    weights = [trained_weights(trainer)]

    class Keep(type(trainer.callback_handler.callbacks[-1]).__mro__[-2]):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(trained_weights(trainer))

    trainer.add_callback(Keep())
    trainer.train()
    # Phases end at updates 2 and 4: shares of 0.2 (2 - 1) and min(0.6, 0.5)
    expected = {n: 0.2 * w + 0.8 * weights[2][n] for n, w in weights[0].items()}
    expected = {n: 0.5 * w + 0.5 * weights[4][n] for n, w in expected.items()}
    with trainer.policy.at("old"):
        assert distance(trained_weights(trainer), expected) < 1e-6
    assert distance(trained_weights(trainer), weights[4]) == 0
    assert [log.get("old/decay") for log in trainer.state.log_history[:4]] == [None, 0.2, None, 0.5]


@each_method
def test_with_all_weights_the_old_policy_is_a_frozen_copy(cls, tmp_path):
    trainer = tiny(tmp_path, cls, lora=None, learning_rate=1e-3, max_steps=2, old_decay=1.0, old_decay_rate=1.0)
    start = trained_weights(trainer)
    trainer.train()
    copy = dict(trainer.policy.old.module.named_parameters())
    assert distance({name: copy[name] for name in start}, start) == 0
    assert distance(trained_weights(trainer), start) > 1e-4
    assert not any(p.requires_grad for p in copy.values())


@pytest.mark.parametrize(
    ("cls", "fields", "adapter", "whole"),
    [
        (DiffusionNFTConfig, {}, 2, 1),
        (AWMConfig, {}, 2, 1),
        (AWMConfig, TWO_UPDATES, 3, 1),
        (AWMConfig, TWO_UPDATES | {"beta_old": 0.0}, 2, 0),
        (AWMConfig, {"beta_old": 0.0}, 0, 0),
    ],
)
def test_the_memory_of_all_sets_of_weights_is_counted(cls, fields, adapter, whole, tmp_path):
    """The old ones, those of sampling, and of an adapter the trained ones while others are in their place."""
    config = tiny_config(tmp_path, cls=cls, **{"timesteps_per_sample": 2} | fields)
    counts = [sum(config.kept_weights(half_precision=False, is_adapter=a).values()) for a in (True, False)]
    assert counts == [adapter, whole]


def test_awm_without_it_has_none(tmp_path):
    trainer = tiny(tmp_path, AWMConfig, beta_old=0.0)
    trainer.train()
    assert not trainer.algorithm.needs_old and "old/kl" not in trainer.state.log_history[0]


# ---- AWM's ratio ----


def test_awms_ratio_is_one_in_the_first_update_of_a_phase_and_moves_in_the_second(tmp_path):
    trainer = tiny(tmp_path, AWMConfig, **TWO_UPDATES, max_steps=4)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["ratio/mean"] == 1 and first["ratio/std"] == 0
    assert second["ratio/std"] > 1e-5


def test_a_clip_range_that_all_ratios_are_beyond_stops_awm(tmp_path):
    fields = TWO_UPDATES | SGD | {"max_steps": 2, "beta": 0.0, "beta_old": 0.0, "learning_rate": 30.0}
    weights = [tiny(tmp_path, AWMConfig, epsilon=epsilon, **fields) for epsilon in (1.0, 1e-9)]
    for trainer in weights:
        trainer.train()
    free, clipped = ([log["clip_ratio/region_mean"] for log in t.state.log_history[:2]] for t in weights)
    assert free == [0, 0] and clipped[0] == 0 and clipped[1] > 0.2
    assert distance(*map(trained_weights, weights)) > 1e-5


# ---- The same, however it is run ----


@each_method
@pytest.mark.parametrize("lora", ["default", None])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_equals_the_unbroken_one(cls, lora, stop, tmp_path):
    fields = TWO_UPDATES | {"cls": cls, "lora": lora, "max_steps": 4, "save_strategy": "steps", "save_steps": stop}
    fields |= {"old_decay_rate": 0.1, "learning_rate": 1e-2 if lora else 1e-3, "use_ema": True}
    whole = train(tmp_path, **fields)
    rest = tiny_trainer(tmp_path, **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_equal(trained_weights(rest), whole)


@each_method
def test_micro_batches_do_not_change_what_is_trained(cls, tmp_path):
    fields = SGD | {"max_steps": 2, "old_decay_rate": 0.3, "learning_rate": 10.0, "generation_batch_size": 16}
    splits = [(16, 1), (4, 4), (2, 8)]
    found = []
    for batch, steps in splits:
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        trainer = tiny(tmp_path, cls, **fields | split)
        start = trained_weights(trainer)
        trainer.train()
        found.append(trained_weights(trainer))
    moved = distance(found[0], start)
    assert moved > 1e-5
    for other in found[1:]:
        assert distance(other, found[0]) < 1e-2 * moved


@each_method
def test_noise_levels_are_drawn_anew_for_each_update_and_sample(cls, tmp_path):
    trainer = tiny(tmp_path, cls, num_iterations=2, max_steps=2, timestep_sampling="uniform")
    levels, noised = [], trainer.algorithm.noised

    def recorded(policy, batch, unit):
        result = noised(policy, batch, unit)
        levels.append(result.level)
        return result

    trainer.algorithm.noised = recorded
    trainer.train()
    drawn = torch.stack(levels)
    assert drawn.shape == (4, 8) and drawn.unique().numel() == 32


@each_method
def test_guidance_gold_scores_several_rewards_and_shaping_go_along(cls, tmp_path):
    trainer = tiny(
        tmp_path, cls, guidance_scale=3.0, reward_funcs=[brightness, darkness], reward_weights=[1.0, 0.5],
        multi_objective_aggregation="normalize_then_sum", advantage_power=0.5, advantage_clip=2.0,
        eval_dataset=prompts(2), eval_strategy="steps", eval_steps=1, eval_reward_funcs=[darkness], num_iterations=2,
        beta=0.1,
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    assert any("eval_gold/average" in log for log in logs)
    updates = [log for log in logs if "loss" in log]
    assert updates[0]["kl"] < 1e-12 < updates[1]["kl"]


@each_method
def test_advantages_are_shares_of_the_largest(cls, tmp_path):
    algorithm = tiny(tmp_path, cls, scale_rewards="none", advantage_clip=2.0, advantage_power=0.5).algorithm
    rewards = torch.tensor([3.0, -3.0, 0.5, -0.5, 1.0, 1.0, 1.0, 1.0])[:, None]
    shares, _ = algorithm.advantages(PhaseScores(rewards, ["a reward"], algorithm.plan(0)))
    torch.testing.assert_close(shares, torch.tensor([1.0, -1.0, 0.125, -0.125, 0.0, 0.0, 0.0, 0.0]))


def test_a_unet_learns_in_its_own_parametrization(tmp_path):
    for cls in METHODS:
        fields = {"pipeline": tiny_sd_pipeline(), "height": 32, "width": 32, "timestep_sampling": "logit_normal"}
        trainer = tiny(tmp_path, cls, **fields)
        before = trained_weights(trainer)
        trainer.train()
        assert distance(trained_weights(trainer), before) > 1e-4


# ---- What is refused ----


@each_method
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dense_rewards": True}, TypeError, "has no dense_rewards: VGPO's values belong to the steps"),
        ({"value_scale": 0.1}, TypeError, "has no value_scale: VGPO"),
        ({"importance_ratio": "ratio_norm"}, TypeError, "has no importance_ratio: GRPO-Guard's ratio"),
        ({"sde_type": "dance"}, TypeError, "has no sde_type: it is about stochastic steps"),
        ({"sde_window_size": 2}, TypeError, "has no sde_window_size"),
        ({"advantage_power": "auto"}, ValueError, "advantage_power is 'auto', which follows the KL"),
        ({"diagnostics_steps": 1}, ValueError, "diagnostics_steps is 1"),
        ({"share_initial_noise": True}, ValueError, "all images of a group would be one and the same"),
        ({"timesteps_per_sample": 5}, ValueError, "timesteps_per_sample is 5, but must be at least 1 and at most 4"),
        ({"timesteps_per_sample": 0}, ValueError, "timesteps_per_sample is 0"),
        ({"timestep_range": [3, 3]}, ValueError, r"timestep_range is \[3, 3\]"),
        ({"timestep_range": [0, 5]}, ValueError, r"timestep_range is \[0, 5\]"),
        ({"timestep_range": 3}, ValueError, r"timestep_range is 3, but must be \[first, end\]"),
        ({"timestep_sampling": "beta"}, ValueError, "one of schedule, uniform, logit_normal"),
        ({"old_decay": 1.5}, ValueError, r"old_decay is 1.5, but must be in \[0, 1\]"),
        ({"beta": -1.0}, ValueError, "beta is -1.0"),
    ],
)
def test_settings_without_meaning_are_refused_by_name(cls, fields, error, message, tmp_path):
    with pytest.raises(error, match=message):
        tiny_config(tmp_path, cls=cls, **{"timesteps_per_sample": 2} | fields)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (DiffusionNFTConfig, {"nft_beta": 0.0}, "nft_beta is 0.0"),
        (DiffusionNFTConfig, {"epsilon": 1e-4}, "DiffusionNFTConfig has no epsilon: it is about a ratio"),
        (AWMConfig, {"huber_power": 0.0}, "huber_power is 0.0"),
        (AWMConfig, {"epsilon": 0.0}, "epsilon is 0.0"),
        (AWMConfig, {"beta_old": -0.5}, "beta_old is -0.5"),
        (AWMConfig, {"timestep_weighting": "temp"}, "one of none, t"),
    ],
)
def test_each_methods_own_settings_are_checked(cls, fields, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_config(tmp_path, cls=cls, **{"timesteps_per_sample": 2} | fields)


def test_levels_that_are_not_steps_may_be_any_number(tmp_path):
    fields = {"timestep_sampling": "uniform", "timesteps_per_sample": 2000}
    assert tiny_config(tmp_path, cls=AWMConfig, **fields).timesteps_per_sample == 2000


def test_a_config_of_another_method_is_refused(tmp_path):
    with pytest.raises(TypeError, match="args is a GuardConfig, but must be a DiffusionNFTConfig"):
        DiffusionNFTTrainer(
            tiny_sd3_pipeline(), brightness, tiny_config(tmp_path, cls=GuardConfig), prompts(), peft_config=tiny_lora()
        )


def test_a_copy_with_other_steps_trains_on_as_many_of_these(tmp_path):
    config = dataclasses.replace(DiffusionNFTConfig(str(tmp_path), use_cpu=True), num_inference_steps=6)
    assert config.timestep_range == [0, 6] and config.timesteps_per_sample == 5


def test_the_defaults_are_those_of_the_released_runs(tmp_path):
    nft, awm = DiffusionNFTConfig(str(tmp_path), use_cpu=True), AWMConfig(str(tmp_path), use_cpu=True)
    assert (nft.guidance_scale, nft.num_inference_steps, nft.timesteps_per_sample) == (1.0, 10, 9)
    assert (nft.beta, nft.nft_beta, nft.old_decay, nft.old_decay_rate) == (1e-4, 1.0, 0.5, 0.001)
    assert (awm.guidance_scale, awm.num_inference_steps, awm.timesteps_per_sample) == (1.0, 14, 6)
    assert (awm.beta, awm.beta_old, awm.old_decay, awm.huber_power, awm.epsilon) == (0.003, 1.0, 0.3, 0.25, 1.0)
    assert nft.updates_per_generation == awm.updates_per_generation == 1
    assert FlowGRPOConfig(str(tmp_path), use_cpu=True).updates_per_generation == 2
    assert not {"sde_type", "dense_rewards"} & set(DiffusionNFTConfig.__dataclass_fields__)
    assert issubclass(AWMConfig, FlowRLConfig)


# ---- Learning ----


def random_numbers(prompts, images, **kwargs):
    """Rewards that have nothing to do with the images."""
    return [random.random() for _ in images]


@each_method
@pytest.mark.parametrize(("reward", "learns"), [(brightness, True), (random_numbers, False)])
def test_the_score_rises_with_its_reward_and_stays_where_rewards_are_random(cls, reward, learns, tmp_path):
    torch.manual_seed(0)
    random.seed(0)
    backbone = tiny_painter_backbone()
    fields = {"height": SIZE, "width": SIZE, "per_device_train_batch_size": 64, "num_generations": 16}
    fields |= {"eval_strategy": "steps", "eval_steps": 20, "num_generations_eval": 16, "max_steps": 20}
    args = tiny_config(tmp_path, cls=cls, guidance_scale=1.0, **fields)
    trainer = {DiffusionNFTConfig: DiffusionNFTTrainer, AWMConfig: AWMTrainer}[cls](
        backbone.pipeline, reward, args, prompts(), prompts(), backbone=backbone, eval_reward_funcs=brightness
    )
    trainer.train()
    # Relative to the untrained model, on the same prompts and seeds
    score = [log["eval_gold/average"] for log in trainer.state.log_history if "eval_gold/average" in log][-1]
    # Seen: 1.37 and 1.29, and with random rewards between 0.98 and 1.01
    assert score > 1.15 if learns else 0.95 < score < 1.05
