"""Named datasets as a table: their files below the data root, how to get them. LAVIS's names are valid."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from blip.errors import DataError, hint

ROOT_VARIABLE = "BLIP_DATA"


@dataclass(frozen=True)
class Row:
    """A named dataset. Paths are relative to the data root."""

    kind: str
    """What a record is: caption (picture and text) or retrieval (the same, evaluated as retrieval)."""
    splits: dict[str, str]
    """Split -> annotation file, or pattern of shards."""
    images: str = ""
    """Folder that the records' image paths start from; empty for shards."""
    format: str = "auto"
    """Layout of the files, as `datasets.NAME.format`."""
    about: str = ""
    """What it is, and how large."""
    pictures: str = ""
    """Which pictures belong below `images`, for `prepare`."""
    annotations: str = ""
    """Which official files become the annotations, for `prepare`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the files' name."""

    @property
    def embedded(self) -> bool:
        """Whether `blip data make scenes` makes it."""
        return next(iter(self.splits.values())).startswith("scenes/")


def _scenes(split: str) -> str:
    return f"scenes/annotations/{split}.json"


_COCO = Row(
    kind="caption",
    splits={split: f"coco/annotations/coco_karpathy_{split}.json" for split in ("train", "val", "test")},
    images="coco/images",
    about="COCO 2014, Karpathy split: 113,287 / 5,000 / 5,000 pictures, 5 captions each",
    pictures="COCO's train2014.zip, val2014.zip and test2014.zip, unpacked into folders of these names",
    annotations="coco_karpathy_train.json, _val.json, _test.json as BLIP and LAVIS distribute them",
)
_FLICKR = Row(
    kind="retrieval",
    splits={split: f"flickr30k/annotations/{split}.json" for split in ("train", "val", "test")},
    images="flickr30k/images",
    about="Flickr30k: 29,000 / 1,000 / 1,000 pictures, 5 captions each",
    pictures="Flickr30k's pictures in the folder flickr30k-images (to be requested from its authors)",
    annotations="flickr30k_train.json, _val.json, _test.json as BLIP and LAVIS distribute them",
)


def _web(folder: str, file: str, images: str, about: str) -> Row:
    return Row(
        kind="caption",
        splits={"train": f"{folder}/annotations/{file}.json"},
        images=f"{folder}/{images}",
        about=about,
        pictures="the pictures behind the set's URL list, downloaded by you (img2dataset, for example)",
        annotations=f"{file}.json: a list of {{image, caption}} of the pictures that you could download",
    )


CATALOG: dict[str, Row] = {
    "scenes": Row(
        kind="retrieval",
        splits={split: _scenes(split) for split in ("train", "val", "test")},
        images="scenes",
        about="embedded: rendered scenes with exact captions, 10,000 / 500 / 500 pictures by default",
    ),
    "scenes_web": Row(
        kind="caption",
        splits={"train": _scenes("web")},
        images="scenes",
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
        about="embedded: the web scenes as webdataset shards",
    ),
    "coco_caption": _COCO,
    "coco_retrieval": Row(**{**_COCO.__dict__, "kind": "retrieval"}),
    "flickr30k": _FLICKR,
    "flickr30k_caption": Row(**{**_FLICKR.__dict__, "kind": "caption"}),
    "vg_caption": Row(
        kind="caption",
        splits={"train": "vg/annotations/vg_caption.json"},
        images="vg/images",
        about="Visual Genome: 100,000 pictures, 821,000 region captions",
        pictures="Visual Genome's images.zip and images2.zip, unpacked into VG_100K and VG_100K_2",
        annotations="vg_caption.json as BLIP and LAVIS distribute it (its absolute paths are made relative)",
    ),
    "conceptual_caption_3m": _web(
        "conceptual_caption", "cc3m", "images", "Conceptual Captions: 3 million web pictures, one text each"
    ),
    "conceptual_caption_12m": _web(
        "conceptual_caption",
        "cc12m",
        "images_12m",
        "Conceptual 12M: 10 to 12 million web pictures, one text each",
    ),
    "sbu_caption": _web(
        "sbu_captions", "sbu", "images", "SBU Captions: 860,000 Flickr pictures, one text each"
    ),
    "laion400M": Row(
        kind="caption",
        splits={"train": "laion400M/*.tar"},
        format="shards",
        about="LAION-400M as shards; BLIP-2 uses 115 million of them with CapFilt captions",
        pictures="shards of key.jpg and key.json with a caption, as img2dataset writes them",
    ),
    "capfilt14m": Row(
        kind="caption",
        splits={"train": "capfilt14m/annotations/annotation.json"},
        images="capfilt14m/images",
        about="CapFilt's bootstrapped captions of the 14-million set: 13,873,136 items",
        pictures="the pictures of COCO, VG, CC3M, CC12M and SBU under the paths that annotation.json names",
        annotations="annotation.json as LAVIS distributes it (its absolute paths are made relative)",
    ),
}


def data_root(configured: str | Path | None = None) -> Path:
    """Where datasets lie: `run.data_root`, else the environment variable BLIP_DATA, else `data`."""
    return Path(configured or os.environ.get(ROOT_VARIABLE) or "data").expanduser()


def names() -> list[str]:
    """All named datasets."""
    return list(CATALOG)


def row(name: str) -> Row:
    """The row of a named dataset.

    Raises:
        DataError: unknown name; the message has the nearest one.
    """
    if name not in CATALOG:
        raise DataError(f"no dataset {name!r} in the catalogue{hint(name, CATALOG)}")
    return CATALOG[name]


def remedy(names: Iterable[str]) -> str:
    """What to do when files of datasets are missing; empty where none of them is in the catalogue."""
    rows = {name: CATALOG[name] for name in dict.fromkeys(names) if name in CATALOG}
    steps = ["run 'blip data make scenes'"] if any(row.embedded for row in rows.values()) else []
    if real := [name for name, row in rows.items() if not row.embedded]:
        steps.append(
            f"run 'blip data prepare {' '.join(real)}', which says what to bring where, or set run.data_root"
            f" (or {ROOT_VARIABLE}) to where it is; --cfg tiny/pretrain_stage1.yaml runs now, on what"
            " 'blip data make scenes' makes"
        )
    return " and ".join(steps)
