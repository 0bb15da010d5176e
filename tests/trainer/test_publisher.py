"""The trainer's publisher, by the real client, to a Hub on the loopback interface."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load, save_file
from tiny_painter import tiny_painter_backbone
from tiny_training import prompts, tiny_config
from transformers import TrainerState

from trl_flow.sharing import PushError
from trl_flow.trainer.publisher import Publisher


REPO = "tester/tuned"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def publisher(folder, **fields) -> Publisher:
    return Publisher(tiny_config(folder, **fields), tiny_painter_backbone(), None, ["brightness"], [prompts()])


def checkpoint(folder, step: int) -> str:
    """A checkpoint whose one weight is its step."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.tensor([float(step)])}, path / WEIGHTS)
    (path / "optimizer.pt").write_text("moments")
    return str(path)


@pytest.mark.parametrize(
    ("strategy", "subfolders"),
    [("end", None), ("every_save", set()), ("checkpoint", {"last-checkpoint"})]
    + [("all_checkpoints", {"checkpoint-1", "checkpoint-2"})],
)
def test_checkpoints_are_pushed_as_hub_strategy_says(hub_server, tmp_path, strategy, subfolders):
    own = publisher(tmp_path, hub_strategy=strategy, hub_always_push=True, hub_private_repo=True)
    for step in (1, 2):
        own.push_checkpoint(checkpoint(tmp_path, step), REPO, step)
        own.wait()
    if strategy == "end":
        assert hub_server.commits == []
        return
    files = hub_server.repos[REPO]
    assert load(files[WEIGHTS])["weight"] == 2 and hub_server.private[REPO]
    assert {path.split("/")[0] for path in files if path.endswith("optimizer.pt")} == subfolders
    titles = [title for _, title in hub_server.commits]
    assert sorted(set(titles)) == ["Training in progress, step 1", "Training in progress, step 2"]


@pytest.mark.parametrize("always", [False, True])
def test_a_checkpoint_is_left_out_while_another_is_uploaded(hub_server, tmp_path, always):
    own = publisher(tmp_path, hub_strategy="every_save", hub_always_push=always)
    with hub_server._lock:  # no request is answered
        own.push_checkpoint(checkpoint(tmp_path, 1), REPO, 1)
        own.push_checkpoint(checkpoint(tmp_path, 2), REPO, 2)
    own.wait()
    assert hub_server.requests.count(("POST", "/api/repos/create")) == (2 if always else 1)


def test_what_is_pushed_in_the_background_is_as_it_was(hub_server, tmp_path):
    own = publisher(tmp_path, hub_strategy="checkpoint", hub_always_push=True)
    (tmp_path / "rewards.png").write_bytes(b"the first curve")
    (tmp_path / "README.md").write_text("![Rewards](rewards.png)")
    with hub_server._lock:  # no request is answered
        folder = checkpoint(tmp_path, 1)
        own.push_checkpoint(folder, REPO, 1)
        (tmp_path / "rewards.png").write_bytes(b"another, longer curve")
        shutil.rmtree(folder)  # save_total_limit
    own.wait()
    files = hub_server.repos[REPO]
    assert files["rewards.png"] == b"the first curve" and load(files[WEIGHTS])["weight"] == 1
    assert load(files[f"last-checkpoint/{WEIGHTS}"])["weight"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"rewards.png", "README.md"}


def test_a_failure_in_the_background_is_logged_and_stops_nothing(hub_server, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("trl_flow.trainer.publisher.logger.warning", messages.append)
    own = publisher(tmp_path, hub_strategy="every_save")
    hub_server.fail("/commit/", 500)
    own.push_checkpoint(checkpoint(tmp_path, 1), REPO, 1)
    own.wait()
    assert len(messages) == 1 and "Nothing is lost" in messages[0]
    own.push_checkpoint(str(tmp_path / "checkpoint-9"), REPO, 9)
    assert len(messages) == 2 and "checkpoint-9 is saved, but not uploaded" in messages[1]
    save_file({"weight": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(PushError):
        own.push(REPO)
    with pytest.raises(PushError):
        own.push(REPO, blocking=False).result(timeout=60)
    hub_server.heal()
    assert own.push(REPO, commit_message="At last").oid == hub_server.revision(REPO)
    assert hub_server.commits == [(REPO, "At last")]


def test_the_card_shows_the_curve_the_latest_grid_and_the_rewards(tmp_path):
    own = publisher(tmp_path / "run", noise_level=0.6)
    (tmp_path / "run" / "images").mkdir(parents=True)
    # The name that comes last is not the latest
    for age, name in enumerate(("step-2.png", "step-3.png", "step-1.png")):
        path = tmp_path / "run" / "images" / name
        path.write_bytes(b"")
        os.utime(path, (1000 - age, 1000 - age))
    logs = [{"step": step, "reward": step / 10, "rewards/brightness/mean": step / 10} for step in (1, 2)]
    state = TrainerState(log_history=logs, global_step=24, max_steps=40)
    own.write_card(own.backbone.model, state, None, model_name="The painter", tags="painting")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "# The painter" in card and "- painting" in card and "`brightness`" in card
    assert "A fine-tuned painter" in card and "| noise\\_level | 0.6 |" in card
    assert "(rewards.png)" in card and (tmp_path / "run" / "rewards.png").is_file()
    # A run that was stopped, and what it has reached
    assert "| updates | 24 of 40 |" in card and "max\\_steps" not in card and "epochs" not in card
    assert "0.1 in the first log, 0.2 in the last" in card and 'prompt="a cat"' in card
    assert "(images/step-2.png)" in card and "step-1.png" not in card and "step-3.png" not in card
