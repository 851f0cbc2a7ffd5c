"""`report.html`: a run folder as one page that needs nothing else, neither files nor network."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from blip import atomic
from blip.engine.charts import line_chart, short
from blip.engine.comparison import HEADS, cells_of, notes_of
from blip.engine.display import ITM_CHANCE
from blip.engine.report_style import STYLE
from blip.engine.run_folder import (
    CONFIG_FILE,
    ENV_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    PREDICTIONS_FOLDER,
    PUBLISHED_FILE,
    REPORT_FILE,
    SKIPPED_FILES,
)
from blip.errors import DataError

THUMBNAIL_SIDE = 160
MAX_SAMPLES = 12
"""Samples, and failures, shown of each split."""
MAX_COLUMNS = 6
"""Evaluations shown side by side in a table."""

Line = dict[str, Any]

_FIRST_CHARTS = ("loss", "loss_itc", "loss_itm", "loss_lm", "itc_acc", "itm_acc", "lr", "grad_norm")
_NO_FIGURES = ("split", "step", "epoch")
_DATA_URI = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/]+=*")
_NAMES = ("image", "images", "index", "image_id", "instance_id", "question_id", "score", "right")


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder from what lies there; returns its path.

    Pictures of samples are those that predictions name under `image` or `images`: a path, absolute or from
    the run folder, or a `data:` URI as `thumbnail` makes it. A prediction failed if `right` says so, or if
    the first that it `found` is not among the `truth`.

    Raises:
        DataError: no run in that folder.
    """
    folder = Path(run_dir)
    metrics = _lines(folder / METRICS_FILE)
    config = _text(folder / CONFIG_FILE)
    if not metrics and not config:
        raise DataError(
            f"'{folder}' holds no run: neither {METRICS_FILE} nor {CONFIG_FILE}; give a run folder"
        )
    train = [line for line in metrics if line.get("split") == "train"]
    evaluations = _by_split(line for line in metrics if line.get("split") != "train")
    sections = [
        _header(folder, train, config),
        _scores(evaluations),
        _published(folder),
        section("Training", _training_charts(train), "charts"),
        section("Evaluations", _evaluation_charts(evaluations), "charts"),
        _samples(folder),
        _troubles(folder),
        details("Configuration", f"<pre>{escape(config)}</pre>" if config else ""),
        details("Environment", _environment(_text(folder / ENV_FILE))),
    ]
    path = folder / REPORT_FILE
    atomic.write_text(path, page(folder.resolve().name, sections))
    return path


def page(title: str, sections: Sequence[str]) -> str:
    """A page that needs nothing else.

    Args:
        title: as text.
        sections: as HTML; empty ones are left out.
    """
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{''.join(s for s in sections if s)}</body>\n</html>\n"
    )


