"""Speed and memory of BLIP's pre-training step beside a straightforward one, in one run on one machine.

    python run_scripts/bench/blip_pretrain.py                    base size on the CPU: ViT-B/16, MED 12 x 768
    python run_scripts/bench/blip_pretrain.py --size small       seconds instead of minutes
    python run_scripts/bench/blip_pretrain.py --batch 24         where memory is the batch's, not the weights'
    python run_scripts/bench/blip_pretrain.py --return-memory    peak memory without the allocator's fragments
    python run_scripts/bench/blip_pretrain.py --device cuda      samples/s, MFU, memory

How it is measured: `harness.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from run_scripts.bench import roofline
from run_scripts.bench.harness import run
from run_scripts.bench.naive_pretrain import NaivePretrain, Sizes
from run_scripts.bench.worker import Bench

SIZES = {
    "small": Sizes(
        image_size=64,
        vit_width=128,
        vit_depth=2,
        vit_heads=4,
        vit_mlp=256,
        width=128,
        depth=4,
        heads=4,
        mlp=256,
        positions=64,
        embed_dim=32,
        vocab=1000,
        queue=960,
    ),
    "base": Sizes(),
    "large": Sizes(vit_width=1024, vit_depth=24, vit_heads=16, vit_mlp=4096),
}


def naive(sizes: Sizes, half: torch.dtype | None) -> nn.Module:
    """The straightforward model; all of it trains, so all of it is in float32."""
    return NaivePretrain(sizes)


def library_config(sizes: Sizes) -> Any:
    """`Sizes` as our model's configuration."""
    from blip.models.blip_pretrain import BlipPretrainConfig
    from blip.models.med import MedConfig
    from blip.models.vision import VisionConfig

    vit = VisionConfig(
        vit_model="vit_base",
        patch_size=sizes.patch,
        width=sizes.vit_width,
        depth=sizes.vit_depth,
        heads=sizes.vit_heads,
        mlp_dim=sizes.vit_mlp,
    )
    med = MedConfig(
        width=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        mlp_dim=sizes.mlp,
        max_positions=sizes.positions,
    )
    return BlipPretrainConfig(
        image_size=sizes.image_size,
        vit=vit,
        med=med,
        max_txt_len=sizes.text_length,
        vocab_size=sizes.vocab,
        dropout=0.0,
        embed_dim=sizes.embed_dim,
        queue_size=sizes.queue,
        momentum=sizes.momentum,
        alpha=sizes.alpha,
        label_smoothing=sizes.smoothing,
    )


def library(sizes: Sizes, half: torch.dtype | None) -> nn.Module:
    """Our model."""
    from blip.models.blip_pretrain import BlipPretrain

    return BlipPretrain(library_config(sizes))


def to_ours(sizes: Sizes, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The straightforward model's weights by our names."""
    from blip.formats import lavis

    return lavis.table("blip_pretrain").to_ours(state).state


BENCH = Bench(
    name="blip_pretrain",
    title="BLIP pre-training",
    sizes=SIZES,
    gpu_size="base",
    gpu_batches=(128, 256, 512),
    naive=naive,
    library=library,
    to_ours=to_ours,
    flops=roofline.pretrain,
)

if __name__ == "__main__":
    sys.exit(run(BENCH, __doc__ or ""))
