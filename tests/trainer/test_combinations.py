"""GRPO-Guard, SLAS and VGPO in every combination, with what else a run may have."""

import itertools

import pytest
from tiny_training import brightness, distance, prompts, tiny_config, tiny_trainer, trained_weights

from trl_flow import FlowGRPOConfig, GuardConfig


GUARD = {"importance_ratio": "ratio_norm", "timestep_weighting": "inverse_dt", "scale_rewards": "group"}
SLAS = {"advantage_power": 0.5}
VGPO = {"dense_rewards": True, "value_scale": 0.1}
PARTS = {"guard": GUARD, "slas": SLAS, "vgpo": VGPO}
COMBINATIONS = [names for number in range(4) for names in itertools.combinations(PARTS, number)]

# KL, a window of two of the three steps, and two rewards, one of which judges finished images only
WITH = {
    "beta": 0.04,
    "sde_window_size": 2,
    "share_initial_noise": True,
    "reward_weights": [1.0, 0.5],
    "num_iterations": 2,
    "max_steps": 4,
}


def redness(prompts, images, **kwargs):
    return [image.convert("RGB").getchannel(0).getextrema()[1] / 255 for image in images]


redness.dense = False


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each combination, trained once: the log's entries, the weights, and how far these have moved."""
    runs = {}
    for names in COMBINATIONS:
        parts = {name: value for part in names for name, value in PARTS[part].items()}
        trainer = tiny_trainer(
            tmp_path_factory.mktemp("run"),
            reward_funcs=[brightness, redness],
            train_dataset=prompts(4),
            **WITH | parts,
        )
        before = trained_weights(trainer)
        trainer.train()
        after = trained_weights(trainer)
        runs[names] = trainer.state.log_history, after, distance(after, before)
    return runs


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "none")
def test_every_combination_trains(names, trained):
    logs, weights, moved = trained[names]
    assert moved > 1e-4
    assert all(value.isfinite().all() for value in weights.values())
    assert all(entry["grad_norm"] > 0 for entry in logs[:4])
    assert logs[1]["kl"] > 0
    assert ("advantage/value_share" in logs[0]) == ("vgpo" in names)
    assert logs[0]["ratio/first_update_deviation"] == pytest.approx(0, abs=1e-6)


def test_every_part_changes_what_is_trained(trained):
    for one, other in itertools.combinations(trained, 2):
        assert distance(trained[one][1], trained[other][1]) > 1e-5, (one, other)


def test_a_combination_is_the_same_from_whichever_class_it_starts(tmp_path):
    """Every switch that a preset sets is a field, so that the other class with the same fields is the same config."""
    fields = SLAS | VGPO | {"epsilon": 1e-3, "learning_rate": 1e-2}
    one = tiny_config(tmp_path, cls=FlowGRPOConfig, **fields | GUARD)
    other = tiny_config(tmp_path, cls=GuardConfig, **fields)
    assert one.to_dict() == other.to_dict()
