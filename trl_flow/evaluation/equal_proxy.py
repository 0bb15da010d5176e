"""Runs compared where their proxies are equal (VGPO, Figure 4c): who optimizes less also loses less gold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from trl_flow.evaluation.intervals import CONFIDENCE
from trl_flow.evaluation.run_log import LogHistory, Run, is_number, read_log_history


_QUANTILE = float(ndtri((1 + CONFIDENCE) / 2))


@dataclass(frozen=True)
class GoldHistory:
    """
    The evaluations of one run: `updates`, `proxy` (the optimized reward), `gold` (the average, base model = 1) and its
    `standard_errors` (NaN where none was logged), float64, `(E,)` each.
    """

    updates: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray
    standard_errors: np.ndarray


@dataclass(frozen=True)
class GoldAtProxy:
    """
    A run where its proxy first reaches a level, between two evaluations by straight lines.

    Attributes:
        run (`str`): its label.
        level (`float`): of the proxy.
        update (`float`): when; NaN, as all that follows, if the run never gets there.
        gold (`float`): the gold average there.
        standard_error (`float`): of `gold`: over the prompts of the evaluation set, not over seeds. Between two
            evaluations it is interpolated, too, which is never too small. NaN if none was logged.
        highest (`float`): the highest proxy of the run.
    """

    run: str
    level: float
    update: float
    gold: float
    standard_error: float
    highest: float

    @property
    def half_width(self) -> float:
        """Half of the 95% interval of `gold`, by the normal quantile: logs do not say how many prompts there are."""
        return _QUANTILE * self.standard_error


def gold_history(run: Run, *, eval_name: str | None = None, label: str = "") -> GoldHistory:
    """
    The evaluations in a run's log ([`~trl_flow.evaluation.run_log.read_log_history`]) that have a gold average.
    `eval_name` is which of several evaluation sets, by default the first that was logged; `label` is what errors call
    the run. `ValueError` if there are none.
    """
    history = read_log_history(run)
    prefix = _gold_prefix(history, eval_name, label)
    keys = ("step", f"{prefix}_reward", f"{prefix}_gold/average")
    found = [entry for entry in history if all(is_number(entry.get(key)) for key in keys)]
    if not found:
        raise ValueError(not_logged(label, "no evaluation with both a reward and a gold average"))
    errors = [entry.get(f"{prefix}_gold/average_std_err") for entry in found]
    columns = [[entry[key] for entry in found] for key in keys]
    columns.append([error if is_number(error) else math.nan for error in errors])
    return GoldHistory(*(np.array(column, dtype=np.float64) for column in columns))


def value_at_proxy(proxy: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, level: float) -> float:
    """`values` where `proxy` first reaches `level`, both `(E,)`, with straight lines in between; the first value if it
    starts there or above, NaN if it never gets there."""
    proxy, values = np.asarray(proxy, dtype=np.float64), np.asarray(values, dtype=np.float64)
    reached = np.flatnonzero(proxy >= level)
    if not len(reached):
        return math.nan
    i = int(reached[0])
    if i == 0 or proxy[i] == level:
        return float(values[i])
    share = (level - proxy[i - 1]) / (proxy[i] - proxy[i - 1])
    return float(values[i - 1] + share * (values[i] - values[i - 1]))


def gold_at_proxy(
    runs: Mapping[str, Run], levels: Sequence[float] | None = None, *, eval_name: str | None = None
) -> list[GoldAtProxy]:
    """
    The gold average of two runs or more at equal proxy, level by level and in the runs' order.

    Args:
        runs (`Mapping[str, Run]`): by label, as for the functions of [`~trl_flow.evaluation.plots`]. They must have
            been evaluated by the same functions on the same prompts, which logs do not say.
        levels (`Sequence[float]`, *optional*): of the proxy. By default the highest that all runs reach, and half of
            the way there.
        eval_name (`str`, *optional*): which of several evaluation sets; by default the first that was logged.

    Raises:
        ValueError: with fewer than two runs; if a run has no gold scores, or no run reaches a level; without `levels`,
            if some run has never risen above where another one starts.
    """
    if len(runs) < 2:
        raise ValueError(f"There are {len(runs)} runs, but a comparison at equal proxy needs two or more.")
    histories = {label: gold_history(run, eval_name=eval_name, label=label) for label, run in runs.items()}
    highest = {label: float(history.proxy.max()) for label, history in histories.items()}
    told = ", ".join(f"{label} {value:.4g}" for label, value in highest.items())
    if levels is None or len(levels) == 0:
        start, top = max(history.proxy[0] for history in histories.values()), min(highest.values())
        if top <= start:
            raise ValueError(
                f"There is no proxy above the start ({start:.4g}) that all runs reach; their highest are {told}. Give "
                "levels, or leave runs out."
            )
        levels = [(start + top) / 2, top]
    points, levels = [], [float(level) for level in levels]
    for level in levels:
        if not level <= max(highest.values()):
            raise ValueError(f"The level {level:.4g} is reached by no run: the highest proxies are {told}.")
        for label, history in histories.items():
            columns = (history.updates, history.gold, history.standard_errors)
            values = [value_at_proxy(history.proxy, column, level) for column in columns]
            points.append(GoldAtProxy(label, level, *values, highest[label]))
    return points


def equal_proxy_table(points: Sequence[GoldAtProxy]) -> str:
    """
    What [`gold_at_proxy`] gives as a Markdown table. The difference is to the first run; its interval takes the errors
    of both for independent, which is too wide rather than too narrow where the prompts are the same.
    """
    first, base = points[0].run, {point.level: point for point in points if point.run == points[0].run}
    lines = [f"| proxy | run | update | gold | difference to {_cell(first)} |", "| ---: | --- | ---: | ---: | ---: |"]
    for point in points:
        if math.isnan(point.update):
            cells = [f"not reached (highest {point.highest:.4g})", "–", "–"]
        else:
            other = base[point.level]
            half = math.hypot(point.half_width, other.half_width)
            known = point.run != first and not math.isnan(other.gold)
            cells = [f"{point.update:.4g}", _with_interval(f"{point.gold:.3f}", point.half_width)]
            cells.append(_with_interval(f"{point.gold - other.gold:+.3f}", half) if known else "–")
        lines.append(f"| {point.level:.4g} | {_cell(point.run)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def not_logged(label: str, what: str) -> str:
    """The message for what a log does not have."""
    return f"The log{f' of {label!r}' if label else ''} has {what}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _with_interval(number: str, half: float) -> str:
    return number if math.isnan(half) else f"{number} ± {half:.3f}"


def _gold_prefix(history: LogHistory, eval_name: str | None, label: str) -> str:
    suffix = "_gold/average"
    prefixes = dict.fromkeys(key.removesuffix(suffix) for entry in history for key in entry if key.endswith(suffix))
    if not prefixes:
        what = "no gold scores. Train with eval_reward_funcs, an eval_dataset and eval_strategy='steps'"
        raise ValueError(not_logged(label, what))
    wanted = next(iter(prefixes)) if eval_name is None else f"eval_{eval_name}"
    if wanted not in prefixes:
        names = [prefix.removeprefix("eval").removeprefix("_") or "(without a name)" for prefix in prefixes]
        raise ValueError(not_logged(label, f"no gold scores of an evaluation set {eval_name!r}, but of {names}"))
    return wanted
