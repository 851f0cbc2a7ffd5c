"""What BERT's modules are called in LAVIS and in transformers, and what they are called here.

Both took the names from the original BERT, so one list of them serves every layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip.formats.rules import Copy, Drop, Rename, Rule, State, expand

PARTS = ("weight", "bias")

_ATTENTION = {
    "self.query": "query",
    "self.key": "key",
    "self.value": "value",
    "output.dense": "out",
    "output.LayerNorm": "norm",
}


def attention(theirs: str, ours: str) -> list[Rule]:
    """One attention sub-block; the arguments are the names of the module on both sides."""
    rules = [Rename(f"{theirs}.{a}.{{part}}", f"{ours}.{b}.{{part}}") for a, b in _ATTENTION.items()]
    return expand(rules, part=PARTS)


def feed_forward(theirs: str, ours: str, suffix: str = "") -> list[Rule]:
    """One feed-forward sub-block; `theirs` is their layer, `ours` the sub-block."""
    names = {
        f"intermediate{suffix}.dense": "expand",
        f"output{suffix}.dense": "contract",
        f"output{suffix}.LayerNorm": "norm",
    }
    rules = [Rename(f"{theirs}.{a}.{{part}}", f"{ours}.{b}.{{part}}") for a, b in names.items()]
    return expand(rules, part=PARTS)


def embeddings(theirs: str, ours: str, numbered: bool = True) -> list[Rule]:
    """Words, positions and their norm.

    Args:
        theirs, ours: names of the module on both sides.
        numbered: their weights hold the numbers of the positions as well.
    """
    positions = f"{theirs}.position_embeddings.weight"

    def numbers(state: State) -> Tensor | None:
        return torch.arange(len(state[positions]))[None] if positions in state else None

    rules: list[Rule] = [
        Rename(f"{theirs}.word_embeddings.weight", f"{ours}.word.weight"),
        Rename(positions, f"{ours}.position.weight"),
        *expand([Rename(f"{theirs}.LayerNorm.{{part}}", f"{ours}.norm.{{part}}")], part=PARTS),
    ]
    return [
        *rules,
        Drop(f"{theirs}.position_ids", "the numbers 0, 1, 2, ...", numbers if numbered else None),
    ]


def lm_head(theirs: str, words: str) -> list[Rule]:
    """The head of the language-model loss.

    Args:
        theirs: what they call it.
        words: their name of the word embeddings, which are its last matrix.
    """
    rules: list[Rule] = [
        Rename(f"{theirs}.bias", "lm_head.bias"),
        Rename(f"{theirs}.transform.dense.{{part}}", "lm_head.transform.{part}"),
        Rename(f"{theirs}.transform.LayerNorm.{{part}}", "lm_head.norm.{part}"),
        Copy(f"{theirs}.decoder.weight", words, "tied to the word embeddings"),
        Copy(f"{theirs}.decoder.bias", f"{theirs}.bias", "the same as predictions.bias"),
    ]
    return expand(rules, part=PARTS)


def layers(theirs: str, ours: str, parts: Sequence[str] = ("self_attn", "cross_attn", "ffn")) -> list[Rule]:
    """Sub-blocks of every layer; `ours` may have its own name between the layer and the sub-block.

    Args:
        theirs: name of their layer, with its number as `{i}`.
        ours: name of our layer.
        parts: sub-blocks.
    """
    of = {
        "self_attn": attention(f"{theirs}.attention", f"{ours}.self_attn"),
        "cross_attn": attention(f"{theirs}.crossattention", f"{ours}.cross_attn"),
        "ffn": feed_forward(theirs, f"{ours}.ffn"),
    }
    return [rule for part in parts for rule in of[part]]


def text(theirs: str, ours: str, cross: bool = True, numbered: bool = True) -> list[Rule]:
    """A whole text transformer without a head.

    Args:
        theirs, ours: names of the module on both sides.
        cross: with cross-attention.
        numbered: as of `embeddings`.
    """
    parts = ("self_attn", "cross_attn", "ffn") if cross else ("self_attn", "ffn")
    return [
        *embeddings(f"{theirs}.embeddings", f"{ours}.embedding", numbered),
        *layers(f"{theirs}.encoder.layer.{{i}}", f"{ours}.layers.{{i}}", parts),
    ]


def second(rules: Sequence[Rule], old: str, new: str, reason: str, exact: bool = True) -> list[Rule]:
    """Rules for a second copy of some tensors, whose names there begin with `new` in place of `old`."""
    names = [rule.theirs for rule in rules if isinstance(rule, Rename)]
    return [Copy(new + name.removeprefix(old), name, reason, exact) for name in names]
