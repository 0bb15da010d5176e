"""A pipeline without weights: its modules on the meta device, built from the configuration files."""

import os
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download

from trl_flow.backbones import BACKBONES
from trl_flow.evaluation.outputs import read_json


INDEX = "model_index.json"


def fetch_configs(model: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """The folder with the configuration files of a pipeline, `model`, which is a hub id or a folder. Of a model on the
    Hub only these are downloaded; `ValueError` if there is none, it is gated, or the Hub cannot be reached."""
    folder, name = Path(model), os.fspath(model)
    if folder.is_file():
        raise ValueError(f"{name!r} is a file. Give the folder of a diffusers pipeline, or a hub id.")
    if not folder.is_dir():
        patterns = [INDEX, "*/config.json", "*/scheduler_config.json"]
        try:
            folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
        except Exception as error:  # without a connection the client raises errors of several libraries
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(
                f"{name!r} is neither a folder nor a hub id, or its configuration files could not be fetched ({reason}"
                "). Check name and network, log in by `hf auth login`, or give a folder that holds the files."
            ) from error
    if not (folder / INDEX).is_file():
        raise ValueError(f"{name!r} is not a diffusers pipeline: it has no {INDEX}.")
    return folder


def empty_pipeline(folder: str | os.PathLike) -> DiffusionPipeline:
    """
    Builds a pipeline on the meta device, where modules have shapes and dtypes but no data, from a folder with
    `model_index.json`, and `config.json` in a folder for each part. It has no tokenizers. `ValueError` if a file is
    missing or unfit, or the pipeline is not a supported one of diffusers.
    """
    index = read_json(Path(folder, INDEX))
    class_name = index.get("_class_name")
    if class_name not in BACKBONES:
        raise ValueError(
            f"{class_name} is not supported. Supported pipelines: {', '.join(sorted(BACKBONES))}. For a pipeline with "
            "a backbone of your own, estimate from the backbone: trl_flow.memory.estimate(backbone, plan)."
        )
    pipeline_class = getattr(diffusers, class_name)
    arguments = {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in signature(pipeline_class).parameters.items()
    }
    for name, value in index.items():
        if name in arguments:
            arguments[name] = _part(Path(folder, name), *value) if isinstance(value, list) else value
    if (checker := arguments.get("safety_checker")) is None:
        return pipeline_class(**arguments)
    # Which the pipeline takes only together with its feature extractor
    pipeline = pipeline_class(**arguments | {"safety_checker": None, "requires_safety_checker": False})
    pipeline.register_modules(safety_checker=checker)
    return pipeline


def _part(folder: Path, library: str | None, class_name: str | None) -> Any:
    """A scheduler, or a module on the meta device; `None` for what has no weights (tokenizers, processors)."""
    if library is None:
        return None
    libraries = {"diffusers": diffusers, "transformers": transformers}
    # Or one of the classes that live beside a pipeline
    cls = getattr(libraries.get(library) or getattr(diffusers.pipelines, library, None), class_name, None)
    if cls is None and (folder / "config.json").is_file():
        what = f"a {class_name} of {library}, which the installed libraries do not have"
        raise ValueError(f"{folder} is {what}. Install a newer diffusers or transformers.")
    if cls is None or not issubclass(cls, (SchedulerMixin, torch.nn.Module)):
        return None
    if issubclass(cls, SchedulerMixin):
        return cls.from_config(read_json(folder / "scheduler_config.json"))
    config, is_diffusers = read_json(folder / "config.json"), issubclass(cls, ModelMixin)
    try:
        with torch.device("meta"):
            module = cls.from_config(config) if is_diffusers else cls(cls.config_class.from_dict(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} does not make a {class_name}: {error}.") from error
    return module.to("meta").eval()  # what is computed with numpy comes into being on the CPU
