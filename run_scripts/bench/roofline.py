"""FLOPs of a training step, per sample; a multiply-add counts 2, elementwise work counts nothing.

A trained part costs three times its forward pass, a frozen tower and a momentum twin once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from run_scripts.bench import naive_pretrain
from run_scripts.bench.naive_stage1 import Sizes as Stage1Sizes
from run_scripts.bench.parts import Sizes

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A6000": 154.8,
    "RTX 4090": 165.2,
}
"""Nominal dense bf16 peak, by a part of the device's name."""


def peak_flops(device_name: str) -> float | None:
    """FLOP/s that `device_name` promises, None where it is not in the table."""
    found = [peak for part, peak in PEAK_TFLOPS.items() if part in device_name]
    return found[0] * 1e12 if found else None


def project(tokens: float, rows: int, columns: int) -> float:
    """`tokens` vectors through a matrix."""
    return 2.0 * tokens * rows * columns


def attend(looking: float, seen: float, width: int) -> float:
    """Scores and weighted sum."""
    return 4.0 * looking * seen * width


def tower(sizes: Sizes) -> float:
    """Forward pass of the vision tower."""
    width, patches = sizes.vit_width, (sizes.image_size // sizes.patch) ** 2
    tokens = patches + 1
    block = project(tokens, width, 4 * width) + project(tokens, width, 2 * sizes.vit_mlp)
    block += attend(tokens, tokens, width)
    return sizes.vit_depth * block + project(patches, 3 * sizes.patch**2, width)


def image_tokens(sizes: Sizes) -> int:
    """Length of the tower's output."""
    return (sizes.image_size // sizes.patch) ** 2 + 1


def cross_layers(sizes: Sizes) -> int:
    """Number of layers that look at the image."""
    return len(range(0, sizes.depth, getattr(sizes, "cross_every", 1)))


def image_keys(sizes: Sizes) -> float:
    """Cross-attention keys and values of one image, in all layers."""
    return cross_layers(sizes) * project(image_tokens(sizes), sizes.vit_width, 2 * sizes.width)


def bert(sizes: Sizes, tokens: float, looking: float, seen: float, last: float | None = None) -> float:
    """One pass of text transformer or Q-Former, without the image's keys and values.

    Args:
        sizes: of the model.
        tokens: positions of the pass.
        looking: those of them that look at the image.
        seen: positions that each looks at in self-attention.
        last: positions whose output somebody reads in the last layer; None = all.
    """
    width, layers = sizes.width, cross_layers(sizes)
    cross = project(1, width, 2 * width) + attend(1, image_tokens(sizes), width)
    in_last = looking if last is None else min(looking, last)
    total = ((layers - 1) * looking + in_last) * cross
    for layer in range(sizes.depth):
        kept = tokens if last is None or layer < sizes.depth - 1 else last
        total += project(tokens, width, 2 * width) + project(kept, width, 2 * width)
        total += attend(kept, seen, width) + project(kept, width, 2 * sizes.mlp)
    return total


def head(sizes: Sizes, tokens: float) -> float:
    """Language-model head."""
    return project(tokens, sizes.width, sizes.width) + project(tokens, sizes.width, sizes.vocab)


def stage1(sizes: Stage1Sizes, text: float) -> tuple[float, float]:
    """The step of `naive_stage1.py`, and what has to be computed for texts of `text` tokens.

    Straightforward: padded texts, keys and values in each of four passes. Needed: keys and values once,
    nothing that no loss reads.
    """
    queries, padded = sizes.queries, sizes.text_length
    both = queries + padded
    trained = bert(sizes, queries, queries, queries) + bert(sizes, padded, 0, padded)
    trained += 3 * bert(sizes, both, queries, both) + 4 * image_keys(sizes)
    trained += bert(sizes, padded, 0, both) + head(sizes, padded)
    straightforward = tower(sizes) + 3 * trained

    both = queries + text
    trained = bert(sizes, queries, queries, queries) + bert(sizes, text, 0, text, last=1)
    trained += 3 * bert(sizes, both, queries, both, last=queries) + image_keys(sizes)
    trained += bert(sizes, text - 1, 0, both) + head(sizes, text - 1)
    return straightforward, tower(sizes) + 3 * trained


def pretrain(sizes: naive_pretrain.Sizes, text: float) -> tuple[float, float]:
    """The step of `naive_pretrain.py`, and what has to be computed for texts of `text` tokens."""
    padded = sizes.text_length
    contrast = project(1, sizes.embed_dim, sizes.queue)  # one row beside one queue
    trained = tower(sizes) + bert(sizes, padded, 0, padded)
    trained += 4 * (bert(sizes, padded, padded, padded) + image_keys(sizes)) + head(sizes, padded)
    # Two directions, of the twin and of the model, which also has a backward pass to its features.
    similar = (2 + 2 * 2) * contrast
    straightforward = 3 * trained + tower(sizes) + bert(sizes, padded, 0, padded) + similar

    trained = tower(sizes) + bert(sizes, text, 0, text, last=1)
    trained += 3 * bert(sizes, text, text, text, last=1) + image_keys(sizes)
    trained += bert(sizes, text - 1, text - 1, text - 1) + head(sizes, text - 1)
    return straightforward, 3 * trained + tower(sizes) + bert(sizes, text, 0, text, last=1) + similar


def queries_alone(sizes: Stage1Sizes) -> float:
    """The Q-Former's pass without text, without the image's keys and values."""
    return bert(sizes, sizes.queries, sizes.queries, sizes.queries)


def decoder(llm: Mapping[str, Any], tokens: float, targets: float) -> float:
    """Forward pass of a causal language model over `tokens`, with logits for `targets` of them."""
    width, layers = llm["hidden_size"], llm["num_hidden_layers"]
    # Llama's feed-forward has a third matrix, the gate.
    inner = 2 * llm["ffn_dim"] if "ffn_dim" in llm else 3 * llm["intermediate_size"]
    block = project(tokens, width, 4 * width + inner) + attend(tokens, tokens, width)
    return layers * block + project(targets, width, llm["vocab_size"])


def encoder_decoder(llm: Mapping[str, Any], given: float, wanted: float, targets: float) -> float:
    """Forward pass of a T5: `given` tokens for its encoder, `wanted` for its decoder, some with logits."""
    width, inner = llm["d_model"], llm["d_kv"] * llm["num_heads"]
    gated = 3 * llm["d_ff"]

    def block(tokens: float) -> float:
        return project(tokens, width, 4 * inner + gated) + attend(tokens, tokens, inner)

    cross = project(wanted + given, width, 2 * inner) + attend(wanted, given, inner)
    both = llm["num_layers"] * (block(given) + block(wanted) + cross)
    return both + project(targets, width, llm["vocab_size"])


def stage2(sizes: Any, text: float) -> tuple[float, float]:
    """The step of `stage2.py`: transformers', and what has to be computed for texts of `text` tokens.

    A frozen language model costs twice its forward pass: gradients of activations, none of weights. Theirs:
    every text as long as the longest may be, logits at every position, gradients of the image's states,
    although the tower is frozen. Needed: none of these.
    """
    queries, longest = sizes.queries, sizes.longest
    if sizes.seq2seq:
        given, wanted = longest // 2, longest - longest // 2
        theirs = encoder_decoder(sizes.llm, queries + given, wanted, wanted)
        needed = encoder_decoder(sizes.llm, queries + text / 2, text / 2, text / 2)
    else:
        theirs = decoder(sizes.llm, queries + longest, queries + longest)
        needed = decoder(sizes.llm, queries + text - 1, text)
    soft = project(queries, sizes.width, sizes.llm_width)
    trained = 3 * (queries_alone(sizes) + soft) + tower(sizes)
    return trained + 3 * image_keys(sizes) + 2 * theirs, trained + 2 * image_keys(sizes) + 2 * needed
