"""Draws prompt sets with a base model and its adapters, scores the images, and writes the comparison."""

import functools
import gc
import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from trl_flow.backbones import Backbone, get_backbone
from trl_flow.evaluation.adapters import BASE, base_fingerprint, check_adapter, loaded_adapter, parse_adapters
from trl_flow.evaluation.comparison import compare_scores
from trl_flow.evaluation.drawing import draw
from trl_flow.evaluation.grids import comparison_grid, evenly
from trl_flow.evaluation.image_folder import ImageFolder, PromptList, file_name
from trl_flow.evaluation.outputs import versions, write_json
from trl_flow.evaluation.page import write_page
from trl_flow.evaluation.scoring import score_images
from trl_flow.evaluation.tables import markdown
from trl_flow.evaluation.vote_results import update_votes
from trl_flow.rewards.checks import check_reward_func, reward_names


RESULTS, REPORT, PAGE = "results.json", "results.md", "comparison.html"

# Images that are scored at a time: as many as fit into memory at any size
_SCORED_TOGETHER = 64


@dataclass(frozen=True)
class DrawingOptions:
    """
    What decides, with models and prompts, what is drawn. Names as in diffusers; `None` is the pipeline's own default.

    Attributes:
        seed (`int`): non-negative; an image's noise depends on it and on the image's index alone.
        num_images_per_prompt (`int`): images for each prompt, `K`.
        batch_size (`int`): images at a time. It changes images by rounding only, but all must be drawn with one.
        dtype, device (`str` or `None`): of the pipeline; filled in when it is loaded.
    """

    seed: int = 0
    num_images_per_prompt: int = 1
    num_inference_steps: int = 40
    guidance_scale: float = 4.5
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    max_sequence_length: int | None = None
    batch_size: int = 8
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self):
        for name, least in (("seed", 0), ("num_images_per_prompt", 1), ("num_inference_steps", 1), ("batch_size", 1)):
            _check_whole(name, getattr(self, name), least)
        for name in ("height", "width", "max_sequence_length"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        if isinstance(self.guidance_scale, bool) or not isinstance(self.guidance_scale, int | float):
            raise ValueError(f"guidance_scale is {self.guidance_scale!r}, but must be a number.")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale!r}, but must be finite.")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}, but must be float32, bfloat16 or float16.")


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}.")


@dataclass(frozen=True)
class Comparison:
    """
    A finished comparison.

    Attributes:
        folder (`Path`): with `results.json`, `results.md`, `comparison.html`, `grid-{set}.png` and the images.
        results (`dict[str, Any]`): what `results.json` holds; `results["sets"][name]` is what
            [`~trl_flow.evaluation.comparison.compare_scores`] gives.
        scores (`dict`): `scores[set][model][reward]`, float64 `(N,)`, NaN where a reward does not apply; the images
            of one prompt are next to each other.
    """

    folder: Path
    results: dict[str, Any]
    scores: dict[str, dict[str, dict[str, np.ndarray]]]

    @property
    def markdown(self) -> str:
        """The report, as in `results.md`."""
        return markdown(self.results)


