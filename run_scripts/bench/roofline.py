"""FLOPs of a stage-1 training step, per sample; a multiply-add counts 2, elementwise work counts nothing.

A trained part costs three times its forward pass, the frozen tower once.
"""

from __future__ import annotations

from run_scripts.bench.naive_stage1 import Sizes

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
    """Number of layers whose queries look at the image."""
    return len(range(0, sizes.depth, sizes.cross_every))


def image_keys(sizes: Sizes) -> float:
    """Cross-attention keys and values of one image, in all layers."""
    return cross_layers(sizes) * project(image_tokens(sizes), sizes.vit_width, 2 * sizes.width)


def qformer(sizes: Sizes, tokens: float, queries: int, seen: float, last: float | None = None) -> float:
    """One pass without the image's keys and values.

    Args:
        sizes: of the model.
        tokens: positions of the pass, queries included.
        queries: those of them that are queries.
        seen: positions that each looks at.
        last: positions whose output somebody reads in the last layer; None = all.
    """
    width = sizes.width
    cross = project(queries, width, 2 * width) + attend(queries, image_tokens(sizes), width)
    total = cross_layers(sizes) * cross
    for layer in range(sizes.depth):
        kept = tokens if last is None or layer < sizes.depth - 1 else last
        total += project(tokens, width, 2 * width) + project(kept, width, 2 * width)
        total += attend(kept, seen, width) + project(kept, width, 2 * sizes.mlp)
    return total


def head(sizes: Sizes, tokens: float) -> float:
    """Language-model head."""
    return project(tokens, sizes.width, sizes.width) + project(tokens, sizes.width, sizes.vocab)


def straightforward(sizes: Sizes) -> float:
    """The step of `naive_stage1.py`: padded texts, keys and values in each of four passes."""
    queries, text = sizes.queries, sizes.text_length
    both = queries + text
    trained = qformer(sizes, queries, queries, queries) + qformer(sizes, text, 0, text)
    trained += 3 * qformer(sizes, both, queries, both) + 4 * image_keys(sizes)
    trained += qformer(sizes, text, 0, both) + head(sizes, text)
    return tower(sizes) + 3 * trained


def lean(sizes: Sizes, text: float, targets: float) -> float:
    """What has to be computed: keys and values once, nothing that no loss reads.

    Args:
        sizes: of the model.
        text: tokens per text, padding included if it is computed.
        targets: tokens per text that are predicted.
    """
    queries = sizes.queries
    both = queries + text
    trained = qformer(sizes, queries, queries, queries) + qformer(sizes, text, 0, text, last=1)
    trained += 3 * qformer(sizes, both, queries, both, last=queries) + image_keys(sizes)
    trained += qformer(sizes, text - 1, 0, both) + head(sizes, targets)
    return tower(sizes) + 3 * trained
