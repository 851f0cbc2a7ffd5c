"""Groups of tasks, InstructBLIP's 26 datasets among them, and the rows of instructions.

The grouping is that of figure 2 of the paper. Training takes the train splits of those held in, evaluation
the validation or test splits of those held out. A set of questions also serves the generation of questions.
"""

from __future__ import annotations

from typing import NamedTuple

from blip.data.catalog.rows import COCO, COCO_LICENCE, Row, Size, coco, remote


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
OTHER_GROUPS: dict[str, tuple[str, ...]] = {
    "image-text retrieval": ("coco_retrieval", "flickr30k"),
    "image-text pre-training": (
        "vg_caption",
        "conceptual_caption_3m",
        "conceptual_caption_12m",
        "sbu_caption",
        "laion400M",
        "laion2B_multi",
        "ccs_filtered",
        "ccs_synthetic_filtered",
        "ccs_synthetic_filtered_large",
        "laion_filtered",
        "laion_synthetic_filtered",
        "laion_synthetic_filtered_large",
        "laion115M",
    ),
    "image captioning": ("vsr_caption",),
    "image question answering": ("vg_vqa",),
    "visual reasoning": ("nlvr",),
    "visual entailment": ("snli_ve",),
    "text-to-video retrieval": ("msrvtt_retrieval", "didemo_retrieval"),
    "video captioning": ("msrvtt_caption", "msvd_caption", "vatex_caption"),
    "LLaVA-Instruct-150K": ("llava150k_dialogue_instruct",),
    "embedded": (
        "scenes",
        "scenes_vqa",
        "scenes_instruct",
        "scenes_nlvr",
        "scenes_answers",
        "scenes_web",
        "scenes_shards",
        "scenes_web_shards",
    ),
}
"""Group -> the sets that InstructBLIP does without."""
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
        "laion400M",
        "vsr_caption",
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


def _llava(file: str, about: str, size: int) -> Row:
    return Row(
        kind="instruct",
        splits={"train": f"LLaVA-Instruct-150K/annotations/{file}.json"},
        images="coco/images/train2017",
        about=f"LLaVA-Instruct-150K: {about}, on pictures of COCO",
        pictures="COCO's train2017.zip, unpacked: its pictures lie right in this folder",
        annotations=f"{file}.json as LLaVA's authors distribute it",
        licence=f"CC BY-NC 4.0, made by GPT-4; {COCO_LICENCE}",
        sizes={"train": Size(size)},
        archives=(coco("train2017"),),
        remote={
            **remote(
                "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/", f"{file}.json"
            ),
            **remote(COCO, "train2017.zip"),
        },
    )


INSTRUCT: dict[str, Row] = {
    "llava_conversation": _llava("conversation_58k", "conversations", 56_681),
    "llava_detail": _llava("detail_23k", "detailed descriptions", 23_240),
    "llava_reasoning": _llava("complex_reasoning_77k", "questions that take reasoning", 76_643),
    "llava150k_dialogue_instruct": _llava("llava_instruct_150k", "all of the three kinds together", 157_712),
}