def evaluate_models(
    model: str | os.PathLike | DiffusionPipeline,
    adapters: Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike] = (),
    *,
    prompts: Dataset | Mapping[str, Dataset],
    output_dir: str | os.PathLike,
    proxy: Callable | Sequence[Callable] = (),
    gold: Callable | Sequence[Callable] = (),
    options: DrawingOptions | None = None,
    backbone: Backbone | None = None,
    grid_prompts: int = 16,
    page_megabytes: float = 50.0,
    rescore: bool = False,
    progress: bool = True,
) -> Comparison:
    """
    Compares a base model and adapters on prompts and rewards, and writes tables, images and a page to look at them.

    All models draw from the same noise, along the pipeline's own sampler. Images are saved as they are drawn: when
    a run is killed, the same call goes on where it stopped. Everything that is passed is checked before the first
    image is drawn. Reward functions with a `close()` are closed when they have scored.

    Args:
        model (`str`, `os.PathLike` or [`~diffusers.DiffusionPipeline`]): hub id, folder, or a loaded pipeline (which
            is drawn with as it is, on its device and in its dtype).
        adapters (`Sequence[str]` or `Mapping[str, str]`): paths, `name=path`, or paths by name: folders of runs,
            checkpoints, LoRA files, hub ids, or folders of a fully fine-tuned transformer or U-Net.
        prompts ([`~datasets.Dataset`] or `Mapping[str, Dataset]`): a column `prompt` and those that the rewards read;
            for pipelines that edit images, a column `image`.
        output_dir (`str` or `os.PathLike`): a new or empty folder, or an earlier comparison's with the same drawing
            options. Models, prompt sets and rewards may be added to it.
        proxy, gold (`Callable` or `Sequence[Callable]`): rewards that were optimized, and others. May both be empty.
        options ([`DrawingOptions`], *optional*): how it is drawn.
        backbone ([`Backbone`], *optional*): for a loaded pipeline of a family that has none here; it decides height,
            width and `max_sequence_length`.
        grid_prompts (`int`): rows of the image grids, spread evenly over the prompts.
        page_megabytes (`float`): about how large the page may become.
        rescore (`bool`): compute again the scores that an earlier run has kept.
        progress (`bool`): show progress bars.

    Returns:
        [`Comparison`]

    Raises:
        ValueError: if something does not fit, before anything is drawn or written.
        RewardError: if a reward function fails.
    """
    return ModelEvaluation(
        model,
        adapters,
        prompts=prompts,
        output_dir=output_dir,
        proxy=proxy,
        gold=gold,
        options=options,
        backbone=backbone,
        grid_prompts=grid_prompts,
        page_megabytes=page_megabytes,
        rescore=rescore,
        progress=progress,
    ).run()


