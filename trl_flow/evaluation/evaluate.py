"""Draws prompt sets with a base model and its adapters, scores the images, and writes the comparison."""

import gc
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from trl_flow.backbones import Backbone
from trl_flow.backbones.prompt_length import warn_of_long_prompts
from trl_flow.evaluation import inputs
from trl_flow.evaluation.adapters import BASE, Adapter, base_fingerprint, check_adapter, loaded_adapter, parse_adapters
from trl_flow.evaluation.categories import category_tables
from trl_flow.evaluation.comparison import compare_scores
from trl_flow.evaluation.drawing import draw_images
from trl_flow.evaluation.grids import comparison_grid, evenly
from trl_flow.evaluation.image_folder import ImageFolder, PromptList, file_name
from trl_flow.evaluation.inputs import DrawingOptions
from trl_flow.evaluation.intervals import finite
from trl_flow.evaluation.outputs import versions, write_json
from trl_flow.evaluation.page import write_page
from trl_flow.evaluation.run_settings import trained_frame
from trl_flow.evaluation.scoring import score_images
from trl_flow.evaluation.steps import draw_steps
from trl_flow.evaluation.tables import markdown
from trl_flow.evaluation.videos import require_mp4
from trl_flow.evaluation.vote_results import update_votes
from trl_flow.images import Frame
from trl_flow.quiet import shows_bars
from trl_flow.rewards.named import as_rewards
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.rewards.unigenbench import UniGenBenchReward
from trl_flow.shapes.bundled import BUNDLED, is_bundled


RESULTS, REPORT, PAGE, STEPS = "results.json", "results.md", "comparison.html", "steps.png"

# Images and videos that are scored at a time: as many as fit into memory at any size
_SCORED_TOGETHER, _VIDEOS_TOGETHER = 64, 8

# By set, model and reward, float64 `(N,)`
ModelScores = dict[str, dict[str, dict[str, np.ndarray]]]
# By set and model, for each image the 0 and 1 of UniGenBench's test points, where these were looked for
TestPoints = dict[str, dict[str, list | None]]


@dataclass(frozen=True)
class Comparison:
    """
    A finished comparison.

    `folder` has `results.json`, `results.md`, `comparison.html`, `grid-{set}.png` and the images. `results` is what
    `results.json` holds; `results["sets"][name]` is from [`compare_scores`]. `scores[set][model][reward]` is float64
    `(N,)`, NaN where a reward does not apply; the images of one prompt are next to each other.

    Example:

    ```pycon
    >>> from trl_flow.evaluation import Comparison, evaluate_models
    >>> from trl_flow.shapes import load_prompts, pipeline_path
    >>> prompts = load_prompts("test").select(range(2))
    >>> asked = {"prompts": prompts, "gold": "shapes_soft", "output_dir": "comparison", "progress": False}
    >>> comparison: Comparison = evaluate_models(pipeline_path(), **asked)
    >>> comparison.scores["prompts"]["base"]["shapes_soft"].shape
    (2,)
    ```
    """

    folder: Path
    results: dict[str, Any]
    scores: ModelScores

    @property
    def markdown(self) -> str:
        """The report, as in `results.md`."""
        return markdown(self.results)

    @property
    def grids(self) -> dict[str, Path]:
        """The grid's file for each set. Its name can differ from the set's, which may be no valid file name."""
        return {name: grid_path(self.folder, name) for name in self.results["sets"]}


def grid_path(folder: Path, set_name: str) -> Path:
    """Where the grid of a prompt set is."""
    return folder / f"grid-{file_name(set_name)}.png"


