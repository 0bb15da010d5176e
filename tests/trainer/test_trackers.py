"""Images, curves by section and the configuration reach each tracker, at the step of the metrics beside them.

trackio and TensorBoard run for real where they are installed. The others are not: these have the calls that their
documentation names, and no other.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_training import darkness, prompts, tiny_trainer
from transformers import TrainerCallback, TrainerState
from transformers.integrations import integration_utils

from trl_flow.trainer.trackers import by_section, log_config, log_image, sections_kept


PICTURE = Image.new("RGB", (4, 2), "red")
STEP = 7


class Calls(list):
    """Notes what a function is called with."""

    def __call__(self, *args, **kwargs):
        self.append((args, kwargs))


def tracker(monkeypatch, name: str, **members):
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def log(report_to: list[str], callbacks=()) -> None:
    handler = SimpleNamespace(callbacks=list(callbacks))
    log_image(PICTURE, "images/step", report_to, TrainerState(global_step=STEP), handler)


def test_wandb_whose_axis_is_a_metric(monkeypatch):
    calls = Calls()
    tracker(monkeypatch, "wandb", log=calls, Image=lambda image: ("picture", image), run=object())
    log(["wandb"])
    assert calls == [(({"images/step": ("picture", PICTURE), "train/global_step": STEP},), {})]


def test_trackio(monkeypatch):
    calls = Calls()
    tracker(monkeypatch, "trackio", log=calls, Image=lambda image: ("picture", image))
    log(["trackio"])
    assert calls == [(({"images/step": ("picture", PICTURE), "train/global_step": STEP},), {"step": STEP})]


def test_swanlab(monkeypatch):
    calls = Calls()
    tracker(monkeypatch, "swanlab", log=calls, Image=lambda image: ("picture", image))
    log(["swanlab"])
    assert calls == [(({"images/step": ("picture", PICTURE)},), {"step": STEP})]


def test_mlflow(monkeypatch):
    calls = Calls()
    tracker(monkeypatch, "mlflow", log_image=calls, active_run=object)
    log(["mlflow"])
    assert calls == [((PICTURE,), {"key": "images/step", "step": STEP})]


def test_comet(monkeypatch):
    calls = Calls()
    tracker(monkeypatch, "comet_ml", get_running_experiment=lambda: SimpleNamespace(log_image=calls))
    log(["comet_ml"])
    assert calls == [((PICTURE,), {"name": "images/step", "step": STEP})]


def test_tensorboard():
    calls = Calls()
    log(["tensorboard"], [SimpleNamespace(tb_writer=SimpleNamespace(add_image=calls)), SimpleNamespace()])
    ((name, array, step), options) = calls[0]
    assert (name, step, options) == ("images/step", STEP, {"dataformats": "HWC"})
    np.testing.assert_array_equal(array, np.asarray(PICTURE))


def test_trackers_without_a_run_get_nothing(monkeypatch):
    calls = Calls()
    tracker(monkeypatch, "wandb", log=calls, Image=calls, run=None)
    tracker(monkeypatch, "mlflow", log_image=calls, active_run=lambda: None)
    tracker(monkeypatch, "comet_ml", get_running_experiment=lambda: None)
    log(["wandb", "mlflow", "comet_ml"])
    assert calls == []


def test_an_image_has_the_step_of_its_metrics(monkeypatch, tmp_path):
    calls = Calls()
    members = {"run": object(), "config": SimpleNamespace(update=lambda config: None)}
    tracker(monkeypatch, "wandb", log=calls, Image=lambda image: image, **members)

    class Wandb(TrainerCallback):
        """What transformers' callback does."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            calls({**logs, "train/global_step": state.global_step})

    trainer = tiny_trainer(tmp_path, callbacks=[Wandb()], log_images=True, eval_dataset=prompts(2), max_steps=2)
    trainer.args.report_to = ["wandb"]
    trainer.train()
    trainer.evaluate()
    logs = [args[0] for args, _ in calls]
    for name, metric, steps in (("images/step", "reward", [1, 2]), ("images/eval", "eval_reward", [2])):
        for key in (name, metric):
            assert [log["train/global_step"] for log in logs if key in log] == steps


