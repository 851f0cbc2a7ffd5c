"""What the claims came to: a table and a plot of each, and one page of all."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from blip.engine.charts import short, ticks
from blip.engine.report import page, section
from run_scripts.claims.claims import AGREES, DISAGREES, UNDECIDED, Claim, Measure, Result, deviation

LEFT, WIDTH, ROW, TOP, BOTTOM, RIGHT = 170, 460, 22, 24, 26, 14
BLUE, RED = "#4477aa", "#cc6677"
MARKS = dict.fromkeys(AGREES, "✓") | dict.fromkeys(UNDECIDED, "≈") | dict.fromkeys(DISAGREES, "✗")
LEGEND = (
    "Figures are of 500 test pictures in groups of five with the same shapes and the same colors: to know"
    " only which occur is right in one of five at R@1. 'By ITC alone' ranks by cosine, the other R@1 re-rank"
    " the best 16 by ITM. 'Stated attributes right' is the share of what captions state that holds for the"
    " picture.",
    "A difference of means counts (✓ yes, ✗ the opposite) where it exceeds the spread, the standard deviation"
    " of the difference of two single runs over seeds; ≈ within the spread: it points the paper's way, but"
    " does not count; ≈ not seen: not even that. Where the paper finds none: ✓ no difference seen, or"
    " ✗ a difference. With three seeds, chance alone makes one comparison in twelve a yes, and one in twelve"
    " the opposite. Seeds are those of training; pictures, tower and language models are the same for all,"
    " so another run of everything may move outcomes that are near to the spread.",
)
"""How the tables are to be read, in paragraphs."""


def cell(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):.{digits}f}"


def shown(result: Result) -> list[Measure]:
    """The measures that any arm has."""
    return [one for one in result.claim.measures if any(one.name in arm for arm in result.values.values())]


def table(result: Result) -> list[list[str]]:
    """Rows of cells, the first with the headings."""
    claim, measures = result.claim, shown(result)
    rows = [["", *result.values]]
    for one in measures:
        cells = [cell(arm[one.name], one.digits) if one.name in arm else "" for arm in result.values.values()]
        rows.append([one.name, *cells])
    if claim.paper:
        rows.append(
            [f"the paper: {claim.paper_columns}", *(claim.paper.get(arm, "") for arm in result.values)]
        )
    return rows


def findings(result: Result) -> list[list[str]]:
    """Every comparison: what the paper says of two arms, and whether it is so here."""
    rows = [["", "is, in the paper,", "", "by", "difference here", "spread", ""]]
    for one in result.compared():
        digits = one.measure.digits
        spread = "" if one.spread != one.spread else f"{one.spread:.{digits}f}"
        words = f"{MARKS.get(one.verdict, '')} {one.verdict}".strip()
        found = [one.measure.name, f"{one.gain:+.{digits}f}", spread, words]
        rows.append([one.better, one.how, one.worse, *found])
    for bound, value in result.reached():
        digits = next(m.digits for m in result.claim.measures if m.name == bound.measure)
        words = "✓ yes" if value >= bound.least else "✗ no"
        least = f"{bound.least:.{digits}f}"
        rows.append(
            [bound.arm, "(asked here) at least", least, bound.measure, f"{value:.{digits}f}", "", words]
        )
    return rows


def plot(result: Result) -> str:
    """SVG: for each measure that the claim is about, the figure of every seed, and their mean."""
    named = {name for one in result.claim.expected for name in one.measures}
    measures = [one for one in shown(result) if one.name in named]
    height = TOP + ROW * len(result.values) + BOTTOM
    total = height * len(measures)
    panels = [_panel(result, one, i * height) for i, one in enumerate(measures)]
    return _tag(
        "svg",
        "".join(panels),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {total}",
        width=WIDTH,
        height=total,
        font_family="sans-serif",
        font_size=11,
        fill="currentColor",
        role="img",
        aria_label=result.claim.title,
    )


def _panel(result: Result, measure: Measure, top: float) -> str:
    rows = {arm: values[measure.name] for arm, values in result.values.items() if measure.name in values}
    every = [value for values in rows.values() for value in values]
    room = (max(every) - min(every)) * 0.06 or abs(max(every)) * 0.1 or 1.0
    low, high = min(every) - room, max(every) + room
    bottom = top + TOP + ROW * len(rows)

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def upright(value: float, ends: tuple[float, float], **how: object) -> str:
        return _tag("line", x1=x(value), x2=x(value), y1=ends[0], y2=ends[1], **how)

    parts = [_tag("text", escape(measure.name), x=LEFT, y=top + 14, font_weight="bold")]
    for mark in ticks(low, high, 5):
        parts.append(upright(mark, (top + TOP, bottom), stroke="currentColor", stroke_opacity=0.15))
        parts.append(_tag("text", short(mark), x=x(mark), y=bottom + 13, text_anchor="middle"))
    for i, (arm, values) in enumerate(rows.items()):
        y = top + TOP + ROW * (i + 0.5)
        mean = statistics.mean(values)
        parts.append(_tag("text", escape(arm), x=LEFT - 8, y=y + 4, text_anchor="end"))
        if len(values) > 1:
            ends = {"x1": x(mean - deviation(values)), "x2": x(mean + deviation(values))}
            parts.append(_tag("line", **ends, y1=y, y2=y, stroke=BLUE, stroke_width=6, stroke_opacity=0.35))
        parts.append(upright(mean, (y - 7, y + 7), stroke=BLUE, stroke_width=2.5))
        for seed, value in zip(result.seeds, values, strict=True):
            told = _tag("title", escape(f"{arm}, seed {seed}: {value:.{measure.digits}f}"))
            parts.append(_tag("circle", told, cx=x(value), cy=y, r=3, fill=RED))
    return "".join(parts)


def _tag(name: str, content: str = "", **attributes: object) -> str:
    """An element; `font_size` is its attribute `font-size`."""
    written = {
        key.replace("_", "-"): f"{value:.5g}" if isinstance(value, float) else escape(str(value), quote=True)
        for key, value in attributes.items()
    }
    opened = " ".join([name, *(f'{key}="{value}"' for key, value in written.items())])
    return f"<{opened}>{content}</{name}>" if content else f"<{opened}/>"


def write_claim(result: Result, folder: Path) -> None:
    """`NAME.json`, `NAME.md` with the tables, and `NAME.svg` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = result.claim
    (folder / f"{claim.name}.json").write_text(
        json.dumps(result.as_values(), indent=1) + "\n", encoding="utf-8"
    )
    (folder / f"{claim.name}.svg").write_text(plot(result) + "\n", encoding="utf-8")
    seeds = ", ".join(map(str, result.seeds))
    lines = [f"# {claim.title} ({claim.source}): {result.verdict()}", "", claim.about, ""]
    lines += [f"Means of seeds {seeds} and standard deviations.", "", *_markdown(table(result)), ""]
    lines += [*_markdown(findings(result)), "", *(part for text in LEGEND for part in (text, ""))]
    lines += [f"![{claim.name}]({claim.name}.svg)", "", *([claim.tried, ""] if claim.tried else [])]
    (folder / f"{claim.name}.md").write_text("\n".join(lines), encoding="utf-8")