def thumbnail(image: Image.Image, side: int = THUMBNAIL_SIDE) -> str:
    """A small picture as a `data:` URI."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# Numbers


def _header(folder: Path, train: Sequence[Line], config: str) -> str:
    facts = []
    for key in ("arch", "model_type", "task"):
        found = re.search(rf"^  {key}: ['\"]?([\w./-]+)", config, re.MULTILINE)
        if found:
            facts.append((key, found[1]))
    if train:
        facts.append(("steps", str(train[-1]["step"])))
        facts.append(("epoch", str(train[-1].get("epoch", "?"))))
        speeds = sorted(v for line in train if (v := _figure(line, "samples_per_s")) is not None)
        if speeds:
            facts.append(("samples/s", short(speeds[len(speeds) // 2])))
        waits = sorted(v for line in train if (v := _figure(line, "data_wait")) is not None)
        if waits:
            facts.append(("waiting for data", f"{waits[len(waits) // 2]:.0%}"))
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f"<header><h1>{escape(folder.resolve().name)}</h1><dl>{items}</dl></header>\n"


def _scores(evaluations: Mapping[str, Sequence[Line]]) -> str:
    """A table per split: figures down, evaluations across, the newest last."""
    tables = []
    for split, lines in evaluations.items():
        shown = lines[-MAX_COLUMNS:]
        names = list(dict.fromkeys(name for line in shown for name in _figure_names(line)))
        head = "".join(f"<th>step {line['step']}</th>" for line in shown)
        body = "".join(
            f"<tr><th>{escape(name)}</th>"
            + "".join(f"<td>{_cell(line, name)}</td>" for line in shown)
            + "</tr>"
            for name in names
        )
        left_out = f" <small>the last {len(shown)} of {len(lines)}</small>" if len(shown) < len(lines) else ""
        tables.append(
            f'<div class="table"><table><caption>{escape(split)}{left_out}</caption>'
            f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return section("Scores", tables, "tables")


def _published(folder: Path) -> str:
    """The last scores beside those that others have published."""
    rows = _predictions(folder / PUBLISHED_FILE)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells_of(row)) + "</tr>" for row in rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in notes_of(rows))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return section("Beside what is published", [f'<div class="table">{table}</div><ul>{notes}</ul>'])


def _training_charts(train: Sequence[Line]) -> list[str]:
    found = list(dict.fromkeys(name for line in train for name in _figure_names(line)))
    names = [name for name in _FIRST_CHARTS if name in found] + [n for n in found if n not in _FIRST_CHARTS]
    levels = {"loss_itm": (ITM_CHANCE, "chance"), "itm_acc": (2 / 3, "chance")}
    return [line_chart(name, {name: _points(train, name)}, levels.get(name)) for name in names]


def _evaluation_charts(evaluations: Mapping[str, Sequence[Line]]) -> list[str]:
    """Charts of splits that were evaluated more than once; `txt_r1`, `txt_r5` ... share one."""
    charts = []
    for split, lines in evaluations.items():
        if len(lines) < 2:
            continue
        groups: dict[str, list[str]] = {}
        for name in dict.fromkeys(name for line in lines for name in _figure_names(line)):
            stem = re.sub(r"(?:\d+|_mean)$", "", name)
            groups.setdefault(stem if stem != "r" else name, []).append(name)
        for stem, names in groups.items():
            title = f"{split} {stem if len(names) > 1 else names[0]}"
            charts.append(line_chart(title, {name: _points(lines, name) for name in names}))
    return charts


# Samples


def _samples(folder: Path) -> str:
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted((folder / PREDICTIONS_FOLDER).glob("*.json")):
        found = re.fullmatch(r"(.*?)(?:-step-(\d+))?", path.stem)
        assert found is not None
        step = int(found[2] or 0)
        if step >= newest.get(found[1], (-1, path))[0]:
            newest[found[1]] = (step, path)
    samples, failures = [], []
    for name, (_, path) in newest.items():
        predictions = _predictions(path)
        samples.append(_cards(folder, escape(name), predictions))
        failed = [p for p in predictions if _failed(p)]
        failures.append(_cards(folder, f"{escape(name)}: {len(failed)} of {len(predictions)}", failed))
    return section("Samples", samples) + section("Failures", failures)


def _cards(folder: Path, title: str, predictions: Sequence[Mapping[str, Any]]) -> str:
    """Some of the predictions, evenly spread; those with a picture first."""
    shown = [p for p in predictions if p.get("image") or p.get("images")] or predictions
    every = max(len(shown) // MAX_SAMPLES, 1)
    cards = [_card(folder, p) for p in shown[::every][:MAX_SAMPLES]]
    return f'<h3>{title}</h3><div class="cards">{"".join(cards)}</div>' if cards else ""


def _failed(prediction: Mapping[str, Any]) -> bool:
    if "right" in prediction:
        return not prediction["right"]
    found, truth = _texts(prediction.get("found")), _texts(prediction.get("truth"))
    return bool(found and truth) and found[0] not in truth


def _card(folder: Path, prediction: Mapping[str, Any]) -> str:
    images = prediction.get("images") or [prediction.get("image")]
    pictures = [_picture(folder, image) for image in images if image] if isinstance(images, list) else []
    parts = [f'<img src="{picture}" alt="">' for picture in pictures if picture]
    truth = _texts(prediction.get("truth"))
    for key, value in prediction.items():
        if key in _NAMES or value is None or value == []:
            continue
        texts = [
            f'<li class="right">{escape(t)}</li>'
            if key == "found" and t in truth
            else f"<li>{escape(t)}</li>"
            for t in _texts(value)
        ]
        parts.append(f"<h4>{escape(str(key))}</h4><ol>{''.join(texts)}</ol>")
    name = prediction.get("instance_id", prediction.get("image_id", ""))
    return f"<article>{''.join(parts)}<footer>{escape(str(name))}</footer></article>"


def _picture(folder: Path, image: Any) -> str | None:
    """A `data:` URI for what a prediction names; None where it cannot be shown."""
    if not isinstance(image, str):
        return None
    if image.startswith("data:"):
        return image if _DATA_URI.fullmatch(image) else None
    try:
        with Image.open(folder / image) as picture:  # an absolute path stays what it is
            return thumbnail(picture)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value[:5]]
    return [] if value is None else [str(value)]


# Everything else


def _troubles(folder: Path) -> str:
    parts = []
    events: dict[str, list[int]] = {}
    for line in _lines(folder / EVENTS_FILE):
        events.setdefault(str(line.get("event")), []).append(line["step"])
    for kind, steps in events.items():
        shown = ", ".join(map(str, steps[:10])) + (" ..." if len(steps) > 10 else "")
        parts.append(f"<li>{escape(kind)}: {len(steps)} times, at step {shown}</li>")
    causes: dict[str, int] = {}
    for path in sorted(folder.glob(SKIPPED_FILES)):
        for line in _json_lines(path):
            cause = f"{line.get('dataset')}: {line.get('cause')}"
            causes[cause] = causes.get(cause, 0) + 1
    parts += [f"<li>skipped records of {escape(cause)}: {count}</li>" for cause, count in causes.items()]
    return section("Troubles", [f"<ul>{''.join(parts)}</ul>"] if parts else [])


def _environment(text: str) -> str:
    try:
        content = json.loads(text)
    except ValueError:
        return ""
    rows = [(k, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for k, v in _flat(content)]
    cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return f'<div class="table"><table class="plain">{cells}</table></div>'


def _flat(content: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif key == "resumed" and isinstance(value, list):
            yield "resumed", f"{len(value)} times"
        else:
            yield f"{prefix}{key}", value


def section(title: str, parts: Sequence[str], kind: str = "") -> str:
    """Parts under a title, laid out as `kind` of the style sheet; empty where there is none."""
    content = "".join(part for part in parts if part)
    return f'<section><h2>{title}</h2><div class="{kind}">{content}</div></section>\n' if content else ""


def details(title: str, content: str) -> str:
    """Something that is shown when it is asked for; empty where there is nothing."""
    return f"<details><summary>{title}</summary>{content}</details>\n" if content else ""


# Reading


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json_lines(path: Path) -> list[Line]:
    lines = []
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a killed run may leave half a line
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _lines(path: Path) -> list[Line]:
    """Lines that belong to a step."""
    return [line for line in _json_lines(path) if isinstance(line.get("step"), int)]


def _predictions(path: Path) -> list[Mapping[str, Any]]:
    try:
        content = json.loads(_text(path))
    except ValueError:
        return []
    return [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []


def _by_split(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Evaluations per split, in order of their steps."""
    found: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        found.setdefault(str(line.get("split")), []).append(line)
    return found


def _figure(line: Line, name: str) -> float | None:
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def _figure_names(line: Line) -> list[str]:
    return [name for name in line if name not in _NO_FIGURES and _figure(line, name) is not None]


def _points(lines: Sequence[Line], name: str) -> list[tuple[float, float]]:
    return [(line["step"], value) for line in lines if (value := _figure(line, name)) is not None]


def _cell(line: Line, name: str) -> str:
    value = _figure(line, name)
    return "" if value is None else short(value)
