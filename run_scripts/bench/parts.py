"""What the straightforward steps are built of, written straight down: eager attention with an additive mask.

Never imported by the library. Parameters carry LAVIS's names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -10000.0


@dataclass(frozen=True)
class Sizes:
    """What has a size in every model; the defaults are the benchmark's base size (ViT-B/16 at 224 px)."""

    image_size: int = 224
    patch: int = 16
    vit_width: int = 768
    vit_depth: int = 12
    vit_heads: int = 12
    vit_mlp: int = 3072
    eva: bool = False
    """EVA-CLIP's tower: no key bias and no final norm; else BLIP's."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    positions: int = 512
    embed_dim: int = 256
    vocab: int = 30523
    specials: int = 1
    """Tokens at the end of the vocabulary that no text has."""
    text_length: int = 32
    """What the straightforward step pads to."""
    smoothing: float = 0.1


class VitAttention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.vit_width
        self.heads = sizes.vit_heads
        self.qkv = nn.Linear(width, 3 * width, bias=not sizes.eva)
        if sizes.eva:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        query, key, value = qkv.view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
        context = scores.softmax(dim=-1) @ value
        return self.proj(context.transpose(1, 2).reshape(rows, tokens, width))


class VitMlp(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.vit_width, sizes.vit_mlp)
        self.fc2 = nn.Linear(sizes.vit_mlp, sizes.vit_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VitBlock(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.vit_width, eps=1e-6)
        self.attn = VitAttention(sizes)
        self.norm2 = nn.LayerNorm(sizes.vit_width, eps=1e-6)
        self.mlp = VitMlp(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.vit_width, sizes.patch, sizes.patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    """(B, 3, H, W) -> (B, 1 + patches, vit_width)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        tokens = (sizes.image_size // sizes.patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.vit_width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, sizes.vit_width))
        self.patch_embed = PatchEmbed(sizes)
        self.blocks = nn.ModuleList(VitBlock(sizes) for _ in range(sizes.vit_depth))
        self.norm = nn.Identity() if sizes.eva else nn.LayerNorm(sizes.vit_width, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Projections(nn.Module):
    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source, width)
        self.value = nn.Linear(source, width)


class Residual(nn.Module):
    """Dense, add, normalise."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Dense(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertAttention(nn.Module):
    """Attention over `source` (the states themselves, or the image), behind cached keys and values."""

    def __init__(self, sizes: Sizes, source: int) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.self = Projections(sizes.width, source)
        self.output = Residual(sizes.width, sizes.width)

    def forward(
        self, hidden: Tensor, source: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query = self._split(self.self.query(hidden))
        key, value = self._split(self.self.key(source)), self._split(self.self.value(source))
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
        context = scores.softmax(dim=-1) @ value
        merged = context.permute(0, 2, 1, 3).contiguous().flatten(2)
        return self.output(merged, hidden), (key, value)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)


class Embeddings(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocab, sizes.width)
        self.position_embeddings = nn.Embedding(sizes.positions, sizes.width)
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=1e-12)


class Transform(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.width, sizes.width)
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=1e-12)


class Predictions(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(sizes.vocab))
        self.transform = Transform(sizes)


class Head(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.predictions = Predictions(sizes)

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        transform = self.predictions.transform
        return transform.LayerNorm(F.gelu(transform.dense(hidden))) @ words.T + self.predictions.bias


def init(model: nn.Module, vit: Vit) -> None:
    """Normal matrices, embeddings and positions; the rest stays as torch makes it."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for table in (vit.pos_embed, vit.cls_token):
        nn.init.normal_(table, std=0.02)


def choose(weights: Tensor, draw: str) -> list[int]:
    """One column per row, row by row: the heaviest (`argmax`), or drawn."""
    if draw == "argmax":
        return [int(row.argmax().item()) for row in weights]
    return [int(torch.multinomial(row, 1).item()) for row in weights]


def additive(mask: Tensor) -> Tensor:
    """bool (B, T), True = real, to 0 / -10000 of shape (B, 1, 1, T)."""
    return (1.0 - mask[:, None, None, :].float()) * MASKED
