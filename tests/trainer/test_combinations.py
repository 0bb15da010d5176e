"""GRPO-Guard, SLAS and VGPO in every combination, with what else a run may have."""

import itertools

import pytest
import torch
from tiny_training import assert_equal, brightness, distance, prompts, tiny_trainer, trained_weights

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


def train(folder, names, **fields):
    parts = {name: value for part in names for name, value in PARTS[part].items()}
    trainer = tiny_trainer(
        folder, reward_funcs=[brightness, redness], train_dataset=prompts(4), **WITH | parts | fields
    )
    before = trained_weights(trainer)
    trainer.train()
    return trainer, distance(trained_weights(trainer), before)


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "none")
def test_every_combination_trains(names, tmp_path):
    trainer, moved = train(tmp_path, names)
    assert moved > 1e-4
    assert all(value.isfinite().all() for value in trained_weights(trainer).values())
    logs = trainer.state.log_history
    assert all(entry["grad_norm"] > 0 for entry in logs[:4])
    assert logs[1]["kl"] > 0
    assert ("advantage/value_share" in logs[0]) == ("vgpo" in names)
    assert logs[0]["ratio/first_update_deviation"] == 0


def test_every_part_changes_what_is_trained(tmp_path):
    weights = {names: trained_weights(train(tmp_path / "-".join(names or "0"), names)[0]) for names in COMBINATIONS}
    for one, other in itertools.combinations(weights, 2):
        assert distance(weights[one], weights[other]) > 1e-6, (one, other)


def test_a_combination_is_the_same_from_whichever_class_it_starts(tmp_path):
    fields = WITH | SLAS | VGPO | {"epsilon": 1e-3, "learning_rate": 1e-2, "reward_funcs": [brightness, redness]}
    weights = []
    for cls, more in ((FlowGRPOConfig, GUARD), (GuardConfig, {})):
        trainer = tiny_trainer(tmp_path / cls.__name__, cls=cls, **fields | more)
        trainer.train()
        weights.append(trained_weights(trainer))
    assert_equal(*weights)


@pytest.mark.parametrize("sde_type", ["flow", "dance"])
@pytest.mark.parametrize(
    ("ratio", "weighting"),
    [
        ("standard", "none"),
        ("standard", "temp"),
        ("standard", "inverse_dt"),
        ("mean_revised", "none"),
        ("ratio_norm", "none"),
        ("ratio_norm", "inverse_dt"),
    ],
)
def test_the_ablation_of_guard_trains_on_both_dynamics(ratio, weighting, sde_type, tmp_path):
    fields = {"importance_ratio": ratio, "timestep_weighting": weighting, "sde_type": sde_type}
    # a clip range that is never reached, so that no step loses its gradient
    trainer = tiny_trainer(tmp_path, num_iterations=2, diagnostics_steps=1, epsilon=1.0, **fields)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["ratio/first_update_deviation"] == 0
    norms = torch.tensor([second[f"grad_norm/step_{step}"] for step in range(3)])
    assert (norms > 0).all() and norms.isfinite().all()
