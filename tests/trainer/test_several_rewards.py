"""Several rewards in the trainer: what is logged of them, and that they reach the update."""

import numpy as np
import pytest
from tiny_training import brightness, tiny_config, tiny_trainer

from trl_flow import VGPOConfig


EACH = {"multi_objective_aggregation": "normalize_then_sum"}
# Of two groups of four
FIRST = [1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0]
SECOND = [30.0, None, 10.0, 0.0, 7.0, 7.0, None, 7.0]
WATCHED = [0.0, 100.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]


def table(name, values):
    def reward(prompts, images, **kwargs):
        return values

    reward.__name__ = name
    return reward


def sampled(tmp_path, *tables, **fields):
    """The advantages of a sampling phase, and what is logged."""
    functions = [table(name, values) for name, values in tables]
    trainer = tiny_trainer(tmp_path, reward_funcs=functions, **EACH | fields)
    (batch,) = trainer._generate_and_score([{"prompt": text} for text in ["a cat"] * 4 + ["two dogs"] * 4])
    return batch.advantages, trainer.metrics.flush(trainer.algorithm)


def test_each_reward_is_logged_by_itself_and_the_watched_one_too(tmp_path):
    tables = {"first": FIRST, "second": SECOND, "watched": WATCHED}
    _, logged = sampled(tmp_path, *tables.items(), reward_weights=[1.0, 0.5, 0.0])
    for name, values in tables.items():
        present = [value for value in values if value is not None]
        assert logged[f"rewards/{name}/mean"] == pytest.approx(np.mean(present))
        assert logged[f"rewards/{name}/std"] == pytest.approx(np.std(present, ddof=1))
    # the second group differs in the watched reward alone
    assert logged["frac_reward_zero_std"] == 0.5


def test_a_group_whose_sum_does_not_differ_has_a_signal_all_the_same(tmp_path):
    tables = [("up", [0.0, 1.0, 2.0, 6.0] * 2), ("down", [6.0, 5.0, 4.0, 0.0] * 2)]
    advantages, logged = sampled(tmp_path, *tables, reward_weights=[1.0, 2.0])
    assert (advantages[0] > advantages[3] + 1).all()
    assert logged["frac_reward_zero_std"] == 0.0


def test_training_goes_through_where_one_reward_never_applies(tmp_path):
    functions = [brightness, table("never", [None] * 8)]
    trainer = tiny_trainer(tmp_path, reward_funcs=functions, max_steps=1, **EACH)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_what_has_no_meaning_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'normalize_then_sum', but dense_rewards is True.*'sum_then_normalize'"):
        tiny_config(tmp_path, cls=VGPOConfig, **EACH)
    with pytest.raises(ValueError, match="multi_objective_aggregation is 'sum', but must be one of"):
        tiny_config(tmp_path, multi_objective_aggregation="sum")
