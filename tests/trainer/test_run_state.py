"""Where a run is, as (generation, update within it), and one save, load and reset of all that has a state."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import brightness, darkness, distance, prompts, tiny_config, tiny_trainer, train, trained_weights
from transformers import TrainerState

from trl_flow import OverOptimizationCallback
from trl_flow.algorithms import MicroBatch
from trl_flow.evaluation.gold import gold_score
from trl_flow.trainer.evaluator import BaseScores
from trl_flow.trainer.run_state import RunState


CPU = torch.device("cpu")


def run_state(folder, parts=None, **fields) -> RunState:
    return RunState(tiny_config(folder, **fields), parts or {})


def micro_batches(number: int) -> list[MicroBatch]:
    return [
        MicroBatch([f"prompt {i}"] * 2, (0, 2), {"latents": torch.randn(2, 2, 3)}, torch.randn(2, 2))
        for i in range(number)
    ]


def place(state: RunState) -> tuple[int, int]:
    return state.generation, state.update


# ---- The place ----


def test_the_place_is_generation_and_update_within_it(tmp_path):
    # Two micro-batches, twice, two for each update
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    state = run_state(tmp_path, **fields)
    samples, places, given = micro_batches(2), [], []
    for _ in range(5):
        if state.needs_samples:
            state.micro_batches = samples
        given.append(samples.index(state.micro_batch))
        state.advance()
        places.append(place(state))
    assert places == [(0, 0), (0, 1), (0, 1), (1, 0), (1, 0)]
    assert given == [0, 1, 0, 1, 0]


def test_an_update_may_take_several_generations(tmp_path):
    state = run_state(tmp_path, gradient_accumulation_steps=2, steps_per_generation=1)
    for generation in (1, 2):
        state.micro_batches = micro_batches(1)
        state.advance()
        assert place(state) == (generation, 0) and state.needs_samples


def test_what_is_saved_is_the_place_of_the_last_update(tmp_path):
    """Wherever the run is when it is interrupted."""
    state = run_state(tmp_path, gradient_accumulation_steps=2, steps_per_generation=1)
    for _ in range(3):
        state.micro_batches = micro_batches(1)
        state.advance()
        if state.generation == 2:
            state.after_update()
    assert saved_place(state, tmp_path / "several generations") == (2, 0)
    # in the middle of a generation its samples are saved, and before the optimizer's step at its end, too
    state = run_state(tmp_path, per_device_train_batch_size=4, steps_per_generation=2)
    state.micro_batches = samples = micro_batches(2)
    state.advance()
    state.after_update()
    assert saved_place(state, tmp_path / "in the middle") == (0, 1)
    state.advance()
    assert state.needs_samples and saved_place(state, tmp_path / "before the step") == (0, 1)
    loaded = run_state(tmp_path, per_device_train_batch_size=4, steps_per_generation=2)
    loaded.load(tmp_path / "before the step", CPU)
    assert loaded.micro_batch.prompts == samples[1].prompts
    state.after_update()
    assert saved_place(state, tmp_path / "after it") == (1, 0)
    assert not list((tmp_path / "after it").glob("rollouts*"))


def saved_place(state: RunState, folder: Path) -> tuple[int, int]:
    state.save(folder)
    content = json.loads((folder / "run_state.json").read_text())
    return content["generation"], content["update"]


def test_place_and_samples_come_back(tmp_path):
    fields = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
    state = run_state(tmp_path, **fields)
    for _ in range(3):
        if state.needs_samples:
            state.micro_batches = samples = micro_batches(2)
        state.advance()
        state.after_update()
    state.save(tmp_path / "checkpoint")
    loaded = run_state(tmp_path, **fields)
    loaded.load(tmp_path / "checkpoint", CPU)
    assert place(loaded) == place(state) == (1, 1)
    for batch, expected in zip(loaded.micro_batches, samples, strict=True):
        assert (batch.prompts, batch.steps) == (expected.prompts, expected.steps)
        assert torch.equal(batch.tensors["latents"], expected.tensors["latents"])
        assert torch.equal(batch.advantages, expected.advantages)
    assert loaded.micro_batch.prompts == ["prompt 1"] * 2


# ---- With other settings ----

# The same 8 images a sampling phase and one update with them, split in three ways
SPLITS = {
    "4 x 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "2 x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "8 x 1": {"per_device_train_batch_size": 8},
}
# Plain gradient descent: Adam makes a whole step of a gradient that is 0 but for rounding
STEADY = {"optim": "sgd", "learning_rate": 3.0, "weight_decay": 0.0, "max_steps": 6, "sde_window_size": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run that is not broken: its folder with checkpoints 3 and 4, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    # Four prompts, two to a phase: step 3 is in the second epoch, step 4 at its end
    trainer = tiny_trainer(folder, save_strategy="steps", save_steps=1, **STEADY, **SPLITS["4 x 2"])
    start = trained_weights(trainer)
    trainer.train()
    weights = trained_weights(trainer)
    assert distance(weights, start) > 1e-3
    return folder, weights


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("step", [3, 4])
def test_at_the_end_of_a_phase_any_split_goes_on(step, split, whole, tmp_path):
    folder, weights = whole
    trainer = tiny_trainer(tmp_path, **STEADY, **SPLITS[split])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert trainer.state.global_step == 6
    assert distance(trained_weights(trainer), weights) < 1e-5


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Two updates a phase: checkpoint 3 is in the middle of one, checkpoint 4 at its end."""
    folder = tmp_path_factory.mktemp("halves")
    fields = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
    return folder, train(folder, save_strategy="steps", save_steps=1, max_steps=6, **fields)


