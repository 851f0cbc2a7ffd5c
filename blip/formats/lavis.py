"""The tables for LAVIS's weights: how its modules call what ours call otherwise.

Where a name is the same on both sides the table says so, since a key without a rule is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blip.errors import CheckpointError, hint
from blip.formats import bert, lavis_blip, stage2
from blip.formats.lavis_blip import tower
from blip.formats.rules import Rename, Rule, Table, Transform, expand
from blip.layers.vit import OPENAI_CLIP_NAMES

_LAYER = "Qformer.bert.encoder.layer.{i}"
_EMBEDDINGS = "Qformer.bert.embeddings"
_CLIP_BLOCK = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")


def _clip_tower() -> list[Rule]:
    """CLIP's tower: OpenAI's names, [CLS] and positions without our leading dimensions."""
    names = ["conv1.weight"]
    for part in bert.PARTS:
        block = [f"attn.in_proj_{part}", *(f"{name}.{part}" for name in _CLIP_BLOCK)]
        names += [f"ln_pre.{part}", *(f"transformer.resblocks.{{i}}.{name}" for name in block)]
    rules: list[Rule] = [Rename(f"visual_encoder.{n}", f"vision.vit.{_from_openai(n)}") for n in names]
    name = "visual_encoder.class_embedding", "vision.vit.cls_token"
    rules.append(Transform(name[:1], name[1:], lambda t: (t[None, None],), lambda t: (t[0, 0],)))
    name = "visual_encoder.positional_embedding", "vision.vit.pos_embed"
    rules.append(Transform(name[:1], name[1:], lambda t: (t[None],), lambda t: (t[0],)))
    return rules


def _from_openai(name: str) -> str:
    for theirs, ours in OPENAI_CLIP_NAMES:
        name = name.replace(theirs, ours)
    return name


def _qformer() -> list[Rule]:
    """Q-Former with text: layers, embeddings and the head of the language-model loss."""
    rules: list[Rule] = [
        Rename("query_tokens", "qformer.query_tokens"),
        *bert.embeddings(_EMBEDDINGS, "qformer.embedding"),
        *bert.lm_head("Qformer.cls.predictions", f"{_EMBEDDINGS}.word_embeddings.weight"),
        *bert.layers(_LAYER, "qformer.layers.{i}", ["self_attn", "cross_attn"]),
        *bert.feed_forward(_LAYER, "qformer.layers.{i}.text_ffn"),
        *bert.feed_forward(_LAYER, "qformer.layers.{i}.query_ffn", "_query"),
    ]
    return rules


def _heads() -> list[Rule]:
    same = ["ln_vision.{part}", "vision_proj.{part}", "text_proj.{part}", "itm_head.{part}", "temp"]
    return expand([Rename(name, name) for name in same], part=bert.PARTS)


def _stage1(tower: str, rules: list[Rule]) -> Table:
    return Table(f"LAVIS weights of BLIP-2 stage 1 ({tower})", [*rules, *_qformer(), *_heads()])


def _with_llm(llm: str, reads: bool = False) -> dict[str, Table]:
    """Stage 2 or InstructBLIP, by tower.

    Args:
        llm: what the language model is called: opt, t5 or llm.
        reads: for InstructBLIP, whose Q-Former reads the instruction.
    """
    name = "InstructBLIP" if reads else "BLIP-2 stage 2"
    needs = [f"{llm}_proj.", *([f"{_EMBEDDINGS}.word_embeddings."] if reads else [])]
    towers = {"clip_L": ("CLIP tower", _clip_tower()), "": ("EVA or BLIP tower", tower())}
    return {
        key: Table(f"LAVIS weights of {name} ({which}, {llm})", [*rules, *stage2.lavis(llm)], needs)
        for key, (which, rules) in towers.items()
    }


_STAGE1 = {"clip_L": _stage1("CLIP tower", _clip_tower()), "": _stage1("EVA or BLIP tower", tower())}
TABLES = {
    "blip2": _STAGE1,
    "blip2_feature_extractor": _STAGE1,
    "blip2_image_text_matching": _STAGE1,
    # Those that need more stand first: what the others need, they have, too.
    "blip2_t5_instruct": _with_llm("t5", reads=True),
    "blip2_vicuna_instruct": _with_llm("llm", reads=True),
    "blip2_llm_instruct": _with_llm("llm", reads=True),
    "blip2_opt": _with_llm("opt"),
    "blip2_t5": _with_llm("t5"),
    "blip2_llm": _with_llm("llm"),
    **lavis_blip.TABLES,
}
"""Registry name -> variant -> table; the variant "" stands for all that have no line of their own."""


def table(arch: str, variant: str = "") -> Table:
    """The table of a model by its registry name and its variant.

    Args:
        arch: registry name.
        variant: vision tower of BLIP-2, `share` of BLIP's pre-training.

    Raises:
        CheckpointError: LAVIS has no weights for that model, or their layout is not known here.
    """
    if arch not in TABLES:
        raise CheckpointError(f"no LAVIS layout is known for {arch!r}{hint(arch, TABLES)}")
    variants = TABLES[arch]
    return variants.get(variant, variants[""])


def looks_like(state: Mapping[str, Any]) -> bool:
    """Whether the keys are LAVIS's: ours have no `Qformer.` and no `visual_encoder.`."""
    return any(key.startswith(("Qformer.", "visual_encoder.")) for key in state)
