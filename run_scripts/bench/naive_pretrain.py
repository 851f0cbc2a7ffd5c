"""BLIP pre-training written straight down: the yardstick of `blip_pretrain.py`; the library never imports it.

The same losses as `blip.models.blip_pretrain`, computed the obvious way: eager attention with an additive
-10000 mask, one ITM pass for the pairs and another for the negatives, image tokens repeated for them so that
every pass projects its own cross-attention keys and values, texts padded to a fixed length, logits for every
position, queues concatenated to the features and written by slices, the twin moved parameter by parameter
inside the step. The twin is a whole copy, cross-attention included.

Parameters carry LAVIS's names, so `blip.formats.lavis` moves weights between this file and the library.
"""

from __future__ import annotations

from copy import deepcopy
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
    """Everything that has a size, and the settings of the momentum twin."""

    vocab: int = 30524
    specials: int = 2
    text_length: int = 30
    queue: int = 57600
    momentum: float = 0.995
    alpha: float = 0.4


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention = BertAttention(sizes, sizes.width)
        self.crossattention = BertAttention(sizes, sizes.vit_width)
        self.intermediate = Dense(sizes.width, sizes.mlp)
        self.output = Residual(sizes.mlp, sizes.width)


class Encoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(sizes) for _ in range(sizes.depth))


class Bert(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes)
        self.encoder = Encoder(sizes)

    def forward(self, text_ids: Tensor, mask: Tensor, image: Tensor | None = None) -> Tensor:
        """States of texts, which look at `image` (B, P, D) where there is one; `mask` is additive."""
        positions = torch.arange(text_ids.shape[1], device=text_ids.device)
        words = self.embeddings.word_embeddings(text_ids)
        hidden = self.embeddings.LayerNorm(words + self.embeddings.position_embeddings(positions))
        for layer in self.encoder.layer:
            hidden, _ = layer.attention(hidden, hidden, mask)
            if image is not None:
                everything = hidden.new_zeros(len(hidden), 1, 1, image.shape[1])
                hidden, _ = layer.crossattention(hidden, image, everything)
            hidden = layer.output(layer.intermediate(hidden), hidden)
        return hidden


class TextDecoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bert = Bert(sizes)
        self.cls = Head(sizes)


