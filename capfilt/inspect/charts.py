"""Geometry of the report's charts: plain numbers for the template to draw as SVG.

All charts share one drawing area (`WIDTH` x `HEIGHT` units, scaled by the page), so that text has
the same size in all of them and stays readable on a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 40, 40


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """One bin: kept pairs below, dropped pairs on top of them."""

    x: float
    width: float
    kept_y: float
    kept_height: float
    dropped_y: float
    dropped_height: float
    title: str


@dataclass(frozen=True)
class Band:
    """An invisible column over a line chart that carries a tooltip."""

    x: float
    width: float
    title: str


@dataclass(frozen=True)
class Line:
    """One line; `path` is an SVG path, `style` the name of its look."""

    name: str
    style: str
    path: str


@dataclass(frozen=True)
class Chart:
    """What the template draws.

    Attributes:
        title: stands over the chart.
        label: says in words what the chart shows, for screen readers.
        x_name: the quantity of the horizontal axis.
        x_ticks: its labels.
        y_ticks: labels and grid lines of the vertical axis.
        bars: of a histogram.
        lines: of a line chart.
        bands: tooltips of a line chart.
        marker: the current threshold.
    """

    title: str
    label: str
    x_name: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bars: list[Bar]
    lines: list[Line]
    bands: list[Band]
    marker: Tick | None


def histogram(
    title: str,
    x_name: str,
    edges: Sequence[float],
    kept: Sequence[int],
    dropped: Sequence[int],
    threshold: float | None,
) -> Chart:
    """A stacked histogram.

    Args:
        title: stands over the chart.
        x_name: the score.
        edges: of the bins, ascending, one more than bins.
        kept: pairs a bin.
        dropped: pairs a bin.
        threshold: marked when it lies within the edges.
    """
    totals = [a + b for a, b in zip(kept, dropped, strict=True)]
    y_values = ticks(0, max(max(totals), 1), 4, whole=True)
    highest = max(y_values[-1], max(totals))
    bars = []
    for at, total in enumerate(totals):
        if not total:
            continue
        left, right = _x(edges[at], edges[0], edges[-1]), _x(edges[at + 1], edges[0], edges[-1])
        # a bin that isn't empty is never invisible, however high its neighbour
        heights = [max(_height(n, highest), 1.5) if n else 0.0 for n in (kept[at], dropped[at])]
        floor = float(HEIGHT - BOTTOM)
        bars.append(
            Bar(
                round(left + 0.75, 2),
                round(max(right - left - 1.5, 1), 2),
                round(floor - heights[0], 2),
                round(heights[0], 2),
                round(floor - heights[0] - heights[1], 2),
                round(heights[1], 2),
                f"{edges[at]:.2f} to {edges[at + 1]:.2f}: "
                f"{kept[at]:,} kept, {dropped[at]:,} dropped",
            )
        )
    label = f"{title}: {sum(kept):,} kept and {sum(dropped):,} dropped pairs"
    return Chart(
        title,
        label,
        x_name,
        [Tick(_x(value, edges[0], edges[-1]), _plain(value)) for value in _x_ticks(edges)],
        [Tick(_y(value, 0, highest), short(value)) for value in y_values],
        bars,
        [],
        [],
        _marker(threshold, edges[0], edges[-1]),
    )


def keep_curve(
    shares: dict[str, Sequence[float]], thresholds: Sequence[float], threshold: float | None
) -> Chart:
    """Share kept by threshold, one line a source.

    Args:
        shares: by source, as many values (0..1) as there are thresholds.
        thresholds: ascending from 0 to 1.
        threshold: the current one.
    """
    lines = []
    for source, values in shares.items():
        points = [(_x(x, 0, 1), _y(y, 0, 1)) for x, y in zip(thresholds, values, strict=True)]
        lines.append(Line(source, source, _path(points)))
    step = max(len(thresholds) // 40, 1)
    width = (WIDTH - LEFT - RIGHT) * step / max(len(thresholds) - 1, 1)
    bands = []
    for at in range(0, len(thresholds), step):
        told = ", ".join(f"{name} {values[at]:.1%}" for name, values in shares.items())
        left = max(_x(thresholds[at], 0, 1) - width / 2, LEFT)
        bands.append(Band(round(left, 2), round(width, 2), f"{thresholds[at]:.3g}: {told}"))
    return Chart(
        "Share kept by ITM threshold",
        "Share of scored texts with an ITM probability at or over the threshold: "
        + ", ".join(shares),
        "ITM threshold",
        [Tick(_x(value, 0, 1), _plain(value)) for value in (0, 0.25, 0.5, 0.75, 1)],
        [Tick(_y(value, 0, 1), f"{value:.0%}") for value in (0, 0.25, 0.5, 0.75, 1)],
        [],
        lines,
        bands,
        _marker(threshold, 0, 1),
    )


def curve(title: str, x_name: str, x: Sequence[float], y: Sequence[float]) -> Chart:
    """A quantity over training: the values as logged, faint, and their running mean when many.

    Args:
        title: the quantity.
        x_name: what `x` counts.
        x: ascending.
        y: finite, as many as `x`; at least one.
    """
    x, y = _thinned(x, 400), _thinned(y, 400)
    low, high = min(y), max(y)
    y_values = ticks(min(low, 0) if low < high / 3 else low, high, 4)
    low, high = min(y_values[0], low), max(y_values[-1], high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    first, last = (x[0], x[-1]) if x[-1] > x[0] else (x[0] - 1, x[0] + 1)

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        return [
            (_x(at, first, last), _y(value, low, high)) for at, value in zip(x, values, strict=True)
        ]

    lines = [Line("logged", "logged", _path(points(y)))]
    if len(y) >= 12:
        mean = _running_mean(y, max(len(y) // 20, 3))
        lines = [
            Line("logged", "faint", lines[0].path),
            Line("running mean", "logged", _path(points(mean))),
        ]
    step = max(len(x) // 60, 1)
    width = (WIDTH - LEFT - RIGHT) * step / max(len(x) - 1, 1)
    bands = [
        Band(
            round(max(_x(x[at], first, last) - width / 2, LEFT), 2),
            round(width, 2),
            f"{x_name} {_plain(x[at])}: {y[at]:.4g}",
        )
        for at in range(0, len(x), step)
    ]
    return Chart(
        title,
        f"{title}: from {y[0]:.3g} to {y[-1]:.3g} over {x_name} {_plain(first)} to {_plain(last)}",
        x_name,
        [
            Tick(_x(value, first, last), short(value))
            for value in ticks(first, last, 5, inside=True)
        ],
        [Tick(_y(value, low, high), _plain(value)) for value in y_values],
        [],
        lines,
        bands,
        None,
    )


def ticks(
    low: float, high: float, about: int, *, whole: bool = False, inside: bool = False
) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span a range.

    Args:
        low: start of the range.
        high: end of the range.
        about: how many steps to aim at.
        whole: steps of at least 1.
        inside: only ticks within the range; otherwise the ticks enclose it.
    """
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(power * n for n in (1, 2, 5, 10) if span / (power * n) <= about)
    if whole:
        step = max(step, 1)
    slack = 1e-9
    if inside:
        start, end = math.ceil(low / step - slack), math.floor(high / step + slack)
    else:
        start, end = math.floor(low / step + slack), math.ceil(high / step - slack)
    return [round(at * step, 10) for at in range(start, end + 1)]


