"""[`RolloutBuffer`]: what one sampling phase gives, in the micro-batches that train on it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trl_flow.algorithms import MicroBatch
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.prompt_cache import image_fingerprint


def micro_batch_indices(number: int, num_micro_batches: int, num_updates: int) -> list[list[int]]:
    """The indices of a process's `number` samples in each micro-batch, in the order in which these are trained on.
    Micro-batch `k` of `K` takes every `K`-th sample from the `k`-th on, and the `U` updates take turns in choosing
    micro-batches: update `u` is made of the samples `u, u + U, u + 2 U ...` of the global batch, however that is cut
    into processes and micro-batches, and has its share of every group."""
    chosen = [k for update in range(num_updates) for k in range(update, num_micro_batches, num_updates)]
    return [list(range(k, number, num_micro_batches)) for k in chosen]


class RolloutBuffer:
    """What an algorithm keeps of a process's `number` samples: they come in their own order and are kept in that of
    training, one tensor for each name, allocated once, of which micro-batches are slices. Where some are chosen when
    all have come, they are kept in their own order until then."""

    def __init__(self, number: int, args: FlowRLConfig):
        num_updates = max(1, args.steps_per_generation // args.gradient_accumulation_steps)
        self._first = args.process_index * number
        trained = number * args.group_size // args.num_generations
        self._indices = micro_batch_indices(trained, args.steps_per_generation, num_updates)
        self._order = [index for batch in self._indices for index in batch]
        # Where each sample is kept
        self._rows = torch.arange(number)
        if trained == number:
            self._rows[self._order] = torch.arange(number)
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, first: int, tensors: dict[str, torch.Tensor]) -> None:
        """Keeps what belongs to the samples from index `first` on, each tensor `(B, ...)`."""
        for name, part in tensors.items():
            if name not in self._tensors:
                self._tensors[name] = part.new_empty(len(self._rows), *part.shape[1:])
            self._tensors[name][self._rows[first : first + len(part)].to(part.device)] = part

    def finish(
        self, rows: list[dict[str, Any]], steps: tuple[int, ...], advantages: torch.Tensor, images: list | None,
        chosen: list[int] | None = None,
    ) -> list[MicroBatch]:  # fmt: skip
        """The micro-batches in the order of training; rows and images in the samples' own. `chosen` are the indices of
        those that are trained on, by default all, and `advantages` theirs, `(M, ...)`."""
        size = len(self._indices[0])
        if chosen is None:
            chosen = range(len(rows))
        else:
            # One after the other, so that no more than one tensor is there twice
            order = torch.tensor(chosen)[self._order]
            for name in list(self._tensors):
                kept = self._tensors.pop(name)
                self._tensors[name] = kept[order.to(kept.device)]
        return [
            MicroBatch(
                prompts=[rows[chosen[i]]["prompt"] for i in indices],
                steps=steps,
                tensors={name: kept[k * size : (k + 1) * size] for name, kept in self._tensors.items()},
                advantages=advantages[indices],
                images=None if images is None else [images[chosen[i]] for i in indices],
                samples=tuple(self._first + chosen[i] for i in indices),
            )
            for k, indices in enumerate(self._indices)
        ]


def save_micro_batches(batches: list[MicroBatch], folder: Path, rank: int) -> None:
    """Writes the micro-batches of process `rank`."""
    tensors, lists = {}, []
    for k, batch in enumerate(batches):
        for name, tensor in {**batch.tensors, "advantages": batch.advantages}.items():
            tensors[f"{k}.{name}"] = tensor.contiguous()
        # An image is shared by a group, and often by several prompts
        names = None if batch.images is None else [image_fingerprint(image) for image in batch.images]
        for image, name in zip(batch.images or [], names or [], strict=True):
            tensors[f"image.{name}"] = torch.from_numpy(np.array(image))
        own = {"prompts": batch.prompts, "steps": batch.steps, "samples": batch.samples}
        lists.append({**own, "images": names, "tensors": list(batch.tensors)})
    save_file(tensors, folder / f"rollouts-{rank}.safetensors")
    (folder / f"rollouts-{rank}.json").write_text(json.dumps(lists))


def load_micro_batches(folder: Path, rank: int, device: torch.device) -> list[MicroBatch]:
    """Reads what [`save_micro_batches`] wrote."""
    # safetensors does not know the names of all devices ("cpu:0" in a process group)
    tensors = load_file(folder / f"rollouts-{rank}.safetensors")
    images = {name: Image.fromarray(value.numpy()) for name, value in tensors.items() if name.startswith("image.")}
    return [
        MicroBatch(
            prompts=entry["prompts"],
            steps=tuple(entry["steps"]),
            tensors={name: tensors[f"{k}.{name}"].to(device) for name in entry["tensors"]},
            advantages=tensors[f"{k}.advantages"].to(device),
            images=None if entry["images"] is None else [images[f"image.{name}"] for name in entry["images"]],
            samples=tuple(entry["samples"]),
        )
        for k, entry in enumerate(json.loads((folder / f"rollouts-{rank}.json").read_text()))
    ]
