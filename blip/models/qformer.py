"""The Q-Former: a BERT whose learned queries look at an image, and whose text looks at the queries.

Queries and text share the self-attention of a layer and have feed-forwards of their own; every n-th layer
lets the queries (never the text) attend to the image. Which of them see each other is the mask's choice
(`layers/masks.py`), so one network serves ITC, ITM and LM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from blip.config.schema import SectionError
from blip.errors import ConfigError
from blip.layers.attention import Attention, ImageKeys, KeyValue, Segment
from blip.layers.cache import TokenCache
from blip.layers.text import FeedForward, TextEmbedding, init_bert
from blip.models.bert_init import BertConfig, BertParts


@dataclass
class QFormerConfig(BertConfig):
    """Sizes of the Q-Former; the defaults are BERT-base's."""

    section: ClassVar[str] = "model.qformer"

    query_init: Literal["random", "words"] = "random"
    """What the queries begin as: `random` (LAVIS); or `words`, words of `init_from`, drawn at random, which a
    narrow BERT keeps apart for longer: random queries are soon all the same to it."""
    cross_init_std: float | None = None
    """Standard deviation of cross-attention's initial query and key matrices; null: `init_std`. The larger,
    the sharper it looks: queries that all see the mean of the picture become the same by what they see."""

    def problems(self) -> list[str]:
        """Sizes that cannot be built."""
        found = super().problems()
        if self.query_init == "words" and not self.init_from:
            found.append("query_init: words are those of a BERT; set init_from, or query_init to random")
        if self.cross_init_std is not None and self.cross_init_std <= 0:
            found.append(f"cross_init_std: {self.cross_init_std} is not above 0")
        return found


class QFormerOutput(NamedTuple):
    """Final states of one pass; what was not asked for is None."""

    queries: Tensor | None
    """(R, Q, D)."""
    text: Tensor | None
    """(R, T, D), or (R, 1, D) when only the first token was asked for."""
    cache: list[KeyValue]
    """Self-attention keys and values per layer, of the positions of this pass."""


class QFormerLayer(nn.Module):
    """One layer: self-attention over [queries ; text], cross-attention of the queries, two feed-forwards.

    `keep` trims the last layer to the positions whose output somebody reads; the others are looked at only.
    """

    def __init__(
        self, config: QFormerConfig, image_width: int | None, dropout: float, text_ffn: bool
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "num_heads": config.num_heads,
            "dropout": dropout,
            "norm_eps": config.norm_eps,
        }
        self.self_attn = Attention(config.width, **sizes)
        self.cross_attn = Attention(config.width, kv_width=image_width, **sizes) if image_width else None
        self.query_ffn = FeedForward(config.width, config.mlp_dim, dropout, config.norm_eps)
        self.text_ffn = (
            FeedForward(config.width, config.mlp_dim, dropout, config.norm_eps) if text_ffn else None
        )

    def forward(
        self,
        hidden: Tensor,
        num_query: int,
        mask: Tensor | None,
        image: list[Segment] | None,
        past: KeyValue | None,
        keep: slice,
    ) -> tuple[Tensor, KeyValue]:
        """(R, Q + T, D) -> the kept positions of it, and the keys and values of this pass's positions."""
        own = self.self_attn.keys_values(hidden)
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, keep]
        hidden = self.self_attn(hidden[:, keep], own.behind(past), mask)

        queries, text = hidden[:, :num_query], hidden[:, num_query:]
        if num_query and image is not None:
            assert self.cross_attn is not None
            queries = self.cross_attn(queries, image)
        parts = []
        if num_query:
            parts.append(self.query_ffn(queries))
        if text.shape[1]:
            assert self.text_ffn is not None
            parts.append(self.text_ffn(text))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), own

    def write(self, hidden: Tensor, source: list[Segment]) -> Tensor:
        """Text (R, 1, D) that looks at itself and what was before it."""
        assert self.text_ffn is not None
        return self.text_ffn(self.self_attn(hidden, source))


