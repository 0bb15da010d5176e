"""Images reach each tracker by its documented call, at the step of the metrics beside them.

The trackers are not installed: these have the calls that their documentation names, and no other.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_training import prompts, tiny_trainer
from transformers import TrainerCallback, TrainerState

from trl_flow.trainer.trackers import log_image


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


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_whose_axis_is_a_metric(name, monkeypatch):
    calls = Calls()
    run = {"run": object()} if name == "wandb" else {}
    tracker(monkeypatch, name, log=calls, Image=lambda image: ("picture", image), **run)
    log([name])
    assert calls == [(({"images/step": ("picture", PICTURE), "train/global_step": STEP},), {})]


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
    tracker(monkeypatch, "wandb", log=calls, Image=lambda image: image, run=object())

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
