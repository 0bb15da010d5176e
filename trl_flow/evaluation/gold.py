"""The composite gold score: functions that are never optimized, normalized to the base model (GRPO-Guard, Table 1)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trl_flow.evaluation.intervals import paired_prompt_means, standard_error


class BaseMeanError(ValueError):
    """The mean of a gold function (`name`) over the base model's images (`mean`, 0 or less) cannot be divided by."""

    def __init__(self, name: str, mean: float):
        super().__init__(
            f"The base model's mean by the gold function {name!r} is {mean:g}. Gold scores are divided by it, so that "
            "it must be positive. Add an offset that makes it so, such as `lambda prompts, images, **kwargs: [value + "
            "5 for value in func(prompts=prompts, images=images, **kwargs)]`. A function that gives 0 for every "
            "image of the base model cannot be normalized at all. Leave it out, or choose easier prompts."
        )
        self.name, self.mean = name, mean


@dataclass(frozen=True)
class GoldScore:
    """
    A model's gold score compared with the base model's, on the same prompts from the same seeds.

    `scores` has the mean of each function, NaN where it applies to no prompt, `relative` the same divided by the base
    model's mean, and `average` is the mean of `relative` over the functions that apply; NaN if none does. `influence`
    (float64, `(P,)`) is what each of the `P` prompts adds to the deviation of `average` from its value over infinitely
    many prompts, times `P`. Its mean is 0.
    """

    scores: dict[str, float]
    relative: dict[str, float]
    average: float
    influence: np.ndarray

    @property
    def standard_error(self) -> float:
        """Of `average`, from the spread over prompts; NaN for a single prompt."""
        return standard_error(self.influence)


def gold_score(
    base: Mapping[str, Sequence[float] | np.ndarray],
    scores: Mapping[str, Sequence[float] | np.ndarray],
    *,
    num_images_per_prompt: int = 1,
) -> GoldScore:
    r"""
    Divides the mean of each function by the base model's mean, and averages over the functions (GRPO-Guard, Table 1):

    $$\text{average} = \frac{1}{F} \sum_f \frac{\sum_p a_{fp}}{\sum_p b_{fp}}$$

    with $b_{fp}$ the base model's and $a_{fp}$ the trained model's score of prompt $p$, the mean over its images.

    The standard error is that of a ratio of means over paired prompts (delta method): prompt $p$ contributes
    $\frac{1}{F} \sum_f (a_{fp} - R_f b_{fp}) / \bar b_f$ with $R_f$ the ratio of function $f$. How hard a prompt is
    raises or lowers both of its scores, and so drops out.

    `base` and `scores` are the base model's and the trained model's scores by function, each `(N,)`: entry `i` of both
    has the same prompt and seed, and those of one prompt are next to each other. A pair with a NaN (the function does
    not apply) is left out. `ValueError` if the functions or the shapes differ, [`BaseMeanError`] if a base model's
    mean is not positive.
    """
    if list(base) != list(scores) or not scores:
        raise ValueError(f"base has scores of {list(base)} and scores of {list(scores)}, but both must be the same.")
    means, relative, contributions = {}, {}, []
    for name in scores:
        try:
            before, after = paired_prompt_means(base[name], scores[name], num_images_per_prompt)
        except ValueError as error:
            raise ValueError(f"The scores by {name!r} do not fit: {error}") from error
        if len(before) == 0:
            raise ValueError(f"There are no scores by {name!r}.")
        present = ~np.isnan(before)
        means[name] = relative[name] = math.nan
        if present.any():
            check_base(name, before)
            mean_before, mean_after = before[present].mean(), after[present].mean()
            ratio = mean_after / mean_before
            means[name], relative[name] = float(mean_after), float(ratio)
            # A mean over some of the prompts: those count for more, the others for nothing
            scale = mean_before * present.mean()
            contributions.append(np.where(present, (after - ratio * before) / scale, 0.0))
    if not contributions:
        return GoldScore(means, relative, math.nan, np.full(len(before), math.nan))
    return GoldScore(means, relative, float(np.nanmean([*relative.values()])), np.mean(contributions, axis=0))


def gold_difference(before: GoldScore, after: GoldScore) -> tuple[float, float]:
    """How the gold score changed between two evaluations of the same prompts and seeds: the difference of the
    averages, `after` less `before`, and its standard error, paired over the prompts; NaN for a single prompt."""
    if before.influence.shape != after.influence.shape:
        numbers = f"{len(before.influence)} and of {len(after.influence)}"
        raise ValueError(f"The gold scores are of {numbers} prompts, but must be of the same ones.")
    return after.average - before.average, standard_error(after.influence - before.influence)


def check_base(name: str, base: Sequence[float] | np.ndarray) -> None:
    """Refuses ([`BaseMeanError`]) a base model's scores whose mean, NaN left out, could not be divided by."""
    base = np.asarray(base, dtype=np.float64)
    mean = float(np.nanmean(base)) if not np.isnan(base).all() else math.nan
    if mean <= 0:
        raise BaseMeanError(name, mean)
