"""InstructBLIP's 26 datasets: their task groups, which are trained on, and the rows that no one else needs.

The grouping is that of figure 2 of the paper. Training takes the train splits of those held in, evaluation
the validation or test splits of those held out. A set of questions also serves the generation of questions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from blip.data.catalog.rows import ALL, Row, video_captions, video_qa


class Member(NamedTuple):
    """A dataset's place among InstructBLIP's."""

    group: str
    """Kind of task; groups without a set that is held in are unseen in training."""
    held_in: bool
    """Whether it is trained on."""


GROUPS: dict[str, dict[str, bool]] = {
    "image captioning": {
        "coco_caption": True,
        "capfilt14m": True,
        "flickr30k_caption": False,
        "nocaps": False,
    },
    "captioning with reading comprehension": {"textcaps_caption": True},
    "visual reasoning": {"gqa": False, "vsr_classification": False, "iconqa": False},
    "image question answering": {"coco_vqa": True, "vizwiz_vqa": False},
    "knowledge-grounded question answering": {"ok_vqa": True, "aok_vqa": True, "scienceqa": False},
    "question answering with reading comprehension": {"ocr_vqa": True, "text_vqa": False},
    "image question generation": {"coco_vqg": True, "ok_vqg": True, "aok_vqg": True},
    "video question answering": {"msvd_qa": False, "msrvtt_qa": False, "ivqa": False},
    "visual conversational question answering": {"visdial": False},
    "image classification": {"hateful_memes": False},
    "LLaVA-Instruct-150K": {"llava_conversation": True, "llava_detail": True, "llava_reasoning": True},
}
"""Group -> its datasets, and whether they are held in."""
MEMBERS = {name: Member(group, held) for group, some in GROUPS.items() for name, held in some.items()}
QUESTIONS_OF = {"coco_vqg": "coco_vqa", "ok_vqg": "ok_vqa", "aok_vqg": "aok_vqa"}
"""Generation of questions -> the set whose training questions it takes."""

ALIASES = {
    f"{name}_instruct": name
    for name in (
        "coco_caption",
        "vg_caption",
        "flickr30k_caption",
        "textcaps_caption",
        "capfilt14m",
        "conceptual_caption_3m",
        "conceptual_caption_12m",
        "sbu_caption",
        "coco_vqa",
        "vg_vqa",
        "ok_vqa",
        "aok_vqa",
        "gqa",
        "iconqa",
        "scienceqa",
        "ocr_vqa",
        "snli_ve",
        "vsr_classification",
        "visdial",
        "msrvtt_caption",
        "msvd_caption",
        "vatex_caption",
        "msrvtt_qa",
        "msvd_qa",
    )
}
"""LAVIS's names of the same files read as instructions."""


def _llava(file: str, about: str) -> Row:
    return Row(
        kind="instruct",
        splits={"train": f"LLaVA-Instruct-150K/annotations/{file}.json"},
        images="coco/images/train2017",
        about=f"LLaVA-Instruct-150K: {about}, on pictures of COCO",
        pictures="COCO's train2017.zip, unpacked: its pictures lie right in this folder",
        annotations=f"{file}.json as LLaVA's authors distribute it",
    )