def test_in_the_middle_of_a_phase_the_same_split_goes_on_and_no_other(halves, tmp_path):
    folder, weights = halves
    checkpoint = str(folder / "checkpoint-3")
    assert json.loads((folder / "checkpoint-3" / "run_state.json").read_text())["update"] == 1
    trainer = tiny_trainer(tmp_path / "same", per_device_train_batch_size=4, steps_per_generation=2, max_steps=6)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert distance(trained_weights(trainer), weights) < 1e-5
    other = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    trainer = tiny_trainer(tmp_path / "other", max_steps=6, **other)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=checkpoint)
    for name, saved, own in (
        ("per_device_train_batch_size", 4, 2),
        ("steps_per_generation", 2, 4),
        ("gradient_accumulation_steps", 1, 2),
    ):
        assert f"{name}={saved}" in str(error.value) and f"{name}={own}" in str(error.value)
    # at the end of the phase it goes on
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert trainer.state.global_step == 6


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"per_device_train_batch_size": 4}, ["generation_batch_size=8", "generation_batch_size=4"]),
        ({"num_iterations": 2}, ["updates_per_generation=1", "updates_per_generation=2"]),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, ["updates_per_generation=1/2"]),
    ],
    ids=["images", "iterations", "half an update"],
)
def test_another_phase_is_refused_before_anything_is_loaded(fields, parts, whole, tmp_path):
    trainer = tiny_trainer(tmp_path, **STEADY, **fields)
    before = trained_weights(trainer)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert all(part in str(error.value) for part in parts)
    assert distance(trained_weights(trainer), before) == 0
    assert trainer.state.global_step == 0 and trainer.optimizer is None


# The same 8 images a phase and the same two updates with them
SAME = {"4 x 1": (4, 2, 1, 1), "2 x 2": (2, 4, 2, 1), "1 x 4": (1, 8, 4, 1)}
# and the same images with other updates: four, the same samples twice, one, half a one
OTHERS = {"four": (2, 4, 1, 1), "twice": (8, 1, 1, 2), "one": (4, 2, 2, 1), "half": (4, 2, 4, 1)}


def split(name: str) -> dict[str, int]:
    names = ("per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps", "num_iterations")
    return dict(zip(names, (SAME | OTHERS)[name], strict=True))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    folders, weights = {}, {}
    for name in ("4 x 1", "2 x 2"):
        folders[name] = tmp_path_factory.mktemp("matrix")
        trainer = tiny_trainer(folders[name], save_strategy="steps", save_steps=1, **STEADY, **split(name))
        trainer.train()
        weights[name] = trained_weights(trainer)
    assert distance(weights["4 x 1"], weights["2 x 2"]) < 1e-5
    return folders, weights["4 x 1"]


