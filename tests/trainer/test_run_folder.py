"""A run never starts over another one's folder, and never goes on from another one's checkpoint, in silence."""

import fcntl

import pytest
from tiny_training import assert_equal, prompts, tiny_trainer, trained_weights, warnings_of

from trl_flow.trainer.checkpoints import complete_checkpoints
from trl_flow.trainer.run_folder import move_aside


LOGGER = "trl_flow.trainer.run_folder"
FIELDS = {"save_strategy": "steps", "save_steps": 1}
ADAPTER = "pytorch_lora_weights.safetensors"


def trained(folder, max_steps: int, resume_from_checkpoint=None, **fields):
    trainer = tiny_trainer(folder, max_steps=max_steps, **FIELDS | fields)
    with warnings_of(LOGGER) as messages:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer, messages


def test_the_same_command_again_moves_the_earlier_run_aside(tmp_path):
    first, messages = trained(tmp_path, 3, log_images=True)
    assert messages == []
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()} - {".lock", "notes.txt"}
    adapter = (tmp_path / ADAPTER).read_bytes()
    # another run, which is shorter and learns faster
    _, (message,) = trained(tmp_path, 2, learning_rate=0.05)
    aside = tmp_path / "previous-1"
    assert str(aside) in message and f"resume_from_checkpoint={str(aside / 'checkpoint-3')!r}" in message
    assert {path.name for path in aside.iterdir()} == before and (aside / ADAPTER).read_bytes() == adapter
    assert (tmp_path / ADAPTER).read_bytes() != adapter and (tmp_path / "notes.txt").is_file()
    # The last checkpoint is this run's, and the earlier one can be gone on with from where it is
    assert list(complete_checkpoints(tmp_path)) == [1, 2]
    rest, (message,) = trained(tmp_path, 4, str(aside / "checkpoint-2"))
    assert "previous-2" in message
    whole, _ = trained(tmp_path / "whole", 4)
    assert_equal(trained_weights(rest), trained_weights(whole))


def test_who_goes_on_from_an_earlier_checkpoint_does_not_leave_later_ones_of_the_other_branch(tmp_path):
    trained(tmp_path, 4)
    _, (message,) = trained(tmp_path, 3, str(tmp_path / "checkpoint-2"))
    assert "checkpoint-3, checkpoint-4" in message and "previous-1" in message
    assert list(complete_checkpoints(tmp_path)) == [1, 2, 3]
    _, messages = trained(tmp_path, 4, True)
    assert messages == []


def test_a_trainers_second_run_is_another_run(tmp_path):
    """Else its checkpoints would stand among later ones of the first, of which the last would be gone on with."""
    trainer = tiny_trainer(tmp_path, max_steps=3, **FIELDS)
    with warnings_of(LOGGER) as messages:
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        assert messages == []
        trainer.args.max_steps = 1
        trainer.train()
    assert "previous-1" in messages[0] and list(complete_checkpoints(tmp_path)) == [1]
    assert list(complete_checkpoints(tmp_path / "previous-1")) == [1, 2, 3]
    # Later checkpoints than the one that it goes back to are another branch's
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=True)
    with warnings_of(LOGGER) as messages:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "checkpoint-2, checkpoint-3" in messages[0]


def test_a_trainer_that_has_not_trained_does_not_replace_a_card(tmp_path):
    trained(tmp_path, 1)[0].create_model_card()
    card = (tmp_path / "README.md").read_text()
    with warnings_of(LOGGER) as messages:
        tiny_trainer(tmp_path).create_model_card()
    assert "previous-1" in messages[0] and (tmp_path / "previous-1" / "README.md").read_text() == card


@pytest.mark.parametrize("named", ["as it is", "otherwise"])
def test_a_trainer_that_has_not_trained_does_not_replace_an_adapter(tmp_path, named):
    """As `push_to_hub` and `save_model` in a new session would."""
    write_to = tmp_path if named == "as it is" else tmp_path / ".." / tmp_path.name
    trained(tmp_path, 1)
    adapter = (tmp_path / ADAPTER).read_bytes()
    other = tiny_trainer(tmp_path, eval_dataset=prompts(2))
    with warnings_of(LOGGER) as messages:
        other.evaluate()
        assert messages == []
        other.save_model(str(write_to))
    assert "previous-1" in messages[0] and (tmp_path / "previous-1" / ADAPTER).read_bytes() == adapter


def test_a_run_that_failed_before_it_wrote_anything_is_no_run(tmp_path):
    def broken(prompts, images, **kwargs):
        raise OSError("no server")

    with pytest.raises(RuntimeError, match="no server"):
        tiny_trainer(tmp_path, reward_funcs=broken).train()
    _, messages = trained(tmp_path, 1)
    assert messages == []


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is training into.*choose another output_dir"):
            tiny_trainer(tmp_path).train()
    trained(tmp_path, 1)


def test_what_is_moved_aside(tmp_path):
    for name in ("a", "b/c", "d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert move_aside(tmp_path, ["a", "b", "missing"]) == tmp_path / "previous-1"
    assert (tmp_path / "previous-1" / "b" / "c").is_file() and (tmp_path / "d").is_file()
    assert move_aside(tmp_path, ["d"]) == tmp_path / "previous-2"
