"""Scores of images, and the paired comparison of two sets of scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from datasets import Dataset

from trl_flow.evaluation.intervals import finite_values, paired_prompt_means, standard_error
from trl_flow.images import Frame, Sample, check_samples
from trl_flow.rewards.named import as_rewards
from trl_flow.rewards.scorer import RewardScorer


def score_images(
    images: Sequence[Sample],
    dataset: Dataset,
    reward_funcs: Callable | str | Sequence[Callable | str],
    *,
    timeout: float | None = None,
    extras: dict[str, list] | None = None,
    frame: Frame = "middle",
) -> dict[str, np.ndarray]:
    """
    Scores of images or videos by reward functions, called as in training, with the data set's columns.

    `images` are `N` (videos as lists of frames): `K` for each row of `dataset`, those of one row next to each other.
    `timeout` is in seconds, for each function; `None`: forever. `extras` is given what the functions pass to
    `log_extra`, `N` values by column. `frame` is the one of a video that functions get as its image.

    Returns:
        `dict[str, np.ndarray]`: for each function float64 of shape `(N,)`, NaN where it does not apply.

    Raises:
        ValueError: if the number of images is no multiple of the number of rows, or a function needs a column that is
            missing, or videos and these are images.
        TypeError: if they are neither images nor videos, or some of each, or a function cannot be called.
        RewardError: if a function fails, naming it.
    """
    if len(dataset) == 0 or len(images) % len(dataset) != 0:
        raise ValueError(f"There are {len(images)} images for {len(dataset)} rows. Give equally many for each row.")
    number = len(images) // len(dataset)
    columns = {name: [value for value in dataset[name] for _ in range(number)] for name in dataset.column_names}
    scorer = RewardScorer(as_rewards(reward_funcs), timeout=timeout, frame=frame)
    scorer.check(dataset.column_names, videos=check_samples(images))
    scored = scorer.score(columns.pop("prompt"), list(images), columns)
    if extras is not None:
        for name, values in scored.logs.columns.items():
            extras[name] = [values.get(i) for i in range(len(images))]
    rewards = scored.rewards
    return {name: rewards[:, i].double().numpy() for i, name in enumerate(scorer.names)}


@dataclass(frozen=True)
class PairedDifference:
    """How a score changed between two models that drew the same prompts from the same seeds: means over the
    `num_pairs` prompts that entered, the mean `difference`, after minus before, and its error, NaN for one."""

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
        return finite_values(asdict(self) | {"standard_errors": self.standard_errors})


def paired_difference(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, *, num_images_per_prompt: int = 1
) -> PairedDifference:
    """
    Paired comparison of two sets of scores.

    The images of one prompt are no independent samples: a prompt that the model has learned improves in all of them.
    So they are averaged first, and the standard error is that of the mean over prompts, `std(d) / sqrt(n)` with `d`
    the `n` prompts' differences and the unbiased standard deviation.

    Entry `i` of `before` and `after`, both `(N,)`, has the same prompt and seed; those of one prompt are next to each
    other. A pair with a NaN (a score that does not apply) is left out, and so is a prompt that has no other.
    `ValueError` if the shapes differ or do not fit `num_images_per_prompt`, or no pair is left.
    """
    means = np.stack(paired_prompt_means(before, after, num_images_per_prompt))
    mean_before, mean_after = means[:, ~np.isnan(means[0])]
    if len(mean_before) == 0:
        raise ValueError("There is no pair of scores in which both are numbers.")
    differences = mean_after - mean_before
    means = (float(values.mean()) for values in (mean_before, mean_after, differences))
    return PairedDifference(*means, standard_error(differences), len(differences))