class ModelEvaluation:
    """
    [`evaluate_models`] in two steps: the constructor checks everything (and loads the model), `run` does it.

    Args:
        As for [`evaluate_models`].
    """

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        adapters: Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike] = (),
        *,
        prompts: Dataset | Mapping[str, Dataset],
        output_dir: str | os.PathLike,
        proxy: Callable | Sequence[Callable] = (),
        gold: Callable | Sequence[Callable] = (),
        options: DrawingOptions | None = None,
        backbone: Backbone | None = None,
        grid_prompts: int = 16,
        page_megabytes: float = 50.0,
        rescore: bool = False,
        progress: bool = True,
    ):
        _check_whole("grid_prompts", grid_prompts, 1)
        if not page_megabytes > 0:
            raise ValueError(f"page_megabytes is {page_megabytes!r}, but must be above 0.")
        self.grid_prompts, self.page_megabytes = grid_prompts, page_megabytes
        self.rescore, self.progress = rescore, progress
        if isinstance(adapters, str | os.PathLike):
            adapters = [adapters]
        if isinstance(adapters, Mapping):
            adapters = [f"{name}={os.fspath(path)}" for name, path in adapters.items()]
        self.adapters = parse_adapters(adapters)
        self.sets = _prompt_sets(prompts)
        self.proxy = [proxy] if callable(proxy) else list(proxy)
        self.gold = [gold] if callable(gold) else list(gold)
        self._check_rewards()
        self.folder = ImageFolder(output_dir)
        options = options or DrawingOptions()

        # What needs no model is checked before one is loaded
        self.pipeline, self.backbone, self.options = _load(model, options, backbone)
        self.model_path = os.fspath(model) if isinstance(model, str | os.PathLike) else _origin(model)
        self._check_images()
        self.models: dict[str, dict[str, str]] = {
            BASE: {"path": self.model_path, "fingerprint": base_fingerprint(self.pipeline)}
        }
        for adapter in self.adapters:
            self.models[adapter.name] = {
                "path": adapter.path,
                "fingerprint": check_adapter(self.pipeline, adapter),
            }
        self.prompt_lists = {name: self._prompt_list(dataset) for name, dataset in self.sets.items()}
        self.columns = {name: _columns_fingerprint(dataset) for name, dataset in self.sets.items()}
        self.folder.claim(asdict(self.options), self.models, self.prompt_lists, write=False)

    # ---- checks ----

    def _check_rewards(self) -> None:
        names = reward_names([*self.proxy, *self.gold])
        self.proxy_names, self.gold_names = names[: len(self.proxy)], names[len(self.proxy) :]
        for name, dataset in self.sets.items():
            for func in [*self.proxy, *self.gold]:
                try:
                    check_reward_func(func, dataset.column_names)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"the prompt set {name!r}: {error}") from error
        self.rewards = {name: _computed_by(func) for name, func in zip(names, [*self.proxy, *self.gold], strict=True)}

    def _check_images(self) -> None:
        if not self.backbone.takes_image:
            return
        for name, dataset in self.sets.items():
            if "image" not in dataset.column_names:
                raise ValueError(
                    f"{type(self.pipeline).__name__} edits images, but the prompt set {name!r} has no column image."
                )
            for row, image in enumerate(dataset["image"]):
                try:
                    self.backbone.check_image_size(image.height, image.width)
                except ValueError as error:
                    raise ValueError(f"the image in row {row} of the prompt set {name!r}: {error}") from error

    def _inputs(self, dataset: Dataset) -> list[Image.Image] | None:
        """The images to be edited."""
        return list(dataset["image"]) if self.backbone.takes_image else None

    def _prompt_list(self, dataset: Dataset) -> PromptList:
        digest = hashlib.sha256()
        for prompt in dataset["prompt"]:
            digest.update(prompt.encode() + b"\0")
        for image in self._inputs(dataset) or []:
            digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
        return PromptList(list(dataset["prompt"]), digest.hexdigest()[:16])

    # ---- run ----

    def run(self) -> Comparison:
        """
        Draws what is not there yet, scores it, and writes everything.

        Returns:
            [`Comparison`]

        Raises:
            ValueError: if the folder cannot be written, another process writes there, or an image is damaged.
            RewardError: if a reward function fails. The images are kept.
        """
        with self.folder.locked():
            return self._run()

    def _run(self) -> Comparison:
        self.folder.claim(asdict(self.options), self.models, self.prompt_lists)
        drawn = self._draw()
        # The rewards' models may need the memory
        del self.pipeline, self.backbone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        scores = self._score(drawn)
        results = {
            "model": self.model_path,
            "models": self.models,
            "proxy": self.proxy_names,
            "gold": self.gold_names,
            "settings": asdict(self.options),
            "sets": {
                name: compare_scores(
                    by_model,
                    proxy=self.proxy_names,
                    gold=self.gold_names,
                    num_images_per_prompt=self.options.num_images_per_prompt,
                )
                for name, by_model in scores.items()
            },
            "votes": None,
            "versions": versions(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        for name in self.sets:
            self._write_grid(name)
        path = self.folder.path
        write_page(
            path / PAGE,
            self.folder,
            results,
            prompts={name: prompts.prompts for name, prompts in self.prompt_lists.items()},
            scores=scores,
            megabytes=self.page_megabytes,
            progress=self.progress,
        )
        write_json(path / RESULTS, results)
        (path / REPORT).write_text(markdown(results), encoding="utf-8")
        results = update_votes(path) or results
        return Comparison(path, results, scores)

    def _draw(self) -> set[tuple[str, str]]:
        """Draws what is missing; returns the sets and models of which something was."""
        found = set()
        number, size = self.options.num_images_per_prompt, self.options.batch_size
        for adapter in [None, *self.adapters]:
            model = BASE if adapter is None else adapter.name
            # Whole batches: what is drawn in another company may differ by rounding
            missing = {
                name: [
                    first
                    for first in range(0, len(dataset) * number, size)
                    if not self.folder.has(name, model, range(first, min(first + size, len(dataset) * number)))
                ]
                for name, dataset in self.sets.items()
            }
            if any(missing.values()):
                with loaded_adapter(self.pipeline, adapter):
                    for name, batches in missing.items():
                        if batches:
                            self._draw_set(name, model, batches)
                            found.add((name, model))
        return found

    def _draw_set(self, name: str, model: str, batches: list[int]) -> None:
        options = self.options
        dataset = self.sets[name]
        prompts = [prompt for prompt in dataset["prompt"] for _ in range(options.num_images_per_prompt)]
        images = self._inputs(dataset)
        size = options.batch_size
        done = len(prompts) - sum(min(size, len(prompts) - first) for first in batches)
        description = model if len(self.sets) == 1 else f"{model}, {name}"
        with self._bar(len(prompts), f"drawing: {description}", done) as bar:
            for first in batches:
                chunk = prompts[first : first + size]
                indices = range(first, first + len(chunk))
                drawn = draw(
                    self.backbone,
                    chunk,
                    seed=options.seed,
                    num_inference_steps=options.num_inference_steps,
                    guidance_scale=options.guidance_scale,
                    negative_prompt=options.negative_prompt,
                    images=None if images is None else [images[i // options.num_images_per_prompt] for i in indices],
                    batch_size=size,
                    first_index=first,
                )
                for index, image in zip(indices, drawn, strict=True):
                    self.folder.save(name, model, index, image)
                bar.update(len(chunk))

    def _score(self, drawn: set[tuple[str, str]]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        # Asked for scores by something that there never was, the folder gives those of other rewards only
        kept = self.folder.scores(dict.fromkeys(self.rewards, "") if self.rescore else self.rewards, self.columns)
        for name, model in drawn:
            kept.get(name, {}).pop(model, None)
        reused = 0
        for reward, func in zip([*self.proxy_names, *self.gold_names], [*self.proxy, *self.gold], strict=True):
            for name, dataset in self.sets.items():
                for model in self.models:
                    by_reward = kept.setdefault(name, {}).setdefault(model, {})
                    if reward in by_reward:
                        reused += 1
                        continue
                    values = self._score_set(name, dataset, model, func, reward)
                    by_reward[reward] = [None if math.isnan(value) else value for value in values]
                    self.folder.keep_scores(kept, self.rewards, self.columns)
            close = getattr(func, "close", None)
            if callable(close):
                close()
        if reused and self.progress:
            tqdm.write(f"{reused} columns of scores are those of an earlier run (--rescore computes them anew).")
        rewards = [*self.proxy_names, *self.gold_names]
        return {
            name: {
                model: {reward: np.array(kept[name][model][reward], dtype=np.float64) for reward in rewards}
                for model in self.models
            }
            for name in self.sets
        }

    def _score_set(self, name: str, dataset: Dataset, model: str, func: Callable, reward: str) -> list[float]:
        number = self.options.num_images_per_prompt
        # Whole prompts: some rewards compare the images of one
        rows = max(1, _SCORED_TOGETHER // number)
        values: list[float] = []
        description = model if len(self.sets) == 1 else f"{model}, {name}"
        with self._bar(len(dataset) * number, f"{reward}: {description}") as bar:
            for first in range(0, len(dataset), rows):
                part = dataset.select(range(first, min(first + rows, len(dataset))))
                indices = range(first * number, (first + len(part)) * number)
                images = [self.folder.load(name, model, index) for index in indices]
                (scores,) = score_images(images, part, func).values()
                values += scores.tolist()
                bar.update(len(images))
        return values

    def _write_grid(self, name: str) -> None:
        prompts = self.prompt_lists[name].prompts
        # By index, never by score; the first image of each
        rows = evenly(len(prompts), self.grid_prompts)
        number = self.options.num_images_per_prompt
        comparison_grid(
            [[self.folder.load(name, model, row * number) for model in self.models] for row in rows],
            list(self.models),
            [prompts[row] for row in rows],
            path=self.folder.path / f"grid-{file_name(name)}.png",
        )

    def _bar(self, total: int, description: str, initial: int = 0) -> tqdm:
        return tqdm(total=total, initial=initial, desc=description, unit="image", disable=not self.progress)


def _prompt_sets(prompts: Dataset | Mapping[str, Dataset]) -> dict[str, Dataset]:
    sets = dict(prompts) if isinstance(prompts, Mapping) else {"prompts": prompts}
    if not sets:
        raise ValueError("there are no prompts: give at least one prompt set.")
    for name, dataset in sets.items():
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"the prompt set {name!r} is a {type(dataset).__name__}, but must be a datasets.Dataset with a column "
                "`prompt`, such as Dataset.from_dict({'prompt': [...]})."
            )
        if "prompt" not in dataset.column_names:
            raise ValueError(f"the prompt set {name!r} has no column `prompt`, only {dataset.column_names}.")
        if len(dataset) == 0:
            raise ValueError(f"the prompt set {name!r} is empty.")
        wrong = next((i for i, prompt in enumerate(dataset["prompt"]) if not isinstance(prompt, str)), None)
        if wrong is not None:
            raise ValueError(f"row {wrong} of the prompt set {name!r} has {dataset[wrong]['prompt']!r} as its prompt.")
    return sets


def _load(
    model: str | os.PathLike | DiffusionPipeline, options: DrawingOptions, backbone: Backbone | None
) -> tuple[DiffusionPipeline, Backbone, DrawingOptions]:
    """The pipeline and its backbone, and the options with everything that these have decided."""
    if backbone is not None and backbone.pipeline is not model:
        raise ValueError("backbone was made for another pipeline than model. Pass model=backbone.pipeline.")
    if isinstance(model, str | os.PathLike):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        try:
            device = torch.device(options.device or accelerator or "cpu")
        except RuntimeError as error:
            raise ValueError(f"device is {options.device!r}, which torch does not know: {error}") from error
        dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        path = os.fspath(model)
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "model_index.json")):
            raise ValueError(
                f"the model folder {path!r} is no diffusers pipeline: it has no model_index.json. It holds "
                f"{sorted(os.listdir(path))[:10]}. Trained weights are given as adapters, beside their base model."
            )
        try:
            pipeline = DiffusionPipeline.from_pretrained(path, dtype=getattr(torch, dtype))
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the model {path!r} could not be loaded as a diffusers pipeline: {str(error).rstrip(' .')}. Give a "
                "hub id such as 'stabilityai/stable-diffusion-3.5-medium' (log in with `hf auth login` if it is "
                "gated) or a folder."
            ) from error
        try:
            pipeline.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"the model could not be moved to the device {str(device)!r}: {error}") from error
    elif isinstance(model, DiffusionPipeline):
        if options.device is not None or options.dtype is not None:
            raise ValueError("device and dtype cannot be given for a loaded pipeline: move it yourself.")
        pipeline = model
    else:
        raise ValueError(f"the model is a {type(model).__name__}, but must be a hub id, a folder or a pipeline.")
    sizes = {name: getattr(options, name) for name in ("height", "width", "max_sequence_length")}
    if backbone is None:
        backbone = get_backbone(pipeline, **sizes)
    elif any(value not in (None, getattr(backbone, name)) for name, value in sizes.items()):
        raise ValueError(f"options have {sizes}, but the backbone draws otherwise. Leave them to the backbone.")
    found = {name: getattr(backbone, name) for name in sizes}
    found |= {"dtype": str(pipeline.dtype).removeprefix("torch."), "device": torch.device(pipeline.device).type}
    return pipeline, backbone, DrawingOptions(**(asdict(options) | found))


def _columns_fingerprint(dataset: Dataset) -> str:
    """Of all columns beside the prompts and images, which are known already."""
    names = sorted(set(dataset.column_names) - {"prompt", "image"})
    # Of objects their kind: what they say of themselves may differ from run to run
    columns = {name: list(dataset[name]) for name in names}
    content = json.dumps(columns, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _computed_by(func: Callable) -> str:
    """What a reward is computed by: where it is defined and, of an object, the plain values among its attributes."""
    if isinstance(func, functools.partial):
        return f"{_computed_by(func.func)} with {_plain(func.keywords)}"
    defined = func if hasattr(func, "__qualname__") else type(func)
    return f"{defined.__module__}.{defined.__qualname__} {_plain(getattr(func, '__dict__', {}))}"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    simple = str | int | float | bool | None
    return {n: v for n, v in sorted(values.items()) if not n.startswith("_") and isinstance(v, simple)}


def _origin(pipeline: DiffusionPipeline) -> str:
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
