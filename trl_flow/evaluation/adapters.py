"""Trained weights, put into a stock pipeline and taken out again."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from trl_flow.backbones import Backbone
from trl_flow.lora import LORA_WEIGHT_NAME, PEFT_FILES, load_lora, lora_layers


BASE = "base"

# diffusers' name for a LoRA and PEFT's, and diffusers' for a model's weights in one file or in shards
_LORA = (LORA_WEIGHT_NAME, PEFT_FILES[0])
_FULL = (SAFETENSORS_WEIGHTS_NAME, f"{SAFETENSORS_WEIGHTS_NAME}.index.json")
_CHECKPOINT = re.compile(r"checkpoint-\d+|best_gold")
# Values of each tensor that a base model is known by
_SAMPLED = 256


@dataclass(frozen=True)
class Adapter:
    """Trained weights by the `name` that tables and images call them. `path` is a folder (a run's output folder, a
    checkpoint, a fully fine-tuned model as diffusers saves one), a `.safetensors` file, or a hub id."""

    name: str
    path: str

    @property
    def is_full(self) -> bool:
        """Whether all weights were trained: the folder has a model, and no LoRA."""
        folder = Path(self.path)
        return not any((folder / name).is_file() for name in _LORA) and any(
            (folder / name).is_file() for name in _FULL
        )


def parse_adapters(
    specifications: str | os.PathLike | Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike],
) -> list[Adapter]:
    """Adapters from `path`, `name=path` or paths by name. Without a name it is the last part of the path, with the
    part before it for checkpoints (`run/checkpoint-100`) and where two would be called the same. `ValueError` if two
    have the same name, one is called `base`, or a local path is wrong."""
    if isinstance(specifications, str | os.PathLike):
        specifications = [specifications]
    if isinstance(specifications, Mapping):
        specifications = [f"{name}={os.fspath(path)}" for name, path in specifications.items()]
    named = [split_name(os.fspath(specification)) for specification in specifications]
    short = [_short_name(path) if name is None else name for name, path in named]
    adapters: dict[str, Adapter] = {}
    for name, path in named:
        if name is None and short.count(name := _short_name(path)) > 1:
            name = "/".join(Path(path).parts[-2:])
        if name in adapters:
            both = f"{adapters[name].path} and {path}"
            raise ValueError(f"two adapters are called {name!r}: {both}. Name them: name=path.")
        if name.lower() == BASE or not name.strip():
            raise ValueError(f"the adapter {path} is called {name!r}, which is kept for the model without an adapter.")
        _check_path(path)
        adapters[name] = Adapter(name, path)
    return list(adapters.values())


def split_name(specification: str) -> tuple[str | None, str]:
    """`name=path` or a path alone, without a name."""
    name, equals, path = specification.partition("=")
    # A path may have an equals sign of its own
    if not equals or os.path.exists(specification) or "/" in name or os.sep in name:
        return None, specification
    return name.strip(), path


def _short_name(path: str) -> str:
    parts = Path(path).resolve().parts if os.path.exists(path) else Path(path).parts
    name = Path(parts[-1]).stem if path.endswith(".safetensors") and parts else "".join(parts[-1:])
    return "/".join(parts[-2:]) if _CHECKPOINT.fullmatch(name) else name


def _check_path(path: str) -> None:
    folder = Path(path)
    if folder.is_file() and folder.suffix != ".safetensors":
        raise ValueError(f"the adapter {path} is not a .safetensors file. Files of other formats are not loaded.")
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            raise ValueError(f"the adapter {path} is a whole pipeline. Give it as the model of another comparison.")
        if any((folder / name).is_file() for name in (*_LORA, *_FULL)):
            return
        inside = sorted(child.name for child in folder.iterdir())[:10]
        checkpoints = [child for child in inside if _CHECKPOINT.fullmatch(child)]
        hint = f" Did you mean {path}/{checkpoints[-1]}?" if checkpoints else f" It holds {inside}."
        raise ValueError(
            f"the adapter folder {path} has neither {LORA_WEIGHT_NAME} nor {SAFETENSORS_WEIGHTS_NAME}.{hint}"
        )
    if not folder.is_file() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise ValueError(f"the adapter {path!r} is neither a file, nor a folder, nor a hub id (owner/name).")


def check_adapter(backbone: Backbone, adapter: Adapter) -> str:
    """Loads an adapter and takes it out again: a fingerprint of its weights and its scaling. `ValueError` if it cannot
    be loaded, or does not fit the pipeline."""
    digest = hashlib.sha256()
    with loaded_adapter(backbone, adapter):
        if adapter.is_full:
            _add_tensors(digest, backbone.component, backbone.model.state_dict())
        for layer, module in lora_layers(backbone.pipeline):
            tensors = {key: value for key, value in module.state_dict().items() if "base_layer" not in key}
            _add_tensors(digest, layer, tensors)
            digest.update(json.dumps(module.scaling, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def base_fingerprint(pipeline: DiffusionPipeline) -> str:
    """A fingerprint of a pipeline's weights, equal for equal ones wherever they were loaded from. Of each tensor a few
    hundred values are looked at, evenly spread: other weights differ nearly everywhere."""
    digest = hashlib.sha256()
    for name, component in sorted(_modules(pipeline).items()):
        # A module that is kept elsewhere between calls has tensors without values
        tensors = {key: tensor for key, tensor in component.state_dict().items() if torch.is_tensor(tensor)}
        tensors = {key: tensor.flatten() for key, tensor in tensors.items() if not tensor.is_meta}
        _add_tensors(digest, name, {key: t[:: max(1, len(t) // _SAMPLED)] for key, t in tensors.items()})
    return digest.hexdigest()[:16]


def _add_tensors(digest, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{prefix}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes: numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


@contextmanager
def loaded_adapter(backbone: Backbone, adapter: Adapter | None) -> Iterator[None]:
    """The backbone's pipeline with an adapter in it, as anyone would load it, and without one again afterwards. `None`
    is the base model. `ValueError` if it cannot be loaded, or does not fit the pipeline."""
    if adapter is None:
        yield
        return
    pipeline, original = backbone.pipeline, backbone.model
    if next(lora_layers(pipeline), None) is not None:
        raise ValueError(
            f"the pipeline has adapters already, which would count to the base model alone and not to {adapter.name!r}"
            ". Take them out, pipeline.unload_lora_weights(), after pipeline.fuse_lora() if they belong to the base."
        )
    try:
        try:
            if adapter.is_full:
                trained = type(original).from_pretrained(adapter.path, dtype=original.dtype)
                own = {key: value for key, value in original.config.items() if not key.startswith("_")}
                if different := sorted(key for key, value in own.items() if value != trained.config.get(key)):
                    raise ValueError(f"its configuration differs from the model's in {', '.join(different)}")
                setattr(pipeline, backbone.component, trained.to(original.device))
            else:
                load_lora(pipeline, adapter.path, backbone.component, adapter_name=None)
        # Files and the Hub fail in many ways: errors of the file's format, of its keys, of the network
        except Exception as error:
            raise _does_not_fit(adapter, pipeline, error) from error
        yield
    finally:
        if adapter.is_full:
            setattr(pipeline, backbone.component, original)
        else:
            pipeline.unload_lora_weights()


def _modules(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _does_not_fit(adapter: Adapter, pipeline: DiffusionPipeline, error: Exception) -> ValueError:
    cause = str(error).strip(" .\n") or type(error).__name__
    if not os.path.exists(adapter.path):
        folder = Path(adapter.path).parent
        inside = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else []
        hint = f" The folder {folder} holds {inside}." if inside else ""
        what = f"the adapter {adapter.name!r}: there is no file or folder {adapter.path!r}"
        return ValueError(f"{what}, and it could not be had from the Hub either: {cause}.{hint}")
    what = f"the adapter {adapter.name!r} ({adapter.path}) could not be loaded into this {type(pipeline).__name__}"
    return ValueError(f"{what}: {cause}. Was it trained on another model?")
