"""Conditions of prompts on disk, one safetensors file each, under a fingerprint of all that they depend on."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils import logging

from trl_flow.backbones.base import Backbone
from trl_flow.evaluation.outputs import whole_file


logger = logging.get_logger(__name__)


def default_folder() -> Path:
    """`trl_flow/prompt_embeds` beside the Hub's cache (`HF_HOME`)."""
    return Path(constants.HF_HOME) / "trl_flow" / "prompt_embeds"


def encoding_fingerprint(backbone: Backbone) -> str:
    """A hash of everything but the prompt that a condition depends on: the class and the settings of the backbone, the
    weights of all modules that are not trained (with their dtypes and device), the tokenizers, and the versions of
    the libraries that encode."""
    pipeline = backbone.pipeline
    digest = hashlib.sha256()
    settings = {
        "backbone": f"{type(backbone).__module__}.{type(backbone).__qualname__}",
        "pipeline": type(pipeline).__name__,
        "max_sequence_length": backbone.max_sequence_length,
        "size": [backbone.height, backbone.width],
        "device": backbone.device.type,
        "versions": [diffusers.__version__, torch.__version__, transformers.__version__],
        "config": {
            key: value
            for key, value in sorted(pipeline.config.items())
            if isinstance(value, bool | int | float | str | None) and not key.startswith("_")
        },
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, component in sorted(pipeline.components.items()):
        if component is backbone.model:
            continue
        if isinstance(component, torch.nn.Module):
            _add(digest, component.state_dict(), prefix=f"{name}.")
        elif name.startswith(("tokenizer", "processor")) and component is not None:
            with tempfile.TemporaryDirectory() as folder:
                component.save_pretrained(folder)
                for path in sorted(Path(folder).rglob("*")):
                    if path.is_file():
                        digest.update(f"{name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


class PromptEmbedStore:
    """A folder of conditions, which any number of processes may read and write at once. Each fingerprint of what
    encodes ([`encoding_fingerprint`]) has a folder of its own within it, so that several models can share it. Raises
    `ValueError` if it cannot be made."""

    def __init__(self, folder: str | os.PathLike, fingerprint: str):
        self.folder = Path(folder, fingerprint[:32])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"prompt_embeds_dir {os.fspath(folder)!r} cannot be written to: {error}. Choose another."
            ) from error

    def _path(self, prompt: str, image: str | None) -> Path:
        key = json.dumps([prompt, image])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def __contains__(self, key: tuple[str, str | None]) -> bool:
        """Whether there is a file of full length for a prompt and the fingerprint of its image."""
        try:
            with safe_open(self._path(*key), framework="pt"):  # reads the head, which says how long the file is
                return True
        except (SafetensorError, OSError, ValueError):
            return False

    def load(self, prompt: str, image: str | None) -> dict[str, torch.Tensor] | None:
        """The condition as it was saved, on the CPU; `None` if there is none, or it is not whole."""
        path = self._path(prompt, image)
        try:
            with safe_open(path, framework="pt") as file:
                condition = {name: file.get_tensor(name) for name in file.keys()}
                checksum = (file.metadata() or {}).get("checksum")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning(f"{path} is damaged ({error}): its prompt is encoded anew.")
            return None
        if checksum != _checksum(condition):
            logger.warning(f"{path} is damaged (its checksum does not fit): its prompt is encoded anew.")
            return None
        return condition

    def save(self, prompt: str, image: str | None, condition: dict[str, torch.Tensor]) -> None:
        """Writes a condition, of which others see all or nothing. Raises `OSError` if it cannot be written."""
        condition = {name: tensor.contiguous() for name, tensor in condition.items()}
        try:
            with whole_file(self._path(prompt, image)) as file:
                file.write(save(condition, metadata={"checksum": _checksum(condition), "prompt": prompt}))
        except OSError as error:
            raise OSError(
                f"The embeddings of a prompt could not be written to {self.folder}: {error}. Make room there, or set "
                "prompt_embeds_dir to another folder."
            ) from error

    def check_space(self, condition: dict[str, torch.Tensor], number: int) -> None:
        """Raises `OSError` if `number` conditions of this size do not fit on the disk."""
        needed, free = number * sum(value.nbytes for value in condition.values()), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"The embeddings of {number} prompts take about {needed / 2**30:.1f} GiB, but {self.folder} has "
                f"{free / 2**30:.1f} GiB free. Make room there, set prompt_embeds_dir to another folder, train on "
                "fewer prompts, or set precompute_prompt_embeds=False."
            )


def _add(digest: Any, tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{prefix}{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes: numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _checksum(condition: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    _add(digest, condition)
    return digest.hexdigest()
