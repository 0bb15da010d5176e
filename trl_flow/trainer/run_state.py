"""[`RunState`]: where a run is, and one save, load and reset over all parts that have a state."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trl_flow.algorithms import MicroBatch
from trl_flow.evaluation.outputs import whole_file
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.rollout_buffer import load_micro_batches, save_micro_batches


# What a checkpoint holds besides transformers' own files
STATE_NAME = "run_state.json"
TENSORS_NAME = "run_state.safetensors"


class RunState:
    """The place in a run, as (generation, update within it), and the samples of the phase that is being trained on.
    `parts` is what else is saved, loaded and reset, by its name in the file: each has `state_dict()`, JSON values and
    tensors by name, and `load_state_dict(state)`, which with `{}` is a new start. `about` is what a later run is told
    of this one besides its config."""

    def __init__(self, args: FlowRLConfig, parts: dict[str, Any], about: dict[str, Any] | None = None):
        self.args, self.parts, self.about = args, parts, about or {}
        self._start()

    def _start(self) -> None:
        self.generation = 0  # sampling phases that have been trained on to their end
        self.micro_batches: list[MicroBatch] | None = None  # of the phase at hand, once it is sampled
        self.sampling_weights: list[torch.Tensor] = []  # the trained ones when it was sampled, if the algorithm asks
        self.evaluation_due = False  # a checkpoint is written before the evaluation that belongs to it
        self._position = 0  # micro-batches of the phase that have been trained on
        # Where the weights are, and the samples that belong there, if those at hand are not
        self._last_update, self._spent = (0, 0), None

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
            self._spent = self.micro_batches if self._last_update[1] > 0 else None
            self._position, self.micro_batches = 0, None
            self.generation += 1

    def after_update(self) -> None:
        self._last_update, self._spent = (self.generation, self._position), None

    # ---- Saving ----

    def reset(self) -> None:
        self._start()
        for part in self.parts.values():
            part.load_state_dict({})

    def save(self, folder: Path) -> None:
        """Writes the state as it was after the last update, where the weights are, wherever the run is now. To be
        called on all processes: in the middle of a phase each has samples of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = self.contents()
        if self.args.process_index == 0:
            tensors = {}
            for name, content in contents.items():
                found = {k: value for k, value in content.items() if isinstance(value, torch.Tensor)}
                tensors |= {f"{name}.{key}": value.contiguous() for key, value in found.items()}
            save_file(tensors, folder / TENSORS_NAME)
            self.save_values(folder, contents)
        if self._last_update[1] > 0:
            samples = self.micro_batches if self._spent is None else self._spent
            save_micro_batches(samples, folder, self.args.process_index)
            weights = {str(i): own.contiguous() for i, own in enumerate(self.sampling_weights)}
            save_file(weights, folder / f"sampling_weights-{self.args.process_index}.safetensors")

    def contents(self) -> dict[str, dict[str, Any]]:
        """The state of each part. To be called on all processes: sharded weights are gathered."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def save_values(self, folder: Path, contents: dict[str, dict[str, Any]]) -> None:
        """Of [`contents`] what is no tensor: all that an evaluation may change. The file is the old or the new one."""
        parts = {}
        for name, content in contents.items():
            parts[name] = {k: value for k, value in content.items() if not isinstance(value, torch.Tensor)}
        generation, position = self._last_update
        state = {"generation": generation, "update": position // self.args.gradient_accumulation_steps}
        state |= {"evaluation_due": self.evaluation_due, "settings": self._settings(), "about": self.about}
        with whole_file(folder / STATE_NAME) as file:
            file.write(json.dumps({**state, "parts": parts}).encode())

    def load(self, folder: Path, device: torch.device) -> None:
        """Goes on from what [`save`] wrote, once [`check`] has passed."""
        for name in self.parts:
            self.load_part(name, folder)
        state = _read(folder)
        self.generation, self.evaluation_due = state["generation"], state.get("evaluation_due", False)
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
            "A resumed run needs as many images in a sampling phase, and as many updates with them, as it began with, "
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
