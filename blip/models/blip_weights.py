"""Weight files of BLIP: the sizes that their tensors tell, and how one model of the family starts from
another's."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from blip.config.schema import ModelConfig
from blip.layers.momentum import FeatureQueue
from blip.models.base import Adopted, Sizes
from blip.models.blip2_weights import stage1_sizes
from blip.models.blip_config import TOWERS
from blip.models.med import DECODER_HAS, MedConfig

log = logging.getLogger(__name__)

HEADS = ("itm_head.", "vision_proj.", "text_proj.", "lm_head.", "cls_head.", "temp")
"""Parts that a model may have and another not."""
STATE = ("twin.", "queue.")
"""What training keeps beside the parameters."""
_MAY_START_ANEW = (*HEADS, *STATE)
_REASONS = {
    "twin.": "the momentum twin of another training, or of other sizes",
    "queue.": "a queue that this model has not, or of another size",
    "lm_head.": "this model has no decoder",
    "answer_decoder.": "this model has no such decoder",
    "text.": "it belongs to the one of encoder and decoder that this model has not",
}


def blip_sizes(tensors: Mapping[str, Tensor], config_class: type[ModelConfig]) -> Sizes:
    """What names and shapes tell of a configuration, and what they leave open.

    Numbers of heads leave no trace in the weights; they are those of the published sizes, or open.

    Args:
        tensors: by our names, of any model of the family.
        config_class: whose keys are asked for.
    """
    values, unknown = stage1_sizes(tensors)  # the tower and the projections have the same names there
    tower = values.pop("vit_model", None)
    if tower is not None:
        values["vit_type"] = next((kind for kind, name in TOWERS.items() if name == tower), tower)
    unknown = [key.replace("vit_model", "vit_type") for key in unknown]
    _med_sizes(tensors, values, unknown)
    if "queue.image" in tensors:
        values["queue_size"] = len(tensors["queue.image"])
    if "cls_head.2.weight" in tensors:
        values["num_classes"] = len(tensors["cls_head.2.weight"])
        values["use_distill"] = "twin.cls_head.2.weight" in tensors
    if any(".cross_attn.looks." in name for name in tensors):
        merged = [re.match(r"text\.layers\.(\d+)\.cross_attn\.merge\.", name) for name in tensors]
        values["merge_from"] = min((int(m[1]) for m in merged if m), default=values["med"]["depth"])
    positions = values.get("med", {}).get("max_positions")
    longest = getattr(config_class, "max_txt_len", None)
    if positions and longest and longest > positions:
        values["max_txt_len"] = positions
    if "itm_head.weight" in tensors and "lm_head.bias" in tensors:
        values["share"] = _share(tensors)
    known = {part.name for part in fields(config_class)}
    return Sizes({key: value for key, value in values.items() if key in known}, unknown)


def _med_sizes(tensors: Mapping[str, Tensor], values: dict[str, Any], unknown: list[str]) -> None:
    layers = [re.fullmatch(r"text\.layers\.(\d+)\.ffn\.expand\.weight", name) for name in tensors]
    depth = len([match for match in layers if match])
    if not depth or "text.layers.0.ffn.expand.weight" not in tensors:
        return
    mlp_dim, width = tensors["text.layers.0.ffn.expand.weight"].shape
    values["med"] = {"width": width, "depth": depth, "mlp_dim": mlp_dim}
    if "text.embedding.position.weight" in tensors:
        values["med"]["max_positions"] = len(tensors["text.embedding.position.weight"])
    if "text.embedding.word.weight" in tensors:
        values["vocab_size"] = len(tensors["text.embedding.word.weight"])
    if width != MedConfig.width:
        unknown.append("med.num_heads")


def _share(tensors: Mapping[str, Tensor]) -> str:
    """What encoder and decoder share, by the parts that the decoder has for itself."""
    own = {
        part
        for part in DECODER_HAS["none"]
        if any(name.startswith(f"text.layers.0.decode.{part}.") for name in tensors)
    }
    return next((share for share, parts in DECODER_HAS.items() if set(parts) == own), "all_but_sa")


def adopt(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Adopted:
    """Weights of one model of the family for another, whose names tell what they are.

    A decoder starts from the decoder of the weights, an encoder from their encoder, where they have both.
    Two cross-attentions (NLVR2) start from the one. Heads that the weights lack start anew; the momentum twin
    and the queue go over where they fit as a whole. Tensors of other sizes stay among the weights, so that
    loading them is an error, or is interpolated (positions of the tower).

    Args:
        tensors: by our names.
        wanted: the state dict of the model that takes them over.
    """
    decoder = _is_decoder(wanted)
    if _is_decoder(tensors) and not decoder:
        log.warning("the text encoder starts from the weights of a decoder")
    origins = {name: _origin(name, tensors, decoder) for name in wanted}
    fresh = _fresh_parts(tensors, wanted, origins)
    taken = {
        name: tensors[origin]
        for name, origin in origins.items()
        if origin in tensors
        and not name.startswith(fresh)
        and not _other_width(name, tensors[origin], wanted)
    }
    left_out: dict[str, str] = {}
    if "queue.image" in taken:  # LAVIS's pre-training keeps no numbers of pictures
        taken.setdefault("queue.ids", torch.full_like(wanted["queue.ids"], FeatureQueue.NO_ID))
        taken.setdefault("queue.pointer", torch.zeros_like(wanted["queue.pointer"]))
    used = {origins[name] for name in taken}
    for name in tensors:
        if name not in used:
            reason = _why_not(name, tensors, wanted, used)
            if reason:
                left_out.setdefault(name, reason)
            else:
                taken[name] = tensors[name]
    kept = [name for name in wanted if name not in taken and _may_stay(name, wanted, taken)]
    return Adopted(taken, left_out, kept)


def _is_decoder(names: Mapping[str, Tensor]) -> bool:
    """Whether `text` is a decoder and nothing else: a captioning model."""
    return "lm_head.bias" in names and not any(
        name.startswith(("answer_decoder.", "itm_head.")) for name in names
    )


def _origin(name: str, tensors: Mapping[str, Tensor], decoder: bool) -> str:
    """The name of the tensor that `name` starts from; `decoder`: `text` is one."""
    head, _, rest = name.partition(".")
    if head == "answer_decoder" or (head == "text" and decoder):
        return _decoders(rest, tensors)
    if head != "text":
        return name
    if rest.startswith("decode_embedding.") or ".decode." in rest:
        return _decoders(rest.replace("decode_embedding.", "embedding.").replace(".decode.", "."), tensors)
    single = re.sub(r"\.looks\.\d+\.", ".", name)
    return single if single in tensors else name


def _decoders(rest: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of a tensor of the text transformer as the decoder of the weights has it."""
    own = "decode_" + rest if rest.startswith("embedding.") else re.sub(r"^(layers\.\d+)", r"\1.decode", rest)
    for name in (f"answer_decoder.{rest}", f"text.{own}"):
        if name in tensors:
            return name
    return f"text.{rest}"


