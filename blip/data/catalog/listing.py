"""The catalogue for people and for programs: a table of all rows, and everything about one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from blip.data.catalog.rows import Row, Size
from blip.data.catalog.table import CATALOG, row

_SPLITS = ("train", "val", "test")


def as_data(name: str, root: Path, missing: list[str]) -> dict[str, Any]:
    """Everything about a dataset, as JSON can hold it.

    Args:
        name: in the catalogue.
        root: the data root.
        missing: files and folders that are not on disk.
    """
    entry = row(name)
    return {
        "name": name,
        "same_as": entry.same_as or None,
        "also_called": _also_called(name),
        "kind": entry.kind,
        "group": entry.group,
        "held": entry.held or None,
        "format": entry.layout,
        "about": entry.about,
        "licence": entry.licence,
        "sizes": {split: size._asdict() for split, size in entry.sizes.items()},
        "splits": {split: list(entry.of(split)) for split in entry.splits},
        "beside": entry.others,
        "images": entry.images or None,
        "data_root": str(root),
        "missing": missing,
        "official": [
            {"makes": one.makes, "of": list(one.files), "format": one.format} for one in entry.takes
        ],
        "archives": [{"names": one.names.split("|"), "to": one.to} for one in entry.archives],
        "addresses": dict(entry.remote),
        "address_lists": list(entry.urls.files) if entry.urls else [],
    }


def table(names: list[str], missing: dict[str, list[str]]) -> list[str]:
    """Lines with a dataset each, under the names of their groups.

    Args:
        names: of datasets.
        missing: for each, the files and folders that are not on disk.
    """
    lines = [f"{'dataset':<34}{'kind':<16}{'InstructBLIP':<14}{'size: train / val / test':<32}on disk"]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(row(name).group, []).append(name)
    for group, some in groups.items():
        lines.append(f"{group}:")
        for name in some:
            entry = row(name)
            held = f"held {entry.held}" if entry.held else ""
            cells = f"  {name:<32}{entry.kind:<16}{held:<14}{_counts(entry):<32}"
            lines.append(cells + _state(entry, missing[name]))
    return lines


def _state(entry: Row, missing: list[str]) -> str:
    if not missing:
        return "ready"
    here = [split for split in entry.splits if not set(entry.of(split)) & set(missing)]
    places = len(entry.files) + len(entry.others) + bool(entry.images)
    has = f", has {', '.join(here)}" if here else ""
    return f"missing {len(missing)} of {places} places{has}"


def _counts(entry: Row) -> str:
    sizes = [entry.sizes.get(split, Size(0)) for split in _SPLITS]
    known = [size.records or size.pictures for size in sizes]
    return " / ".join(f"{count:,}" if count else "-" for count in known) if any(known) else "-"


def details(name: str, root: Path, missing: list[str]) -> list[str]:
    """Everything about a dataset, in lines.

    Args:
        name: in the catalogue.
        root: the data root.
        missing: files and folders that are not on disk.
    """
    entry = row(name)
    held = f"; InstructBLIP holds it {entry.held}" if entry.held else ""
    told = {
        "also called": ", ".join(_also_called(name)),
        "task": f"{entry.group}; records of kind {entry.kind}{held}",
        "licence": entry.licence,
        **{
            split: f"{_size(entry, split)}{entry.layout}, {', '.join(entry.of(split))}"
            for split in entry.splits
        },
        "beside them": ", ".join(entry.others),
        "pictures in": f"{root / entry.images}{os.sep}" if entry.images else "",
        "pictures": entry.pictures,
        "annotations": entry.annotations,
    }
    several = {
        "made of": [f"{' + '.join(map(_either, one.files))} -> {one.makes}" for one in entry.takes],
        "unpacked": [f"{_either(one.names)} -> {one.to}" for one in entry.archives],
        "address": list(entry.remote.values()),
        "missing": [str(root / place) for place in missing] or ["nothing; 'blip data check' reads it all"],
    }
    lines = [f"{name}: {entry.about}"]
    lines += [f"  {key + ':':<14}{text}" for key, text in told.items() if text]
    return lines + [f"  {key + ':':<14}{text}" for key, texts in several.items() for text in texts]


def _also_called(name: str) -> list[str]:
    """The other names of a dataset's files, most of them LAVIS's."""
    first = row(name).same_as or name
    return [other for other, some in CATALOG.items() if first in (other, some.same_as) and other != name]


def _either(names: str) -> str:
    return names.replace("|", " or ")


def _size(entry: Row, split: str) -> str:
    size = entry.sizes.get(split)
    known = [
        f"{count:,} {noun}" for count, noun in zip(size or (), ("records", "pictures"), strict=False) if count
    ]
    return " of ".join(known) + "; " if known else ""
