"""The tables for weights of BLIP as the original code and LAVIS write them.

The two differ in the name of the queue's pointer only.
"""

from __future__ import annotations

from blip.formats import bert
from blip.formats.rules import Omit, Rename, Rule, Table, Transform, expand

DECODER_HAS = {
    "all": (),
    "all_but_sa": ("self_attn",),
    "all_but_ca": ("cross_attn",),
    "none": ("self_attn", "cross_attn", "ffn"),
}
"""`share` of pre-training -> parts of a layer that the decoder has for itself."""

_SUB_BLOCKS = ("self_attn", "cross_attn", "ffn")
_ENCODER, _DECODER = "text_encoder.", "text_decoder.bert."
_TIED = "encoder and decoder share it"
_UNUSED = "the momentum twin looks at no image; BLIP keeps a cross-attention that it never uses"
_TOWER = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.{part}",
    "blocks.{i}.norm1.{part}",
    "blocks.{i}.norm2.{part}",
    "blocks.{i}.attn.q_bias",
    "blocks.{i}.attn.v_bias",
    "blocks.{i}.attn.qkv.{part}",
    "blocks.{i}.attn.proj.{part}",
    "blocks.{i}.mlp.fc1.{part}",
    "blocks.{i}.mlp.fc2.{part}",
    "norm.{part}",
)


def tower(theirs: str = "visual_encoder", ours: str = "vision.vit") -> list[Rule]:
    """BLIP's and EVA-CLIP's towers, whose names are ours."""
    return expand([Rename(f"{theirs}.{name}", f"{ours}.{name}") for name in _TOWER], part=bert.PARTS)


def _encoder() -> list[Rule]:
    return [*tower(), *bert.text("text_encoder", "text")]


def _decoder(ours: str) -> list[Rule]:
    """A decoder that shares nothing."""
    return [*bert.text("text_decoder.bert", ours), *_lm_head()]


def _lm_head() -> list[Rule]:
    return bert.lm_head("text_decoder.cls.predictions", f"{_DECODER}embeddings.word_embeddings.weight")


def _sharing_decoder(share: str) -> list[Rule]:
    """The decoder of pre-training: its own parts, and second copies of what it shares."""
    own = DECODER_HAS[share]
    theirs = "encoder.layer.{i}"
    shared = [part for part in _SUB_BLOCKS if part not in own]
    if share == "none":
        words = bert.embeddings(f"{_DECODER}embeddings", "text.decode_embedding")
    else:
        words = bert.embeddings(f"{_ENCODER}embeddings", "text.embedding")
        numbers = bert.embeddings(f"{_DECODER}embeddings", "text.embedding")[-1]
        words = [*bert.second(words, _ENCODER, _DECODER, _TIED), numbers]
    return [
        *words,
        *bert.layers(_DECODER + theirs, "text.layers.{i}.decode", own),
        *bert.second(bert.layers(_ENCODER + theirs, "text", shared), _ENCODER, _DECODER, _TIED),
        *_lm_head(),
    ]


def _same(*names: str) -> list[Rule]:
    """What is called the same on both sides."""
    return expand([Rename(name, name) for name in names], part=bert.PARTS)


def _contrast() -> list[Rule]:
    return _same("vision_proj.{part}", "text_proj.{part}", "itm_head.{part}")


def _twin() -> list[Rule]:
    """The momentum twin of the contrastive loss."""
    unused = bert.layers(f"{_ENCODER}encoder.layer.{{i}}", "text", ["cross_attn"])
    heads = [Rename(f"{name}_m.{{part}}", f"twin.{name}.{{part}}") for name in ("vision_proj", "text_proj")]
    return [
        *tower("visual_encoder_m", "twin.vision.vit"),
        *bert.text("text_encoder_m", "twin.text", cross=False),
        *bert.second(unused, _ENCODER, "text_encoder_m.", _UNUSED, exact=False),
        *expand(heads, part=bert.PARTS),
    ]


def _queue(ids: bool) -> list[Rule]:
    """The queue, whose features are columns there and rows here.

    Args:
        ids: with the numbers of the pictures.
    """
    rules: list[Rule] = [
        Transform((f"{kind}_queue",), (f"queue.{kind}",), lambda t: (t.T,), lambda t: (t.T.contiguous(),))
        for kind in ("image", "text")
    ]
    for name in ("queue_ptr", "ptr_queue"):  # LAVIS's, which is written, and the original one
        rules.append(Transform((name,), ("queue.pointer",), lambda t: (t[0],), lambda t: (t[None],)))
    if ids:
        rules.append(Transform(("idx_queue",), ("queue.ids",), lambda t: (t[0],), lambda t: (t[None],)))
    else:
        rules.append(Omit("queue.ids", "BLIP's pre-training keeps no numbers of pictures"))
    return rules


