"""Training in steps that can be broken off: a step does the same, whether or not there was a break before it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


CHECKPOINT_EVERY = 250


def write(path: Path, content: dict) -> None:
    """Saves a file whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def log(folder: Path, **values) -> None:
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(
            json.dumps({"time": time.strftime("%H:%M:%S"), "cpu_s": round(time.process_time())} | values) + "\n"
        )


def adamw(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)


def generator(seed: int, *numbers: int) -> torch.Generator:
    """Random numbers of one step, whatever ran before it."""
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed % 2**63)


class Stage:
    """
    A number of optimizer steps on some modules.

    Args:
        folder: where its checkpoint `{name}.pt` and the log are.
        parts: what is trained and kept in the checkpoint, by name; each has `state_dict` and `load_state_dict`.
        optimizers: of all that is trained.
        rate: the share of the optimizers' learning rates in a step, from its number.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        parts: dict,
        optimizers: list[torch.optim.Optimizer],
        rate: Callable[[int], float],
    ) -> None:
        self.folder, self.name, self.optimizers, self.rate = folder, name, optimizers, rate
        self.rates = [group["lr"] for group in self.groups]
        self.parts = parts | {f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)}
        self.step = 0
        self.average: float | None = None
        if self.path.is_file():
            saved = read(self.path)
            self.step, self.average = saved.pop("step"), saved.pop("average")
            for key, part in self.parts.items():
                part.load_state_dict(saved[key])

    @property
    def groups(self) -> list[dict]:
        # Others after a checkpoint is loaded
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def save(self) -> None:
        state = {key: part.state_dict() for key, part in self.parts.items()}
        write(self.path, state | {"step": self.step, "average": self.average})

    def run(self, steps: int, loss_of: Callable[[int], torch.Tensor], after: Callable[[int], None] = lambda _: None):
        """Takes the steps that are left of `steps`; `after` is called with the number of steps done."""
        parameters = [parameter for group in self.groups for parameter in group["params"]]
        while self.step < steps:
            for group, top in zip(self.groups, self.rates, strict=True):
                group["lr"] = top * self.rate(self.step)
            loss = loss_of(self.step)
            for parameter in parameters:
                parameter.grad = None
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            self.average = loss.item() if self.average is None else 0.99 * self.average + 0.01 * loss.item()
            after(self.step)
            if self.step % CHECKPOINT_EVERY == 0 or self.step == steps:
                self.save()
                log(self.folder, stage=self.name, step=self.step, loss=round(self.average, 5))
