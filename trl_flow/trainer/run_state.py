"""[`RunState`]: where a run is, and one save, load and reset over all parts that have a state."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from trl_flow.algorithms import MicroBatch
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.rollout_buffer import load_micro_batches, save_micro_batches


logger = logging.get_logger(__name__)

# What a checkpoint holds besides transformers' own files
STATE_NAME = "run_state.json"
TENSORS_NAME = "run_state.safetensors"


class RunState:
    """The place in a run, as (generation, update within it), and the samples of the phase that is being trained on.
    `parts` is what else is saved, loaded and reset, by its name in the file: each has `state_dict()`, JSON values and
    tensors by name, and `load_state_dict(state)`, which with `{}` is a new start."""

    def __init__(self, args: FlowRLConfig, parts: dict[str, Any]):
        self.args, self.parts = args, parts
        self._start()

    def _start(self) -> None:
        self.generation = 0  # sampling phases that have been trained on to their end
        self.micro_batches: list[MicroBatch] | None = None  # of the phase at hand, once it is sampled
        self.sampling_weights: list[torch.Tensor] = []  # the trained ones when it was sampled, if the algorithm asks
        self._position = 0  # micro-batches of the phase that have been trained on
        self._last_update = (0, 0)

    @property
    def update(self) -> int:
        """Updates that have been made with the samples at hand."""
        return self._position // self.args.gradient_accumulation_steps

    @property
    def needs_samples(self) -> bool:
        return self.micro_batches is None

    @property
    def micro_batch(self) -> MicroBatch:
        """The next one to train on."""
        return self.micro_batches[self._position % self.args.steps_per_generation]

    def advance(self) -> None:
        """After a micro-batch."""
        self._position += 1
        if self._position == self.args.steps_per_generation * self.args.num_iterations:
            self._position, self.micro_batches = 0, None
            self.generation += 1

    def after_update(self) -> None:
        self._last_update = (self.generation, self._position)

    def rewind(self) -> None:
        """To the end of the last update, where the weights are, when sampling or a reward has failed after it."""
        self.generation, self._position = self._last_update
        if self._position == 0:  # in the middle of a phase, an evaluation has failed: its samples are at hand
            self.micro_batches = None

    # ---- Saving ----

    def reset(self) -> None:
        self._start()
        for part in self.parts.values():
            part.load_state_dict({})

    def save(self, folder: Path) -> None:
        """Writes the state. To be called on all processes: in the middle of a phase each has samples of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = {name: part.state_dict() for name, part in self.parts.items()}  # sharded weights are gathered
        if self.args.process_index == 0:
            parts, tensors = {}, {}
            for name, content in contents.items():
                found = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
                tensors |= {f"{name}.{key}": value.contiguous() for key, value in found.items()}
                parts[name] = {key: value for key, value in content.items() if key not in found}
            save_file(tensors, folder / TENSORS_NAME)
            state = {"generation": self.generation, "update": self.update, "settings": self._settings()}
            (folder / STATE_NAME).write_text(json.dumps({**state, "parts": parts}))
        if self._position:
            save_micro_batches(self.micro_batches, folder, self.args.process_index)
            weights = {str(i): own.contiguous() for i, own in enumerate(self.sampling_weights)}
            save_file(weights, folder / f"sampling_weights-{self.args.process_index}.safetensors")

    def load(self, folder: Path, device: torch.device) -> None:
        """Goes on from what [`save`] wrote, once [`check`] has passed."""
        for name in self.parts:
            self.load_part(name, folder)
        state = _read(folder)
        self.generation = state["generation"]
        self._position = state["update"] * self.args.gradient_accumulation_steps
        self.micro_batches, self.sampling_weights = None, []
        if self._position > 0:
            rank = self.args.process_index
            self.micro_batches = load_micro_batches(folder, rank, device)
            weights = load_file(folder / f"sampling_weights-{rank}.safetensors")
            self.sampling_weights = [weights[str(i)].to(device) for i in range(len(weights))]
        self.after_update()

    def load_part(self, name: str, folder: Path) -> None:
        """Of what [`save`] wrote the state of one part."""
        tensors = load_file(folder / TENSORS_NAME).items()
        own = {key.removeprefix(f"{name}."): value for key, value in tensors if key.startswith(f"{name}.")}
        self.parts[name].load_state_dict(_read(folder)["parts"].get(name, {}) | own)

    def _settings(self) -> dict[str, Any]:
        names = ["generation_batch_size", "per_device_train_batch_size", "steps_per_generation"]
        names += ["gradient_accumulation_steps", "num_iterations"]
        own = {"updates_per_generation": str(self.args.updates_per_generation), "num_processes": self.args.world_size}
        return own | {name: getattr(self.args, name) for name in names}

    def check(self, folder: Path) -> None:
        """Raises `ValueError` unless this run can go on from a checkpoint: at a phase's end with any split of the same
        generation batch, in its middle with the same one only."""
        state = _read(folder)
        own, saved = self._settings(), state["settings"]
        # Micro-batches of which an update takes no whole share are made of other samples when they are cut otherwise
        steps = [(s["steps_per_generation"], s["gradient_accumulation_steps"]) for s in (own, saved)]
        names = ["generation_batch_size", "updates_per_generation", "num_iterations"]
        reason = (
            "A run goes on with as many images a sampling phase and as many updates with them as it began with, "
            "however they are split over processes and micro-batches. Use these settings."
        )
        if state["update"] > 0 or any(max(pair) % min(pair) for pair in steps):
            names = list(own)
            reason = (
                "It stands in the middle of a generation batch, or its updates take uneven shares of one: samples are "
                "split that way. Use these settings, or a checkpoint at the end of a generation batch."
            )
        if different := [name for name in names if own[name] != saved[name]]:
            before, now = (", ".join(f"{name}={values[name]}" for name in different) for values in (saved, own))
            raise ValueError(f"{folder} was written with {before}, but this run has {now}. {reason}")


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_NAME).read_text())