def _fresh_parts(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origins: Mapping[str, str]
) -> tuple[str, ...]:
    """Parts that do not go over as a whole, and so not at all."""
    fresh = []
    for part in ("twin.", "queue.", "cls_head."):
        names = [n for n in wanted if n.startswith(part) and n not in ("queue.ids", "queue.pointer")]
        whole = all(
            origins[n] in tensors
            and (tensors[origins[n]].shape == wanted[n].shape or n.endswith(".pos_embed"))
            for n in names
        )
        if not whole:
            fresh.append(part)
    return tuple(fresh)


def _other_width(name: str, tensor: Tensor, wanted: Mapping[str, Tensor]) -> bool:
    """Keys and values of an answer decoder, which look at states of another width than a caption's."""
    look = re.fullmatch(r"answer_decoder\..*\.cross_attn\.(key|value)\.weight", name)
    return look is not None and tensor.shape[1] != wanted[name].shape[1]


def _why_not(
    name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], used: set[str]
) -> str | None:
    """Why a tensor that nothing starts from has no place; None: it should have one."""
    part = next((p for p in (*_MAY_START_ANEW, "answer_decoder.") if name.startswith(p)), None)
    if part == "cls_head." and any(n.startswith(part) for n in wanted):
        return "a head with another number of classes"
    if part is not None:
        return _REASONS.get(part, "a head that this model has not")
    if ".decode." in name or name.startswith("text.decode_embedding."):
        return _REASONS["text."]
    head, _, rest = name.partition(".")
    other = _decoders(rest, tensors)
    return _REASONS["text."] if head == "text" and other != name and other in used else None


def _may_stay(name: str, wanted: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> bool:
    """Whether a tensor that the weights do not give may keep its value: they lack the whole part."""
    part = next((p for p in _MAY_START_ANEW if name.startswith(p)), None)
    if ".cross_attn.merge." in name:
        return not any(".cross_attn.merge." in n for n in taken)
    if part is None:
        return re.fullmatch(r"answer_decoder\..*\.cross_attn\.(key|value)\.weight", name) is not None
    return not any(n.startswith(part) for n in taken if n in wanted)