@pytest.mark.parametrize("step", [4, 5], ids=["at a phase's end", "in its middle"])
@pytest.mark.parametrize("resumed", SAME | OTHERS)
@pytest.mark.parametrize("saved", ["4 x 1", "2 x 2"])
def test_what_is_resumed_is_equal_or_refused(saved, resumed, step, matrix, tmp_path):
    folders, weights = matrix
    trainer = tiny_trainer(tmp_path, **STEADY, **split(resumed))
    before, checkpoint = trained_weights(trainer), str(folders[saved] / f"checkpoint-{step}")
    if resumed == saved or (resumed in SAME and step == 4):
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 6 and distance(trained_weights(trainer), weights) < 1e-5
        return
    with pytest.raises(ValueError, match="was written with .*, but this run has"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert distance(trained_weights(trainer), before) == 0 and trainer.optimizer is None


# ---- All that has a state ----


class Part:
    """A part whose state is a number and a tensor."""

    def __init__(self, number: int = 0):
        self.load_state_dict({"number": number, "tensor": torch.full((3,), float(number))})

    def state_dict(self):
        return {"number": self.number, "tensor": self.tensor}

    def load_state_dict(self, state):
        self.number, self.tensor = state.get("number", -1), state.get("tensor", torch.zeros(3))


def test_every_part_is_saved_loaded_and_reset(tmp_path):
    state = run_state(tmp_path, {"one": Part(1), "one more": Part(2)})
    state.generation = 5
    state.after_update()
    state.save(tmp_path / "checkpoint")
    parts = {"one": Part(), "one more": Part(), "new": Part(7)}
    loaded = run_state(tmp_path, parts)
    loaded.load(tmp_path / "checkpoint", CPU)
    # a part that the checkpoint does not know starts anew
    assert [part.number for part in parts.values()] == [1, 2, -1]
    assert [part.tensor[0].item() for part in parts.values()] == [1.0, 2.0, 0.0]
    assert place(loaded) == (5, 0)
    loaded.reset()
    assert [part.number for part in parts.values()] == [-1, -1, -1]
    assert place(loaded) == (0, 0)


def everything(folder):
    """A trainer in which every part has a state."""
    trainer = tiny_trainer(
        folder,
        use_ema=True,
        advantage_power="auto",
        num_iterations=2,
        eval_reward_funcs=[darkness],
        eval_dataset=prompts(2),
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[OverOptimizationCallback()],
    )
    callbacks = trainer.callback_handler.callbacks
    trainer.run_state.parts |= OverOptimizationCallback.by_name(callbacks)
    return trainer


def test_the_average_the_algorithm_the_base_scores_and_the_watch_are_parts(tmp_path):
    trainer = everything(tmp_path)
    trainer.evaluator.evaluate(trainer.eval_dataset, TrainerState())
    ema = trainer.policy.ema
    ema.optimization_step = 3
    ema.shadow_params = [parameter + 1 for parameter in ema.shadow_params]
    power = trainer.algorithm.estimator.power
    power.power, power.target_kl, power._sum, power._count = 0.5, 1e-3, 2.0, 4
    watch = trainer.run_state.parts["over_optimization"]
    watch._key, watch._count, watch._best_reward = "key", 1, 0.5
    watch._best = gold_score({"gold": [1.0, 1.0]}, {"gold": [1.0, 1.2]})
    saved = {name: part.state_dict() for name, part in trainer.run_state.parts.items()}
    assert saved.keys() == {"policy", "algorithm", "evaluator", "over_optimization"} and all(saved.values())
    trainer.run_state.save(tmp_path / "checkpoint")

    fresh = everything(tmp_path / "fresh")
    start = {name: part.state_dict() for name, part in fresh.run_state.parts.items()}
    fresh.run_state.load(tmp_path / "checkpoint", CPU)
    for name, part in fresh.run_state.parts.items():
        loaded = part.state_dict()
        assert loaded.keys() == saved[name].keys()
        for key, value in saved[name].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(loaded[key], value)
            else:
                assert loaded[key] == value, key

    fresh.run_state.reset()
    for name in ("algorithm", "over_optimization"):
        assert fresh.run_state.parts[name].state_dict() == start[name]
    # a new average begins at the weights; base scores stay, for they do not depend on the run
    torch.testing.assert_close(fresh.policy.ema.shadow_params, list(trained_weights(fresh).values()))
    assert fresh.policy.ema.optimization_step == 0
    assert fresh.evaluator.state_dict() == saved["evaluator"]


def test_base_scores_are_json_without_nan():
    base = BaseScores({"reward": float("nan")}, {"gold": np.array([1.0, np.nan])}, None)
    content = json.loads(json.dumps(base.to_json(), allow_nan=False))
    again = BaseScores.from_json(content)
    assert np.isnan(again.reward) and again.diversity is None
    np.testing.assert_array_equal(again.gold["gold"], base.gold["gold"])


def test_a_second_training_begins_anew(tmp_path):
    calls = []

    def reward(prompts, images, **kwargs):
        calls.append([image.tobytes() for image in images])
        return brightness(prompts, images)

    trainer = tiny_trainer(tmp_path, reward_funcs=reward, max_steps=1, learning_rate=0.0)
    trainer.train()
    trainer.train()
    # generation 0 again, from the same noise
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [((2, 4, 2, 1), (4, 2, 2, 2), "num_iterations=1"), ((4, 3, 2, 2), (2, 6, 4, 2), "steps_per_generation=3")],
    ids=["the same samples twice", "uneven shares"],
)
def test_splits_whose_updates_are_made_of_other_samples_are_refused(before, after, word, tmp_path):
    names = ("per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps", "num_iterations")
    old, new = (
        RunState(tiny_config(tmp_path, **dict(zip(names, split, strict=True))), {}) for split in (before, after)
    )
    assert old.args.updates_per_generation == new.args.updates_per_generation
    old.save(tmp_path)
    with pytest.raises(ValueError, match=word):
        new.check(tmp_path)


def test_a_run_that_has_come_to_its_end_is_not_trained_further(tmp_path):
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, **fields).train()
    with pytest.raises(ValueError, match="is at update 3, and max_steps is 3: the run is complete"):
        tiny_trainer(tmp_path, **fields).train(resume_from_checkpoint=True)
