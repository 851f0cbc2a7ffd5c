"""`report.html` of a round: what was kept and removed, how scores are spread, and examples as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from blip import atomic, keyed
from blip.capfilt.select import ORIGINS, RANGES, Thresholds, choose
from blip.capfilt.units import Unit
from blip.capfilt.work import Work
from blip.data.samples import BadRecord, read_image
from blip.engine.charts import histogram
from blip.engine.report import details, page, section, thumbnail
from blip.engine.run_folder import CONFIG_FILE, REPORT_FILE
from blip.tasks.capfilt import KeepConfig

EXAMPLES = 12
"""Of each kind that are shown."""
_LOOKED_AT = 4000
"""Pictures of a dataset among which examples are looked for."""


def write_report(
    folder: Path, summary: Mapping[str, Any], work: Sequence[Work], keep: KeepConfig, least: Thresholds
) -> Path:
    """Write the page; returns its path.

    Args:
        folder: of the round.
        summary: as `summary.json` has it.
        work: all units.
        keep: the rules.
        least: thresholds that follow from them.
    """
    title = f"{folder.resolve().parent.name}, round {summary['round']}"
    parts = [_header(title, summary)]
    for name, counts in summary["datasets"].items():
        units = [one for one in work if one.pool.name == name]
        parts.append(_counts(name, counts))
        parts.append(_truth(name, counts.get("truth", {})))
        parts.append(section(f"{escape(name)}: scores", _histograms(counts, least), "charts"))
        accepted, rejected = _examples(units, keep, least)
        for what, found in (("kept", accepted), ("removed", rejected)):
            for origin in ORIGINS:
                cards = found[origin]
                heading = f"{escape(name)}: {origin} texts {what}"
                parts.append(section(heading, cards, "cards"))
        if causes := counts["unreadable"]:
            rows = "".join(f"<li>{escape(cause)}: {count}</li>" for cause, count in causes.items())
            parts.append(section(f"{escape(name)}: unreadable", [f"<ul>{rows}</ul>"]))
    config = folder.parent / CONFIG_FILE
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    parts.append(details("Configuration", f"<pre>{escape(text)}</pre>" if text else ""))
    path = folder / REPORT_FILE
    atomic.write_text(path, page(title, parts))
    return path


def _header(title: str, summary: Mapping[str, Any]) -> str:
    facts = {"captioner": summary["captioner"], "filter": summary["filter"]}
    facts |= {
        f"least {name} of {origin} texts": f"{value:.4g}"
        for origin, bounds in summary["thresholds"].items()
        for name, value in bounds.items()
    }
    items = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v
    )
    return f"<header><h1>{escape(title)}</h1><dl>{items}</dl></header>\n"


def _counts(name: str, counts: Mapping[str, Any]) -> str:
    head = "<th></th><th>texts</th><th>kept</th><th>removed</th>"
    rows = [
        f"<tr><th>{origin}</th><td>{count}</td><td>{counts['kept'].get(origin, 0)}</td>"
        f"<td>{counts['removed'][origin]:.1%}</td></tr>"
        for origin, count in counts["texts"].items()
    ]
    rows += [
        f"<tr><th>{escape(c)}</th><td>{n}</td><td></td><td></td></tr>"
        for c, n in counts["not_judged"].items()
    ]
    caption = f"{counts['pictures']} pictures, {counts['without_text']} without any text now"
    table = (
        f'<div class="table"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return section(escape(name), [table], "tables")


def _truth(name: str, found: Mapping[str, Any]) -> str:
    """What is known of the embedded web scenes."""
    if not found:
        return ""
    rows = [
        f"<tr><th>{escape(kind)}</th><td>{row['texts']}</td><td>{row['kept']}</td>"
        f"<td>{1 - row['kept'] / max(row['texts'], 1):.1%}</td></tr>"
        for kind, row in found["kinds"].items()
    ]
    head = "<th></th><th>texts</th><th>kept</th><th>removed</th>"
    figures = "".join(
        f"<li>{escape(key)}: {value:.4g}</li>" for key, value in found.items() if isinstance(value, float)
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    table = f'<div class="table"><table>{body}</table></div>'
    return section(f"{escape(name)}: beside the truth", [table, f"<ul>{figures}</ul>"], "tables")


def _histograms(counts: Mapping[str, Any], least: Thresholds) -> list[str]:
    titles = {"itm": "ITM, probability of a match", "itc": "ITC, cosine"}
    found = []
    for name, bins in counts["histograms"].items():
        bounds = {least[origin][name] for origin in bins if name in least[origin]}
        level = (bounds.pop(), "kept from here") if len(bounds) == 1 else None
        found.append(histogram(titles[name], bins, RANGES[name], level))
    return found


def _examples(
    work: Sequence[Work], keep: KeepConfig, least: Thresholds
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Cards of kept and of removed texts, by origin, of pictures here and there."""
    accepted: dict[str, list[str]] = {origin: [] for origin in ORIGINS}
    rejected: dict[str, list[str]] = {origin: [] for origin in ORIGINS}
    looked = 0
    for at in keyed.permutation(len(work), "examples").tolist():
        unit, journal = work[at].unit, work[at].journal
        for number, line in enumerate(journal.lines()):
            looked += 1
            kept = choose(line, keep, least)
            for text in line.get("texts", ()):
                chosen = (accepted if any(text is one for one in kept) else rejected)[text["origin"]]
                if len(chosen) < EXAMPLES and (card := _card(unit, number, line, text)):
                    chosen.append(card)
        unit.close()
        full = all(len(some) == EXAMPLES for kind in (accepted, rejected) for some in kind.values())
        if full or looked > _LOOKED_AT:
            break
    return accepted, rejected


def _card(unit: Unit, number: int, line: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    try:
        entry = unit.entry(number)
        picture = thumbnail(read_image(entry.picture, entry.name))
    except (BadRecord, OSError):
        return ""
    scores = " ".join(f"{name} {text[name]:.3f}" for name in RANGES if name in text)
    return (
        f'<article><img src="{picture}" alt=""><ol><li>{escape(str(text["caption"]))}</li></ol>'
        f"<h4>{scores}</h4><footer>{escape(line['picture'])}</footer></article>"
    )