def evaluate_models(
    model: str | os.PathLike | DiffusionPipeline,
    adapters: Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike] = (),
    *,
    prompts: Dataset | Mapping[str, Dataset],
    output_dir: str | os.PathLike,
    proxy: Callable | str | Sequence[Callable | str] = (),
    gold: Callable | str | Sequence[Callable | str] = (),
    rewards_by_set: Mapping[str, Collection[str]] | None = None,
    brackets: bool = True,
    options: DrawingOptions | None = None,
    backbone: Backbone | None = None,
    revision: str | None = None,
    variant: str | None = None,
    grid_prompts: int = 16,
    steps: bool = False,
    page_megabytes: float = 50.0,
    rescore: bool = False,
    reward_frame: Frame | None = None,
    progress: bool = True,
) -> Comparison:
    """
    Compares a base model and adapters on prompts and rewards, and writes tables, images and a page to look at them.

    All models draw from the same noise, as the trainer's `evaluate` does. Images are saved as they are drawn: when
    a run is killed, the same call continues where it stopped. Everything that is passed is checked before the first
    image is drawn. Reward functions with a `close()` are closed when they have scored.

    Args:
        model: hub id, folder, or a loaded pipeline (which is drawn with as it is, on its device and in its dtype).
        adapters: paths, `name=path`, or paths by name: folders of runs, checkpoints, LoRA files, hub ids, or folders
            of a fully fine-tuned transformer or U-Net.
        prompts: sets with a column `prompt` and those that the rewards read; to edit images, a column `image`.
        output_dir: a new or empty folder, or an earlier comparison's with the same drawing options. Models, prompt
            sets and rewards may be added to it.
        proxy, gold: rewards that were optimized, and others: functions or names, as for the trainer. Each may be none.
        rewards_by_set: names of the rewards that score each set; by default all score all.
        brackets: whether the tables bracket what is in `proxy`: not if each adapter was trained on another part of it.
        backbone: for a loaded pipeline of a family that has none here; it decides height, width and
            `max_sequence_length`.
        revision, variant: of the model on the Hub or in the folder, as for `from_pretrained`; by default those that
            the adapters were trained with, as their folders say.
        grid_prompts: rows of the image grids, spread evenly over the prompts.
        steps: also write `steps.png`, what the models predict at every step of sampling, for a few prompts of each
            set ([`~trl_flow.evaluation.steps_grid`]).
        page_megabytes: about how large the page may become.
        rescore: compute again the scores that an earlier run has kept.
        reward_frame: the frame of a video, `"first"`, `"middle"` or `"last"`, that rewards get as its image; by
            default the one of the first adapter's run. Rewards with a parameter `videos` get all frames.

    Raises:
        ValueError: if something does not fit, before anything is drawn or written.
        ImportError: if the pipeline draws videos, and mp4 cannot be written.
        RewardError: if a reward function fails.

    Example:

    ```pycon
    >>> from trl_flow.evaluation import evaluate_models
    >>> from trl_flow.shapes import load_prompts, pipeline_path
    >>> comparison = evaluate_models(
    ...     pipeline_path(),
    ...     adapters={},  # {"my run": "outputs/my-run"}
    ...     prompts=load_prompts("test").select(range(2)),
    ...     gold="shapes_strict",
    ...     output_dir="comparison",
    ...     progress=False,
    ... )
    >>> sorted(path.name for path in comparison.folder.glob("[a-z]*.*"))
    ['comparison.html', 'grid-prompts.png', 'results.json', 'results.md', 'scores.json', 'settings.json']
    ```
    """
    # What needs no model is checked before one is loaded
    if grid_prompts < 1:
        raise ValueError(f"grid_prompts is {grid_prompts!r}, but must be a whole number of at least 1.")
    if not page_megabytes > 0:
        raise ValueError(f"page_megabytes is {page_megabytes!r}, but must be above 0.")
    adapters = parse_adapters(adapters)
    sets = inputs.prompt_sets(prompts)
    proxy, gold = as_rewards(proxy), as_rewards(gold)
    scorer = RewardScorer([*proxy, *gold])
    asked = {name: [r for r in scorer.names if not rewards_by_set or r in rewards_by_set[name]] for name in sets}
    _check_rewards(scorer, sets, asked)
    frame = trained_frame(adapters) if reward_frame is None else reward_frame
    if frame not in get_args(Frame):
        raise ValueError(f"reward_frame is {frame!r}, but must be one of {', '.join(get_args(Frame))}.")
    folder = ImageFolder(output_dir)

    loading = inputs.loading_options(model, adapters, revision=revision, variant=variant)
    given = model, options or DrawingOptions(), backbone, adapters, loading
    backbone, options, notes = inputs.loaded_backbone(*given)
    if draws_videos := backbone.frames_per_second is not None:
        require_mp4()
    _check_rewards(scorer, sets, asked, videos=draws_videos)
    inputs.check_images_to_edit(sets, backbone)
    models = _described_models(model, backbone, adapters)
    lists = {name: inputs.prompt_list(dataset, with_images=backbone.takes_image) for name, dataset in sets.items()}
    folder.claim(asdict(options), models, lists, write=False)
    for name, found in lists.items():
        texts = [*found.prompts, options.negative_prompt or ""]
        warn_of_long_prompts(backbone, texts, "the prompts" if len(lists) == 1 else f"the prompt set {name!r}")
    for note in notes if progress else ():
        tqdm.write(note)
    run = _Run(folder, options, notes, sets, asked, lists, models, frame if draws_videos else None, progress)
    with folder.locked():
        folder.claim(asdict(options), models, lists)
        drawn = run.draw(backbone, adapters)
        if steps:
            draw_steps(backbone, adapters, sets, options, folder.path / STEPS, progress=progress)
        # The rewards' models may need the memory
        del model, backbone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        scores, points = run.score(scorer, drawn, rescore)
        kinds = {"proxy": scorer.names[: len(proxy)], "gold": scorer.names[len(proxy) :]}
        return run.write(scores, points, kinds, brackets, grid_prompts, page_megabytes)


