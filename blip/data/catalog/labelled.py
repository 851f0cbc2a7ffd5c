"""Rows of sentences with labels, about one picture or two."""

from __future__ import annotations

from dataclasses import replace

from blip.data.catalog.captions import FLICKR_PICTURES
from blip.data.catalog.rows import (
    ALL,
    BLIP,
    COCO,
    COCO_LICENCE,
    FLICKR_LICENCE,
    INSTRUCTED,
    Archive,
    Official,
    Row,
    coco,
    remote,
    sizes,
)

_NAMES = {"train": "train", "val": "dev", "test": "test"}

LABELLED: dict[str, Row] = {
    "nlvr": Row(
        kind="nlvr",
        splits={split: f"nlvr/annotations/{name}.json" for split, name in _NAMES.items()},
        images="nlvr/images",
        about="NLVR2: sentences about two pictures, true or false; test is test-P",
        pictures="NLVR2's pictures in the folders images/train, dev and test1 (to be requested from its"
        " authors)",
        annotations="nlvr_train.json, nlvr_dev.json, nlvr_test.json as BLIP and LAVIS distribute them; or"
        " NLVR2's own train.json, dev.json and test1.json",
        licence="annotations CC BY 4.0; pictures under the terms of the sites that show them",
        sizes=sizes(86_373, 6_982, 6_967),
        takes=tuple(
            Official(f"nlvr/annotations/{_NAMES[split]}.json", "nlvr2", (file,), {"folder": folder})
            for split, file, folder in (
                ("train", "train.json", "images/train/{directory}/"),
                ("val", "dev.json", "dev/"),
                ("test", "test1.json", "test1/"),
            )
        ),
        archives=(
            Archive("train_img.zip", "nlvr/images", "images/train/"),
            Archive("dev_img.zip", "nlvr/images", "dev/"),
            Archive("test1_img.zip", "nlvr/images", "test1/"),
        ),
        remote=remote(BLIP, *(f"nlvr_{name}.json" for name in _NAMES.values())),
    ),
    "snli_ve": Row(
        kind="classification",
        splits={split: f"snli/annotations/ve_{name}.json" for split, name in _NAMES.items()},
        images="flickr30k/images/flickr30k-images",
        about="SNLI-VE: sentences that follow from a picture of Flickr30k, or contradict it, or neither",
        pictures="Flickr30k's pictures (to be requested from its authors)",
        annotations="ve_train.json, ve_dev.json, ve_test.json as LAVIS distributes them; or SNLI-VE's own"
        " snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl",
        licence=f"sentences CC BY-SA 4.0; pictures: {FLICKR_LICENCE}",
        sizes=sizes((529_527, 29_783), (17_858, 1_000), (17_901, 1_000)),
        classes=("contradiction", "neutral", "entailment"),
        suffix=".jpg",
        takes=tuple(
            Official(f"snli/annotations/ve_{name}.json", "snli_ve", (f"snli_ve_{name}.jsonl",))
            for name in _NAMES.values()
        ),
        archives=FLICKR_PICTURES,
    ),
    "vsr_classification": Row(
        kind="classification",
        splits={split: f"vsr/annotations/{name}.jsonl" for split, name in _NAMES.items()},
        images="vsr/images",
        about="VSR, zero-shot split: statements about where things are in pictures of COCO, true or false",
        pictures="VSR's pictures, which are COCO's train2017 and val2017",
        annotations="train.jsonl, dev.jsonl and test.jsonl of VSR's zero-shot split",
        licence=f"statements CC BY 4.0; {COCO_LICENCE}",
        sizes=sizes(4_713, 231, 616),
        classes=("false", "true"),
        templates="statement",
        archives=(
            coco("train2017", "vsr/images"),
            coco("val2017", "vsr/images"),
        ),
        remote={
            **remote(f"{INSTRUCTED}vsr/", *(f"{name}.jsonl" for name in _NAMES.values())),
            **remote(COCO, "train2017.zip", "val2017.zip"),
        },
    ),
    "hateful_memes": Row(
        kind="classification",
        splits={
            split: f"hateful_memes/annotations/{file}.jsonl"
            for split, file in (("train", "train"), ("val", "dev_seen"), ("test", "test_seen"))
        },
        images="hateful_memes",
        columns={"image": "img", "sentence": "text"},
        about="HatefulMemes: memes, hateful or not",
        pictures="the memes in the folder img (to be requested from Meta)",
        annotations="train.jsonl, dev_seen.jsonl and test_seen.jsonl as Meta distributes them",
        licence="Meta's Hateful Memes licence, research only, to be requested",
        sizes=sizes((8_500, 8_500), (500, 500), (1_000, 1_000)),
        classes=("no", "yes"),
        templates="hateful",
        archives=(Archive("hateful_memes.zip", "hateful_memes", ""),),
    ),
}
# The true statements of VSR are captions.
LABELLED["vsr_caption"] = replace(
    LABELLED["vsr_classification"],
    kind="caption",
    within=dict.fromkeys(ALL, "1"),
    within_column="label",
    about="VSR: its true statements, as captions",
    sizes={},
    classes=(),
    templates="",
)
