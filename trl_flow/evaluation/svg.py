"""Line charts as SVG that is part of an HTML page: they take its colors, light or dark, and its width."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass


_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 8, 8, 24
# Points of a line; of more their means are drawn, for nobody sees more
_MOST_POINTS = 300


@dataclass(frozen=True)
class Series:
    """Values at updates, with a name for the legend. `errors` are half lengths of bars, `points` whether the values
    are few and far between, as evaluations are."""

    name: str
    updates: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float] | None = None
    points: bool = False


def line_chart(title: str, series: Sequence[Series], *, baseline: float | None = None) -> str:
    """A `<figure>` with a title, a legend that has the last value of each series, and the chart; a dotted line is
    `baseline`. `""` without a value. Colors are the classes `c0` to `c6`."""
    series = [each for each in series if len(each.values)]
    if not series:
        return ""
    xs = [x for each in series for x in each.updates]
    ys = [y + d * e for each in series for y, e in zip(each.values, _errors(each), strict=True) for d in (-1, 1)]
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, whole=True)
    y_axis = _Axis(*_range(ys + ([] if baseline is None else [baseline])), _HEIGHT - _BOTTOM, _TOP)
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_axis.ticks():
        parts.append(f'<text x="{x_axis.place(tick):.1f}" y="{_HEIGHT - 7}" text-anchor="middle">{tick:g}</text>')
    if baseline is not None:
        parts.append(f'<path class="base" d="M{_LEFT} {y_axis.place(baseline):.1f}H{_WIDTH - _RIGHT}"/>')
    for number, each in enumerate(series):
        parts += _drawn(each, f"c{number % 7}", x_axis, y_axis)
    legend = "".join(
        f'<span><i class="c{number % 7}"></i>{html.escape(each.name)} <b>{_number(each.values[-1])}</b></span>'
        for number, each in enumerate(series)
    )
    label = html.escape(f"{title} over updates")
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption><p>{legend}</p>{drawing}</figure>"


def _drawn(series: Series, color: str, x_axis: "_Axis", y_axis: "_Axis") -> list[str]:
    updates, values = _thinned(series.updates), _thinned(series.values)
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in zip(updates, values, strict=True)]
    if series.points or len(places) == 1:
        bars = []
        for x, y, error in zip(series.updates, series.values, _errors(series), strict=True):
            if error:
                low, high = y_axis.place(y - error), y_axis.place(y + error)
                bars.append(f'<path class="line {color}" d="M{x_axis.place(x):.1f} {low:.1f}V{high:.1f}"/>')
        dots = [f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        return [f'<path class="line {color}" d="{_path(places)}"/>', *bars, *dots]
    window = max(1, len(values) // 15)
    if window == 1:
        return [f'<path class="line {color}" d="{_path(places)}"/>']
    means = [sum(values[i - window + 1 : i + 1]) / window for i in range(window - 1, len(values))]
    smooth = [(x, y_axis.place(mean)) for (x, _), mean in zip(places[window - 1 :], means, strict=True)]
    raw = f'<path class="line raw {color}" d="{_path(places)}"/>'
    return [raw, f'<path class="line {color}" d="{_path(smooth)}"/>']


def _errors(series: Series) -> Sequence[float]:
    return series.errors or [0.0] * len(series.values)


def _thinned(values: Sequence[float]) -> Sequence[float]:
    size = math.ceil(len(values) / _MOST_POINTS)
    parts = [values[first : first + size] for first in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _number(value: float) -> str:
    text = f"{value:.3g}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text


class _Axis:
    """From values `low ... high` to places `start ... end`."""

    def __init__(self, low: float, high: float, start: float, end: float, *, whole: bool = False):
        self.low, self.high = (low, high) if high > low else (low - 0.5, high + 0.5)
        self.start, self.end, self.whole = start, end, whole

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to six round numbers."""
        rough = (self.high - self.low) / 4
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
        step = max(1, round(step)) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]