INSTRUCT: dict[str, Row] = {
    "textcaps_caption": Row(
        kind="caption",
        splits={split: f"TextCaps/annotations/TextCaps_0.1_{split}.json" for split in ALL},
        images="TextCaps/images",
        columns={"image": "image_id"},
        suffix=".jpg",
        about="TextCaps: 109,765 captions to train on that take reading, on pictures of OpenImages",
        pictures="TextVQA's pictures, train_val_images.zip and test_images.zip",
        annotations="TextCaps_0.1_train.json, _val.json and _test.json, and TextVQA's words read in the"
        " pictures, TextVQA_Rosetta_OCR_v0.2_train.json, _val.json and _test.json",
        templates="ocr_caption",
        ocr={split: f"textvqa/annotations/TextVQA_Rosetta_OCR_v0.2_{split}.json" for split in ALL},
    ),
    "text_vqa": Row(
        kind="vqa",
        splits={split: f"textvqa/annotations/TextVQA_0.5.1_{split}.json" for split in ALL},
        images="textvqa/images",
        columns={"image": "image_id"},
        suffix=".jpg",
        about="TextVQA: 34,602 / 5,000 / 5,734 questions that take reading, ten answers each (test without)",
        pictures="TextVQA's pictures, train_val_images.zip and test_images.zip",
        annotations="TextVQA_0.5.1_train.json, _val.json and _test.json, and the words read in the pictures,"
        " TextVQA_Rosetta_OCR_v0.2_train.json, _val.json and _test.json",
        templates="ocr_vqa",
        ocr={split: f"textvqa/annotations/TextVQA_Rosetta_OCR_v0.2_{split}.json" for split in ALL},
    ),
    "ocr_vqa": Row(
        kind="vqa",
        splits=dict.fromkeys(ALL, "ocrvqa/annotations/ocrvqa.json"),
        within={"train": "1", "val": "2", "test": "3"},
        images="ocrvqa/images",
        columns={"image": "sample_id"},
        suffix=".jpg",
        about="OCR-VQA: about a million questions on 207,572 book covers, one answer each",
        pictures="the book covers as KEY.jpg, where KEY is their name in ocrvqa.json",
        annotations="ocrvqa.json as LAVIS distributes it (OCR-VQA's dataset.json); ocr_tokens in its records"
        " are shown where there are any",
        templates="ocr_vqa",
    ),
    "gqa": Row(
        kind="vqa",
        splits={
            "train": "gqa/annotations/train_balanced_questions.json",
            "val": "gqa/annotations/val_balanced_questions.json",
            "test": "gqa/annotations/testdev_balanced_questions.json",
        },
        images="gqa/images",
        about="GQA: balanced questions on Visual Genome's pictures, one answer each; 12,578 in testdev",
        pictures="GQA's images.zip",
        annotations="train_balanced_questions.json, val_balanced_questions.json and"
        " testdev_balanced_questions.json as LAVIS distributes them: lists with image, question, answer",
    ),
    "vsr_classification": Row(
        kind="classification",
        splits={
            split: f"vsr/annotations/{file}.jsonl"
            for split, file in (("train", "train"), ("val", "dev"), ("test", "test"))
        },
        images="vsr/images",
        about="VSR, zero-shot split: statements about where things are in pictures of COCO, true or false",
        pictures="VSR's pictures, which are COCO's train2017 and val2017",
        annotations="train.jsonl, dev.jsonl and test.jsonl of VSR's zero-shot split",
        classes=("false", "true"),
        templates="statement",
    ),
    "iconqa": Row(
        kind="vqa",
        splits={split: f"iconqa/annotations/{split}.json" for split in ALL},
        images="iconqa/images",
        columns={"correct_choice": "answer"},
        about="IconQA, text choices: questions about icon pictures with choices",
        pictures="IconQA's pictures, under the paths that the annotations name",
        annotations="annotations_train.json, _val.json and _test.json of LAVIS, as train.json, val.json and"
        " test.json",
        templates="choice",
    ),
    "scienceqa": Row(
        kind="vqa",
        splits={split: f"scienceqa/annotations/problems_{split}.json" for split in ALL},
        images="scienceqa/images",
        columns={"correct_choice": "answer", "context": "hint"},
        about="ScienceQA: questions of school science with choices; those without a picture are left out",
        pictures="ScienceQA's pictures, under the paths that the annotations name",
        annotations="problems_train.json, problems_val.json and problems_test.json as LAVIS distributes them",
        templates="choice",
    ),
    "vizwiz_vqa": Row(
        kind="vqa",
        splits={split: f"vizwiz/annotations/{split}.json" for split in ("val", "test")},
        images="vizwiz/images",
        about="VizWiz: 4,319 / 8,000 questions of blind people, ten answers each (test without)",
        pictures="VizWiz's val.zip and test.zip, unpacked into folders of these names",
        annotations="val.json and test.json as VizWiz distributes them",
    ),
    "visdial": Row(
        kind="vqa",
        splits={"val": "visdial/annotations/visdial_1.0_val.json"},
        images="visdial/images",
        about="VisDial 1.0: 2,064 dialogs of ten questions, 100 candidate answers each",
        pictures="VisDial's VisualDialog_val2018.zip, unpacked into a folder of this name",
        annotations="visdial_1.0_val.json as VisDial distributes it",
        templates="dialog",
    ),
    "hateful_memes": Row(
        kind="classification",
        splits={
            split: f"hateful_memes/annotations/{file}.jsonl"
            for split, file in (("train", "train"), ("val", "dev_seen"), ("test", "test_seen"))
        },
        images="hateful_memes",
        columns={"image": "img", "sentence": "text"},
        about="HatefulMemes: 8,500 / 500 / 1,000 memes, hateful or not",
        pictures="the memes in the folder img (to be requested from Meta)",
        annotations="train.jsonl, dev_seen.jsonl and test_seen.jsonl as Meta distributes them",
        classes=("no", "yes"),
        templates="hateful",
    ),
    "ivqa": replace(
        video_qa("iVQA", "mp4", ""),
        about="iVQA: 5,994 / 2,000 / 2,000 questions about video clips, five answers each",
        annotations="qa_train.json, _val.json and _test.json, made of iVQA's own tables: lists of {video,"
        " question, question_id, answer: [five texts]}; and qa_ans2label.json: the answers of training",
    ),
    "msrvtt_caption": video_captions("MSRVTT", "mp4", "7,010 / 497 / 2,990"),
    "msvd_caption": video_captions("MSVD", "avi", "1,200 / 100 / 670"),
    "vatex_caption": video_captions("VATEX", "mp4", "25,991 / 3,000 / 6,278"),
    "llava_conversation": _llava("conversation_58k", "58,000 conversations"),
    "llava_detail": _llava("detail_23k", "23,000 detailed descriptions"),
    "llava_reasoning": _llava("complex_reasoning_77k", "77,000 questions that take reasoning"),
    "llava150k_dialogue_instruct": _llava("llava_instruct_150k", "all of the three kinds together"),
}
