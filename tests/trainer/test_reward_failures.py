"""A reward that fails costs nothing: the run is saved as it was, and goes on from there as if nothing had happened."""

from pathlib import Path

import pytest
from tiny_training import assert_equal, brightness, darkness, prompts, tiny_trainer, trained_weights
from transformers import TrainerCallback

from trl_flow.rewards import CheckpointError, CLIPScoreReward
from trl_flow.rewards.checks import RewardError


class Server:
    """Call number `gone_at`, counted from 1, fails."""

    __name__ = "server"

    def __init__(self, gone_at=None):
        self.gone_at = gone_at
        self.calls = 0

    def __call__(self, prompts, images, **kwargs):
        self.calls += 1
        if self.calls == self.gone_at:
            raise ConnectionError("http://127.0.0.1:8000 does not answer")
        return brightness(prompts, images)


def failed(folder, gone_at, **fields):
    """A run that fails: its trainer and its error."""
    trainer = tiny_trainer(folder, reward_funcs=Server(gone_at), **fields)
    with pytest.raises(RewardError, match="'server' raised ConnectionError: http://127.0.0.1:8000") as error:
        trainer.train()
    return trainer, str(error.value)


def weights_of(folder, resume_from_checkpoint=None, **fields):
    trainer = tiny_trainer(folder, reward_funcs=Server(), **fields)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trained_weights(trainer)


# The batch of four is sampled in two parts, so that a call may fail with one behind it
TWO_PARTS = {"per_device_train_batch_size": 4, "steps_per_generation": 2}


@pytest.mark.parametrize(
    ("fields", "gone_at", "update"),
    [
        ({"max_steps": 4}, 3, 2),  # the first of the second epoch
        ({"max_steps": 6, "num_iterations": 2, **TWO_PARTS}, 4, 4),
        ({"max_steps": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 1}, 4, 1),  # in half an update
        (
            {
                "max_steps": 3,
                "gradient_accumulation_steps": 2,
                "advantage_power": "auto",
                "target_kl": 1e-3,
                "use_ema": True,
                **TWO_PARTS,
            },
            4,
            1,
        ),
        ({"max_steps": 3, "dense_rewards": True}, 5, 1),  # while unfinished images are scored
    ],
    ids=["each update", "several iterations", "half an update", "adapted power", "dense"],
)
def test_going_on_equals_a_run_without_the_failure(fields, gone_at, update, tmp_path):
    trainer, message = failed(tmp_path / "out", gone_at, **fields)
    checkpoint = tmp_path / "out" / f"checkpoint-{update}"
    assert trainer.state.global_step == update and checkpoint.is_dir()
    assert f"after update {update}" in message and f"resume_from_checkpoint={str(checkpoint)!r}" in message
    rest = weights_of(tmp_path / "out", True, **fields)
    assert_equal(rest, weights_of(tmp_path / "whole", **fields))


def test_with_nothing_trained_there_is_nothing_to_save(tmp_path):
    _, message = failed(tmp_path, 1)
    assert "nothing to save" in message
    # not the function's fault
    assert "See to it that what it asks is there." in message and "Fix it" not in message
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    written = {}

    class Times(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            written[state.global_step] = (tmp_path / f"checkpoint-{state.global_step}").stat().st_ctime_ns

    trainer = tiny_trainer(tmp_path, reward_funcs=Server(3), callbacks=[Times()], **fields)
    with pytest.raises(RewardError, match="after update 2.*checkpoint-2"):
        trainer.train()
    assert list(written) == [2]
    # nor is the one from which a run was resumed that fails at once
    trainer = tiny_trainer(tmp_path, reward_funcs=Server(1), callbacks=[Times()], **fields)
    with pytest.raises(RewardError, match="after update 2.*checkpoint-2"):
        trainer.train(resume_from_checkpoint=True)
    assert list(written) == [2] and written[2] == (tmp_path / "checkpoint-2").stat().st_ctime_ns


def test_one_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path):
    weights_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, learning_rate=0.05)
    failed(tmp_path, 3, max_steps=4)
    assert_equal(weights_of(tmp_path, True, max_steps=4), weights_of(tmp_path / "whole", max_steps=4))


def test_checkpoints_of_the_model_alone_are_no_hindrance(tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer, message = failed(tmp_path, 3, **fields)
    assert trainer.args.save_only_model and (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
    assert_equal(weights_of(tmp_path, True, **fields), weights_of(tmp_path / "whole", **fields))


@pytest.mark.parametrize("phase", [{}, {"per_device_train_batch_size": 4, "steps_per_generation": 2}], ids=str)
def test_a_failed_evaluation_saves_too(phase, tmp_path):
    """At the end of a sampling phase and in its middle, where the samples at hand are saved with the rest."""

    def fails_later(prompts, images, trainer_state, **kwargs):
        if trainer_state.global_step > 0:
            raise ConnectionError("gone")
        return darkness(prompts, images)

    fields = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts(2), **phase}
    trainer = tiny_trainer(tmp_path, reward_funcs=Server(), eval_reward_funcs=fails_later, **fields)
    with pytest.raises(RewardError, match="'fails_later' raised.*is saved as it was after update 1"):
        trainer.train()
    rest = weights_of(tmp_path, True, **fields, eval_reward_funcs=darkness)
    assert_equal(rest, weights_of(tmp_path / "whole", **fields, eval_reward_funcs=darkness))


def test_an_error_while_saving_does_not_hide_the_rewards(tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=Server(2))

    def full(*args):
        raise OSError("No space left on device")

    trainer.run_state.save = full
    with pytest.raises(RewardError, match=r"'server' raised ConnectionError.*could not be saved.*No space left"):
        trainer.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))


@pytest.mark.parametrize("option", ["reward_funcs", "eval_reward_funcs"])
def test_a_model_that_cannot_be_loaded_is_found_out_before_anything_is_sampled(option, tmp_path):
    calls = []

    def counted(prompts, images, **kwargs):
        calls.append(len(images))
        return brightness(prompts, images)

    missing = CLIPScoreReward(str(tmp_path / "missing"))
    funcs = {"reward_funcs": [counted, missing]} if option == "reward_funcs" else {"reward_funcs": counted}
    others = {} if option == "reward_funcs" else {"eval_reward_funcs": missing, "eval_dataset": prompts(2)}
    trainer = tiny_trainer(tmp_path / "out", **funcs, **others)
    with pytest.raises(CheckpointError, match="clipscore.*missing"):
        trainer.train()
    assert calls == []
