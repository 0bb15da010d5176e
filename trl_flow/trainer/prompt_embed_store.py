"""Conditions of prompts on disk, one safetensors file each, under a fingerprint of all that they depend on."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from trl_flow.backbones.base import Backbone


logger = logging.get_logger(__name__)


def default_folder() -> Path:
    """`trl_flow/prompt_embeds` beside the Hub's cache (`HF_HOME`)."""
    return Path(constants.HF_HOME) / "trl_flow" / "prompt_embeds"


def encoding_fingerprint(backbone: Backbone) -> str:
    """
    A hash of everything but the prompt that a condition depends on: the class and the settings of the backbone, the
    weights of all modules that are not trained (with their dtypes and device), the tokenizers, and the versions of
    the libraries that encode.
    """
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
            for key, tensor in sorted(component.state_dict().items()):
                digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                # As bytes: numpy has no bfloat16
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif name.startswith(("tokenizer", "processor")) and component is not None:
            with tempfile.TemporaryDirectory() as folder:
                component.save_pretrained(folder)
                for path in sorted(Path(folder).rglob("*")):
                    if path.is_file():
                        digest.update(f"{name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


class PromptEmbedStore:
    """
    A folder of conditions, which any number of processes may read and write at once.

    Args:
        folder (`str` or `PathLike`): where; made if it is not there.
        fingerprint (`str`): of what encodes, see [`encoding_fingerprint`]. Each has a folder of its own within
            `folder`, so that several models can share it.

    Raises:
        ValueError: if the folder cannot be made.
    """

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
            # Reads the head, and holds the file's length against it
            with safe_open(self._path(*key), framework="pt"):
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
        """
        Writes a condition. Others see all of it or nothing: it gets its name when it is complete.

        Raises:
            OSError: if it cannot be written; what to do is in the message.
        """
        path = self._path(prompt, image)
        # A name that no other process or machine has
        temporary = path.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}.tmp")
        condition = {name: tensor.contiguous() for name, tensor in condition.items()}
        try:
            save_file(condition, temporary, metadata={"checksum": _checksum(condition), "prompt": prompt})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise OSError(
                f"The embeddings of a prompt could not be written to {self.folder}: {error}. Make room there, or set "
                "prompt_embeds_dir to another folder."
            ) from error


def _checksum(condition: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(condition.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
