"""Draws prompt sets with a base model and its adapters, scores the images, and writes the comparison."""

import gc
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from trl_flow.backbones import Backbone
from trl_flow.evaluation.adapters import BASE, base_fingerprint, check_adapter, loaded_adapter, parse_adapters
from trl_flow.evaluation.comparison import compare_scores
from trl_flow.evaluation.drawing import draw
from trl_flow.evaluation.grids import comparison_grid, evenly
from trl_flow.evaluation.image_folder import ImageFolder, file_name
from trl_flow.evaluation.inputs import (
    DrawingOptions,
    check_images_to_edit,
    columns_fingerprint,
    computed_by,
    loaded_backbone,
    prompt_list,
    prompt_sets,
)
from trl_flow.evaluation.intervals import finite
from trl_flow.evaluation.outputs import versions, write_json
from trl_flow.evaluation.page import write_page
from trl_flow.evaluation.scoring import score_images
from trl_flow.evaluation.tables import markdown
from trl_flow.evaluation.vote_results import update_votes
from trl_flow.rewards.scorer import RewardScorer


RESULTS, REPORT, PAGE = "results.json", "results.md", "comparison.html"

# Images that are scored at a time: as many as fit into memory at any size
_SCORED_TOGETHER = 64

# By set, model and reward, float64 `(N,)`
ModelScores = dict[str, dict[str, dict[str, np.ndarray]]]


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
    scores: ModelScores

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

    All models draw from the same noise, as the trainer's `evaluate` does. Images are saved as they are drawn: when
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


