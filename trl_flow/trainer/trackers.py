"""Images and the configuration in the experiment trackers that transformers reports to, each by its own documented
call, and the curves by section."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerState
from transformers.integrations import TrackioCallback, integration_utils
from transformers.trainer_callback import CallbackHandler


def log_image(image: Image.Image, name: str, report_to: list[str], state: TrainerState, handler: CallbackHandler):
    """Logs an image under `name` at the run's step in all trackers of `report_to` that take images and have a run. To
    be called on the main process."""
    step = state.global_step
    # The axis of these is a metric of transformers' own; without it an image would stand at the step logged before
    on_axis = {"train/global_step": step}
    modules = {tracker: import_module(tracker) for tracker in _MODULES & set(report_to)}
    if (wandb := modules.get("wandb")) is not None and wandb.run is not None:
        wandb.log({name: wandb.Image(image), **on_axis})
    if (trackio := modules.get("trackio")) is not None:
        trackio.log({name: trackio.Image(image), **on_axis}, step=step)
    if (mlflow := modules.get("mlflow")) is not None and mlflow.active_run() is not None:
        mlflow.log_image(image, key=name, step=step)
    if (swanlab := modules.get("swanlab")) is not None:
        swanlab.log({name: swanlab.Image(image)}, step=step)
    if "comet_ml" in report_to and (experiment := import_module("comet_ml").get_running_experiment()) is not None:
        experiment.log_image(image, name=name, step=step)
    for callback in handler.callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            writer.add_image(name, np.asarray(image), step, dataformats="HWC")


def log_config(config: Mapping[str, Any], report_to: list[str], handler: CallbackHandler) -> None:
    """Adds to the configuration of the run in all trackers of `report_to`, which have the training's arguments from
    transformers. To be called on the main process, once the trackers have begun."""
    for tracker in _MODULES & set(report_to):
        module = import_module(tracker)
        if tracker == "mlflow":
            if module.active_run() is not None:
                module.log_params(config)
        elif tracker != "wandb" or module.run is not None:
            module.config.update(config)
    if "comet_ml" in report_to and (experiment := import_module("comet_ml").get_running_experiment()) is not None:
        experiment.log_parameters(config)
    for callback in handler.callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            writer.add_text("run", json.dumps(config, indent=2))


@contextlib.contextmanager
def sections_kept() -> Iterator[None]:
    """Within this, transformers' callbacks name curves as [`by_section`] does."""
    integration_utils.rewrite_logs = by_section
    try:
        yield
    finally:
        integration_utils.rewrite_logs = _everything_in_train


def by_section(logs: dict[str, Any]) -> dict[str, Any]:
    """Trackers group curves by what stands before the first slash of a name, and transformers puts `train/` before all
    of them. Here a name that has a section (`rewards/`, `clip_ratio/`, `eval_gold/`) is left as it is."""
    own = {name: value for name, value in logs.items() if "/" in name}
    return _everything_in_train({name: value for name, value in logs.items() if name not in own}) | own


class TrackioAtUpdates(TrackioCallback):
    """transformers' callback counts its logs, and so would put an image beside the metrics of another update."""

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self._initialized:
            self.setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            step = state.global_step
            self._trackio.log({**by_section(logs), "train/global_step": step}, step=step)


_everything_in_train = integration_utils.rewrite_logs
_MODULES = {"wandb", "trackio", "mlflow", "swanlab"}
