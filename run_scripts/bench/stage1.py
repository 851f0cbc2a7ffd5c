"""Speed and memory of our stage-1 training step beside a straightforward one, in one run on one machine.

    python run_scripts/bench/stage1.py                    base size on the CPU: ViT-B/16, Q-Former 12 x 768
    python run_scripts/bench/stage1.py --size small       seconds instead of minutes
    python run_scripts/bench/stage1.py --precision bf16   our step in bfloat16 as well
    python run_scripts/bench/stage1.py --device cuda      paper size, ViT-g/14: samples/s, MFU, memory

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
from run_scripts.bench.naive_stage1 import NaiveStage1, Sizes
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
        queries=8,
        embed_dim=32,
        vocab=1000,
    ),
    "base": Sizes(),
    "paper": Sizes(patch=14, vit_width=1408, vit_depth=39, vit_heads=16, vit_mlp=6144, eva=True),
}


def naive(sizes: Sizes, half: torch.dtype | None) -> nn.Module:
    """The straightforward model; like LAVIS it keeps the frozen tower in half precision."""
    model = NaiveStage1(sizes)
    if half is not None:
        for part in model.visual_encoder.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.to(half)
    return model


def library_config(sizes: Sizes, vit_precision: str = "fp32") -> Any:
    """`Sizes` as our model's configuration."""
    from blip.models.blip2_qformer import Blip2QformerConfig
    from blip.models.qformer import QFormerConfig
    from blip.models.vision import VisionConfig

    vit = VisionConfig(
        patch_size=sizes.patch,
        width=sizes.vit_width,
        depth=sizes.vit_depth,
        heads=sizes.vit_heads,
        mlp_dim=sizes.vit_mlp,
    )
    qformer = QFormerConfig(
        width=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        mlp_dim=sizes.mlp,
        max_positions=sizes.positions,
    )
    return Blip2QformerConfig(
        vit_model="eva_clip_g" if sizes.eva else "vit_base",
        image_size=sizes.image_size,
        vit_precision=vit_precision,
        vit=vit,
        num_query_token=sizes.queries,
        cross_attention_freq=sizes.cross_every,
        qformer=qformer,
        embed_dim=sizes.embed_dim,
        max_txt_len=sizes.text_length,
        vocab_size=sizes.vocab,
        dropout=0.0,
        label_smoothing=sizes.smoothing,
    )


def library(sizes: Sizes, half: torch.dtype | None) -> nn.Module:
    """Our model."""
    from blip.models.blip2_qformer import Blip2Qformer

    return Blip2Qformer(library_config(sizes, "fp32" if half is None else "bf16"))


def to_ours(sizes: Sizes, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The straightforward model's weights by our names."""
    from blip.formats import lavis

    return lavis.table("blip2", "eva_clip_g" if sizes.eva else "vit_base").to_ours(state).state


BENCH = Bench(
    name="stage1",
    title="stage 1",
    sizes=SIZES,
    gpu_size="paper",
    gpu_batches=(64, 128, 256),
    naive=naive,
    library=library,
    to_ours=to_ours,
    flops=roofline.stage1,
)

if __name__ == "__main__":
    sys.exit(run(BENCH, __doc__ or ""))
