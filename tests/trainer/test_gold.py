"""Gold scores of evaluations: what is divided by what, that nothing else changes, and that it survives a resume."""

import json
import random

import numpy as np
import pytest
import torch
from tiny_models import tiny_sd3_pipeline
from tiny_training import (
    assert_equal,
    brightness,
    darkness,
    distance,
    prompts,
    tiny_lora,
    tiny_trainer,
    trained_weights,
    warnings_of,
)

from trl_flow.evaluation.diversity import diversity
from trl_flow.evaluation.plots import reward_curves
from trl_flow.rewards.checks import RewardError


def reds(prompts, images, **kwargs):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


class Recorded:
    """`darkness`, and what it was given and gave."""

    __name__ = "recorded"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, images, trainer_state, **kwargs):
        values = darkness(prompts, images)
        self.calls.append((trainer_state.global_step, prompts, values, images))
        return values


def gold_trainer(tmp_path, **fields):
    defaults = {"eval_dataset": prompts(3), "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.1}
    return tiny_trainer(tmp_path, **{"eval_reward_funcs": [darkness]} | defaults | fields)


def golds(trainer) -> list[dict[str, float]]:
    """What evaluations logged, without seconds."""
    return [
        {name: value for name, value in logs.items() if "runtime" not in name and "per_second" not in name}
        for logs in trainer.state.log_history
        if any("gold/average" in name for name in logs)
    ]


def test_the_metrics_by_hand(tmp_path):
    recorded = Recorded()
    trainer = gold_trainer(tmp_path, eval_reward_funcs=[recorded, reds], num_generations_eval=2)
    trainer.train()
    red = []
    base, first, second = golds(trainer)
    assert [step for step, *_ in recorded.calls] == [0, 1, 2]
    for (_, asked, values, images), logs in zip(recorded.calls, (base, first, second), strict=True):
        assert asked == ["a cat", "a cat", "two dogs", "two dogs", "a bird", "a bird"]
        red.append(np.mean(reds(None, images)))
        assert logs["eval_gold/recorded"] == pytest.approx(np.mean(values), rel=1e-6)
        assert logs["eval_gold/reds"] == pytest.approx(red[-1], rel=1e-6)
        own = np.mean(values) / np.mean(recorded.calls[0][2])
        assert logs["eval_gold/average"] == pytest.approx((own + red[-1] / red[0]) / 2, rel=1e-6)
        assert logs["eval_diversity"] == diversity(images, 2)
        assert logs["eval_reward"] == pytest.approx(1 - np.mean(values), rel=1e-6)
    assert (base["step"], base["eval_gold/average"], base["eval_gold/average_std_err"]) == (0, 1.0, 0.0)
    assert second["eval_gold/average"] != 1.0 and second["eval_gold/average_std_err"] > 0
    # they are no rewards
    assert not any("rewards/recorded" in name or "rewards/reds" in name for logs in golds(trainer) for name in logs)
    assert "eval_diversity" not in golds(gold_trainer(tmp_path / "one", max_steps=1))


@pytest.mark.parametrize("lora", [tiny_lora(init_lora_weights=False), None], ids=["adapter", "all weights"])
def test_the_base_is_the_model_that_the_trainer_was_given(lora, tmp_path):
    pipeline = tiny_sd3_pipeline()
    untouched = tiny_trainer(tmp_path / "untouched", pipeline=tiny_sd3_pipeline(), lora=None, eval_dataset=prompts(3))
    expected = untouched.evaluate()["eval_reward"]
    trainer = gold_trainer(tmp_path / "gold", pipeline=pipeline, lora=lora, max_steps=1)
    trainer.train()
    base, trained = golds(trainer)
    assert base["eval_reward"] == pytest.approx(expected, abs=2e-5)
    assert base["eval_gold/darkness"] == pytest.approx(1 - expected, abs=2e-5)
    assert abs(trained["eval_reward"] - expected) > 1e-4
    assert trained["eval_gold/average"] == pytest.approx((1 - trained["eval_reward"]) / (1 - expected), abs=1e-4)


def test_training_is_the_same_with_and_without_them(tmp_path):
    def noisy(prompts, images, **kwargs):
        random.random(), np.random.rand(), torch.rand(1)
        return darkness(prompts, images)

    def jittered(prompts, images, **kwargs):
        return [value + 1e-3 * (random.random() + torch.rand(1).item()) for value in brightness(prompts, images)]

    fields = {"max_steps": 3, "reward_funcs": jittered}
    weights = {}
    for gold in (noisy, None):
        trainer = gold_trainer(tmp_path / str(gold is None), eval_reward_funcs=gold, **fields)
        trainer.train()
        weights[gold is None] = trained_weights(trainer)
    start = trained_weights(tiny_trainer(tmp_path / "start"))
    assert distance(weights[True], start) > 1e-3
    assert_equal(weights[False], weights[True])


@pytest.mark.parametrize("lora", ["default", None], ids=["adapter", "all weights"])
def test_a_resumed_run_has_the_same_base(lora, tmp_path):
    fields = {"lora": lora, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "num_generations_eval": 2}
    whole = gold_trainer(tmp_path, **fields)
    whole.train()
    recorded = Recorded()
    recorded.__name__ = "darkness"
    rest = gold_trainer(tmp_path, eval_reward_funcs=recorded, **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for own, expected in zip(golds(rest), golds(whole), strict=True):
        assert own == pytest.approx(expected, abs=2e-5)
    # the base model has not been drawn again
    assert [step for step, *_ in recorded.calls] == [2, 3]
    # nor when the finished run is evaluated
    assert rest.evaluate()["eval_gold/average"] == pytest.approx(golds(whole)[-1]["eval_gold/average"], abs=2e-5)
    assert len(recorded.calls) == 3


# An adapter is switched off, and with a KL a frozen copy is kept: the base is there
@pytest.mark.parametrize(
    "fields", [{}, {"lora": None, "beta": 1e-3, "learning_rate": 1e-3}], ids=["adapter", "all weights and kl"]
)
def test_a_checkpoint_without_base_scores_goes_on_where_the_base_is_there(fields, tmp_path):
    fields = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1} | fields
    gold_trainer(tmp_path, eval_reward_funcs=None, **fields).train()
    rest = gold_trainer(tmp_path, **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    whole = gold_trainer(tmp_path / "whole", **fields)
    whole.train()
    assert golds(rest)[-1] == pytest.approx(golds(whole)[-1], abs=2e-5)


def test_a_checkpoint_without_base_scores_is_refused_where_the_base_is_gone(tmp_path):
    fields = {"lora": None, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    gold_trainer(tmp_path, eval_reward_funcs=None, **fields).train()
    rest = gold_trainer(tmp_path, **fields | {"max_steps": 2})
    with pytest.raises(ValueError, match="the base model is gone"):
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_evaluations_before_and_after_training(tmp_path):
    before = gold_trainer(tmp_path / "adapter", max_steps=1)
    assert before.evaluate()["eval_gold/average"] == 1.0
    before.train()
    other = prompts(4).select([3, 2])
    assert before.evaluate(other)["eval_gold/average"] != 1.0

    full = gold_trainer(tmp_path / "full", lora=None, max_steps=1)
    full.train()
    weights = trained_weights(full)
    assert full.evaluate()["eval_gold/average"] == pytest.approx(golds(full)[-1]["eval_gold/average"], abs=2e-5)
    with pytest.raises(ValueError, match="the base model is gone"):
        full.evaluate(other)
    # with a KL the initial model is kept
    kept = gold_trainer(tmp_path / "kept", lora=None, max_steps=1, beta=1e-6)
    kept.train()
    untrained = gold_trainer(tmp_path / "untrained", lora=None)
    assert kept.evaluate(other)["eval_gold/average"] == pytest.approx(
        (1 - kept.evaluate(other)["eval_reward"]) / untrained.evaluate(other)["eval_gold/darkness"], rel=1e-6
    )
    assert_equal(trained_weights(full), weights)


def test_the_average_of_the_weights_is_evaluated(tmp_path):
    fields = {"max_steps": 3, "use_ema": True, "ema_decay": 0.9}
    trainer = gold_trainer(tmp_path, **fields)
    trainer.train()
    last = golds(trainer)[-1]["eval_gold/average"]
    averages = trainer.policy.ema.shadow_params
    trainer.policy.ema = None
    assert abs(trainer.evaluate()["eval_gold/average"] - last) > 2e-5
    with torch.no_grad():
        for parameter, average in zip(trainer.policy.trained_parameters, averages, strict=True):
            parameter.copy_(average)
    assert trainer.evaluate()["eval_gold/average"] == pytest.approx(last, abs=5e-6)


def test_what_does_not_apply_is_left_out(tmp_path):
    def cats_only(prompts, images, **kwargs):
        return [value if "cat" in p else None for p, value in zip(prompts, darkness(prompts, images), strict=True)]

    def never(prompts, images, **kwargs):
        return [None] * len(images)

    trainer = gold_trainer(tmp_path, eval_reward_funcs=[cats_only, never], save_strategy="steps", save_steps=1)
    trainer.train()
    base, _, last = golds(trainer)
    assert last["eval_gold/never"] is None
    assert last["eval_gold/average"] == pytest.approx(last["eval_gold/cats_only"] / base["eval_gold/cats_only"])
    rest = gold_trainer(tmp_path, eval_reward_funcs=[cats_only, never])
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert golds(rest)[-1] == pytest.approx(last, abs=2e-5)


def test_a_function_that_applies_to_nothing_is_named(tmp_path):
    def absent(prompts, images, **kwargs):
        return [None] * len(images)

    trainer = gold_trainer(tmp_path, eval_reward_funcs=[darkness, absent], max_steps=1)
    with warnings_of("trl_flow") as warnings:
        trainer.train()
    (warning,) = [message for message in warnings if "gold function" in message]
    assert "'absent' returned None for every image" in warning


def test_several_evaluation_sets(tmp_path):
    data = {"seen": prompts(2), "held_out": prompts(4).select([2, 3])}
    trainer = gold_trainer(tmp_path, eval_dataset=data, max_steps=1)
    trainer.train()
    log = trainer.state.log_history
    for name in data:
        base, last = (logs for logs in log if f"eval_{name}_gold/average" in logs)
        assert base["step"] == 0 and base[f"eval_{name}_gold/average"] == 1.0
        assert last[f"eval_{name}_gold/average"] == pytest.approx(
            last[f"eval_{name}_gold/darkness"] / base[f"eval_{name}_gold/darkness"]
        )
    by_name = trainer.evaluate("held_out")
    assert by_name["eval_gold/average"] == pytest.approx(last["eval_held_out_gold/average"], abs=2e-5)


def test_the_base_is_logged_once(tmp_path):
    trainer = gold_trainer(tmp_path, eval_on_start=True, max_steps=1)
    trainer.train()
    assert [logs["step"] for logs in golds(trainer)] == [0, 1]
    assert golds(trainer)[0]["eval_gold/average"] == 1.0


def test_an_evaluation_before_training_is_in_the_runs_log_and_curves(tmp_path):
    trainer = gold_trainer(tmp_path, max_steps=1)
    before = trainer.evaluate()
    trainer.evaluate(prompts(2))  # of another set: not in the curves of the trainer's own
    trainer.train()
    assert [logs["step"] for logs in golds(trainer)] == [0, 1]
    assert golds(trainer)[0]["eval_rewards/brightness/mean"] == before["eval_rewards/brightness/mean"]
    lines = {line.get_label(): line.get_xdata().tolist() for line in reward_curves(str(tmp_path)).axes[0].lines}
    assert lines == {"evaluation": [0, 1], "training": [1]}


def test_a_base_that_was_measured_before_is_logged_with_all_its_rewards(tmp_path):
    trainer = gold_trainer(tmp_path, eval_strategy="no", max_steps=1)
    trainer.evaluator.evaluate_base(trainer.eval_dataset, trainer.state)
    trainer.train()
    assert golds(trainer)[0]["step"] == 0 and "eval_rewards/brightness/mean" in golds(trainer)[0]


def test_the_images_of_the_base_are_shown(tmp_path):
    gold_trainer(tmp_path, log_images=True, max_steps=1).train()
    assert {path.name for path in (tmp_path / "images").glob("eval*")} == {"eval-000000.png", "eval-000001.png"}


def test_a_function_that_is_optimized_may_be_watched_as_well(tmp_path):
    trainer = gold_trainer(tmp_path, eval_reward_funcs=brightness, max_steps=1)
    trainer.train()
    last = golds(trainer)[-1]
    assert last["eval_gold/brightness_2"] == pytest.approx(last["eval_rewards/brightness/mean"])


def test_diversity_while_training(tmp_path):
    seen = []

    def reward(prompts, images, **kwargs):
        seen.append(images)
        return brightness(prompts, images)

    trainer = tiny_trainer(tmp_path, reward_funcs=reward)
    trainer.train()
    logged = [logs["diversity"] for logs in trainer.state.log_history if "diversity" in logs]
    assert logged == [diversity(images, 4) for images in seen]
    assert len(set(logged)) == 2 and min(logged) > 0.05


# ---- What is refused ----


def test_functions_that_no_evaluation_would_call_are_refused(tmp_path):
    for nothing in (None, {}):
        with pytest.raises(ValueError, match=r"eval_reward_funcs \(darkness\) score evaluations only"):
            tiny_trainer(tmp_path / "out", pipeline="nowhere", eval_reward_funcs=[darkness], eval_dataset=nothing)
    assert not (tmp_path / "out").exists()


def test_functions_are_checked_before_a_model_is_loaded(tmp_path):
    def needs(prompts, images, answer, **kwargs):
        return [0.0] * len(images)

    def average(prompts, images, **kwargs):
        return [1.0] * len(images)

    fields = {"pipeline": "nowhere", "eval_dataset": {"held_out": prompts(2)}}
    with pytest.raises(ValueError, match=r"eval_dataset\['held_out'\]: .*'needs' needs a column 'answer'"):
        tiny_trainer(tmp_path, eval_reward_funcs=needs, **fields)
    with pytest.raises(ValueError, match="there is no reward function 'darkness'"):
        tiny_trainer(tmp_path, eval_reward_funcs=["darkness"], **fields)
    with pytest.raises(ValueError, match="called 'average'"):
        tiny_trainer(tmp_path, eval_reward_funcs=average, **fields)


def test_columns_of_the_evaluation_set_are_enough(tmp_path):
    def offset(prompts, images, level, **kwargs):
        return [value + 1 for value in level]

    trainer = gold_trainer(tmp_path, eval_reward_funcs=offset, eval_dataset=prompts(2, level=[1.0, 2.0]), max_steps=1)
    trainer.train()
    assert golds(trainer)[-1]["eval_gold/offset"] == 2.5


def test_a_base_that_cannot_be_divided_by_ends_the_run_before_its_first_update(tmp_path):
    def negative(prompts, images, **kwargs):
        return [-value for value in brightness(prompts, images)]

    trainer = gold_trainer(tmp_path, eval_reward_funcs=[darkness, negative])
    start = trained_weights(trainer)
    with pytest.raises(ValueError, match=r"'negative' is -0\.\d+.*offset"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert_equal(trained_weights(trainer), start)
    with pytest.raises(ValueError, match="'negative'"):
        trainer.evaluate()


def test_an_error_names_the_function(tmp_path):
    def broken(prompts, images, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise OSError("the scorer is gone")
        return darkness(prompts, images)

    with pytest.raises(RewardError, match="'broken' raised OSError"):
        gold_trainer(tmp_path, eval_reward_funcs=broken).train()


def test_the_state_is_json_without_nan(tmp_path):
    def cats_only(prompts, images, **kwargs):
        return [1.0 if "cat" in prompt else None for prompt in prompts]

    gold_trainer(tmp_path, eval_reward_funcs=cats_only, max_steps=1, save_strategy="steps", save_steps=1).train()

    def refuse(name):
        raise AssertionError(name)

    state = json.loads((tmp_path / "checkpoint-1" / "run_state.json").read_text(), parse_constant=refuse)
    ((key, base),) = state["parts"]["evaluator"]["base_scores"].items()
    assert base["gold"] == {"cats_only": [1.0, None, None]}