def short(value: float) -> str:
    """A number in few characters: 1,500 is 1.5k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def _x_ticks(edges: Sequence[float]) -> list[float]:
    return ticks(edges[0], edges[-1], 5, inside=True)


def _marker(threshold: float | None, low: float, high: float) -> Tick | None:
    if threshold is None or not low <= threshold <= high:
        return None
    return Tick(_x(threshold, low, high), f"{threshold:g}")


def _x(value: float, low: float, high: float) -> float:
    return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)


def _y(value: float, low: float, high: float) -> float:
    return round(HEIGHT - BOTTOM - _height(value - low, high - low), 2)


def _height(value: float, highest: float) -> float:
    return value / highest * (HEIGHT - TOP - BOTTOM)


def _path(points: Sequence[tuple[float, float]]) -> str:
    if len(points) == 1:
        # a single point is drawn as a short dash
        (x, y) = points[0]
        return f"M{x - 3:g} {y:g}H{x + 3:g}"
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _thinned(values: Sequence[float], most: int) -> list[float]:
    if len(values) <= most:
        return list(values)
    step = (len(values) - 1) / (most - 1)
    return [values[round(at * step)] for at in range(most)]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    half = window // 2
    parts = [values[max(at - half, 0) : at + half + 1] for at in range(len(values))]
    return [sum(part) / len(part) for part in parts]