def _check_rewards(
    scorer: RewardScorer, sets: Mapping[str, Dataset], asked: Mapping[str, list[str]], videos: bool | None = None
) -> None:
    for name, dataset in sets.items():
        funcs = zip(scorer.names, scorer.reward_funcs, strict=True)
        try:
            RewardScorer(f for reward, f in funcs if reward in asked[name]).check(dataset.column_names, videos=videos)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the prompt set {name!r}: {error}") from error


def _described_models(
    model: str | os.PathLike | DiffusionPipeline, backbone: Backbone, adapters: Sequence[Adapter]
) -> dict[str, dict[str, str]]:
    """Path and fingerprint of each model by its name, the base first; each adapter is loaded and taken out again."""
    pipeline = backbone.pipeline
    is_loaded = isinstance(model, DiffusionPipeline)
    path = pipeline.config.get("_name_or_path") or type(pipeline).__name__ if is_loaded else os.fspath(model)
    path = BUNDLED if is_bundled(path) else path  # wherever this machine has it
    models = {BASE: {"path": str(path), "fingerprint": base_fingerprint(pipeline)}}
    for adapter in adapters:
        models[adapter.name] = {"path": adapter.path, "fingerprint": check_adapter(backbone, adapter)}
    return models


@dataclass
class _Run:
    """The steps of a comparison that has been checked."""

    folder: ImageFolder
    options: DrawingOptions
    notes: list[str]  # what runs evaluated otherwise
    sets: dict[str, Dataset]
    asked: dict[str, list[str]]  # names of the rewards that score each set
    lists: dict[str, PromptList]
    models: dict[str, dict[str, str]]
    frame: Frame | None  # of videos, the one that rewards get as an image
    progress: bool

    def draw(self, backbone: Backbone, adapters: Sequence[Adapter]) -> set[tuple[str, str]]:
        """Draws what is missing; returns the sets and models of which something was."""
        number, size = self.options.num_images_per_prompt, self.options.batch_size
        found = set()
        for adapter in [None, *adapters]:
            model = BASE if adapter is None else adapter.name
            missing = {}
            for name, dataset in self.sets.items():
                images = range(len(dataset) * number)
                # Whole batches: what is drawn in another company may differ by rounding
                batches = [images[first : first + size] for first in images[::size]]
                missing[name] = [batch for batch in batches if not self.folder.has(name, model, batch)]
            if any(missing.values()):
                with loaded_adapter(backbone, adapter):
                    for name in filter(missing.get, missing):
                        self._draw_set(backbone, name, model, missing[name])
                        found.add((name, model))
        return found

    def _draw_set(self, backbone: Backbone, name: str, model: str, batches: list[range]) -> None:
        dataset, prompts, number = self.sets[name], self.lists[name].prompts, self.options.num_images_per_prompt
        names = ("seed", "num_inference_steps", "guidance_scale", "negative_prompt", "batch_size")
        options = {option: getattr(self.options, option) for option in names}
        images = list(dataset["image"]) if backbone.takes_image else None
        with self._bar("drawing", model, name, initial=len(dataset) * number - sum(map(len, batches))) as bar:
            for batch in batches:
                rows = [index // number for index in batch]
                texts, edited = [prompts[row] for row in rows], images and [images[row] for row in rows]
                options |= {"num_images_per_prompt": 1, "images": edited, "first_index": batch.start}
                drawn = draw_images(backbone, texts, **options)
                for index, sample in zip(batch, drawn, strict=True):
                    self.folder.save(name, model, index, sample, backbone.frames_per_second)
                bar.update(len(batch))

    def score(
        self, scorer: RewardScorer, drawn: set[tuple[str, str]], rescore: bool
    ) -> tuple[ModelScores, TestPoints]:
        """The scores of all images: kept ones where they still hold, unless `rescore`."""
        of_frame = "" if self.frame is None else f" of the {self.frame} frame"
        funcs = zip(scorer.names, scorer.reward_funcs, strict=True)
        rewards = {name: inputs.computed_by(func) + of_frame for name, func in funcs}
        columns = {name: inputs.columns_fingerprint(dataset) for name, dataset in self.sets.items()}
        # Asked for scores by something that there never was, the folder gives those of other rewards only
        kept = self.folder.scores(dict.fromkeys(rewards, "") if rescore else rewards, columns)
        for name, model in drawn:
            kept.get(name, {}).pop(model, None)
        reused = 0
        for reward, func in zip(scorer.names, scorer.reward_funcs, strict=True):
            of_reward = [name for name in self.sets if reward in self.asked[name]]
            for name, model in itertools.product(of_reward, self.models):
                by_reward = kept.setdefault(name, {}).setdefault(model, {})
                if reward in by_reward:
                    reused += 1
                    continue
                values, points = self._score_set(name, model, func, reward)
                by_reward[reward] = [finite(value) for value in values]
                if any(points):
                    by_reward[UniGenBenchReward.POINTS] = points
                self.folder.keep_scores(kept, rewards, columns)
            if callable(close := getattr(func, "close", None)):
                close()
        if reused and self.progress:
            tqdm.write(f"{reused} columns of scores are those of an earlier run (--rescore recomputes them).")
        scores: ModelScores = {name: {model: {} for model in self.models} for name in self.sets}
        points: TestPoints = {name: {} for name in self.sets}
        for name, model in itertools.product(self.sets, self.models):
            found = kept.get(name, {}).get(model, {})
            for reward in self.asked[name]:
                scores[name][model][reward] = np.array(found[reward], dtype=np.float64)
            judged = any(isinstance(f, UniGenBenchReward) for f in scorer.reward_funcs)
            points[name][model] = found.get(UniGenBenchReward.POINTS) if judged else None
        return scores, points

    def _score_set(self, name: str, model: str, func: Callable, reward: str) -> tuple[list[float], list]:
        dataset, number = self.sets[name], self.options.num_images_per_prompt
        # Whole prompts: some rewards compare the images of one
        rows = max(1, (_SCORED_TOGETHER if self.frame is None else _VIDEOS_TOGETHER) // number)
        values: list[float] = []
        points: list = []
        with self._bar(reward, model, name) as bar:
            for first in range(0, len(dataset), rows):
                part = dataset.select(range(first, min(first + rows, len(dataset))))
                indices = range(first * number, (first + len(part)) * number)
                images, extras = [self.folder.load(name, model, i) for i in indices], {}
                (scores,) = score_images(images, part, func, extras=extras, frame=self.frame or "middle").values()
                values += scores.tolist()
                points += extras.get(UniGenBenchReward.POINTS, [None] * len(images))
                bar.update(len(indices))
        return values, points

    def write(
        self,
        scores: ModelScores,
        points: TestPoints,
        kinds: dict[str, list[str]],
        brackets: bool,
        grid_prompts: int,
        page_megabytes: float,
    ) -> Comparison:
        """Writes tables, grids and the page."""
        path, number = self.folder.path, self.options.num_images_per_prompt
        sets = {}
        for name, found in scores.items():
            own = {
                kind: [reward for reward in rewards if reward in self.asked[name]] for kind, rewards in kinds.items()
            }
            sets[name] = compare_scores(found, **own, num_images_per_prompt=number)
            sets[name]["categories"] = category_tables(self.sets[name], found, points[name], number)
        of_videos = [] if self.frame is None else [f"Rewards of images got the {self.frame} frame of each video."]
        results = {
            "model": self.models[BASE]["path"],
            "models": self.models,
            **kinds,
            "brackets": brackets,
            "settings": asdict(self.options),
            "notes": [*self.notes, *of_videos],
            "sets": sets,
            "votes": None,
            "versions": versions(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        prompts = {name: found.prompts for name, found in self.lists.items()}
        for name, texts in prompts.items():
            # By index, never by score; the first image of each
            rows = evenly(len(texts), grid_prompts)
            images = [[self.folder.load(name, model, row * number) for model in self.models] for row in rows]
            captions = [texts[row] for row in rows]
            comparison_grid(images, list(self.models), captions, path=grid_path(path, name))
        options = {"megabytes": page_megabytes, "progress": self.progress}
        write_page(path / PAGE, self.folder, results, prompts=prompts, scores=scores, **options)
        write_json(path / RESULTS, results)
        (path / REPORT).write_text(markdown(results), encoding="utf-8")
        return Comparison(path, update_votes(path) or results, scores)

    def _bar(self, what: str, model: str, name: str, initial: int = 0) -> tqdm:
        total = len(self.sets[name]) * self.options.num_images_per_prompt
        what = f"{what}: {model}" if len(self.sets) == 1 else f"{what}: {model}, {name}"
        return tqdm(
            total=total, initial=initial, desc=what, unit="image", disable=not (self.progress and shows_bars())
        )