def write_page(results: Sequence[Result], lost: Sequence[tuple[Claim, str]], folder: Path) -> Path:
    """One page of all claims; returns where it is.

    Args:
        results: what has an outcome.
        lost: what has none, with the reason.
        folder: of the page.
    """
    summary = [["claim", "", "outcome", "minutes of its runs, shared ones too"]]
    summary += [[r.claim.title, r.claim.source, r.verdict(), f"{r.minutes:.0f}"] for r in results]
    summary += [[one.title, one.source, f"no outcome: {why}", ""] for one, why in lost]
    told = (
        "<p>Every claim is tried with the embedded pictures and models of one to two million weights, over"
        " seeds. What these pictures do not show may still hold for photographs.</p>"
    )
    legend = "".join(f"<p>{escape(text)}</p>" for text in LEGEND)
    parts = [section("The papers' claims on drawings", [told, _html(summary), legend])]
    for result in results:
        claim = result.claim
        seeds = ", ".join(map(str, result.seeds))
        content = [
            f"<p>{escape(claim.source)}. <b>{escape(result.verdict())}</b>. {escape(claim.about)}</p>",
            f"<p>Means of seeds {seeds} ± standard deviation; {result.minutes:.0f} minutes of runs.</p>",
            *(_html(table(result)), _html(findings(result)), f"<figure>{plot(result)}</figure>"),
            f"<p>{escape(claim.tried)}</p>" if claim.tried else "",
        ]
        parts.append(section(escape(claim.title), content))
    path = folder / "claims.html"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(page("Claims", parts), encoding="utf-8")
    return path


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [head, f"|{'---|' * len(rows[0])}", *rest]


def _html(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    parts = ["".join(f"<th>{escape(one)}</th>" for one in head)]
    parts += ["".join(f"<td>{escape(one)}</td>" for one in row) for row in rest]
    return f"<table>{''.join(f'<tr>{one}</tr>' for one in parts)}</table>"
