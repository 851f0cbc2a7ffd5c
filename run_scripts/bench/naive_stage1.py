"""BLIP-2 stage 1 written straight down: the yardstick of `stage1.py`, never imported by the library.

The same losses as `blip.models.blip2_qformer`, computed the obvious way: eager attention with an additive
-10000 mask, the expanded (B, N, Q, E) similarity product in both directions, negatives drawn row by row with
`.item()`, image tokens repeated for the 3B matching pairs so that every pass projects its own cross-attention
keys and values, texts padded to a fixed length, logits for every position.

Parameters carry LAVIS's names, so `blip.formats.lavis` moves weights between this file and the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run_scripts.bench import parts as common
from run_scripts.bench.parts import (
    MASKED,
    BertAttention,
    Dense,
    Embeddings,
    Head,
    Residual,
    Vit,
    additive,
    choose,
    init,
)


@dataclass(frozen=True)
class Sizes(common.Sizes):
    """Everything that has a size."""

    cross_every: int = 2
    queries: int = 32


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, cross: bool) -> None:
        super().__init__()
        self.attention = BertAttention(sizes, sizes.width)
        if cross:
            self.crossattention = BertAttention(sizes, sizes.vit_width)
        self.cross = cross
        self.intermediate = Dense(sizes.width, sizes.mlp)
        self.output = Residual(sizes.mlp, sizes.width)
        self.intermediate_query = Dense(sizes.width, sizes.mlp)
        self.output_query = Residual(sizes.mlp, sizes.width)


class Encoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(sizes, i % sizes.cross_every == 0) for i in range(sizes.depth))


class Bert(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes)
        self.encoder = Encoder(sizes)

    def forward(
        self,
        mask: Tensor,
        text_ids: Tensor | None = None,
        queries: Tensor | None = None,
        image: Tensor | None = None,
        past: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Queries, text, or both behind each other; `mask` is additive. States and the cache per layer."""
        parts = [] if queries is None else [queries]
        if text_ids is not None:
            positions = torch.arange(text_ids.shape[1], device=text_ids.device)
            words = self.embeddings.word_embeddings(text_ids)
            parts.append(words + self.embeddings.position_embeddings(positions))
        hidden = self.embeddings.LayerNorm(torch.cat(parts, dim=1))
        num_query = 0 if queries is None else queries.shape[1]
        cache = []
        for index, layer in enumerate(self.encoder.layer):
            hidden, entry = layer.attention(hidden, hidden, mask, None if past is None else past[index])
            cache.append(entry)
            parts = []
            if num_query:
                seen = hidden[:, :num_query]
                if layer.cross:
                    seen, _ = layer.crossattention(
                        seen, image, hidden.new_zeros(len(seen), 1, 1, image.shape[1])
                    )
                parts.append(layer.output_query(layer.intermediate_query(seen), seen))
            if text_ids is not None:
                text = hidden[:, num_query:]
                parts.append(layer.output(layer.intermediate(text), text))
            hidden = torch.cat(parts, dim=1)
        return hidden, cache