# ---- Sections and configuration ----


def test_a_name_with_a_section_keeps_it():
    logs = {"reward": 1, "rewards/a/mean": 2, "eval_reward": 3, "eval_gold/average": 4, "clip_ratio/low_step_0": 5}
    sections = {"train/reward": 1, "rewards/a/mean": 2, "eval/reward": 3, "eval_gold/average": 4}
    assert by_section(logs) == sections | {"clip_ratio/low_step_0": 5}
    before = integration_utils.rewrite_logs
    with sections_kept():
        assert integration_utils.rewrite_logs(logs) == by_section(logs)
    assert integration_utils.rewrite_logs is before and before({"rewards/a/mean": 2}) == {"train/rewards/a/mean": 2}


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab", "mlflow", "comet_ml"])
def test_the_configuration_reaches_each_tracker(name, monkeypatch):
    calls = Calls()
    members = {"run": object(), "config": SimpleNamespace(update=calls)}
    if name == "mlflow":
        members = {"log_params": calls, "active_run": object}
    elif name == "comet_ml":
        members = {"get_running_experiment": lambda: SimpleNamespace(log_parameters=calls)}
    tracker(monkeypatch, name, **members)
    log_config({"run/model": "m"}, [name], SimpleNamespace(callbacks=[]))
    assert calls == [(({"run/model": "m"},), {})]


def test_the_configuration_is_a_text_in_tensorboard():
    calls = Calls()
    handler = SimpleNamespace(callbacks=[SimpleNamespace(tb_writer=SimpleNamespace(add_text=calls))])
    log_config({"run/model": "m"}, ["tensorboard"], handler)
    ((name, text), _) = calls[0]
    assert name == "run" and '"run/model": "m"' in text


# ---- For real ----


def tracked(tmp_path, tracker: str):
    """A run of two updates, each evaluated, that reports to a tracker."""
    every = {"eval_dataset": prompts(2), "eval_strategy": "steps", "eval_steps": 1, "eval_reward_funcs": darkness}
    trainer = tiny_trainer(tmp_path / "run", log_images=True, report_to=[tracker], run_name="r", project="p", **every)
    trainer.train()


def test_trackio_runs_for_real(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    tracked(tmp_path, "trackio")
    logs = SQLiteStorage.get_logs("p", "r")
    assert all(log["step"] == log["train/global_step"] for log in logs)
    found = {name: [log["step"] for log in logs if name in log] for log in logs for name in log}
    for name in ("train/reward", "rewards/brightness/mean", "time/sampling", "images/step"):
        assert found[name] == [1, 2], name
    for name in ("eval/reward", "eval_rewards/brightness/mean", "eval_gold/average", "images/eval"):
        assert found[name] == [0, 1, 2], name
    assert not any(name.startswith("train/") and "/" in name.removeprefix("train/") for name in found)
    config = SQLiteStorage.get_run_config("p", "r")
    assert (config["run/config"], config["run/rewards"], config["run/gold"]) == (
        "FlowGRPOConfig", "brightness", "darkness",
    )  # fmt: skip
    assert config["num_generations"] == 4 and config["noise_level"] == 0.7


def test_tensorboard_runs_for_real(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    tracked(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [image.step for image in events.Images("images/step")] == [1, 2]
    assert [image.step for image in events.Images("images/eval")] == [0, 1, 2]
    assert [scalar.step for scalar in events.Scalars("eval_gold/average")] == [0, 1, 2]
    sections = {name.split("/")[0] for name in events.Tags()["scalars"]}
    assert {"train", "eval", "rewards", "eval_rewards", "eval_gold", "clip_ratio", "time"} <= sections
    assert "run/text_summary" in events.Tags()["tensors"]
