"""A pipeline without weights: its modules on the meta device, built from the configuration files."""

import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from trl_flow.backbones import BACKBONES


INDEX = "model_index.json"


@dataclass(frozen=True)
class EmptyModel:
    """
    Attributes:
        pipeline ([`~diffusers.DiffusionPipeline`]): of meta modules, without tokenizers.
        modules (`dict[str, torch.nn.Module]`): all modules that loading the pipeline would bring, by name.
    """

    pipeline: DiffusionPipeline
    modules: dict[str, torch.nn.Module]


def fetch_configs(model: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """
    The folder with a pipeline's configuration files; of a hub id these alone are downloaded.

    Args:
        model (`str` or `PathLike`): hub id, or a folder.
        revision, token (`str`, *optional*): of the Hub.

    Raises:
        ValueError: if there is no such model, it is gated, or the Hub can not be reached.
    """
    folder = Path(model)
    if folder.is_file():
        raise ValueError(f"{os.fspath(model)!r} is a file. Give the folder of a diffusers pipeline, or a hub id.")
    if not folder.is_dir():
        name = os.fspath(model)
        patterns = [INDEX, "*/config.json", "*/scheduler_config.json"]
        try:
            folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
        except GatedRepoError as error:
            raise ValueError(
                f"The model {name!r} is gated: accept its licence at https://huggingface.co/{name}, and log in with "
                "`hf auth login`."
            ) from error
        except HFValidationError as error:
            raise ValueError(f"{name!r} is neither a folder nor a hub id such as 'user/name'.") from error
        except RevisionNotFoundError as error:
            raise ValueError(f"The model {name!r} has no revision {revision!r}.") from error
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"There is neither a folder nor a model {name!r} on the Hub, or it is private: check the name, and "
                "log in with `hf auth login` if it is."
            ) from error
        # The client raises errors of several libraries when there is no connection
        except Exception as error:
            raise ValueError(
                f"The configuration files of {name!r} could not be fetched ({type(error).__name__}: {error}). See "
                "that the network is there, or give a folder that holds them."
            ) from error
    if not (folder / INDEX).is_file():
        raise ValueError(f"{os.fspath(model)!r} is not a diffusers pipeline: it has no {INDEX}.")
    return folder


def empty_model(folder: str | os.PathLike) -> EmptyModel:
    """
    Builds a pipeline on the meta device, where modules have shapes and dtypes but no data.

    Args:
        folder (`str` or `PathLike`): with `model_index.json`, and `config.json` in a folder for each part.

    Raises:
        ValueError: if a file is missing or unfit, or no backbone is written for the pipeline.
    """
    folder = Path(folder)
    index = _read(folder / INDEX)
    class_name = index.get("_class_name")
    if class_name not in BACKBONES:
        raise ValueError(
            f"{class_name} is not supported. Supported pipelines: {', '.join(sorted(BACKBONES))}. For one with a "
            "backbone of your own there is no estimate."
        )
    pipeline_class = getattr(diffusers, class_name)
    parts: dict[str, Any] = {}
    for name, value in index.items():
        if isinstance(value, list):
            parts[name] = _part(folder / name, *value)
        elif not name.startswith("_"):
            parts[name] = value
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    arguments = {
        name: parts.get(name) for name in inspect.signature(pipeline_class.__init__).parameters if name != "self"
    }
    if "safety_checker" in arguments:  # which the pipeline takes only together with its feature extractor
        arguments |= {"safety_checker": None, "requires_safety_checker": False}
    defaults = inspect.signature(pipeline_class.__init__).parameters
    for name in arguments.keys() - parts.keys() - {"safety_checker", "requires_safety_checker"}:
        if defaults[name].default is not inspect.Parameter.empty:
            arguments[name] = defaults[name].default
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        return EmptyModel(pipeline_class(**arguments), modules)
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


def _part(folder: Path, library: str | None, class_name: str | None) -> Any:
    """A scheduler, or a module on the meta device; `None` for what has no weights (tokenizers, processors)."""
    if library is None:
        return None
    namespace = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if namespace is None:
        namespace = getattr(diffusers.pipelines, library, None)  # classes that live beside a pipeline
    cls = getattr(namespace, class_name, None)
    if cls is None:
        if not (folder / "config.json").is_file():
            return None  # a tokenizer or processor, from wherever
        raise ValueError(
            f"{folder} is a {class_name} of {library}, which the installed libraries do not have. Install a newer "
            "diffusers or transformers."
        )
    if issubclass(cls, SchedulerMixin):
        return cls.from_config(_read(folder / "scheduler_config.json"))
    if not issubclass(cls, torch.nn.Module):
        return None
    config = _read(folder / "config.json")
    try:
        with torch.device("meta"):
            module = (
                cls.from_config(config) if issubclass(cls, ModelMixin) else cls(cls.config_class.from_dict(config))
            )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} does not make a {class_name}: {error}.") from error
    # What is computed with numpy comes into being on the CPU
    return module.to("meta").eval()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can not be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content
