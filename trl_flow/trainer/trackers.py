"""Images in the experiment trackers that transformers reports to, each by its own documented call."""

from importlib import import_module

import numpy as np
from PIL import Image
from transformers import TrainerState
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
        trackio.log({name: trackio.Image(image), **on_axis})
    if (mlflow := modules.get("mlflow")) is not None and mlflow.active_run() is not None:
        mlflow.log_image(image, key=name, step=step)
    if (swanlab := modules.get("swanlab")) is not None:
        swanlab.log({name: swanlab.Image(image)}, step=step)
    if "comet_ml" in report_to and (experiment := import_module("comet_ml").get_running_experiment()) is not None:
        experiment.log_image(image, name=name, step=step)
    for callback in handler.callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            writer.add_image(name, np.asarray(image), step, dataformats="HWC")


_MODULES = {"wandb", "trackio", "mlflow", "swanlab"}
