"""MED, BLIP's mixture of encoder and decoder (section 3.1): one text transformer with three modes.

    unimodal encoder          mode encode, no images     sees all of the text             starts with [CLS]
    image-grounded encoder    mode encode, images        text, then the image             starts with [ENC]
    image-grounded decoder    mode decode, images        its own past, then the image     starts with [DEC]

The mask decides what the text sees (`layers/masks.py`), the mode which parameters are used. Encoder and
decoder share all but self-attention. The sharing is in the construction: a part that the decoder does not
have for itself is the encoder's, so every parameter exists once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from blip.config.schema import SectionError
from blip.layers.attention import Attention, ImageKeys, KeyValue, PairAttention, Segment
from blip.layers.cache import TokenCache
from blip.layers.masks import causal_mask, padding_mask
from blip.layers.text import FeedForward, TextEmbedding, init_bert
from blip.losses import at_least_float32
from blip.models.bert_init import BertConfig, BertParts
from blip.models.narrate import decoder_input

Mode = Literal["encode", "decode"]

DECODER_HAS = {
    "all": (),
    "all_but_sa": ("self_attn",),
    "all_but_ca": ("cross_attn",),
    "none": ("self_attn", "cross_attn", "ffn"),
}
"""Sharing (BLIP, table 3) -> parts of a layer that the decoder has for itself."""


@dataclass
class MedConfig(BertConfig):
    """Sizes of the text transformer; the defaults are BERT-base's."""

    section: ClassVar[str] = "model.med"


class MedOutput(NamedTuple):
    """Result of one pass."""

    states: Tensor
    """(R, T, D), or (R, 1, D) where only the first token was asked for."""
    cache: list[KeyValue]
    """Self-attention keys and values per layer, of the positions of this pass."""


class Parts(NamedTuple):
    """Makes the parts of one layer."""

    config: BertConfig
    image_width: int | None
    dropout: float
    num_images: int
    merge_from: int
    layer: int

    def new(self, part: str) -> nn.Module | None:
        """`self_attn`, `cross_attn` (None where there are no images) or `ffn`."""
        config = self.config
        sizes: dict[str, Any] = {
            "num_heads": config.num_heads,
            "dropout": self.dropout,
            "norm_eps": config.norm_eps,
        }
        if part == "ffn":
            return FeedForward(config.width, config.mlp_dim, self.dropout, config.norm_eps)
        if part == "self_attn":
            return Attention(config.width, **sizes)
        if self.image_width is None:
            return None
        if self.num_images == 1:
            return Attention(config.width, kv_width=self.image_width, **sizes)
        merge = self.layer >= self.merge_from
        return PairAttention(config.width, kv_width=self.image_width, merge=merge, **sizes)