class TextModel(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bert = Bert(sizes)
        self.cls = Head(sizes)


class NaiveStage1(nn.Module):
    """image float (B, 3, H, W), text_ids int64 (B, L) and text_mask bool (B, L) padded to `text_length`."""

    def __init__(self, sizes: Sizes, draw: str = "argmax") -> None:
        super().__init__()
        self.sizes, self.draw = sizes, draw
        self.visual_encoder = Vit(sizes)
        self.ln_vision = nn.LayerNorm(sizes.vit_width, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.zeros(1, sizes.queries, sizes.width))
        self.Qformer = TextModel(sizes)
        self.vision_proj = nn.Linear(sizes.width, sizes.embed_dim)
        self.text_proj = nn.Linear(sizes.width, sizes.embed_dim)
        self.itm_head = nn.Linear(sizes.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        init(self, self.visual_encoder)
        nn.init.normal_(self.query_tokens, std=0.02)
        self.visual_encoder.requires_grad_(False)

    def forward(self, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> dict[str, Tensor]:
        rows = len(image)
        image_embeds = self.ln_vision(self.visual_encoder(image))
        queries = self.query_tokens.expand(rows, -1, -1)
        nothing = image_embeds.new_zeros(rows, 1, 1, self.sizes.queries)
        seen, cache = self.Qformer.bert(nothing, queries=queries, image=image_embeds)
        image_feats = F.normalize(self.vision_proj(seen), dim=-1)  # (B, Q, E)
        text, _ = self.Qformer.bert(additive(text_mask), text_ids=text_ids)
        text_feats = F.normalize(self.text_proj(text[:, 0]), dim=-1)  # (B, E)

        # (B, 1, Q, E) x (1, N, E, 1) and (B, 1, 1, E) x (1, N, E, Q): expanded before the maximum.
        sim_q2t = (image_feats.unsqueeze(1) @ text_feats.unsqueeze(-1)).squeeze(-1)
        sim_t2q = (text_feats.unsqueeze(1).unsqueeze(1) @ image_feats.permute(0, 2, 1)).squeeze(-2)
        sim_i2t = sim_q2t.max(-1)[0] / self.temp
        sim_t2i = sim_t2q.max(-1)[0] / self.temp
        targets = torch.arange(rows, device=image.device)
        smoothing = self.sizes.smoothing
        loss_itc = (
            F.cross_entropy(sim_i2t, targets, label_smoothing=smoothing)
            + F.cross_entropy(sim_t2i, targets, label_smoothing=smoothing)
        ) / 2
        loss_itm = self._itm(image_embeds, text_ids, text_mask, sim_i2t, sim_t2i)
        loss_lm = self._lm(text_ids, text_mask, cache)
        loss = loss_itc + loss_itm + loss_lm
        return {"loss": loss, "loss_itc": loss_itc, "loss_itm": loss_itm, "loss_lm": loss_lm}

    def _negatives(self, sim: Tensor) -> list[int]:
        weights = sim.detach().clone()
        weights.fill_diagonal_(MASKED)
        return choose(weights.softmax(dim=1), self.draw)

    def _itm(
        self, image: Tensor, text_ids: Tensor, text_mask: Tensor, sim_i2t: Tensor, sim_t2i: Tensor
    ) -> Tensor:
        wrong_image = torch.stack([image[j] for j in self._negatives(sim_t2i)])
        texts = self._negatives(sim_i2t)
        wrong_ids = torch.stack([text_ids[j] for j in texts])
        wrong_mask = torch.stack([text_mask[j] for j in texts])
        image_all = torch.cat([image, wrong_image, image])
        ids_all = torch.cat([text_ids, text_ids, wrong_ids])
        mask_all = torch.cat([text_mask, text_mask, wrong_mask])
        rows, num_query = len(ids_all), self.sizes.queries
        mask = additive(torch.cat([mask_all.new_ones(rows, num_query), mask_all], dim=1))
        queries = self.query_tokens.expand(rows, -1, -1)
        hidden, _ = self.Qformer.bert(mask, text_ids=ids_all, queries=queries, image=image_all)
        logits = self.itm_head(hidden[:, :num_query]).mean(dim=1)
        labels = torch.zeros(rows, dtype=torch.long, device=image.device)
        labels[: len(image)] = 1
        return F.cross_entropy(logits, labels)

    def _lm(self, text_ids: Tensor, text_mask: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        rows, length = text_ids.shape
        ids = text_ids.clone()
        ids[:, 0] = self.sizes.vocab - 1  # [DEC]
        labels = ids.masked_fill(~text_mask, -100)
        past = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        seen = past & text_mask[:, None, :]
        seen = torch.cat([seen.new_ones(rows, length, self.sizes.queries), seen], dim=2)
        mask = (1.0 - seen[:, None].float()) * MASKED
        hidden, _ = self.Qformer.bert(mask, text_ids=ids, past=cache)
        logits = self.Qformer.cls(hidden, self.Qformer.bert.embeddings.word_embeddings.weight)
        shifted, targets = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
        return F.cross_entropy(shifted.flatten(0, 1), targets.flatten(), label_smoothing=self.sizes.smoothing)
