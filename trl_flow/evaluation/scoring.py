"""Scoring, and the paired comparison of two sets of scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from PIL import Image

from trl_flow.evaluation.intervals import paired_prompt_means
from trl_flow.rewards.calling import call_reward_funcs, reward_names


def score_images(
    images: Sequence[Image.Image],
    dataset: Dataset,
    reward_funcs: Callable | Sequence[Callable],
    *,
    timeout: float | None = None,
) -> dict[str, np.ndarray]:
    """
    Scores of pictures by reward functions, called as in training, with the data set's columns.

    Args:
        images (`Sequence[PIL.Image.Image]`): `N` pictures: `K` for each row, those of one row next to each other.
        dataset ([`~datasets.Dataset`]): a `prompt` column, and whatever else the functions read.
        reward_funcs (`Callable` or `Sequence[Callable]`): the functions.
        timeout (`float`, *optional*): seconds to wait for each function; `None`: for ever.

    Returns:
        `dict[str, np.ndarray]`: for each function float64 of shape `(N,)`, NaN where it does not apply.

    Raises:
        ValueError: if the number of pictures is no multiple of the number of rows.
        RewardError: if a function fails, naming it.
    """
    reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    if len(dataset) == 0 or len(images) % len(dataset) != 0:
        raise ValueError(
            f"There are {len(images)} images for {len(dataset)} rows. Give the same number of images for each row."
        )
    rows = [row for row in dataset for _ in range(len(images) // len(dataset))]
    names = reward_names(reward_funcs)
    rewards = call_reward_funcs(
        reward_funcs,
        names,
        [row["prompt"] for row in rows],
        list(images),
        {column: [row[column] for row in rows] for column in dataset.column_names if column != "prompt"},
        timeout=timeout,
        # There is no training to report to
        trainer_state=None,
        log_metric=lambda name, value: None,
        log_extra=lambda column, values: None,
    )
    return {name: rewards[:, i].double().numpy() for i, name in enumerate(names)}


@dataclass(frozen=True)
class PairedDifference:
    """
    How a score changed between two models that drew the same prompts from the same seeds.

    Attributes:
        mean_before, mean_after (`float`): means over the prompts.
        difference (`float`): mean of the differences, after minus before.
        standard_error (`float`): of `difference`; NaN for a single prompt.
        num_pairs (`int`): prompts that entered.
    """

    mean_before: float
    mean_after: float
    difference: float
    standard_error: float
    num_pairs: int

    @property
    def standard_errors(self) -> float:
        """The difference in units of its standard error; NaN for a single prompt or when no prompt changed."""
        if self.standard_error > 0:
            return self.difference / self.standard_error
        return math.copysign(math.inf, self.difference) if self.standard_error == 0 and self.difference else math.nan

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON: the attributes and `standard_errors`; what is not finite becomes `None`."""
        values = {
            "mean_before": self.mean_before,
            "mean_after": self.mean_after,
            "difference": self.difference,
            "standard_error": self.standard_error,
            "standard_errors": self.standard_errors,
        }
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {**finite, "num_pairs": self.num_pairs}


def paired_difference(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, *, num_images_per_prompt: int = 1
) -> PairedDifference:
    """
    Paired comparison of two sets of scores.

    The pictures of one prompt are no independent samples: a prompt that the model has learned improves in all of them.
    So they are averaged first, and the standard error is that of the mean over prompts,
    `std(d) / sqrt(n)` with `d` the `n` prompts' differences and the unbiased standard deviation.

    Args:
        before, after (`Sequence[float]`): shape `(N,)`; entry `i` of both has the same prompt and seed, and those of
            one prompt are next to each other.
        num_images_per_prompt (`int`): `K`, a divisor of `N`.

    A pair with a NaN (a score that does not apply) is left out, and so is a prompt that has no other.

    Returns:
        [`PairedDifference`]

    Raises:
        ValueError: if the shapes differ or do not fit `num_images_per_prompt`, or no pair is left.
    """
    mean_before, mean_after = paired_prompt_means(before, after, num_images_per_prompt)
    present = ~np.isnan(mean_before)
    if not present.any():
        raise ValueError("There is no pair of scores in which both are numbers.")
    mean_before, mean_after = mean_before[present], mean_after[present]
    differences = mean_after - mean_before
    n = len(differences)
    return PairedDifference(
        mean_before=float(mean_before.mean()),
        mean_after=float(mean_after.mean()),
        difference=float(differences.mean()),
        standard_error=float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        num_pairs=n,
    )
