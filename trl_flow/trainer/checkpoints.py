"""What a checkpoint holds beside transformers' own files, so that training goes on exactly where it stopped."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from trl_flow.trainer.prompt_cache import image_fingerprint


logger = logging.get_logger(__name__)

# The count of micro-batches and the like
STATE_NAME = "flow_grpo_state.json"


@dataclass(frozen=True)
class MicroBatch:
    """
    What one forward and backward pass is run on: `B` samples of one sampling phase.

    Attributes:
        prompts (`list[str]`): length `B`.
        steps (`tuple[int, ...]`): the trained steps, length `S`.
        latents, next_latents, means, log_probs: as in [`~trl_flow.rollout.Trajectory`].
        advantages (`torch.Tensor`): `(B, S)`, float32.
        images (`list[PIL.Image.Image]` or `None`): the pictures that are edited, RGB, length `B`.
    """

    prompts: list[str]
    steps: tuple[int, ...]
    latents: torch.Tensor
    next_latents: torch.Tensor
    means: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    images: list[Image.Image] | None = None

    TENSORS = ("latents", "next_latents", "means", "log_probs", "advantages")


def save_micro_batches(batches: list[MicroBatch], folder: Path, rank: int) -> None:
    """Writes the sampled micro-batches of process `rank`."""
    tensors = {
        f"{k}.{name}": getattr(batch, name).contiguous()
        for k, batch in enumerate(batches)
        for name in MicroBatch.TENSORS
    }
    # A picture is shared by a group, and often by several prompts
    names = [
        None if batch.images is None else [image_fingerprint(image) for image in batch.images] for batch in batches
    ]
    for batch, own in zip(batches, names, strict=True):
        for image, name in zip(batch.images or [], own or [], strict=True):
            tensors[f"image.{name}"] = torch.from_numpy(np.array(image))
    save_file(tensors, folder / f"rollouts-{rank}.safetensors")
    lists = [
        {"prompts": batch.prompts, "steps": batch.steps, "images": own}
        for batch, own in zip(batches, names, strict=True)
    ]
    (folder / f"rollouts-{rank}.json").write_text(json.dumps(lists))


def load_micro_batches(folder: Path, rank: int, device: torch.device) -> list[MicroBatch]:
    """Reads what `save_micro_batches` wrote."""
    # safetensors does not know the names of all devices ("cpu:0" in a process group)
    tensors = load_file(folder / f"rollouts-{rank}.safetensors")
    return [
        MicroBatch(
            prompts=entry["prompts"],
            steps=tuple(entry["steps"]),
            images=None
            if entry["images"] is None
            else [Image.fromarray(tensors[f"image.{name}"].numpy()) for name in entry["images"]],
            **{name: tensors[f"{k}.{name}"].to(device) for name in MicroBatch.TENSORS},
        )
        for k, entry in enumerate(json.loads((folder / f"rollouts-{rank}.json").read_text()))
    ]


def is_complete(checkpoint: str) -> bool:
    """Whether a checkpoint was written to its end."""
    # The trainer's state is written last; a process that was killed meanwhile leaves it out, or half of it
    try:
        json.loads(Path(checkpoint, "trainer_state.json").read_text())
        return Path(checkpoint, STATE_NAME).is_file()
    except (OSError, ValueError):
        return False


def last_complete_checkpoint(output_dir: str) -> str:
    """The checkpoint of the highest step that was written to its end; `ValueError` if there is none."""
    found = sorted(
        (path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()),
        key=lambda path: int(path.name.rsplit("-", 1)[1]) if path.name.rsplit("-", 1)[1].isdigit() else -1,
    )
    for path in reversed(found):
        if is_complete(str(path)):
            return str(path)
        logger.warning(f"{path} is not complete (its writing was interrupted) and is passed over.")
    raise ValueError(
        f"resume_from_checkpoint=True, but {output_dir!r} has no complete checkpoint. Train from the "
        "start (resume_from_checkpoint=None)."
    )
