"""What a comparison is made of: pipeline, drawing options, prompt sets, and fingerprints of what rewards read."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline

from trl_flow.backbones import Backbone, get_backbone
from trl_flow.backbones.base import SAMPLING_SETTINGS
from trl_flow.backbones.contract import scheduled
from trl_flow.backbones.model_files import loading_hint, variants_in
from trl_flow.backbones.settings import check_settings, effective, with_own_settings
from trl_flow.evaluation.adapters import Adapter
from trl_flow.evaluation.image_folder import PromptList
from trl_flow.evaluation.run_settings import differences, run_settings, trained_component
from trl_flow.images import to_rgb
from trl_flow.lora import adapter_config
from trl_flow.prompts.rows import columns_of_rows, has_transform
from trl_flow.shapes.bundled import DRAWING_SETTINGS, is_bundled


_SIZES = ("height", "width", "num_frames", "max_sequence_length")
_OWN = (*_SIZES, "guidance_scale_2")  # what a backbone is made with


@dataclass(frozen=True)
class DrawingOptions:
    """
    Settings of the images, with diffusers' names. What is `None` is that of the
    evaluations of the first adapter's run, if `training_args.json` beside it says it, else the pipeline's own default.

    An image's noise depends on the non-negative `seed` and on the image's index alone. `batch_size`, images at a time,
    changes images by rounding only, but all must be drawn with one. `dtype` and `device` are filled in when the
    pipeline is loaded.

    Example:

    ```pycon
    >>> from trl_flow.evaluation import DrawingOptions
    >>> options = DrawingOptions(seed=1, num_inference_steps=28, guidance_scale=4.5, batch_size=4)
    >>> options.num_images_per_prompt
    1
    ```
    """

    seed: int = 0
    num_images_per_prompt: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    max_sequence_length: int | None = None
    batch_size: int = 8
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self):
        names = ("seed", "num_images_per_prompt", "batch_size")
        given = [name for name in ("num_inference_steps", *_SIZES) if getattr(self, name) is not None]
        for name in (*names, *given):
            value, smallest = getattr(self, name), int(name != "seed")
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {smallest}.")
        for name in ("guidance_scale", "guidance_scale_2"):
            scale = 1.0 if getattr(self, name) is None else getattr(self, name)
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
                raise ValueError(f"{name} is {scale!r}, but must be a finite number.")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}, but must be float32, bfloat16 or float16.")


def prompt_sets(prompts: Dataset | Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Prompt sets by name; `ValueError` if there is none, or one has no prompts."""
    sets = dict(prompts) if isinstance(prompts, Mapping) else {"prompts": prompts}
    if not sets:
        raise ValueError("there are no prompts: give at least one prompt set.")
    for name, dataset in sets.items():
        if not isinstance(dataset, Dataset):
            raise ValueError(f"the prompt set {name!r} is a {type(dataset).__name__}, but must be a datasets.Dataset.")
        if len(dataset) == 0:
            raise ValueError(f"the prompt set {name!r} is empty.")
        if "prompt" not in (columns := columns_of_rows(dataset)):
            raise ValueError(f"the prompt set {name!r} has no column `prompt`, only {columns}.")
        if has_transform(dataset):  # read once: all models are given the same
            sets[name] = dataset = Dataset.from_list(list(dataset))
        for row, prompt in enumerate(dataset["prompt"]):
            if not isinstance(prompt, str):
                raise ValueError(f"row {row} of the prompt set {name!r} has {prompt!r} as its prompt.")
    return sets


def check_images_to_edit(sets: Mapping[str, Dataset], backbone: Backbone) -> None:
    """Raises `ValueError` if the pipeline draws from an image, and a set has none or one that does not fit."""
    for name, dataset in sets.items() if backbone.takes_image else ():
        if "image" not in dataset.column_names:
            kind = type(backbone.pipeline).__name__
            raise ValueError(f"{kind} draws from an image, but the prompt set {name!r} has no column image.")
        for row, image in enumerate(dataset["image"]):
            try:
                image = to_rgb(image)  # turned as it will be
                backbone.check_image_size(image.height, image.width)
            except ValueError as error:
                raise ValueError(f"the image in row {row} of the prompt set {name!r}: {error}") from error


