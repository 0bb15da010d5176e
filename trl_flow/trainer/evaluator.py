"""[`Evaluator`]: draws prompts along the ODE from fixed seeds, and scores them beside the base model."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from transformers import TrainerState
from transformers.utils import logging

from trl_flow.evaluation.diversity import mean_pairwise_distance, pixel_features, thumbnails
from trl_flow.evaluation.drawing import draw_batch
from trl_flow.evaluation.gold import GoldScore, check_base, gold_score
from trl_flow.functional import combine_rewards
from trl_flow.images import to_rgb
from trl_flow.prompts.rows import read_rows, unchanged_random_state
from trl_flow.rewards.checks import needs_group
from trl_flow.rewards.scorer import RewardScorer
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.phase_scores import columns_of, gather_rewards, reward_metrics
from trl_flow.trainer.policy import Policy
from trl_flow.trainer.prompt_cache import image_fingerprint
from trl_flow.trainer.sampler import Sampler


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class BaseScores:
    """What the base model scores on one evaluation set: the metrics of the optimized rewards, by each gold function
    float64 `(N,)` (NaN where it does not apply, the images of one prompt next to each other), and the diversity within
    a prompt."""

    rewards: dict[str, float]
    gold: dict[str, np.ndarray]
    diversity: float | None

    @property
    def reward(self) -> float:
        return self.rewards["reward"]

    def to_json(self) -> dict[str, Any]:
        rewards = {name: None if math.isnan(value) else value for name, value in self.rewards.items()}
        gold = {name: [None if math.isnan(v) else v for v in values.tolist()] for name, values in self.gold.items()}
        return {"rewards": rewards, "gold": gold, "diversity": self.diversity}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "BaseScores":
        rewards = {name: math.nan if value is None else value for name, value in content["rewards"].items()}
        gold = {name: np.asarray(values, dtype=np.float64) for name, values in content["gold"].items()}  # None: NaN
        return cls(rewards, gold, content["diversity"])


@dataclass(frozen=True)
class EvaluationResult:
    """One evaluation of one data set, as callbacks get it in `on_evaluate(..., evaluation=...)` if it has gold scores.

    Attributes:
        name (`str` or `None`): the data set's, where there are several.
        metrics (`dict[str, float | None]`): `reward`, `rewards/{name}/mean`, `gold/average` and so on; `None` for a
            mean over no image.
        images (`list[PIL.Image.Image]`), prompts (`list[str]`): of this process; none if nothing had to be drawn.
        key (`str`): equal for evaluations that can be compared prompt by prompt.
        reward (`float`), base_reward (`float`): mean of the optimized reward, and the base model's.
        gold ([`~trl_flow.evaluation.gold.GoldScore`] or `None`): of the model as it is.
        num_samples (`int`): images of all processes.
        save (`Callable`): `save(folder)` writes the model as it was evaluated, in diffusers' format. To be called on
            all processes.
    """

    name: str | None
    metrics: dict[str, float | None]
    images: list[Image.Image]
    prompts: list[str]
    key: str
    reward: float
    base_reward: float
    gold: GoldScore | None
    num_samples: int
    save: Callable[[str | os.PathLike], None]


@dataclass(eq=False)
class Evaluator:
    """Draws and scores evaluation sets by `scorer`, and by `gold_scorer`, whose functions (if any) are not optimized.
    Training is not affected: all random states are as before."""

    policy: Policy
    sampler: Sampler
    scorer: RewardScorer
    reward_weights: torch.Tensor
    gold_scorer: RewardScorer
    args: FlowRLConfig
    save: Callable[[str | os.PathLike], None]
    is_untrained: bool = True  # whether the weights are still those that the trainer was given
    _base_scores: dict[str, BaseScores] = field(default_factory=dict)

    def evaluate(self, dataset: Dataset, state: TrainerState, name: str | None = None) -> EvaluationResult:
        """Draws and scores every prompt of `dataset`. Raises `ValueError` if gold scores have no base model."""
        base = self._base(dataset, state)[0] if self.gold_scorer.reward_funcs else None
        with unchanged_random_state(), self.policy.evaluating():
            return self._evaluate(dataset, state, name, base)

    def evaluate_base(self, dataset: Dataset, state: TrainerState, name: str | None = None) -> EvaluationResult:
        """[`evaluate`] of the base model, which is drawn once for each set and kept. Without images if it was."""
        base, drawn = self._base(dataset, state)
        return drawn or self._result(dataset, name, dict(base.rewards), base, base, rows=[], images=[])

    def _base(self, dataset: Dataset, state: TrainerState) -> tuple[BaseScores, EvaluationResult | None]:
        key = self._key(dataset)
        if key in self._base_scores:
            return self._base_scores[key], None
        if not self.policy.has_reference and not (self.is_untrained and state.global_step == 0):
            raise ValueError(
                "eval_reward_funcs are normalized to the base model's scores, which have not been measured for this "
                "evaluation set (or these settings), and all weights have been trained since: the base model is gone. "
                "Pass the set as eval_dataset when the run starts, resume from a checkpoint of a run that had the "
                "same sets and functions, or train an adapter (peft_config)."
            )
        with unchanged_random_state(), self.policy.evaluating(base=True):
            result = self._evaluate(dataset, state, None, None)
        return self._base_scores[key], result

    # ---- Drawing and scoring ----

    def _evaluate(self, dataset: Dataset, state: TrainerState, name: str | None, base: BaseScores | None):
        """With `base=None` and gold functions, the model that is drawn with becomes the base."""
        accelerator, number = self.policy.accelerator, self.args.num_generations_eval
        self.policy.conditions.encode_ahead(self.args, [dataset])
        total = len(dataset) * number
        # Every process draws the same number of images, so that sharded forwards stay in step: some twice. Where a
        # function compares those of a prompt, a prompt's are not spread over processes
        whole = number if any(map(needs_group, self.scorer.reward_funcs + self.gold_scorer.reward_funcs)) else 1
        each = math.ceil(len(dataset) * number / whole / accelerator.num_processes) * whole
        indices = [min(accelerator.process_index * each + i, total - 1) for i in range(each)]
        rows = read_rows(dataset, [index // number for index in indices], self.args.seed)
        images = self._draw(rows, indices)
        self.sampler.show_stage("evaluating the rewards")
        rewards_per_func = self._scored(self.scorer, rows, images, total, state)
        rewards = combine_rewards(rewards_per_func, self.reward_weights.to(rewards_per_func.device))
        gold_values: dict[str, np.ndarray] = {}
        if self.gold_scorer.reward_funcs:
            by_func = self._scored(self.gold_scorer, rows, images, total, state)
            gold_values = dict(zip(self.gold_scorer.names, by_func.T.cpu().double().numpy(), strict=True))
        diversity = group_diversity(accelerator, images, number, total) if number > 1 else None
        metrics = reward_metrics(rewards_per_func, rewards, self.scorer.names)
        scores = BaseScores(dict(metrics), gold_values, diversity)
        if base is None and gold_values:
            base = self._base_scores[self._key(dataset)] = scores
            for gold_name, values in gold_values.items():
                check_base(gold_name, values)
                if np.isnan(values).all():
                    about = "returned None for every image of this evaluation set: it is left out of the gold average."
                    logger.warning(f"The gold function {gold_name!r} {about}")
        return self._result(dataset, name, metrics, scores, base, rows, images)

    def _result(
        self, dataset: Dataset, name: str | None, metrics, scores: BaseScores, base: BaseScores | None, rows, images
    ) -> EvaluationResult:
        number, gold = self.args.num_generations_eval, None
        if scores.diversity is not None:
            metrics |= {"diversity": scores.diversity}
        if base is not None:
            gold = gold_score(base.gold, scores.gold, num_images_per_prompt=number)
            metrics |= {f"gold/{gold_name}": value for gold_name, value in gold.scores.items()}
            metrics |= {"gold/average": gold.average, "gold/average_std_err": gold.standard_error}
        metrics = {key: None if math.isnan(value) else value for key, value in metrics.items()}
        base_reward, prompts = math.nan if base is None else base.reward, [row["prompt"] for row in rows]
        scored = {"reward": scores.reward, "base_reward": base_reward, "gold": gold}
        about = {"key": self._key(dataset), "num_samples": len(dataset) * number, "save": self.save}
        return EvaluationResult(name, metrics, images, prompts, **scored, **about)

    def _draw(self, rows: list[dict[str, Any]], indices: list[int]) -> list[Image.Image]:
        size, num_steps = self.args.per_device_eval_batch_size, self.args.eval_num_inference_steps
        images: list[Image.Image] = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            prompts = [row["prompt"] for row in part]
            stage = f"evaluating images {first + 1} to {first + len(part)} of {len(rows)}, step "
            condition = self.policy.condition(prompts, self.sampler.images_to_edit(part), self.guidance_scale)
            given = self.policy.backbone, self._forward, condition.positive, condition.negative
            options = {"num_inference_steps": num_steps, "guidance_scale": condition.guidance_scale}
            options["on_step"] = lambda step, stage=stage: self.sampler.show_stage(f"{stage}{step + 1} of {num_steps}")
            images += draw_batch(*given, seed=self.args.seed, indices=indices[first : first + size], **options)
        return images

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model in the precision of training; what is around it has its own."""
        with self.policy.sampling():
            return self.policy.sampling_module(*args, **kwargs)

    def _scored(
        self, scorer: RewardScorer, rows: list[dict], images: list[Image.Image], total: int, state: TrainerState
    ) -> torch.Tensor:
        """The rewards `(total, K)` of all processes' images, each of which is scored once."""
        own = min(max(total - self.policy.accelerator.process_index * len(rows), 0), len(rows))

        def score() -> torch.Tensor:
            rewards = torch.full((len(rows), len(scorer.reward_funcs)), math.nan)
            if own:
                arguments = [row["prompt"] for row in rows[:own]], images[:own], columns_of(rows[:own])
                rewards[:own] = scorer.score(*arguments, trainer_state=state).rewards
            return rewards

        return gather_rewards(self.policy.accelerator, score)[:total]

    @property
    def guidance_scale(self) -> float:
        scale = self.args.eval_guidance_scale
        return self.args.guidance_scale if scale is None else scale

    def _key(self, dataset: Dataset) -> str:
        """A fingerprint of what an evaluation draws and scores: under the same one, scores are paired by index."""
        dataset = dataset.with_format(None)  # a transform may give other rows each time
        columns = {name: dataset[name][:] for name in sorted(dataset.column_names) if name != "image"}
        settings = {"columns": columns, "gold": self.gold_scorer.names, "guidance_scale": self.guidance_scale}
        names = ["seed", "num_generations_eval", "eval_num_inference_steps", "negative_prompt"]
        names += ["height", "width", "max_sequence_length"]
        settings |= {name: getattr(self.args, name) for name in names}
        if self.policy.backbone.takes_image and "image" in dataset.column_names:
            settings["images"] = [image_fingerprint(to_rgb(row["image"])) for row in dataset]
        return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:16]

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        return {"base_scores": {key: base.to_json() for key, base in self._base_scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Adds to what has been measured: it does not depend on the run."""
        self._base_scores |= {key: BaseScores.from_json(base) for key, base in state.get("base_scores", {}).items()}


def group_diversity(accelerator: Accelerator, images: list[Image.Image], group_size: int, total: int) -> float:
    """Diversity within the groups of all processes' images, of which the first `total` count."""
    # A group may be split over processes; reduced images are small enough to be gathered
    thumbs = torch.from_numpy(thumbnails(images)).to(accelerator.device)
    thumbs = accelerator.gather(thumbs)[:total].cpu().numpy()
    return mean_pairwise_distance(pixel_features(thumbs), group_size)
