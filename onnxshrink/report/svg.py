"""Drawing in SVG: elements with everything escaped, axes with round ticks, and text that is legible on a phone.

Colours come from the page's style sheet by class, so that one drawing serves light, dark and print. Drawings are
`WIDTH` units wide: on a phone a unit is a little less than a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from onnxshrink.report.terminal import shortened

WIDTH = 440.0
N_COLOURS = 7
"""Classes ``c0`` to ``c6``: the palette of Okabe and Ito without yellow, which no white page shows."""

_LETTER = 7.2
"""Units that a letter of a label takes in a wide font."""


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element: ``class_`` is ``class``, other underscores are hyphens, and None leaves an attribute out.

    Args:
        name: Of the element.
        children: Text, which is escaped, and elements, which are not again.
        attributes: Numbers are rounded to a hundredth of a unit.
    """
    pairs = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value))
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(pairs), inside)  # noqa: S704  our own names


def drawing(height: float, label: str, *children: str, interactive: bool = False) -> Markup:
    """A whole drawing: an image with a description, or a group where its points can be reached by keyboard."""
    return tag(
        "svg", *children, viewBox=f"0 0 {WIDTH:g} {height:g}", role="group" if interactive else "img", aria_label=label
    )


def label(x: float, y: float, words: str, *, anchor: str = "start", class_: str = "") -> Markup:
    """Text; ``y`` is its baseline."""
    return tag("text", words, x=x, y=y, text_anchor=anchor, class_=class_ or None)


def room(words: str) -> float:
    """Units that a label takes, and a little more."""
    return _LETTER * len(words)


def brief(words: str, width: float) -> str:
    """A label that fits: see `shortened`."""
    return shortened(words, max(int(width / _LETTER), 3))


def below(x: float, y: float, words: str) -> Markup:
    """The label of a tick, under it, and within the drawing."""
    half = room(words) / 2
    return label(min(max(x, half), WIDTH - half), y, words, anchor="middle")


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def mark(x: float, y: float, number: int, class_: str) -> Markup:
    """A circle, square, diamond or triangle: series differ in shape as well as in colour."""
    shapes = (
        None,
        ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        ((0, -6), (6, 0), (0, 6), (-6, 0)),
        ((0, -6), (5.5, 4), (-5.5, 4)),
        ((0, 6), (5.5, -4), (-5.5, -4)),
    )
    shape = shapes[number % len(shapes)]
    if shape is None:
        return tag("circle", cx=x, cy=y, r=4.5, class_=class_)
    return tag("polygon", points=" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shape), class_=class_)


def colour(number: int) -> str:
    """The class of a series' colour."""
    return f"c{number % N_COLOURS}"


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places.

    Attributes:
        lo: Value at ``start``.
        hi: Value at ``end``.
        start: Place in units of the drawing.
        end: Place.
        log: True where equal ratios are equally far.
    """

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; what lies outside stands at the edge."""
        lo, hi, at = self.lo, self.hi, max(value, self.lo)
        if self.log:
            lo, hi, at = math.log(lo), math.log(hi), math.log(at)
        return self.start + min(max((at - lo) / (hi - lo), 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, at least two of them where there are any."""
        if not self.log:
            return _even(self.lo, self.hi)
        decades = range(math.floor(math.log10(self.lo)), math.ceil(math.log10(self.hi)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
            found = [s * 10.0**d for d in decades for s in steps if self.lo <= s * 10.0**d <= self.hi]
            if len(found) >= 3:
                return found[:: -(-len(found) // 6)]
        return _even(self.lo, self.hi)


def scale_of(values: Sequence[float], start: float, end: float, *, log: bool = False, pad: float = 0.08) -> Scale:
    """A scale that shows all values with a margin; one value alone gets room on both sides."""
    lo, hi = min(values), max(values)
    if log:
        margin = (hi / lo) ** pad if hi > lo else 1.5
        return Scale(lo / margin, hi * margin, start, end, log=True)
    margin = (hi - lo) * pad or abs(hi) * pad or 1.0
    return Scale(lo - margin, hi + margin, start, end)


def axes(
    x: Scale, y: Scale, said: tuple[Callable[[float], str], Callable[[float], str]], names: tuple[str, str]
) -> str:
    """Grid, ticks and names of both axes; ``y.start`` is the bottom.

    Args:
        x: Horizontal.
        y: Vertical.
        said: How values of either are written.
        names: What they are.
    """
    parts = [
        label(x.start, y.end - 10, names[1], class_="axis"),
        label(x.end, y.start + 34, names[0], anchor="end", class_="axis"),
    ]
    for value in y.ticks():
        parts += [line(x.start, y(value), x.end, y(value), "grid")]
        parts += [label(x.start - 6, y(value) + 4, said[1](value), anchor="end")]
    for value in x.ticks():
        parts += [line(x(value), y.start, x(value), y.start + 4, "tick")]
        parts += [below(x(value), y.start + 17, said[0](value))]
    return Markup("").join([*parts, line(x.start, y.start, x.end, y.start, "tick")])


def apart(places: Sequence[float], least: float, most: float = math.inf) -> list[float]:
    """Places moved so that neighbours are ``least`` apart or more and none lies beyond ``most``, in the order given."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    for i, place in enumerate(reversed(order)):
        moved[place] = min(moved[place], most - i * least)
    return moved


def _even(lo: float, hi: float) -> list[float]:
    raw = (hi - lo) / 5
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(s for s in (1, 2, 5, 10) if s * step >= raw)
    return [i * step for i in range(math.ceil(lo / step), math.floor(hi / step) + 1)]


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
