"""BLIP-2 with the language models that were published with it: OPT and FlanT5."""

from __future__ import annotations

from typing import Any, ClassVar

from blip.models.blip2_llm import Blip2Llm
from blip.models.blip2_weights import CLIP_L, EVA, LAVIS
from blip.models.llm_presets import FLAN_T5_XL, FLAN_T5_XXL, OPT_2_7B, OPT_6_7B
from blip.registry import MODELS

CAPTIONING: dict[str, Any] = {
    **EVA,
    "image_size": 364,
    "freeze_vit": False,
    "vit_precision": "fp32",
    "prompt": "a photo of",
}
"""Fine-tuning for captions (BLIP-2, section 4.2)."""


def _published(*names: str) -> dict[str, str]:
    """Preset -> address; LAVIS calls the files of the first kind `pretrained_...`."""
    return {name: f"{LAVIS}BLIP2/blip2_{_file(name)}.pth" for name in names}


def _file(preset: str) -> str:
    return preset.replace("pretrain_", "pretrained_").replace("caption_coco_", "caption_")


@MODELS.register("blip2_opt")
class Blip2Opt(Blip2Llm):
    """BLIP-2 with OPT."""

    presets: ClassVar = {
        "pretrain_opt2.7b": {**EVA, **OPT_2_7B},
        "pretrain_opt6.7b": {**EVA, **OPT_6_7B},
        "caption_coco_opt2.7b": {**CAPTIONING, **OPT_2_7B},
        "caption_coco_opt6.7b": {**CAPTIONING, **OPT_6_7B},
    }
    published: ClassVar = _published(*presets)
    starts: ClassVar = {
        **published,
        "caption_coco_opt2.7b": published["pretrain_opt2.7b"],
        "caption_coco_opt6.7b": published["pretrain_opt6.7b"],
    }


@MODELS.register("blip2_t5")
class Blip2T5(Blip2Llm):
    """BLIP-2 with FlanT5."""

    presets: ClassVar = {
        "pretrain_flant5xl": {**EVA, **FLAN_T5_XL},
        "pretrain_flant5xl_vitL": {**CLIP_L, **FLAN_T5_XL},
        "pretrain_flant5xxl": {**EVA, **FLAN_T5_XXL},
        "caption_coco_flant5xl": {**CAPTIONING, **FLAN_T5_XL},
    }
    published: ClassVar = _published(*presets)
    starts: ClassVar = {**published, "caption_coco_flant5xl": published["pretrain_flant5xl"]}
