"""A small stage-1 model in float64, and global batches to cut among ranks and micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip import dist
from blip.batch import Output
from blip.models.blip2_qformer import Blip2Qformer, Blip2QformerConfig
from blip.models.qformer import QFormerConfig
from blip.models.vision import VisionConfig

VOCAB = 40
IMAGE = 16
IDS = (3, 9, 3, 4, 9, 5, 5, 3)
"""Pictures of the rows, some of them repeated."""
LENGTHS = (4, 9, 3, 7, 5, 6, 8, 3)


def small_model(**values: Any) -> Blip2Qformer:
    """The same weights every time; `values` are configuration keys that differ."""
    sizes: dict[str, Any] = {
        "vit_model": "vit_base",
        "vit_precision": "fp32",
        "image_size": IMAGE,
        "vit": VisionConfig(patch_size=8, width=12, depth=2, heads=2, mlp_dim=20),
        "num_query_token": 3,
        "qformer": QFormerConfig(width=16, depth=3, num_heads=2, mlp_dim=24, max_positions=16),
        "embed_dim": 8,
        "vocab_size": VOCAB,
        "max_txt_len": 12,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    model = Blip2Qformer(Blip2QformerConfig(**{**sizes, **values})).double()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name != "temp":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def global_batch(total: int, ids: bool) -> dict[str, Any]:
    """One optimizer step's rows, texts padded to more than the longest."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(len(IDS), 3, IMAGE, IMAGE, generator=generator, dtype=torch.double)[:total]
    mask = torch.arange(11) < torch.tensor(LENGTHS[:total])[:, None]
    text_ids = torch.randint(1, VOCAB - 1, (len(IDS), 11), generator=generator)[:total].masked_fill(~mask, 0)
    batch = {"image": image, "text_ids": text_ids, "text_mask": mask, "seed": 5, "step": 7}
    return batch | ({"image_id": torch.tensor(IDS[:total])} if ids else {})


def part_of(batch: dict[str, Any], start: int, end: int, shares: float = 1) -> dict[str, Any]:
    """This rank's rows of the micro-batch `start:end`, with texts padded to their own longest.

    Args:
        batch: of the whole optimizer step.
        start: first row of the micro-batch.
        end: row after its last.
        shares: how many ranks and micro-batches the losses are averaged over.
    """
    first, last = dist.slices(end - start)[dist.rank()]
    rows = slice(start + first, start + last)
    part = {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch.items()}
    longest = int(part["text_mask"].sum(dim=1).max())
    for key in ("text_ids", "text_mask"):
        part[key] = part[key][:, :longest]
    return part | {
        "rows": torch.arange(start + first, start + last),
        "batch_total": end - start,
        "loss_rows": len(batch["image"]) / shares,
        "loss_tokens": float(batch["text_mask"][:, 1:].sum()) / shares,
    }


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of the parameters that have one."""
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def losses(output: Output) -> dict[str, Tensor]:
    """The losses and accuracies, detached."""
    return {k: v.detach().clone() for k, v in output.items() if k.startswith("loss") or k.endswith("acc")}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal names, equal tensors."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        near = max(tolerance, 1e-6) if value.dtype == torch.float32 else tolerance  # accuracies
        torch.testing.assert_close(got[name], value, atol=near, rtol=near, msg=lambda m, n=name: f"{n}: {m}")
