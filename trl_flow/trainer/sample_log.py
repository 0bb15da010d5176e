"""[`SampleLog`]: grids of images on disk and in the trackers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler

from trl_flow.evaluation.grids import image_grid
from trl_flow.rewards.scorer import RewardLogs
from trl_flow.trainer.flow_rl_config import FlowRLConfig


class SampleLog:
    """The latest images of this process with their captions, until they are logged."""

    def __init__(self, args: FlowRLConfig, reward_names: list[str]):
        self.args, self.reward_names = args, reward_names
        self._images: list[Image.Image] = []
        self._captions: list[str] = []

    def take(
        self, rows: list[dict[str, Any]], images: list[Image.Image], rewards: torch.Tensor, logs: RewardLogs
    ) -> None:
        """Keeps images from as many groups as fit; `rewards` is `(N, K)`, of this process's samples."""
        by_group = sorted(range(len(images)), key=lambda i: (i % self.args.num_generations, i))
        self._images, self._captions = [], []
        for i in sorted(by_group[: self.args.num_images_to_log]):
            scores = zip(self.reward_names, rewards[i].tolist(), strict=True)
            lines = [rows[i]["prompt"], *(f"{name} {value:.3g}" for name, value in scores)]
            lines += [f"{column} {values[i]}" for column, values in logs.columns.items() if i in values]
            self._images.append(images[i])
            self._captions.append("\n".join(lines))

    def flush(self, state: TrainerState, handler: CallbackHandler) -> None:
        """Writes the latest samples, if there are any since the last call."""
        if self._images:
            self.write(self._images, self._captions, f"step-{state.global_step:06d}", state, handler)
            self._images, self._captions = [], []

    def write(
        self, images: list[Image.Image], captions: list[str], name: str, state: TrainerState, handler: CallbackHandler
    ) -> None:
        """A grid of images as `output_dir/images/{name}.png` and in the trackers."""
        if not self.args.log_images or not state.is_world_process_zero:
            return
        number = self.args.num_images_to_log
        path = Path(self.args.output_dir, "images", f"{name}.png")
        grid = image_grid(images[:number], captions[:number], path=path)
        tag = name.rsplit("-", 1)[0]
        for tracker in self.args.report_to:
            if tracker in ("wandb", "trackio"):
                module = __import__(tracker)
                if tracker == "trackio" or module.run is not None:
                    module.log({f"images/{tag}": module.Image(grid)})
        for callback in handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_image(f"images/{tag}", np.asarray(grid), state.global_step, dataformats="HWC")
