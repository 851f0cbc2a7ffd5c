"""Named datasets as a table: their files below the data root, how to get them. LAVIS's names are valid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from blip.data.catalog.instruct import ALIASES, INSTRUCT, MEMBERS, QUESTIONS_OF
from blip.data.catalog.rows import ALL, CLIPS, Row, video_qa, web
from blip.data.scenes.questions import answers
from blip.errors import DataError, hint
from blip.places import ROOT_VARIABLE, data_root

__all__ = ["CATALOG", "data_root", "instructblip", "names", "remedy", "row"]


def _scenes(pattern: str, *splits: str) -> dict[str, str | tuple[str, ...]]:
    return {split: f"scenes/annotations/{pattern.format(split)}.json" for split in splits}


_COCO = Row(
    kind="caption",
    splits={split: f"coco/annotations/coco_karpathy_{split}.json" for split in ALL},
    images="coco/images",
    about="COCO 2014, Karpathy split: 113,287 / 5,000 / 5,000 pictures, 5 captions each",
    pictures="COCO's train2014.zip, val2014.zip and test2014.zip, unpacked into folders of these names",
    annotations="coco_karpathy_train.json, _val.json, _test.json as BLIP and LAVIS distribute them",
)
_FLICKR = Row(
    kind="retrieval",
    splits={split: f"flickr30k/annotations/{split}.json" for split in ALL},
    images="flickr30k/images",
    about="Flickr30k: 29,000 / 1,000 / 1,000 pictures, 5 captions each",
    pictures="Flickr30k's pictures in the folder flickr30k-images (to be requested from its authors)",
    annotations="flickr30k_train.json, _val.json, _test.json as BLIP and LAVIS distribute them",
)

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
    "nocaps": Row(
        kind="caption",
        splits={split: f"nocaps/annotations/nocaps_{split}.json" for split in ("val", "test")},
        images="nocaps/images",
        about="NoCaps: 4,500 / 10,600 pictures of new objects; the captions of val have their own file",
        pictures="NoCaps's pictures of Open Images, in the folders val and test",
        annotations="nocaps_val.json and nocaps_test.json as BLIP and LAVIS distribute them, and NoCaps's own"
        " nocaps_val_4500_captions.json",
        official={"val": "nocaps/annotations/nocaps_val_4500_captions.json"},
        captioned=False,
    ),
    "coco_vqa": Row(
        kind="vqa",
        splits={
            "train": ("coco/annotations/vqa_train.json", "coco/annotations/vqa_val.json"),
            "val": "coco/annotations/vqa_val_eval.json",
            "test": "coco/annotations/vqa_test.json",
        },
        images="coco/images",
        about="VQAv2: 658,111 questions to train on (train and val), 447,793 to test, ten answers each",
        pictures=_COCO.pictures.replace("test2014.zip", "test2015.zip"),
        annotations="vqa_train.json, vqa_val.json, vqa_val_eval.json, vqa_test.json and answer_list.json as"
        " BLIP and LAVIS distribute them, and VQA's own v2_mscoco_val2014_annotations.json",
        answer_list="coco/annotations/answer_list.json",
        official={"val": "coco/annotations/v2_mscoco_val2014_annotations.json"},
    ),
    "vg_vqa": Row(
        kind="vqa",
        splits={"train": "vg/annotations/vg_qa.json"},
        images="vg/images",
        about="Visual Genome: questions with one answer each, to train on",
        pictures="Visual Genome's images.zip and images2.zip, unpacked into VG_100K and VG_100K_2",
        annotations="vg_qa.json as BLIP and LAVIS distribute it",
    ),
    "ok_vqa": Row(
        kind="vqa",
        splits={
            "train": "okvqa/annotations/okvqa_train.json",
            "test": "okvqa/annotations/vqa_val_eval.json",
        },
        images="coco/images",
        about="OK-VQA: 9,009 / 5,046 questions that need knowledge, on pictures of COCO",
        pictures="COCO's train2014.zip and val2014.zip, unpacked into folders of these names",
        annotations="okvqa_train.json, vqa_val_eval.json and answer_list.json as LAVIS distributes them (the"
        " last two not to be confused with VQAv2's), and OK-VQA's own mscoco_val2014_annotations.json",
        answer_list="okvqa/annotations/answer_list.json",
        official={"test": "okvqa/annotations/mscoco_val2014_annotations.json"},
    ),
    "aok_vqa": Row(
        kind="vqa",
        splits={split: f"aokvqa/annotations/aokvqa_v1p0_{split}.json" for split in ALL},
        images="coco/images",
        about="A-OKVQA: 17,056 / 1,145 / 6,702 questions, ten direct answers each (test without)",
        pictures="COCO's train2014.zip, val2014.zip and test2015.zip, unpacked into folders of these names",
        annotations="aokvqa_v1p0_train.json, _val.json, _test.json and specialized_vocab_train_lavis.json as"
        " LAVIS distributes them",
        answer_list="aokvqa/annotations/specialized_vocab_train_lavis.json",
        templates="choice",
    ),
    "nlvr": Row(
        kind="nlvr",
        splits={
            split: f"nlvr/annotations/{name}.json"
            for split, name in (("train", "train"), ("val", "dev"), ("test", "test"))
        },
        images="nlvr/images",
        about="NLVR2: 86,373 / 6,982 / 6,967 sentences about two pictures, true or false",
        pictures="NLVR2's pictures in the folders images, dev and test1 (to be requested from its authors)",
        annotations="nlvr_train.json, nlvr_dev.json, nlvr_test.json as BLIP and LAVIS distribute them",
    ),
    "snli_ve": Row(
        kind="classification",
        splits={
            split: f"snli/annotations/ve_{name}.json"
            for split, name in (("train", "train"), ("val", "dev"), ("test", "test"))
        },
        images="flickr30k/images/flickr30k-images",
        about="SNLI-VE: 529,527 / 17,858 / 17,901 sentences that follow from a picture, or not",
        pictures="Flickr30k's pictures (to be requested from its authors)",
        annotations="ve_train.json, ve_dev.json, ve_test.json as LAVIS distributes them",
        classes=("contradiction", "neutral", "entailment"),
        suffix=".jpg",
    ),
    "msrvtt_retrieval": Row(
        kind="retrieval",
        splits={split: f"msrvtt/annotations/retrieval_{split}.json" for split in ALL},
        images="msrvtt/videos",
        about="MSRVTT: 10,000 video clips, of which 1,000 with a caption each are for testing",
        pictures=CLIPS.format("MSRVTT", "mp4"),
        annotations="retrieval_train.json, _val.json, _test.json as LAVIS distributes them",
    ),
    "msrvtt_qa": video_qa("MSRVTT", "mp4", "158,581 / 12,278 / 72,821"),
    "msvd_qa": video_qa("MSVD", "avi", "30,933 / 6,415 / 13,157"),
    "conceptual_caption_3m": web(
        "conceptual_caption", "cc3m", "images", "Conceptual Captions: 3 million web pictures, one text each"
    ),
    "conceptual_caption_12m": web(
        "conceptual_caption",
        "cc12m",
        "images_12m",
        "Conceptual 12M: 10 to 12 million web pictures, one text each",
    ),
    "sbu_caption": web(
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
    )
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
        raise DataError(f"no dataset {name!r} in the catalogue{hint(name, CATALOG)}")
    return CATALOG[name]


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