class MedLayer(nn.Module):
    """One block: self-attention, cross-attention to the image where there is one, feed-forward (post-norm).

    Args:
        make: makes the parts.
        decoder_has: parts that exist a second time, for the decoder.
    """

    def __init__(self, make: Parts, decoder_has: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.self_attn, self.cross_attn, self.ffn = (
            make.new("self_attn"),
            make.new("cross_attn"),
            make.new("ffn"),
        )
        own = {part: make.new(part) for part in decoder_has}
        self.decode = nn.ModuleDict({part: module for part, module in own.items() if module is not None})

    def part(self, name: str, mode: Mode) -> Any:
        """The module of a part that a mode uses."""
        return self.decode[name] if mode == "decode" and name in self.decode else getattr(self, name)

    def keys_values(self, hidden: Tensor, mode: Mode) -> KeyValue:
        """Self-attention keys and values of states (R, T, D)."""
        return self.part("self_attn", mode).keys_values(hidden)

    def forward(
        self,
        hidden: Tensor,
        source: KeyValue | list[Segment],
        mask: Tensor | None,
        images: list[Segment] | None,
        mode: Mode,
    ) -> Tensor:
        """States (R, T, D) that look at `source`, then at the images. -> (R, T, D)."""
        hidden = self.part("self_attn", mode)(hidden, source, mask)
        if images is not None:
            hidden = self.part("cross_attn", mode)(hidden, images)
        return self.part("ffn", mode)(hidden)


class Med(nn.Module):
    """The text transformer.

    Args:
        config: sizes.
        vocab_size: V.
        image_width: width of the image states; None builds no cross-attention (a unimodal encoder).
        dropout: of embeddings, attention probabilities and every sub-block's output.
        share: what encoder and decoder share, a key of `DECODER_HAS`; None where only one of them is needed.
        num_images: 2 for texts about two images.
        merge_from: of those, the first layer that joins what is seen by a matrix; None: half-way.

    Raises:
        ConfigError: sizes that cannot be built.
    """

    def __init__(
        self,
        config: BertConfig,
        vocab_size: int,
        image_width: int | None,
        dropout: float = 0.1,
        share: str | None = None,
        num_images: Literal[1, 2] = 1,
        merge_from: int | None = None,
    ) -> None:
        if problems := config.problems():  # it may have been changed since it was built
            raise SectionError(config.section, problems)
        super().__init__()
        embedding = (vocab_size, config.width, config.max_positions, dropout, config.norm_eps)
        self.embedding = TextEmbedding(*embedding)
        self.decode_embedding = TextEmbedding(*embedding) if share == "none" else None
        decoder_has = DECODER_HAS[share] if share else ()
        merge_from = config.depth // 2 if merge_from is None else merge_from
        parts = (
            Parts(config, image_width, dropout, num_images, merge_from, layer)
            for layer in range(config.depth)
        )
        self.layers = nn.ModuleList(MedLayer(part, decoder_has) for part in parts)
        self.dec_id, self.enc_id = vocab_size - 2, vocab_size - 1
        """Ids of [DEC] and [ENC]: the last two rows, as BLIP adds them, unless a tokenizer says otherwise."""
        init_bert(self, config.init_std)

    def blocks(self) -> list[MedLayer]:
        """The layers in order."""
        return [cast(MedLayer, layer) for layer in self.layers]

    def embedding_of(self, mode: Mode) -> TextEmbedding:
        """The embeddings that a mode uses; the LM head is tied to the decoder's words."""
        own = self.decode_embedding if mode == "decode" else None
        return self.embedding if own is None else own

    def bert_parts(self, mode: Mode) -> BertParts:
        """What a BERT can start for a mode."""
        layers = [(layer.part("self_attn", mode), layer.part("ffn", mode)) for layer in self.blocks()]
        return BertParts(MedConfig.section, self.embedding_of(mode), layers)

    def image_keys(
        self, image_embeds: Tensor, mode: Mode = "encode", mask: Tensor | None = None, which: int = 0
    ) -> ImageKeys:
        """Cross-attention keys and values of states (B, P, image_width), once per layer.

        Args:
            image_embeds: what is looked at.
            mode: whose; the same for both modes where they share cross-attention.
            mask: bool (B, P), True = may be seen; None: all.
            which: of two images, the first (0) or the second (1).
        """
        parts = [layer.part("cross_attn", mode) for layer in self.blocks()]
        looks: list[Any] = [part.looks[which] if isinstance(part, PairAttention) else part for part in parts]
        if not torch.is_autocast_enabled(image_embeds.device.type):  # which would cast back in every layer
            image_embeds = at_least_float32(image_embeds)  # a frozen tower's may be half as long
        return ImageKeys([look.keys_values(image_embeds) for look in looks], mask)

    def shares_image_keys(self) -> bool:
        """Whether both modes look at the same keys and values."""
        return "cross_attn" not in self.blocks()[0].decode

    def unimodal(self, text_ids: Tensor, text_mask: Tensor, first_only: bool = False) -> Tensor:
        """States of texts by themselves, (B, T, D), or (B, 1, D) of [CLS] only."""
        return self.forward(text_ids, padding_mask(text_mask), first_only=first_only).states

    def grounded(
        self,
        text_ids: Tensor,
        text_mask: Tensor,
        images: list[tuple[ImageKeys, int]],
        first_only: bool = False,
        as_is: bool = False,
    ) -> Tensor:
        """States of texts that look at images, (R, T, D), or (R, 1, D) of the first token only.

        Args:
            text_ids: int64 (R, T); the first ids become [ENC].
            text_mask: bool (R, T).
            images: as of `forward`.
            first_only: compute the last layer for the first token only.
            as_is: leave the first ids as they are.
        """
        if not as_is:
            text_ids = torch.cat([torch.full_like(text_ids[:, :1], self.enc_id), text_ids[:, 1:]], dim=1)
        return self.forward(text_ids, padding_mask(text_mask), images, first_only=first_only).states

    def decode(self, text_ids: Tensor, text_mask: Tensor, images: list[tuple[ImageKeys, int]]) -> Tensor:
        """States that predict each text's next tokens, (R, T - 1, D): [DEC] first, without the last token."""
        ids, mask = decoder_input(text_ids, text_mask, self.dec_id)
        return self.forward(ids, causal_mask(mask), images, "decode").states

    def forward(
        self,
        text_ids: Tensor,
        mask: Tensor,
        images: list[tuple[ImageKeys, int]] | None = None,
        mode: Mode = "encode",
        first_only: bool = False,
        past: list[KeyValue] | None = None,
    ) -> MedOutput:
        """One pass over text.

        Args:
            text_ids: int64 (R, T).
            mask: bool, broadcastable to (R, 1, T, S + T), True = may attend.
            images: keys of images and how many rows in a row look at each (`Segment`), or those of the first
                and of the second images; None: text alone.
            mode: whose parameters.
            first_only: compute the last layer for the first token only.
            past: self-attention keys and values of S tokens before these, a layer each; None: S is 0.
        """
        hidden = self.embedding_of(mode)(text_ids, past[0].key.shape[2] if past else 0)
        cache = []
        for i, layer in enumerate(self.blocks()):
            segments = [keys.segment(i, copies) for keys, copies in images] if images else None
            own = layer.keys_values(hidden, mode)
            if first_only and i == len(self.layers) - 1:
                hidden, mask = hidden[:, :1], mask[:, :, :1]
            hidden = layer(hidden, own.behind(past[i]) if past else own, mask, segments, mode)
            cache.append(own)
        return MedOutput(hidden, cache)

    def step(
        self,
        tokens: Tensor,
        position: Tensor,
        cache: TokenCache,
        images: list[tuple[ImageKeys, int]],
    ) -> Tensor:
        """The decoder's states (R, D) of one more token per row, which looks at the cached ones (generation).

        Args:
            tokens: int64 (R,).
            position: int64 (R,), their places in the texts.
            cache: of the tokens before; these are added.
            images: as of `forward`.
        """
        hidden = self.embedding_of("decode")(tokens[:, None], position)  # (R, 1, D)
        cache.advance()
        for i, layer in enumerate(self.blocks()):
            segments = [keys.segment(i, copies) for keys, copies in images]
            source = cache.add(i, layer.keys_values(hidden, "decode"))
            hidden = layer(hidden, source, None, segments, "decode")
        return hidden[:, 0]
