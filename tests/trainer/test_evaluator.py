"""What an evaluation leaves as it is, and what it is compared with."""

import asyncio

import numpy as np
import pytest
import torch
from tiny_training import brightness, distance, prompts, tiny_trainer, trained_weights

from trl_flow.rewards.checks import RewardError


def test_training_in_half_precision_does_not_notice_an_evaluation(tmp_path):
    def weights(name: str, evaluates: bool) -> dict[str, torch.Tensor]:
        trainer = tiny_trainer(tmp_path / name, bf16=True, eval_dataset=prompts(4), max_steps=1)
        if evaluates:
            trainer.evaluate()
        trainer.train()
        return trained_weights(trainer)

    assert distance(weights("with", True), weights("without", False)) < 1e-6


def test_rewards_and_decoding_have_their_own_precision(tmp_path):
    seen = []

    def reward(prompts, images, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return brightness(prompts, images)

    trainer = tiny_trainer(tmp_path, reward_funcs=reward, bf16=True, eval_dataset=prompts(2))
    decode = trainer.backbone.decode
    trainer.backbone.decode = lambda latents: seen.append(torch.is_autocast_enabled("cpu")) or decode(latents)
    trainer.evaluate()
    assert seen and not any(seen)


def test_sets_with_equal_prompts_and_other_columns_have_base_scores_of_their_own(tmp_path):
    sets = {"a": prompts(2, target=[1.0, 1.0]), "b": prompts(2, target=[10.0, 10.0])}

    def target(prompts, images, target, **kwargs):
        return target

    metrics = tiny_trainer(tmp_path, eval_dataset=sets, eval_reward_funcs=target).evaluate()
    assert metrics["eval_a_gold/average"] == metrics["eval_b_gold/average"] == pytest.approx(1.0)


def test_an_evaluation_to_which_no_reward_applies_is_not_the_best(tmp_path):
    def none_while_evaluating(prompts, images, trainer_state, **kwargs):
        return [None] * len(images)

    fields = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=none_while_evaluating,
        eval_dataset=prompts(2),
        load_best_model_at_end=True,
        **fields,
    )
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.best_model_checkpoint is None


def test_the_best_of_several_sets_is_asked_for_at_once(tmp_path):
    with pytest.raises(ValueError, match="eval_a_reward, eval_b_reward"):
        tiny_trainer(
            tmp_path,
            eval_dataset={"a": prompts(2), "b": prompts(2)},
            load_best_model_at_end=True,
            **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        )


def test_a_reward_that_cancels_itself_is_named(tmp_path):
    async def cancelled(prompts, images, **kwargs):
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="'cancelled' raised CancelledError"):
        tiny_trainer(tmp_path, reward_funcs=cancelled).train()


def test_metrics_of_an_algorithm_may_be_numbers_of_any_kind(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.algorithm.after_update = lambda policy: {"a": torch.tensor(1.5), "b": np.float32(2.5)}
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "a" in entry)
    assert (log["a"], log["b"]) == (1.5, 2.5)