def loaded_backbone(
    model: str | os.PathLike | DiffusionPipeline,
    options: DrawingOptions,
    backbone: Backbone | None,
    adapters: Sequence[Adapter],
    loading: Mapping[str, str],
) -> tuple[Backbone, DrawingOptions, list[str]]:
    """The backbone, with its pipeline loaded, the options with everything that is decided now, and what runs evaluated
    otherwise. `loading` may have a hub id's `revision`, and the `variant` of the files. `ValueError` if there is no
    such model, its family is not supported, it cannot draw with these options, or one of them has no effect."""
    if backbone is not None and backbone.pipeline is not model:
        raise ValueError("backbone was made for another pipeline than model. Pass model=backbone.pipeline.")
    if isinstance(model, str | os.PathLike):
        model = _loaded(os.fspath(model), options, loading)
    elif not isinstance(model, DiffusionPipeline):
        raise ValueError(f"the model is a {type(model).__name__}, but must be a hub id, a folder or a pipeline.")
    elif options.device is not None or options.dtype is not None:
        raise ValueError("device and dtype cannot be given for a loaded pipeline: move it yourself.")
    given = {name: getattr(options, name) for name in SAMPLING_SETTINGS if getattr(options, name) is not None}
    runs = {adapter.name: run_settings(adapter) for adapter in adapters}
    known = DRAWING_SETTINGS if is_bundled(model.config.get("_name_or_path")) else {}
    decided = known | next(filter(None, runs.values()), {}) | given
    if backbone is None:
        own = {name: decided.get(name) for name in _OWN}
        backbone = get_backbone(model, **own, component=trained_component(adapters))
    elif any(given.get(name) not in (None, getattr(backbone, name)) for name in _OWN):
        raise ValueError(f"the options are {given}, but backbone has its own {', '.join(_OWN)}. Leave them out.")
    scale = with_own_settings(backbone, decided)["guidance_scale"]
    check_settings(backbone, given, [scale])
    decided = {"negative_prompt": None, **effective(backbone, decided | {"guidance_scale": scale})}
    decided |= with_own_settings(backbone, decided) | {name: getattr(backbone, name) for name in _OWN}
    if backbone.fixed_sequence_length is not None:
        decided["max_sequence_length"] = backbone.fixed_sequence_length
    notes = differences({name: effective(backbone, own) for name, own in runs.items()}, decided, given)
    decided |= {"dtype": str(model.dtype).removeprefix("torch."), "device": torch.device(model.device).type}
    scheduled(backbone, decided["num_inference_steps"])
    return backbone, replace(options, **decided), notes


def loading_options(
    model: str | os.PathLike | DiffusionPipeline, adapters: Sequence[Adapter], **given: str | None
) -> dict[str, str]:
    """`revision` and `variant` of the base model: those given, else those that the adapters were trained with, as
    their folders say. `ValueError` if these are of several revisions, or `model` is loaded already."""
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(model, DiffusionPipeline):
        if given:
            raise ValueError(f"{' and '.join(given)} cannot be given for a loaded pipeline.")
        return {}
    found: dict[str, dict[str, str | None]] = {"revision": {}, "variant": {}}
    for adapter in adapters:
        path = Path(adapter.path)
        config = adapter_config(path)
        settings = (path if path.is_dir() else path.parent) / "training_args.json"
        kwargs = (json.loads(settings.read_text()) if settings.is_file() else {}).get("model_init_kwargs")
        if config.get("base_model_name_or_path") in (None, os.fspath(model)) and (config or kwargs):
            for name, values in found.items():
                values[adapter.name] = config.get(name) or (kwargs if isinstance(kwargs, dict) else {}).get(name)
    if len(set(found["revision"].values())) > 1 and "revision" not in given and not os.path.isdir(model):
        said = ", ".join(f"{name}: {value or 'main'}" for name, value in found["revision"].items())
        raise ValueError(f"the adapters were trained on different revisions of {model} ({said}). Choose by revision.")
    # Variants differ by rounding, and another copy of the model may not have the one that was trained with
    if os.path.isdir(model):
        found["variant"] = {n: value for n, value in found["variant"].items() if value in variants_in(model)}
    return {n: value for n, values in found.items() for value in values.values() if value is not None} | given


def _loaded(path: str, options: DrawingOptions, loading: Mapping[str, str]) -> DiffusionPipeline:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(options.device or accelerator or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device is {options.device!r}, which torch does not know: {error}") from error
    dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "model_index.json")):
        raise ValueError(
            f"the model folder {path!r} is not a diffusers pipeline: it has no model_index.json. It holds "
            f"{sorted(os.listdir(path))[:10]}. Pass trained weights as adapters, together with their base model."
            f"{loading_hint(path)}"
        )
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=getattr(torch, dtype), **loading)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        asked = "".join(f" with {name} {value}" for name, value in loading.items())
        raise ValueError(
            f"the model {path!r} could not be loaded{asked} as a diffusers pipeline: {str(error).rstrip(' .')}. Give "
            f"a folder or a hub id (log in with `hf auth login` if it is gated).{loading_hint(path, error)}"
        ) from error
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the model could not be moved to the device {str(device)!r}: {error}") from error


def prompt_list(dataset: Dataset, *, with_images: bool) -> PromptList:
    """The prompts, with a fingerprint of them and of the images to be edited."""
    digest = hashlib.sha256()
    for prompt in dataset["prompt"]:
        digest.update(prompt.encode() + b"\0")
    for image in map(to_rgb, dataset["image"] if with_images else ()):
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return PromptList(list(dataset["prompt"]), digest.hexdigest()[:16])


def columns_fingerprint(dataset: Dataset) -> str:
    """A fingerprint of all columns besides the prompts and images, which are known already."""
    names = sorted(set(dataset.column_names) - {"prompt", "image"})
    # Of objects their kind: what they say of themselves may differ from run to run
    columns = {name: list(dataset[name]) for name in names}
    content = json.dumps(columns, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def computed_by(func: Callable) -> str:
    """What a reward is computed by: where it is defined and, of an object, the plain values among its attributes."""
    if isinstance(func, functools.partial):
        name, values = f"{computed_by(func.func)} with", func.keywords
    else:
        defined = func if hasattr(func, "__qualname__") else type(func)
        name, values = f"{defined.__module__}.{defined.__qualname__}", getattr(func, "__dict__", {})
        if callable(values.get("reward")):  # of frames
            values = {**values, "reward": computed_by(values["reward"])}
    plain = str | int | float | bool | None
    return f"{name} { {n: v for n, v in sorted(values.items()) if not n.startswith('_') and isinstance(v, plain)} }"
