"""Confidence intervals of means and of shares."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import ndtri, stdtrit


CONFIDENCE = 0.95
_QUANTILE = (1 + CONFIDENCE) / 2


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its confidence interval; NaN where fewer than two (for `mean`: no) prompts entered."""

    mean: float
    low: float
    high: float
    standard_error: float
    num_prompts: int

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON; what is not finite becomes `None`."""
        return finite_values(asdict(self))


def finite(value: float) -> float | None:
    """For JSON: `None` in place of NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def finite_values(values: Mapping[str, float | int]) -> dict[str, float | int | None]:
    """[`finite`] of each float."""
    return {name: value if isinstance(value, int) else finite(value) for name, value in values.items()}


def mean_interval(scores: Sequence[float] | np.ndarray, *, num_images_per_prompt: int = 1) -> Interval:
    r"""
    Mean of the prompts' means, with Student's interval

    $$\bar x \pm t_{0.975,\,n-1} \, \frac{s}{\sqrt n}$$

    of the `n` prompts' means $x$ with unbiased standard deviation $s$. Images of one prompt, which are next to each
    other in the `(N,)` scores, are averaged first, as they are no independent samples. NaN (the score does not apply)
    is left out, and so is a prompt that has nothing else.
    """
    means = prompt_means(scores, num_images_per_prompt)
    means = means[~np.isnan(means)]
    mean, error = float(means.mean()) if len(means) else math.nan, standard_error(means)
    half = half_width(error, len(means))
    return Interval(mean, mean - half, mean + half, error, len(means))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of `(n,)` values, `s / sqrt(n)`; NaN for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def half_width(error: float, n: int) -> float:
    """Half of Student's 95% interval of a mean of `n` values, from its standard error; NaN for fewer than two."""
    return float(stdtrit(n - 1, _QUANTILE)) * error if n > 1 else math.nan


def prompt_means(scores: Sequence[float] | np.ndarray, num_images_per_prompt: int) -> np.ndarray:
    """The mean over each prompt's images, float64 `(P,)`; NaN for a prompt whose scores are all NaN. `ValueError` if
    the scores are not `(N,)` with `N` a multiple of `num_images_per_prompt`."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or num_images_per_prompt < 1 or len(scores) % num_images_per_prompt != 0:
        what = f"The scores have the shape {scores.shape} and num_images_per_prompt is {num_images_per_prompt}"
        raise ValueError(f"{what}, but the shape must be (N,) with N a multiple of it.")
    groups = scores.reshape(-1, num_images_per_prompt)
    counts = (~np.isnan(groups)).sum(axis=1)
    return np.where(counts > 0, np.nansum(groups, axis=1) / np.maximum(counts, 1), math.nan)


def paired_prompt_means(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, num_images_per_prompt: int
) -> tuple[np.ndarray, np.ndarray]:
    """[`prompt_means`] of both, which have one shape `(N,)`, over the images that have a score before and after."""
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(f"before has shape {before.shape} and after {after.shape}, but both must be the same (N,).")
    single = np.isnan(before) | np.isnan(after)
    before, after = np.where(single, math.nan, before), np.where(single, math.nan, after)
    return prompt_means(before, num_images_per_prompt), prompt_means(after, num_images_per_prompt)


def share_interval(share: float, n: int) -> tuple[float, float]:
    r"""
    Wilson's 95% interval of a share $p$ of `n` independent cases, which stays inside `[0, 1]` and keeps a width where
    the share is 0 or 1:

    $$\frac{p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4n^2}}{1 + z^2 / n}$$

    (scipy has it for whole numbers of cases only.) `share` may be the mean of `n` (1 or more) numbers in `[0, 1]`:
    these spread less than cases of 0 and 1 do, so that the interval is too wide rather than too narrow.
    """
    z = float(ndtri(_QUANTILE))
    center = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n * n))
    scale = 1 + z**2 / n
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)
