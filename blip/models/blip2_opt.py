"""BLIP-2 with the language models that were published with it: OPT and FlanT5."""

from __future__ import annotations

from typing import Any, ClassVar

from blip.models.blip2_llm import Blip2Llm
from blip.models.blip2_weights import CLIP_L, EVA
from blip.models.llm_presets import FLAN_T5_XL, FLAN_T5_XXL, OPT_2_7B, OPT_6_7B
from blip.models.published import starts_of, weights_of
from blip.registry import MODELS

CAPTIONING: dict[str, Any] = {
    **EVA,
    "image_size": 364,
    "freeze_vit": False,
    "vit_precision": "fp32",
    "prompt": "a photo of",
}
"""Fine-tuning for captions (BLIP-2, section 4.2)."""


@MODELS.register("blip2_opt")
class Blip2Opt(Blip2Llm):
    """BLIP-2 with OPT."""

    presets: ClassVar = {
        "pretrain_opt2.7b": {**EVA, **OPT_2_7B},
        "pretrain_opt6.7b": {**EVA, **OPT_6_7B},
        "caption_coco_opt2.7b": {**CAPTIONING, **OPT_2_7B},
        "caption_coco_opt6.7b": {**CAPTIONING, **OPT_6_7B},
    }
    published: ClassVar = weights_of("blip2_opt")
    starts: ClassVar = starts_of("blip2_opt")


@MODELS.register("blip2_t5")
class Blip2T5(Blip2Llm):
    """BLIP-2 with FlanT5."""

    presets: ClassVar = {
        "pretrain_flant5xl": {**EVA, **FLAN_T5_XL},
        "pretrain_flant5xl_vitL": {**CLIP_L, **FLAN_T5_XL},
        "pretrain_flant5xxl": {**EVA, **FLAN_T5_XXL},
        "caption_coco_flant5xl": {**CAPTIONING, **FLAN_T5_XL},
    }
    published: ClassVar = weights_of("blip2_t5")
    starts: ClassVar = starts_of("blip2_t5")
