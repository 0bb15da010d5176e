"""A base model and its adapters compared: means, paired differences and gold scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trl_flow.evaluation.gold import BaseMeanError, gold_score
from trl_flow.evaluation.intervals import finite_values, half_width, mean_interval
from trl_flow.evaluation.scoring import paired_difference


# {model: {reward: (N,) scores}}; the first model is the base
ModelScores = Mapping[str, Mapping[str, Sequence[float] | np.ndarray]]


def compare_scores(
    scores: ModelScores, *, proxy: Sequence[str] = (), gold: Sequence[str] = (), num_images_per_prompt: int = 1
) -> dict[str, Any]:
    """
    The comparison of several models on one prompt set, by the rewards that were optimized (`proxy`) and others.

    Args:
        scores (`Mapping`): by model and reward, `(N,)` each, NaN where the reward does not apply. Entry `i` is the
            same prompt and the same noise for all models; the images of one prompt are next to each other. The first
            model is the base.
        num_images_per_prompt (`int`): `K`, a divisor of `N`.

    Returns:
        `dict[str, Any]`: for JSON, with `None` for what is not finite:

        * `means`: by model and reward `mean`, `low`, `high`, `standard_error` and `num_prompts`
          ([`~trl_flow.evaluation.intervals.mean_interval`]);
        * `differences`: by model, without the base, and reward: [`~trl_flow.evaluation.scoring.paired_difference`]
          with `low` and `high`, or `None` if no pair of scores is there;
        * `gold`: by model `average`, `standard_error`, `low`, `high` and `relative`
          ([`~trl_flow.evaluation.gold.gold_score`]), or `None`, and in `gold_note` why.

    Raises:
        ValueError: if the shapes do not fit each other.

    Example:

    ```pycon
    >>> import numpy as np
    >>> from trl_flow.evaluation import compare_scores
    >>> base, trained = np.array([0.2, 0.4, 0.6, 0.8]), np.array([0.3, 0.6, 0.7, 0.8])
    >>> found = compare_scores({"base": {"soft": base}, "run": {"soft": trained}}, gold=["soft"])
    >>> round(found["differences"]["run"]["soft"]["difference"], 3), round(found["gold"]["run"]["average"], 3)
    (0.1, 1.2)
    ```
    """
    base, number = next(iter(scores)), num_images_per_prompt
    means: dict[str, dict] = {}
    differences: dict[str, dict] = {}
    for model, found in scores.items():
        intervals = {r: mean_interval(values, num_images_per_prompt=number) for r, values in found.items()}
        means[model] = {reward: interval.to_dict() for reward, interval in intervals.items()}
        if model != base:
            differences[model] = {r: _difference(scores[base][r], values, number) for r, values in found.items()}
    averages, note = _gold(scores, gold, number)
    num_prompts = len(next(iter(scores[base].values()))) // number if scores[base] else 0
    found = {"num_prompts": num_prompts, "num_images_per_prompt": number}
    found |= {"proxy": list(proxy), "gold_rewards": list(gold), "means": means, "differences": differences}
    return found | {"gold": averages, "gold_note": note}


def _difference(before: Sequence[float], after: Sequence[float], number: int) -> dict[str, Any] | None:
    if np.isnan(np.asarray(before, dtype=np.float64) + np.asarray(after, dtype=np.float64)).all():
        return None
    result = paired_difference(before, after, num_images_per_prompt=number)
    half = half_width(result.standard_error, result.num_pairs)
    return result.to_dict() | finite_values({"low": result.difference - half, "high": result.difference + half})


def _gold(scores: ModelScores, gold: Sequence[str], number: int) -> tuple[dict[str, Any] | None, str | None]:
    if not gold:
        return None, None
    base = next(iter(scores))
    averages = {}
    for model, by_reward in scores.items():
        before, after = ({name: found[name] for name in gold} for found in (scores[base], by_reward))
        try:
            result = gold_score(before, after, num_images_per_prompt=number)
        except BaseMeanError as error:
            return None, (
                f"There is no average: gold scores are divided by the base model's mean, and that of {error.name} is "
                f"{error.mean:.4g}, which is not positive."
            )
        # The base model's own is 1 by definition
        error = 0.0 if model == base else result.standard_error
        half = half_width(error, len(result.influence))
        values = {"average": result.average, "standard_error": error}
        values |= {"low": result.average - half, "high": result.average + half}
        averages[model] = finite_values(values) | {"relative": finite_values(result.relative)}
    return averages, None
