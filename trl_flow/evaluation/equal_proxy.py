"""Runs compared where their proxies are equal (VGPO, Figure 4c): who optimizes less also loses less gold."""

import math
import re
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
    `standard_errors` (NaN where none was logged), float64, `(E,)` each; `functions` are the names of those of which
    the gold is the average.
    """

    updates: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray
    standard_errors: np.ndarray
    functions: tuple[str, ...]


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
        start (`float`), highest (`float`): the first and the highest proxy of the run.

    Example:

    ```pycon
    >>> from trl_flow.evaluation import GoldAtProxy
    >>> point = GoldAtProxy("guard", level=1.6, update=30, gold=1.15, standard_error=0.02, start=1.0, highest=1.8)
    >>> round(point.half_width, 3)  # of the 95% interval
    0.039
    ```
    """

    run: str
    level: float
    update: float
    gold: float
    standard_error: float
    start: float
    highest: float

    @property
    def half_width(self) -> float:
        """Half of the 95% interval of `gold`, by the normal quantile: logs do not say how many prompts there are."""
        return _QUANTILE * self.standard_error


def gold_history(run: Run, *, eval_name: str | None = None, label: str = "", proxy: str | None = None) -> GoldHistory:
    """
    The evaluations in a run's log ([`~trl_flow.evaluation.run_log.read_log_history`]) that have a gold average.
    `eval_name` is which of several evaluation sets, by default the first that was logged; `label` is what errors call
    the run; `proxy` names one of several rewards, by default their weighted sum. `ValueError` if there are none.
    """
    history = read_log_history(run)
    prefix = _gold_prefix(history, eval_name, label)
    reward, gold = f"{prefix}_reward" if proxy is None else f"{prefix}_rewards/{proxy}/mean", f"{prefix}_gold/"
    keys = ("step", reward, f"{gold}average")
    found = [entry for entry in history if all(is_number(entry.get(key)) for key in keys)]
    if not found:
        pattern = re.compile(rf"{re.escape(prefix)}_rewards/(.+)/mean")
        names = dict.fromkeys(match[1] for entry in history for key in entry if (match := pattern.fullmatch(key)))
        wanted = "a reward" if proxy is None else f"the reward {proxy!r} (there are {', '.join(names) or 'none'})"
        raise ValueError(not_logged(label, f"no evaluation with both {wanted} and a gold average"))
    errors = [entry.get(f"{prefix}_gold/average_std_err") for entry in found]
    columns = [[entry[key] for entry in found] for key in keys]
    columns.append([error if is_number(error) else math.nan for error in errors])
    names = {key.removeprefix(gold) for entry in found for key in entry if key.startswith(gold)}
    functions = tuple(sorted(names - {"average", "average_std_err"}))
    return GoldHistory(*(np.array(column, dtype=np.float64) for column in columns), functions)


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
    runs: Mapping[str, Run],
    levels: Sequence[float] | None = None,
    *,
    eval_name: str | None = None,
    proxy: str | None = None,
) -> list[GoldAtProxy]:
    """
    The gold average of two runs or more at equal proxy, level by level and in the runs' order.

    Args:
        runs (`Mapping[str, Run]`): by label, as for the functions of [`~trl_flow.evaluation.plots`]. They must have
            been evaluated on the same prompts, which logs do not say, and by the same functions, of which they say
            the names.
        levels (`Sequence[float]`, *optional*): of the proxy. By default the highest that all runs reach, and half of
            the way there.
        eval_name (`str`, *optional*): which of several evaluation sets; by default the first that was logged.
        proxy (`str`, *optional*): which of several rewards is the proxy; by default the sum with `reward_weights`,
            which is only the same thing in runs of the same rewards and weights.

    Raises:
        ValueError: with fewer than two runs; if a run has no gold scores, or those of other functions than the first;
            if no run reaches a level; without `levels`, if some run has never risen above where another one starts.

    Example:

    ```pycon
    >>> from trl_flow.evaluation import gold_at_proxy
    >>> def run(rewards, gold):  # or the folder of a run
    ...     keys = ("eval_reward", "eval_gold/average")
    ...     return [{"step": i, **dict(zip(keys, pair))} for i, pair in enumerate(zip(rewards, gold))]
    ...
    >>> runs = {"guard": run([1.0, 1.4, 1.8], [1.0, 1.1, 1.2]), "plain": run([1.0, 1.6, 2.0], [1.0, 0.9, 0.8])}
    >>> [(point.run, round(point.gold, 3)) for point in gold_at_proxy(runs, levels=[1.6])]
    [('guard', 1.15), ('plain', 0.9)]
    ```
    """
    if len(runs) < 2:
        raise ValueError(f"There are {len(runs)} runs, but a comparison at equal proxy needs two or more.")
    options = {"eval_name": eval_name, "proxy": proxy}
    histories = {label: gold_history(run, label=label, **options) for label, run in runs.items()}
    first, expected = next((label, history.functions) for label, history in histories.items())
    for label, history in histories.items():
        if history.functions != expected:
            names, others = (", ".join(functions) or "(not named)" for functions in (expected, history.functions))
            raise ValueError(
                f"The gold of {first!r} is the average of {names}, that of {label!r} of {others}: these cannot be "
                "compared. Evaluate both with the same eval_reward_funcs."
            )
    highest = {label: float(history.proxy.max()) for label, history in histories.items()}
    told = ", ".join(f"{label} {value:.4g}" for label, value in highest.items())
    if levels is None or len(levels) == 0:
        start, top = max(history.proxy[0] for history in histories.values()), min(highest.values())
        if top <= start:
            raise ValueError(
                f"There is no proxy above the start ({start:.4g}) that all runs reach; their highest are {told}. Give "
                "levels, leave runs out, or, if their rewards or weights differ, name a reward that all have: --proxy "
                "NAME."
            )
        levels = [(start + top) / 2, top]
    points, levels = [], [float(level) for level in levels]
    for level in levels:
        if not level <= max(highest.values()):
            raise ValueError(f"The level {level:.4g} is reached by no run: the highest proxies are {told}.")
        for label, history in histories.items():
            columns = (history.updates, history.gold, history.standard_errors)
            values = [value_at_proxy(history.proxy, column, level) for column in columns]
            points.append(GoldAtProxy(label, level, *values, history.proxy[0], highest[label]))
    return points


def equal_proxy_table(points: Sequence[GoldAtProxy]) -> str:
    """
    What [`gold_at_proxy`] gives as a Markdown table. The difference is to the first run; its interval takes the errors
    of both for independent, which is too wide rather than too narrow where the prompts are the same.

    Example:

    ```pycon
    >>> from trl_flow.evaluation import GoldAtProxy, equal_proxy_table
    >>> guard = GoldAtProxy("guard", 1.6, 30, 1.15, 0.02, 1.0, 1.8)
    >>> plain = GoldAtProxy("plain", 1.6, 12, 0.90, 0.03, 1.0, 2.0)
    >>> print(equal_proxy_table([guard, plain]))
    | proxy | run | update | gold | difference to guard |
    | ---: | --- | ---: | ---: | ---: |
    | 1.6 | guard | 30 | 1.150 ± 0.039 | – |
    | 1.6 | plain | 12 | 0.900 ± 0.059 | -0.250 ± 0.071 |
    ```
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
            # The interval would seem to be one of a trained model
            start = " (start)" if point.level <= point.start else ""
            cells = [f"{point.update:.4g}{start}", _with_interval(f"{point.gold:.3f}", point.half_width)]
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