@dataclass
class ModelEvaluation:
    """[`evaluate_models`] in two steps: the constructor checks everything (and loads the model), `run` does it. The
    arguments are the same."""

    model: str | os.PathLike | DiffusionPipeline
    adapters: Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike] = ()
    _: KW_ONLY
    prompts: Dataset | Mapping[str, Dataset]
    output_dir: str | os.PathLike
    proxy: Callable | Sequence[Callable] = ()
    gold: Callable | Sequence[Callable] = ()
    options: DrawingOptions | None = None
    backbone: Backbone | None = None
    grid_prompts: int = 16
    page_megabytes: float = 50.0
    rescore: bool = False
    progress: bool = True

    def __post_init__(self):
        # What needs no model is checked before one is loaded
        if self.grid_prompts < 1:
            raise ValueError(f"grid_prompts is {self.grid_prompts!r}, but must be a whole number of at least 1.")
        if not self.page_megabytes > 0:
            raise ValueError(f"page_megabytes is {self.page_megabytes!r}, but must be above 0.")
        self.adapters = parse_adapters(self.adapters)
        self.sets = prompt_sets(self.prompts)
        self.proxy, self.gold = ([f] if callable(f) else list(f) for f in (self.proxy, self.gold))
        self.scorer = RewardScorer([*self.proxy, *self.gold])
        for name, dataset in self.sets.items():
            try:
                self.scorer.check(dataset.column_names)
            except (TypeError, ValueError) as error:
                raise type(error)(f"the prompt set {name!r}: {error}") from error
        self.rewards = {n: computed_by(f) for n, f in zip(self.scorer.names, self.scorer.reward_funcs, strict=True)}
        self.folder = ImageFolder(self.output_dir)

        self.backbone, self.options = loaded_backbone(self.model, self.options or DrawingOptions(), self.backbone)
        pipeline = self.backbone.pipeline
        is_loaded = isinstance(self.model, DiffusionPipeline)
        own_path = pipeline.config.get("_name_or_path") or type(pipeline).__name__
        self.model_path = str(own_path) if is_loaded else os.fspath(self.model)
        check_images_to_edit(self.sets, self.backbone)
        self.models = {BASE: {"path": self.model_path, "fingerprint": base_fingerprint(pipeline)}}
        for adapter in self.adapters:
            self.models[adapter.name] = {"path": adapter.path, "fingerprint": check_adapter(self.backbone, adapter)}
        edits = self.backbone.takes_image
        self.prompt_lists = {name: prompt_list(dataset, with_images=edits) for name, dataset in self.sets.items()}
        self.columns = {name: columns_fingerprint(dataset) for name, dataset in self.sets.items()}
        self.folder.claim(asdict(self.options), self.models, self.prompt_lists, write=False)

    def run(self) -> Comparison:
        """
        Draws what is not there yet, scores it, and writes everything.

        Raises:
            ValueError: if the folder cannot be written, another process writes there, or an image is damaged.
            RewardError: if a reward function fails. The images are kept.
        """
        with self.folder.locked():
            self.folder.claim(asdict(self.options), self.models, self.prompt_lists)
            drawn = self._draw()
            # The rewards' models may need the memory
            self.model = self.backbone = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return self._write(self._score(drawn))

    def _draw(self) -> set[tuple[str, str]]:
        """Draws what is missing; returns the sets and models of which something was."""
        found = set()
        number, size = self.options.num_images_per_prompt, self.options.batch_size
        for adapter in [None, *self.adapters]:
            model = BASE if adapter is None else adapter.name
            # Whole batches: what is drawn in another company may differ by rounding
            missing = {
                name: [
                    batch
                    for first in range(0, len(dataset) * number, size)
                    if not self.folder.has(
                        name, model, batch := range(first, min(first + size, len(dataset) * number))
                    )
                ]
                for name, dataset in self.sets.items()
            }
            if any(missing.values()):
                with loaded_adapter(self.backbone, adapter):
                    for name, batches in missing.items():
                        if batches:
                            self._draw_set(name, model, batches)
                            found.add((name, model))
        return found

    def _draw_set(self, name: str, model: str, batches: list[range]) -> None:
        options, dataset, prompts = self.options, self.sets[name], self.prompt_lists[name].prompts
        number = options.num_images_per_prompt
        images = list(dataset["image"]) if self.backbone.takes_image else None
        done = len(dataset) * number - sum(map(len, batches))
        with self._bar(len(dataset) * number, "drawing", model, name, done) as bar:
            for batch in batches:
                rows = [index // number for index in batch]
                drawn = draw(
                    self.backbone,
                    [prompts[row] for row in rows],
                    seed=options.seed,
                    num_inference_steps=options.num_inference_steps,
                    guidance_scale=options.guidance_scale,
                    negative_prompt=options.negative_prompt,
                    images=None if images is None else [images[row] for row in rows],
                    batch_size=options.batch_size,
                    first_index=batch.start,
                )
                for index, image in zip(batch, drawn, strict=True):
                    self.folder.save(name, model, index, image)
                bar.update(len(batch))

    def _score(self, drawn: set[tuple[str, str]]) -> ModelScores:
        # Asked for scores by something that there never was, the folder gives those of other rewards only
        kept = self.folder.scores(dict.fromkeys(self.rewards, "") if self.rescore else self.rewards, self.columns)
        for name, model in drawn:
            kept.get(name, {}).pop(model, None)
        reused = 0
        for reward, func in zip(self.scorer.names, self.scorer.reward_funcs, strict=True):
            for name, model in itertools.product(self.sets, self.models):
                by_reward = kept.setdefault(name, {}).setdefault(model, {})
                if reward in by_reward:
                    reused += 1
                    continue
                by_reward[reward] = [finite(value) for value in self._score_set(name, model, func, reward)]
                self.folder.keep_scores(kept, self.rewards, self.columns)
            close = getattr(func, "close", None)
            if callable(close):
                close()
        if reused and self.progress:
            tqdm.write(f"{reused} columns of scores are those of an earlier run (--rescore computes them anew).")
        return {
            name: {
                model: {reward: np.array(kept[name][model][reward], dtype=np.float64) for reward in self.rewards}
                for model in self.models
            }
            for name in self.sets
        }

    def _score_set(self, name: str, model: str, func: Callable, reward: str) -> list[float]:
        dataset, number = self.sets[name], self.options.num_images_per_prompt
        # Whole prompts: some rewards compare the images of one
        rows = max(1, _SCORED_TOGETHER // number)
        values: list[float] = []
        with self._bar(len(dataset) * number, reward, model, name) as bar:
            for first in range(0, len(dataset), rows):
                part = dataset.select(range(first, min(first + rows, len(dataset))))
                indices = range(first * number, (first + len(part)) * number)
                (scores,) = score_images([self.folder.load(name, model, i) for i in indices], part, func).values()
                values += scores.tolist()
                bar.update(len(indices))
        return values

    def _write(self, scores: ModelScores) -> Comparison:
        path, number = self.folder.path, self.options.num_images_per_prompt
        names = self.scorer.names
        kinds = {"proxy": names[: len(self.proxy)], "gold": names[len(self.proxy) :]}
        results = {
            "model": self.model_path,
            "models": self.models,
            **kinds,
            "settings": asdict(self.options),
            "sets": {
                name: compare_scores(by_model, **kinds, num_images_per_prompt=number)
                for name, by_model in scores.items()
            },
            "votes": None,
            "versions": versions(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        prompts = {name: found.prompts for name, found in self.prompt_lists.items()}
        for name, texts in prompts.items():
            # By index, never by score; the first image of each
            rows = evenly(len(texts), self.grid_prompts)
            comparison_grid(
                [[self.folder.load(name, model, row * number) for model in self.models] for row in rows],
                list(self.models),
                [texts[row] for row in rows],
                path=path / f"grid-{file_name(name)}.png",
            )
        write_page(
            path / PAGE,
            self.folder,
            results,
            prompts=prompts,
            scores=scores,
            megabytes=self.page_megabytes,
            progress=self.progress,
        )
        write_json(path / RESULTS, results)
        (path / REPORT).write_text(markdown(results), encoding="utf-8")
        return Comparison(path, update_votes(path) or results, scores)

    def _bar(self, total: int, what: str, model: str, name: str, initial: int = 0) -> tqdm:
        description = f"{what}: {model}" if len(self.sets) == 1 else f"{what}: {model}, {name}"
        return tqdm(total=total, initial=initial, desc=description, unit="image", disable=not self.progress)
