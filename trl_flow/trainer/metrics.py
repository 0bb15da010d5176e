"""What is logged: [`Metrics`], in one flat dictionary, and [`SampleLog`], grids of images."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from trl_flow.algorithms import Algorithm, LossOutput, StepSums
from trl_flow.evaluation.grids import image_grid
from trl_flow.images import Sample
from trl_flow.rewards.scorer import RewardLogs
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.trackers import log_image


logger = logging.get_logger(__name__)


class Metrics:
    """Adds up what is measured until it is logged."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        # Apple's GPUs have no float64
        self._dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self._values: dict[str, list[float]] = defaultdict(list)
        self._sums: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        self._counts: dict[str, torch.Tensor] = {}

    def append(self, values: Mapping[str, float]) -> None:
        """Values that are equal on all processes, or of which the main process's count; a log has their means."""
        for name, value in values.items():
            self._values[name].append(float(value))

    def clear(self) -> None:
        self._values.clear()
        self._sums.clear()
        self._counts.clear()

    @torch.no_grad()
    def add(self, unit: int, output: LossOutput) -> None:
        """The samples' statistics `(B,)` and counts `(B, K)` of one unit, summed up on the device, without waiting for
        it."""
        for name, values in output.stats.items():
            values = values.to(self._dtype)
            everything = {unit: values.new_ones(len(values))}
            for counted, mask in (everything if output.counted is None else output.counted).items():
                if values.ndim == 2:
                    key = f"{name}_step_{counted}"
                    self._counts[key] = mask.to(self._dtype) @ values + self._counts.get(key, 0)
                    continue
                sums = torch.stack([torch.ones_like(values), values, values.square()]) @ mask.to(self._dtype)
                before = self._sums[counted].get(name)
                self._sums[counted][name] = sums if before is None else before + sums

    def counts(self) -> dict[str, list[int]]:
        """What was counted since the last log, of all processes, by names with units. [`flush`] forgets it."""
        totals = {key: self.accelerator.reduce(counts, "sum").tolist() for key, counts in self._counts.items()}
        return {key: list(map(round, counts)) for key, counts in totals.items() if any(counts)}

    def flush(self, algorithm: Algorithm) -> dict[str, float | None]:
        """All metrics since the last log, of all processes, by their names; `None` for a mean over nothing."""
        metrics: dict[str, float | None] = {}
        for name, values in self._values.items():
            present = [value for value in values if not math.isnan(value)]
            metrics[name] = sum(present) / len(present) if present else None
        keys = [(unit, name) for unit in sorted(self._sums) for name in self._sums[unit]]
        if keys:
            # Every process has trained on the same units, so that the keys are in the same order
            stacked = torch.stack([self._sums[unit][name] for unit, name in keys])
            sums: dict[int, dict[str, list[float]]] = defaultdict(dict)
            for (unit, name), row in zip(keys, self.accelerator.reduce(stacked, "sum").tolist(), strict=True):
                sums[unit][name] = row
            metrics |= algorithm.summarize(StepSums(sums))
        self.clear()
        return metrics


@contextlib.contextmanager
def going_on_without(path: Path) -> Iterator[None]:
    """Around the writing of what training can do without: if that fails, on a full disk, it is warned of."""
    try:
        yield
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error}): training goes on without it.")


class SampleLog:
    """The latest images of this process with their captions, until they are logged."""

    def __init__(self, args: FlowRLConfig, reward_names: list[str]):
        self.args, self.reward_names = args, reward_names
        self._images: list[Sample] = []
        self._captions: list[str] = []

    def take(self, rows: list[dict[str, Any]], images: list[Sample], rewards: torch.Tensor, logs: RewardLogs) -> None:
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
        if self._images:
            self.write(self._images, self._captions, f"step-{state.global_step:06d}", state, handler)
            self._images, self._captions = [], []

    def write(
        self, images: list[Sample], captions: list[str], name: str, state: TrainerState, handler: CallbackHandler
    ) -> None:
        """A grid of images as `output_dir/images/{name}.png` and in the trackers."""
        if not self.args.log_images or not state.is_world_process_zero:
            return
        number, tag = self.args.num_images_to_log, name.rsplit("-", 1)[0]
        grid = image_grid(images[:number], captions[:number])
        path = Path(self.args.output_dir, "images", f"{name}.png")
        with going_on_without(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)
        log_image(grid, f"images/{tag}", self.args.report_to, state, handler)
