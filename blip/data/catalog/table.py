"""Named datasets as a table: their files below the data root, how to get them. LAVIS's names are valid."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from blip.config.lavis import refused_dataset
from blip.data.catalog.captions import CAPTIONS
from blip.data.catalog.instruct import ALIASES, INSTRUCT, MEMBERS, OTHER_GROUPS, QUESTIONS_OF
from blip.data.catalog.labelled import LABELLED
from blip.data.catalog.questions import QUESTIONS
from blip.data.catalog.rows import ALL, Row
from blip.data.scenes.questions import answers
from blip.errors import DataError, hint, nearest
from blip.places import ROOT_VARIABLE, data_root

__all__ = ["CATALOG", "data_root", "instructblip", "names", "remedy", "row", "similar"]

_SIMILAR = 4
"""Most datasets that a message proposes."""


def _scenes(pattern: str, *splits: str) -> dict[str, str | tuple[str, ...]]:
    return {split: f"scenes/annotations/{pattern.format(split)}.json" for split in splits}


CATALOG: dict[str, Row] = {
    "scenes": Row(
        kind="retrieval",
        splits=_scenes("{}", *ALL),
        images="scenes",
        about="embedded: rendered scenes with exact captions, 10,000 / 500 / 500 pictures by default",
        judged={split: f"scenes/annotations/records_{split}.json" for split in ALL},
    ),
    "scenes_vqa": Row(
        kind="vqa",
        splits=_scenes("vqa_{}", *ALL),
        images="scenes",
        about="embedded: questions of eleven types about scenes, one answer each",
    ),
    "scenes_instruct": Row(
        kind="instruct",
        splits=_scenes("instruct_{}", *ALL),
        images="scenes",
        about="embedded: instructions of nine types about scenes, one output each",
    ),
    "scenes_nlvr": Row(
        kind="nlvr",
        splits=_scenes("nlvr_{}", *ALL),
        images="scenes",
        about="embedded: sentences about two scenes, true or false",
    ),
    "scenes_answers": Row(
        kind="classification",
        splits=_scenes("vqa_{}", *ALL),
        images="scenes",
        columns={"sentence": "question", "label": "answer"},
        classes=tuple(answers()),
        about="embedded: the same questions, whose answers are classes",
    ),
    "scenes_web": Row(
        kind="caption",
        splits={"train": "scenes/annotations/web.json"},
        images="scenes",
        judged={"train": "scenes/annotations/records_web.json"},
        corrupted={"train": "scenes/annotations/web_truth.json"},
        about="embedded: scenes whose captions are corrupted at a known rate, for CapFilt",
    ),
    "scenes_shards": Row(
        kind="caption",
        splits={"train": "scenes/shards/train-*.tar"},
        format="shards",
        about="embedded: the training scenes as webdataset shards, one caption each",
    ),
    "scenes_web_shards": Row(
        kind="caption",
        splits={"train": "scenes/shards/web-*.tar"},
        format="shards",
        judged={"train": "scenes/annotations/records_web.json"},
        corrupted={"train": "scenes/annotations/web_truth.json"},
        about="embedded: the web scenes as webdataset shards",
    ),
    **CAPTIONS,
    **QUESTIONS,
    **LABELLED,
    **INSTRUCT,
}
for _name, _other in QUESTIONS_OF.items():
    CATALOG[_name] = replace(
        CATALOG[_other],
        splits={"train": CATALOG[_other].splits["train"]},
        about=f"the training questions of {_other}, to be asked for their answers",
        templates="vqg",
        answer_list="",
        official={},
        sizes={"train": CATALOG[_other].sizes["train"]},
    )
for _group, _some in OTHER_GROUPS.items():
    for _name in _some:
        CATALOG[_name] = replace(CATALOG[_name], group=_group)
for _name, _member in MEMBERS.items():
    _held: Literal["in", "out"] = "in" if _member.held_in else "out"
    CATALOG[_name] = replace(CATALOG[_name], group=_member.group, held=_held)
for _name, _other in ALIASES.items():
    CATALOG[_name] = replace(CATALOG[_other], same_as=_other)


def names() -> list[str]:
    """All named datasets."""
    return list(CATALOG)


def row(name: str) -> Row:
    """The row of a named dataset.

    Raises:
        DataError: unknown name; the message has the nearest one.
    """
    if name not in CATALOG:
        reason = refused_dataset(name) or similar(name).removeprefix("; ")
        raise DataError(f"no dataset {name!r} in the catalogue; {reason}")
    return CATALOG[name]


def similar(name: str) -> str:
    """The end of a message about an unknown name: datasets that papers or files call so; else as `hint`."""
    wanted = _plain(name)
    known: dict[str, list[str]] = {}
    for own, row in CATALOG.items():
        if row.same_as or row.templates == "vqg":
            continue
        title = re.split("[:,]", row.about)[0]
        stems = [Path(file).stem for file in row.files]
        for key in {*map(_plain, (own, title, row.files[0].split("/")[0], *stems))}:
            known.setdefault(key, []).append(own)
    found = known.get(wanted) or [
        own for key, some in known.items() if wanted and key.startswith(wanted) for own in some
    ]
    if name in CATALOG or not found or nearest(name, CATALOG, cutoff=0.85):
        return hint(name, CATALOG)
    *first, last = map(repr, dict.fromkeys(found[:_SIMILAR]))
    return f"; did you mean {', '.join(first) + ' or ' if first else ''}{last}?"


def _plain(name: str) -> str:
    """A name without what people spell differently: capitals, hyphens, underscores."""
    return re.sub(r"[\W_]+", "", name.lower())


def instructblip(held_in: bool | None = None) -> list[str]:
    """InstructBLIP's 26 datasets; only those that it trains on, or only those that it does not."""
    return [name for name, member in MEMBERS.items() if held_in is None or member.held_in == held_in]


def remedy(names: Iterable[str]) -> str:
    """What to do when files of datasets are missing; empty where none of them is in the catalogue."""
    rows = {name: CATALOG[name] for name in dict.fromkeys(names) if name in CATALOG}
    steps = ["run 'blip data make scenes'"] if any(row.embedded for row in rows.values()) else []
    if real := [name for name, row in rows.items() if not row.embedded]:
        steps.append(
            f"run 'blip data prepare {' '.join(real)}', which says what to bring where, or set run.data_root"
            f" (or {ROOT_VARIABLE}) to where it is"
        )
    return " and ".join(steps)
