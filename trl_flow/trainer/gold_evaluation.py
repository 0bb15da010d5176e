"""What an evaluation gives beside metrics: the scores of the functions that are never optimised, and the base's."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from trl_flow.evaluation.gold import GoldScore
from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig
from trl_flow.trainer.prompt_cache import image_fingerprint


@dataclass(frozen=True)
class BaseScores:
    """
    What the base model scores on one evaluation set.

    Attributes:
        reward (`float`): mean of the optimised reward.
        gold (`dict[str, np.ndarray]`): scores by each gold function, float64 of shape `(N,)`, NaN where it does not
            apply; the pictures of one prompt are next to each other.
        diversity (`float` or `None`): within a prompt; `None` with one picture for each.
    """

    reward: float
    gold: dict[str, np.ndarray]
    diversity: float | None

    def to_json(self) -> dict[str, Any]:
        gold = {name: [None if math.isnan(v) else v for v in values.tolist()] for name, values in self.gold.items()}
        return {
            "reward": None if math.isnan(self.reward) else self.reward,
            "gold": gold,
            "diversity": self.diversity,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "BaseScores":
        return cls(
            reward=math.nan if content["reward"] is None else content["reward"],
            # None becomes NaN
            gold={name: np.asarray(values, dtype=np.float64) for name, values in content["gold"].items()},
            diversity=content["diversity"],
        )


@dataclass(frozen=True)
class Evaluation:
    """
    One evaluation of one data set, as callbacks get it in `on_evaluate(..., evaluation=...)`.

    Attributes:
        name (`str` or `None`): the data set's, where there are several.
        key (`str`): equal for evaluations that can be compared prompt by prompt.
        reward (`float`): mean of the optimised reward.
        gold ([`~trl_flow.evaluation.gold.GoldScore`]): of the model as it is.
        base_reward (`float`): the base model's `reward`.
        save (`Callable`): `save(folder)` writes the model as it was evaluated, in diffusers' format. To be called on
            all processes.
    """

    name: str | None
    key: str
    reward: float
    gold: GoldScore
    base_reward: float
    save: Callable[[str | os.PathLike], None]


def evaluation_key(dataset: Dataset, args: FlowGRPOConfig, gold_names: list[str], *, takes_image: bool = False) -> str:
    """A fingerprint of what an evaluation draws and scores: under the same one, scores can be paired by place. With
    `takes_image` it is drawn from the pictures in the column `image`, too."""
    settings = {
        "prompts": list(dataset["prompt"]),
        "gold": gold_names,
        "seed": args.seed,
        "num_generations_eval": args.num_generations_eval,
        "steps": args.eval_num_inference_steps,
        "guidance_scale": args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale,
        "negative_prompt": args.negative_prompt,
        "size": [args.height, args.width],
        "max_sequence_length": args.max_sequence_length,
    }
    if takes_image:
        settings["images"] = [image_fingerprint(row["image"]) for row in dataset]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