class QFormer(nn.Module):
    """Learned queries and text in one BERT (BLIP-2, section 3.1).

    Args:
        config: sizes.
        num_query: Q, number of learned queries.
        image_width: width of the image states that the queries look at.
        vocab_size: V; None builds neither embeddings nor text feed-forwards (stage 2: queries only).
        cross_attention_freq: layers 0, n, 2n, ... have cross-attention.
        dropout: of attention probabilities and of every sub-block's output.

    Raises:
        ConfigError: sizes that cannot be built.
    """

    embedding: Any
    """`TextEmbedding`, or `QueryEmbedding` without text."""

    def __init__(
        self,
        config: QFormerConfig,
        num_query: int,
        image_width: int,
        vocab_size: int | None,
        cross_attention_freq: int = 2,
        dropout: float = 0.1,
    ) -> None:
        if problems := config.problems():  # it may have been changed since it was built
            raise SectionError(config.section, problems)
        if min(num_query, image_width, cross_attention_freq) < 1:
            raise ConfigError(
                f"Q-Former: num_query {num_query}, image_width {image_width} and cross_attention_freq"
                f" {cross_attention_freq} must be at least 1"
            )
        super().__init__()
        self.num_query = num_query
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query, config.width))
        has_text = vocab_size is not None
        if vocab_size is not None:
            self.embedding = TextEmbedding(
                vocab_size, config.width, config.max_positions, dropout, config.norm_eps
            )
        else:
            self.embedding = QueryEmbedding(config.width, dropout, config.norm_eps)
        self.layers = nn.ModuleList(
            QFormerLayer(config, image_width if i % cross_attention_freq == 0 else None, dropout, has_text)
            for i in range(config.depth)
        )
        init_bert(self, config.init_std)
        if config.cross_init_std is not None:
            for cross in (layer.cross_attn for layer in self.blocks() if layer.cross_attn is not None):
                nn.init.normal_(cross.query.weight, std=config.cross_init_std)
                nn.init.normal_(cross.key.weight, std=config.cross_init_std)
        nn.init.normal_(self.query_tokens, std=0.02)
        self.copy_text_ffn()

    def blocks(self) -> list[QFormerLayer]:
        """The layers in order."""
        return [cast(QFormerLayer, layer) for layer in self.layers]

    def copy_text_ffn(self) -> None:
        """Start the queries' feed-forwards as copies of the text's, as LAVIS does."""
        for layer in self.blocks():
            if layer.text_ffn is not None:
                layer.query_ffn.load_state_dict(layer.text_ffn.state_dict())

    @torch.no_grad()
    def begin_as_words(self) -> None:
        """Queries become words, drawn by torch's generator, at the places behind a text's first token."""
        word, position = self.embedding.word.weight, self.embedding.position.weight
        places = torch.arange(1, self.num_query + 1) % len(position)
        drawn = torch.randint(len(word), (self.num_query,))
        self.query_tokens.copy_((word[drawn] + position[places])[None])

    def bert_parts(self) -> BertParts:
        """What a BERT can start: the text side."""
        layers = [(layer.self_attn, cast(FeedForward, layer.text_ffn)) for layer in self.blocks()]
        return BertParts(QFormerConfig.section, self.embedding, layers)

    def image_keys(self, image_embeds: Tensor, norm: nn.LayerNorm | None = None) -> ImageKeys:
        """Cross-attention keys and values of image states (B, P, image_width), once per layer.

        `norm` is applied to them as far as its weight and bias go (`Attention.keys_values`).
        """
        cross = [layer.cross_attn for layer in self.blocks()]
        return ImageKeys([None if x is None else x.keys_values(image_embeds, norm) for x in cross])

    def queries(self, rows: int) -> Tensor:
        """The learned queries for `rows` rows, embedded: (rows, Q, D)."""
        return self.embedding.finish(self.query_tokens.expand(rows, -1, -1))

    def forward(
        self,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        images: list[tuple[ImageKeys, int]] | None = None,
        past: list[KeyValue] | None = None,
        keep: str = "all",
    ) -> QFormerOutput:
        """One pass over queries (where `images` are given), text, or both.

        Args:
            text: (R, T, D) embedded text (`embedding`), or None.
            mask: bool, broadcastable to (R, 1, Q + T, S + Q + T), True = may attend; None = all.
            images: keys of images and how many rows in a row look at each (`Segment`); None = no queries.
            past: cached keys and values per layer that come before this pass's positions.
            keep: `all`, `queries` or `first` (the first text token): what the last layer computes.
        """
        num_query = self.num_query if images else 0
        parts = []
        if images:
            rows = sum(keys.rows * copies for keys, copies in images)
            parts.append(self.queries(rows))
        if text is not None:
            parts.append(text)
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (R, Q + T, D)
        cache = []
        for i, layer in enumerate(self.blocks()):
            segments = None
            if images and layer.cross_attn is not None:
                segments = [keys.segment(i, copies) for keys, copies in images]
            kept = _kept(keep, num_query) if i == len(self.layers) - 1 else slice(None)
            hidden, own = layer(hidden, num_query, mask, segments, past[i] if past else None, kept)
            cache.append(own)
        queries = hidden[:, :num_query] if num_query else None
        rest = hidden[:, num_query:]
        return QFormerOutput(queries, rest if rest.shape[1] else None, cache)

    def step(self, tokens: Tensor, position: Tensor, cache: TokenCache) -> Tensor:
        """States (R, D) of one more token per row, which looks at the cached ones (generation).

        Args:
            tokens: int64 (R,).
            position: int64 (R,), their places in the texts.
            cache: of the queries and of the tokens before; these are added.
        """
        hidden = self.embedding(tokens[:, None], position)  # (R, 1, D)
        cache.advance()
        for i, layer in enumerate(self.blocks()):
            hidden = layer.write(hidden, cache.add(i, layer.self_attn.keys_values(hidden)))
        return hidden[:, 0]


class QueryEmbedding(nn.Module):
    """The embedding of a Q-Former without text: queries still pass its LayerNorm and dropout."""

    def __init__(self, width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = dropout

    def finish(self, states: Tensor) -> Tensor:
        """LayerNorm and dropout, (B, Q, D) -> same."""
        return nn.functional.dropout(self.norm(states), self.dropout, self.training)


def _kept(keep: str, num_query: int) -> slice:
    if keep == "queries":
        return slice(0, num_query)
    return slice(0, num_query + 1) if keep == "first" else slice(None)
