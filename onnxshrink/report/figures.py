"""The drawings of a report: bars, points, distributions, curves and histograms, from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from onnxshrink.report.svg import (
    WIDTH,
    Scale,
    apart,
    axes,
    below,
    brief,
    colour,
    drawing,
    label,
    line,
    mark,
    polyline,
    room,
    scale_of,
    tag,
)

_LEFT, _RIGHT, _TOP = 58.0, WIDTH - 12.0, 30.0
_BINS = 80
_STEPS = sorted(range(-12, 13), key=lambda step: (abs(step), -step))
"""Heights that a label is tried at, the nearest first."""

_HATCHES: Mapping[str, tuple[float, float]] = {"float": (6.0, 30.0), "mixed": (8.0, 0.0)}
"""Of the parts of a bar that are not plain: units between the lines, and how far they lean over its height."""

_LEAST_WIDTH = 2.5
"""Of a part of a bar: what has no share is seen and can be pointed at."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of `bars`: its name, its length, the value in words, and what was before it."""

    name: str
    value: float
    text: str
    before: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A model of `scatter`.

    Attributes:
        name: Of the model.
        x: Its place.
        y: Its place.
        ends: Lower and upper end of ``y``, or None.
        on_front: True if no other model is better in everything.
        tip: What it is, in words.
    """

    name: str
    x: float
    y: float
    ends: tuple[float, float] | None
    on_front: bool
    tip: str


@dataclass(frozen=True, slots=True)
class Ridge:
    """A distribution of `ridges`: values, and the point and interval that are reported of them."""

    name: str
    values: NDArray[np.float64]
    middle: float | None
    ends: tuple[float, float] | None
    tip: str


def bars(rows: Sequence[Bar], title: str, *, number: int = 3) -> Markup:
    """Horizontal bars from zero, each under its name; what was lost since the bar before is drawn in outline."""
    x = Scale(0.0, max(max(row.value, row.before or 0.0) for row in rows) or 1.0, 0.0, WIDTH)
    parts: list[str] = []
    for i, row in enumerate(rows):
        y = 40.0 * i
        parts.append(label(0, y + 14, brief(row.name, WIDTH - room(row.text) - 16)))
        parts.append(label(WIDTH, y + 14, row.text, anchor="end", class_="strong"))
        if row.before is not None and row.before > row.value:
            parts.append(tag("rect", x=0.0, y=y + 20, width=x(row.before), height=12.0, class_="lost"))
        width = max(x(row.value), 1.0)
        tip = f"{row.name}: {row.text}"
        parts.append(tag("rect", x=0.0, y=y + 20, width=width, height=12.0, class_=colour(number), data_tip=tip))
    return drawing(40.0 * len(rows), title, *parts)


def scatter(
    points: Sequence[Point],
    title: str,
    *,
    names: tuple[str, str],
    said: tuple[Callable[[float], str], Callable[[float], str]],
    level: float | None = None,
    alike: bool = False,
) -> Markup:
    """Models by two measures, those on the front filled; ``x`` is logarithmic.

    Args:
        points: The models; one without a name has no label.
        title: What the drawing shows.
        names: Of both axes.
        said: How values of either axis are written.
        level: Where a line goes across.
        alike: Whether all points look the same, as of many there is no telling apart.
    """
    spread = [v for p in points for v in (p.y, *(p.ends or ()))] + ([] if level is None else [level])
    x = scale_of([p.x for p in points], _LEFT, _RIGHT - 10, log=True)
    y = scale_of(spread, 240.0, _TOP)
    parts: list[str] = [axes(x, y, said, names)]
    if level is not None:
        parts.append(line(x.start, y(level), x.end, y(level), "level"))
    for order, point in enumerate(points):
        i = 0 if alike else order
        at, up = x(point.x), y(point.y)
        inside = [mark(at, up, i, colour(i) if point.on_front else f"{colour(i)} hollow")]
        if point.ends is not None:
            inside.insert(0, line(at, y(point.ends[0]), at, y(point.ends[1]), f"whisker {colour(i)}"))
        tip = point.tip
        parts.append(tag("g", *inside, tabindex=0, role="img", aria_label=tip, data_tip=tip, class_="point"))
    parts += _labels(points, x, y)
    return drawing(280.0, title, *parts, interactive=True)


def _labels(points: Sequence[Point], x: Scale, y: Scale) -> Iterator[Markup]:
    """Names beside their points, towards where there is room; where a neighbour is in the way, beyond it and marked.

    Each is as near to its point's height as those before leave it, the uppermost first.
    """
    places = [(x(point.x), y(point.y) + 4) for point in points]
    taken: list[tuple[float, float, float]] = []
    for i in sorted((i for i, point in enumerate(points) if point.name), key=lambda i: places[i][1]):
        name = brief(points[i].name, WIDTH * 0.43)
        sign = -1.0 if places[i][0] + room(name) + 40 > WIDTH else 1.0
        for height in (places[i][1] + 15 * step for step in _STEPS):
            start, is_beyond = _beside(places, places[i][0], height, sign)
            low, high = sorted((start, start + sign * room(name)))
            is_free = all(abs(height - other) > 14.5 or low > right or left > high for left, right, other in taken)
            if is_free and _TOP <= height < y.start:
                taken.append((low, high, height))
                if is_beyond:
                    yield mark(start - 7 * sign, height - 4, i, f"{colour(i)} small")
                yield label(start, height, name, anchor="end" if sign < 0 else "start", class_="halo")
                break


def _beside(places: Sequence[tuple[float, float]], at: float, height: float, sign: float) -> tuple[float, bool]:
    """Where the name of a point at ``at`` begins at a height, and whether that is beyond a neighbour."""
    near = [sign * x for x, y in places if 0 < sign * (x - at) < 30 and abs(y - height) < 20]
    return (sign * (max(near) + 21), True) if near else (at + 9 * sign, False)


def ridges(
    rows: Sequence[Ridge], title: str, *, axis: str, said: Callable[[float], str], level: float | None = None
) -> Markup:
    """Distributions under each other on one logarithmic axis, each as high as the others; a bar is its interval.

    The axis reaches from the first to the last percentile of all; what lies beyond is counted at its ends.
    """
    positive = [row.values[row.values > 0] for row in rows]
    lo, hi = (float(np.percentile(np.concatenate(positive), q)) for q in (1.0, 99.0))
    known = [v for row in rows for v in (row.middle, *(row.ends or ())) if v is not None and v > 0]
    x = scale_of([lo, hi, *known, *([] if level is None else [level])], 4.0, WIDTH - 4.0, log=True, pad=0.03)
    edges = np.geomspace(x.lo, x.hi, _BINS + 1)
    bottom = _TOP - 12 + 58.0 * len(rows)
    parts: list[str] = []
    for value in x.ticks():
        parts += [line(x(value), 6, x(value), bottom + 4, "grid")]
        parts += [below(x(value), bottom + 17, said(value))]
    if level is not None:
        parts.append(line(x(level), 6, x(level), bottom, "level"))
    for i, (row, values) in enumerate(zip(rows, positive, strict=True)):
        counts, _ = np.histogram(np.clip(values, x.lo, x.hi), edges)
        base = _TOP - 12 + 58.0 * (i + 1) - 8
        outline = [(x(float(edge)), base - 32.0 * n / max(counts.max(), 1)) for edge, n in _steps(edges, counts)]
        area = " ".join(f"{a:.1f},{b:.1f}" for a, b in [(outline[0][0], base), *outline, (outline[-1][0], base)])
        parts.append(tag("polygon", points=area, class_=f"area {colour(i)}", data_tip=row.tip))
        parts.append(label(4, base - 36, brief(row.name, WIDTH - 8), class_="halo"))
        if row.middle is not None:
            ends = row.ends or (row.middle, row.middle)
            parts.append(line(x(ends[0]), base + 4, x(ends[1]), base + 4, f"interval {colour(i)}"))
            parts.append(mark(x(row.middle), base + 4, 0, f"{colour(i)} small"))
    parts.append(label(WIDTH - 4, bottom + 34, axis, anchor="end", class_="axis"))
    return drawing(bottom + 40, title, *parts)


def curves(series: Mapping[str, Sequence[float]], title: str, *, axis: str) -> Markup:
    """Lines over epochs from 1, on a logarithmic axis where all values are positive and far apart."""
    values = [v for row in series.values() for v in row if math.isfinite(v)]
    log = min(values) > 0 and max(values) / min(values) > 20
    length = max(map(len, series.values()))
    names = [brief(name, 150) for name in series]
    x = Scale(1.0, max(float(length), 1.5), _LEFT, _RIGHT - 9 - max(60.0, *map(room, names)))
    y = scale_of(values, 200.0, _TOP, log=log)
    parts: list[str] = [axes(x, y, (_whole, "{:.3g}".format), ("epoch", axis))]
    ends = apart([y(row[-1]) + 4 for row in series.values()], 15.0, y.start)
    for i, ((name, row), end) in enumerate(zip(series.items(), ends, strict=True)):
        places = [(x(float(n)), y(v)) for n, v in enumerate(row, 1)]
        parts.append(polyline(places, f"curve {colour(i)}"))
        parts.append(mark(*places[-1], i, colour(i)))
        parts.append(label(places[-1][0] + 9, end, names[i]))
        tips = (f"{name}, epoch {n}: {v:.4g}" for n, v in enumerate(row, 1))
        parts += [
            tag("circle", cx=a, cy=b, r=6.0, class_="hit", data_tip=t) for (a, b), t in zip(places, tips, strict=True)
        ]
    return drawing(240.0, title, *parts)


def stack(parts: Sequence[tuple[str, float, str, str]], title: str) -> Markup:
    """One bar of several shares; parts of one name look alike and are told in a legend, by hatching as by colour.

    Args:
        parts: Name, share of the bar from 0 to 1, what it is in words, and its class.
        title: What the bar is.
    """
    drawn: list[str] = []
    at = 0.0
    widths = [max(share * WIDTH, _LEAST_WIDTH) for _, share, _, _ in parts]
    for (name, _, tip, class_), wide in zip(parts, widths, strict=True):
        width = wide * WIDTH / sum(widths)
        drawn.append(tag("rect", x=at, y=2.0, width=width, height=30.0, class_=class_, data_tip=tip))
        drawn += _hatched(name, at, width, 2.0)
        at += width
    at = 0.0
    for name, class_ in {name: class_ for name, _, _, class_ in parts}.items():
        drawn.append(tag("path", d=f"M{at:g},40h24v30h-24z", class_=class_))
        drawn += _hatched(name, at, 24.0, 40.0)
        drawn.append(label(at + 30, 60.0, name))
        at += 44 + room(name)
    return drawing(74.0, title, *drawn)


def _hatched(name: str, x: float, width: float, y: float) -> Iterator[Markup]:
    """The lines over a part of a bar, 30 units high, that tell it from others without colours."""
    step, lean = _HATCHES.get(name, (0.0, 0.0))
    if not step:
        return
    lines = []
    for i in range(1, math.ceil((width + lean) / step)):
        foot = x - lean + i * step
        ends = [max(foot, x), min(foot + lean, x + width)] if lean else [foot, foot]
        low, high = (30.0, 0.0) if not lean else (30.0 - (ends[0] - foot), 30.0 - (ends[1] - foot))
        lines.append(f"M{ends[0]:.1f},{y + low:.1f}L{ends[1]:.1f},{y + high:.1f}")
    yield tag("path", d="".join(lines), class_="hatch")


def histogram(
    edges: Sequence[float], counts: Sequence[float], chosen: tuple[float, float], title: str, number: int
) -> Markup:
    """Counts between edges on a logarithmic height, with the chosen range marked and what it cuts off coloured."""
    x = scale_of([edges[0], edges[-1], *chosen], 6.0, WIDTH - 6.0, pad=0.02)
    top = math.log1p(max(counts, default=0.0)) or 1.0
    parts: list[str] = []
    for left, right, n in zip(edges, edges[1:], counts, strict=False):
        if n > 0:
            height = 90.0 * math.log1p(n) / top
            is_inside = right > chosen[0] and left < chosen[1]
            width = max(x(right) - x(left), 0.6)
            tip = f"{left:.4g} to {right:.4g}: {n:,.0f} values" + ("" if is_inside else ", clipped")
            class_ = colour(number) if is_inside else "clipped"
            parts.append(
                tag("rect", x=x(left), y=100 - height, width=width, height=height, class_=class_, data_tip=tip)
            )
    for end in chosen:
        parts += [line(x(end), 4, x(end), 104, "level")]
    for value in x.ticks():
        parts += [line(x(value), 100, x(value), 104, "tick"), below(x(value), 118, f"{value:.3g}")]
    return drawing(124.0, title, *parts)


def is_dominated(one: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """True where another is no worse in everything and better in something; less is better."""
    return any(all(b <= a for a, b in zip(one, other, strict=True)) and tuple(other) != tuple(one) for other in others)


def _steps(edges: NDArray[np.float64], counts: NDArray[np.int64]) -> list[tuple[float, float]]:
    """The outline of a histogram."""
    return [(e, float(n)) for left, right, n in zip(edges, edges[1:], counts, strict=False) for e in (left, right)]


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else ""
