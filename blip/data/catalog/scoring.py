"""What counts as right on each named dataset, and who scores what is secret there."""

from __future__ import annotations

from dataclasses import dataclass, field

from blip.data.catalog.instruct import ALIASES


@dataclass(frozen=True)
class Scoring:
    """How answers to a dataset are scored where its section does not say."""

    measure: str = ""
    """As `datasets.NAME.measure`; empty: the VQA accuracy."""
    server: str = ""
    """Format of what its evaluation server takes, a key of `tasks.submissions.SERVERS`; empty: VQA's."""
    relevance: dict[str, str] = field(default_factory=dict)
    """Split -> file of how relevant people found each of a question's candidates."""


SCORING: dict[str, Scoring] = {
    "gqa": Scoring("exact", server="gqa"),
    "ok_vqa": Scoring("vqa"),
    "coco_vqa": Scoring("vqa"),
    "text_vqa": Scoring("vqa"),
    "vizwiz_vqa": Scoring("vqa", server="vizwiz"),
    "vg_vqa": Scoring("exact"),
    "ocr_vqa": Scoring("exact"),
    "aok_vqa": Scoring("direct", server="aok_vqa"),
    "scienceqa": Scoring("choice"),
    "iconqa": Scoring("choice"),
    "visdial": Scoring(
        "ranks",
        server="visdial",
        relevance={"val": "visdial/annotations/visdial_1.0_val_dense_annotations.json"},
    ),
    "hateful_memes": Scoring("auc"),
    "msvd_qa": Scoring("exact"),
    "msrvtt_qa": Scoring("exact"),
    "ivqa": Scoring("pairs"),
}


def scoring(name: str) -> Scoring:
    """How a dataset of this name is scored, LAVIS's other names included."""
    return SCORING.get(ALIASES.get(name, name), Scoring())