def training_state() -> list[str]:
    """Our names of what retrieval has for its training only: temperature, momentum twin and queue."""
    names: dict[str, None] = {}
    for rule in (*_same("temp"), *_twin(), *_queue(ids=True)):
        if isinstance(rule, Rename):
            names[rule.ours] = None
        elif isinstance(rule, Transform):
            names |= dict.fromkeys(rule.ours)
    return list(names)


def _pretrain(share: str) -> Table:
    heads, momentum = [*_contrast(), *_same("temp")], [*_twin(), *_queue(ids=False)]
    return Table(
        f"LAVIS weights of BLIP pre-training (share: {share})",
        [*_encoder(), *_sharing_decoder(share), *heads, *momentum],
        needs=[_ENCODER, "text_decoder.", "itm_head."],
    )


def _retrieval() -> Table:
    rules = [*_encoder(), *_contrast(), *_same("temp"), *_twin(), *_queue(ids=True)]
    return Table("LAVIS weights of BLIP retrieval", rules, needs=[_ENCODER, "itm_head.", "temp"])


def _nlvr() -> Table:
    """Every layer looks at two images."""
    theirs, ours = f"{_ENCODER}encoder.layer.{{i}}", "text.layers.{i}"
    look, out = f"{theirs}.crossattention.self{{j}}", f"{theirs}.crossattention.output"
    pair = [
        *(Rename(f"{look}.{n}.{{part}}", f"{ours}.cross_attn.looks.{{j}}.{n}.{{part}}") for n in _LOOK),
        Rename(f"{out}.dense{{j}}.{{part}}", f"{ours}.cross_attn.looks.{{j}}.out.{{part}}"),
        Rename(f"{out}.merge_layer.{{part}}", f"{ours}.cross_attn.merge.{{part}}"),
        Rename(f"{out}.LayerNorm.{{part}}", f"{ours}.cross_attn.norm.{{part}}"),
    ]
    rules = [*tower(), *bert.text("text_encoder", "text", cross=False), *expand(pair, part=bert.PARTS)]
    return Table("LAVIS weights of BLIP NLVR", [*rules, *_same(*_CLS_HEAD)], needs=[_ENCODER, "cls_head."])


_LOOK = ("query", "key", "value")
_CLS_HEAD = ("cls_head.0.{part}", "cls_head.2.{part}")


def _classification() -> Table:
    head = [Rename(n.replace("cls_head", "cls_head_m"), f"twin.{n}") for n in _CLS_HEAD]
    twin = [*tower("visual_encoder_m", "twin.vision.vit"), *bert.text("text_encoder_m", "twin.text")]
    rules = [*_encoder(), *_same(*_CLS_HEAD), *twin, *expand(head, part=bert.PARTS)]
    return Table("LAVIS weights of BLIP classification", rules, needs=[_ENCODER, "cls_head."])


TABLES: dict[str, dict[str, Table]] = {
    "blip_pretrain": {
        "all": _pretrain("all"),
        "": _pretrain("all_but_sa"),
        "all_but_ca": _pretrain("all_but_ca"),
        "none": _pretrain("none"),
    },
    "blip_retrieval": {"": _retrieval()},
    "blip_image_text_matching": {
        "": Table(
            "LAVIS weights of BLIP image-text matching",
            [*_encoder(), *_contrast()],
            needs=[_ENCODER, "itm_head."],
        )
    },
    "blip_caption": {
        "": Table("LAVIS weights of BLIP captioning", [*tower(), *_decoder("text")], needs=["text_decoder."])
    },
    "blip_vqa": {
        "": Table(
            "LAVIS weights of BLIP VQA",
            [*_encoder(), *_decoder("answer_decoder")],
            needs=[_ENCODER, "text_decoder."],
        )
    },
    "blip_nlvr": {"": _nlvr()},
    "blip_classification": {"": _classification()},
    "blip_feature_extractor": {
        "": Table(
            "LAVIS weights of BLIP features",
            [*_encoder(), *_same("vision_proj.{part}", "text_proj.{part}", "temp")],
            needs=[_ENCODER, "vision_proj."],
        )
    },
}
"""Registry name -> variant -> table. Variants of pre-training are what `share` says, "" being the usual one;
they stand in the order in which weights are tried, those that share most first."""