def is_complete(checkpoint: str) -> bool:
    # The trainer's state is written last; a process that was killed meanwhile leaves it out, or half of it
    try:
        json.loads(Path(checkpoint, "trainer_state.json").read_text())
        return Path(checkpoint, STATE_NAME).is_file()
    except (OSError, ValueError):
        return False


def step_of(checkpoint: str) -> int:
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"]


def checkpoint_to_resume(given: str | os.PathLike | bool | None, args: FlowRLConfig) -> str | None:
    """The checkpoint that `train(resume_from_checkpoint=given)` means; `ValueError` without one to go on from."""
    if not given:
        return None
    checkpoint = last_complete_checkpoint(args.output_dir) if given is True else os.fspath(given)
    if not is_complete(checkpoint):
        what = "is not a complete checkpoint of this trainer. Pass True to resume from the last complete one"
        raise ValueError(f"{checkpoint!r} {what} in output_dir.")
    # transformers would look at max_steps after one more update only
    if 0 < args.max_steps <= (step := step_of(checkpoint)):
        ended = f"max_steps is {args.max_steps}: the run has come to its end. Raise max_steps to go on with it."
        raise ValueError(f"{checkpoint!r} is at update {step}, and {ended}")
    return checkpoint


def last_complete_checkpoint(output_dir: str) -> str:
    """The checkpoint of the highest step that was written to its end; `ValueError` if there is none."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: path.name.rsplit("-", 1)[1] for path in found}
    for path in sorted(found, key=lambda path: int(steps[path]) if steps[path].isdigit() else -1, reverse=True):
        if is_complete(str(path)):
            return str(path)
        logger.warning(f"{path} is not complete (its writing was interrupted) and is passed over.")
    raise ValueError(
        f"resume_from_checkpoint=True, but {output_dir!r} has no complete checkpoint. Train from the start "
        "(resume_from_checkpoint=None)."
    )


@contextlib.contextmanager
def writing_checkpoint(folder: Path, args: FlowRLConfig) -> Iterator[None]:
    """Around the writing of a checkpoint, on all processes: a failed one is removed, and a `RuntimeError` raised."""
    is_main = args.process_index == 0
    try:
        # A folder left by a process that was killed while writing it would mix with this one
        if is_main and folder.exists():
            shutil.rmtree(folder)
        args.distributed_state.wait_for_everyone()
        yield
    except Exception as error:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(Path(args.output_dir)).free / 2**20
        raise RuntimeError(
            f"The checkpoint {folder} could not be written ({type(error).__name__}: {error}); {free:.0f} MiB are free "
            "there. It is removed, and earlier checkpoints are untouched. Make room and resume with "
            "train(resume_from_checkpoint=True)."
        ) from error
