"""Charts as SVG text: no drawing package, readable on light and dark ground."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

MAX_POINTS = 300
COLOURS = 6
"""Number of colours that the style sheet defines as `--c1` ...; further lines start again."""

WIDTH, HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 24


def line_chart(title: str, lines: Mapping[str, Points], level: tuple[float, str] | None = None) -> str:
    """A chart as HTML `<figure>`; empty text where no line has a point.

    Args:
        title: what is drawn; with a single line, its last value is shown beside it.
        lines: name -> (x, y) points in order of x, finite.
        level: a value and its name, drawn as a dashed line.
    """
    lines = {name: thin(points) for name, points in lines.items() if points}
    if not lines:
        return ""
    values = [y for points in lines.values() for _, y in points]
    log = is_wild(values)
    low, high = _range([*values, *([level[0]] if level and not log else [])], log)
    steps = [x for points in lines.values() for x, _ in points]
    scale = _Scale(min(steps), max(steps), low, high, log)
    parts = [_grid(scale)]
    if level and low <= level[0] <= high:
        y = scale.y(level[0])
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{WIDTH - _RIGHT}" y="{y - 3:.1f}" text-anchor="end">{escape(level[1])}</text>'
        )
    for i, (name, points) in enumerate(lines.items()):
        parts.append(_line(scale, name, points, i % COLOURS + 1))
    return (
        f'<figure><figcaption>{_caption(title, lines, log)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def histogram(
    title: str,
    bins: Mapping[str, Sequence[int]],
    span: tuple[float, float],
    level: tuple[float, str] | None = None,
) -> str:
    """A chart of shares per bin as HTML `<figure>`; empty text where nothing was counted.

    Args:
        title: what is drawn.
        bins: name -> counts, in equal steps over `span`.
        span: least and greatest value.
        level: a value and its name, drawn as a dashed line.
    """
    totals = {name: sum(counts) for name, counts in bins.items()}
    shares = {n: [count / totals[n] for count in counts] for n, counts in bins.items() if totals[n]}
    if not shares:
        return ""
    # Values far from all others would press the rest flat.
    used = [i for i in range(len(next(iter(shares.values())))) if any(some[i] for some in shares.values())]
    first, last = used[0], used[-1] + 1
    step = (span[1] - span[0]) / len(next(iter(shares.values())))
    left, right = span[0] + first * step, span[0] + last * step
    scale = _Scale(left, right, 0.0, max(max(some) for some in shares.values()) * 1.05, False)
    parts = [_grid(scale)]
    if level and left <= level[0] <= right:
        x = scale.x(level[0])
        parts.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x + 3:.1f}" y="{_TOP + 8}">{escape(level[1])}</text>')
    for i, some in enumerate(shares.values()):
        corners = [(left + (k - first) * step, some[k]) for k in range(first, last)]
        places = " ".join(
            f"{scale.x(x):.1f},{scale.y(y):.1f} {scale.x(x + step):.1f},{scale.y(y):.1f}" for x, y in corners
        )
        parts.append(f'<polyline style="--c:var(--c{i % COLOURS + 1})" points="{places}"/>')
    keys = "".join(
        f'<span class="key" style="--c:var(--c{i % COLOURS + 1})">{escape(name)} {totals[name]}</span>'
        for i, name in enumerate(shares)
    )
    return (
        f'<figure><figcaption><b>{escape(title)}</b> {keys}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def thin(points: Points, most: int = MAX_POINTS) -> Points:
    """At most `most` points; each is the mean of as many neighbours. The last point stays."""
    if len(points) <= most:
        return points
    size = math.ceil((len(points) - 1) / (most - 1))
    groups = [points[i : min(i + size, len(points) - 1)] for i in range(0, len(points) - 1, size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups] + [points[-1]]


def is_wild(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis is needed: few values far above the rest would press it flat."""
    if len(values) < 5 or min(values) <= 0:
        return False
    return max(values) > 20 * sorted(values)[len(values) // 2]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover a range, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if float(value).is_integer() and abs(value) < 1e4:
        return f"{value:.0f}"
    if abs(value) >= 1000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


class _Scale:
    """From values to places in the drawing."""

    def __init__(self, left: float, right: float, low: float, high: float, log: bool) -> None:
        self.left, self.right = left, right if right > left else left + 1
        self.low, self.high, self.log = low, high, log

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    # Losses, accuracies and rates are not negative; an axis below zero would mislead.
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _grid(scale: _Scale) -> str:
    if scale.log:
        exponents = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        marks = [10.0**e for e in exponents if scale.low <= 10.0**e <= scale.high]
    else:
        marks = ticks(scale.low, scale.high)
    parts = []
    for mark in marks:
        y = scale.y(mark)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{short(mark)}</text>')
    for mark in ticks(scale.left, scale.right, 5):
        anchor = "end" if scale.x(mark) > WIDTH - _RIGHT - 8 else "middle"
        parts.append(
            f'<text x="{scale.x(mark):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{short(mark)}</text>'
        )
    return "".join(parts)


def _line(scale: _Scale, name: str, points: Points, colour: int) -> str:
    style = f'style="--c:var(--c{colour})"'
    places = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
    parts = [f'<polyline {style} points="{places}"/>'] if len(points) > 1 else []
    if len(points) <= 30:
        for x, y in points:
            text = escape(f"{name}: {short(y)} after step {x:.0f}")
            place = f'cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="2.6"'
            parts.append(f"<circle {style} {place}><title>{text}</title></circle>")
    return "".join(parts)


def _caption(title: str, lines: Mapping[str, Points], log: bool) -> str:
    note = " <small>log scale</small>" if log else ""
    if len(lines) == 1:
        (points,) = lines.values()
        return f"<b>{escape(title)}</b> {short(points[-1][1])}{note}"
    keys = "".join(
        f'<span class="key" style="--c:var(--c{i % COLOURS + 1})">{escape(name)}'
        f" {short(points[-1][1])}</span>"
        for i, (name, points) in enumerate(lines.items())
    )
    return f"<b>{escape(title)}</b>{note} {keys}"