class NaivePretrain(nn.Module):
    """image float (B, 3, H, W), text_ids int64 (B, L) and text_mask bool (B, L) padded to `text_length`.

    B must divide the length of the queue.
    """

    image_queue: Tensor
    text_queue: Tensor
    queue_ptr: Tensor

    def __init__(self, sizes: Sizes, draw: str = "argmax") -> None:
        super().__init__()
        self.sizes, self.draw = sizes, draw
        self.visual_encoder = Vit(sizes)
        self.text_encoder = Bert(sizes)
        self.text_decoder = TextDecoder(sizes)
        self.vision_proj = nn.Linear(sizes.vit_width, sizes.embed_dim)
        self.text_proj = nn.Linear(sizes.width, sizes.embed_dim)
        self.itm_head = nn.Linear(sizes.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        init(self, self.visual_encoder)
        self._tie()
        self.visual_encoder_m = deepcopy(self.visual_encoder).requires_grad_(False)
        self.text_encoder_m = deepcopy(self.text_encoder).requires_grad_(False)
        self.vision_proj_m = deepcopy(self.vision_proj).requires_grad_(False)
        self.text_proj_m = deepcopy(self.text_proj).requires_grad_(False)
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(sizes.embed_dim, sizes.queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def _tie(self) -> None:
        """The decoder has its own self-attention and shares the rest with the encoder."""
        self.text_decoder.bert.embeddings = self.text_encoder.embeddings
        layers = self.text_decoder.bert.encoder.layer, self.text_encoder.encoder.layer
        for own, layer in zip(*layers, strict=True):
            for name in ("crossattention", "intermediate", "output"):
                setattr(own, name, getattr(layer, name))

    def forward(self, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image_embeds = self.visual_encoder(image)
        text = self.text_encoder(text_ids, additive(text_mask))
        image_feats = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)  # (B, E)
        text_feats = F.normalize(self.text_proj(text[:, 0]), dim=-1)
        loss_itc, sim_i2t, sim_t2i = self._itc(image, text_ids, text_mask, image_feats, text_feats)
        loss_itm = self._itm(image_embeds, text_ids, text_mask, sim_i2t, sim_t2i)
        loss_lm = self._lm(image_embeds, text_ids, text_mask)
        loss = loss_itc + loss_itm + loss_lm
        return {"loss": loss, "loss_itc": loss_itc, "loss_itm": loss_itm, "loss_lm": loss_lm}

    def _itc(
        self, image: Tensor, text_ids: Tensor, text_mask: Tensor, image_feats: Tensor, text_feats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        alpha = self.sizes.alpha
        with torch.no_grad():
            self._follow()
            image_m = F.normalize(self.vision_proj_m(self.visual_encoder_m(image)[:, 0]), dim=-1)
            text_m = self.text_encoder_m(text_ids, additive(text_mask))
            text_m = F.normalize(self.text_proj_m(text_m[:, 0]), dim=-1)
            image_all = torch.cat([image_m.t(), self.image_queue.clone().detach()], dim=1)  # (E, B + K)
            text_all = torch.cat([text_m.t(), self.text_queue.clone().detach()], dim=1)
            sim_i2t_m = image_m @ text_all / self.temp
            sim_t2i_m = text_m @ image_all / self.temp
            hard = torch.zeros_like(sim_i2t_m)
            hard.fill_diagonal_(1)
            target_i2t = alpha * F.softmax(sim_i2t_m, dim=1) + (1 - alpha) * hard
            target_t2i = alpha * F.softmax(sim_t2i_m, dim=1) + (1 - alpha) * hard
        sim_i2t = image_feats @ text_all / self.temp
        sim_t2i = text_feats @ image_all / self.temp
        loss_i2t = -torch.sum(F.log_softmax(sim_i2t, dim=1) * target_i2t, dim=1).mean()
        loss_t2i = -torch.sum(F.log_softmax(sim_t2i, dim=1) * target_t2i, dim=1).mean()
        self._enqueue(image_m, text_m)
        return (loss_i2t + loss_t2i) / 2, sim_i2t, sim_t2i

    @torch.no_grad()
    def _follow(self) -> None:
        momentum = self.sizes.momentum
        for name in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            theirs, own = getattr(self, name).parameters(), getattr(self, f"{name}_m").parameters()
            for parameter, parameter_m in zip(theirs, own, strict=True):
                parameter_m.data = parameter_m.data * momentum + parameter.data * (1.0 - momentum)

    @torch.no_grad()
    def _enqueue(self, image_m: Tensor, text_m: Tensor) -> None:
        start = int(self.queue_ptr)
        end = start + len(image_m)
        self.image_queue[:, start:end] = image_m.T
        self.text_queue[:, start:end] = text_m.T
        self.queue_ptr[0] = end % self.sizes.queue

    def _negatives(self, sim: Tensor) -> list[int]:
        with torch.no_grad():
            weights = F.softmax(sim[:, : len(sim)], dim=1) + 1e-4
            weights.fill_diagonal_(0)
        return choose(weights, self.draw)

    def _itm(
        self, image: Tensor, text_ids: Tensor, text_mask: Tensor, sim_i2t: Tensor, sim_t2i: Tensor
    ) -> Tensor:
        ids = text_ids.clone()
        ids[:, 0] = self.sizes.vocab - 1  # [ENC]
        right = self.text_encoder(ids, additive(text_mask), image)
        wrong_image = torch.stack([image[j] for j in self._negatives(sim_t2i)])
        texts = self._negatives(sim_i2t)
        wrong_ids = torch.stack([ids[j] for j in texts])
        wrong_mask = torch.stack([text_mask[j] for j in texts])
        ids_all, mask_all = torch.cat([ids, wrong_ids]), torch.cat([text_mask, wrong_mask])
        wrong = self.text_encoder(ids_all, additive(mask_all), torch.cat([wrong_image, image]))
        logits = self.itm_head(torch.cat([right[:, 0], wrong[:, 0]]))
        labels = torch.zeros(len(logits), dtype=torch.long, device=image.device)
        labels[: len(image)] = 1
        return F.cross_entropy(logits, labels)

    def _lm(self, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        length = text_ids.shape[1]
        ids = text_ids.clone()
        ids[:, 0] = self.sizes.vocab - 2  # [DEC]
        labels = ids.masked_fill(~text_mask, -100)
        past = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        seen = past & text_mask[:, None, :]
        mask = (1.0 - seen[:, None].float()) * MASKED
        hidden = self.text_decoder.bert(ids, mask, image)
        logits = self.text_decoder.cls(hidden, self.text_decoder.bert.embeddings.word_embeddings.weight)
        shifted, targets = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
        return F.cross_entropy(shifted.flatten(0, 1), targets.flatten(), label_smoothing=self.sizes.smoothing)
