"""BLIP pre-training: ITC, ITM and LM with a momentum twin (sections 3.1 and 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from blip.batch import Output
from blip.layers.text import LMHead
from blip.models.bert_init import BertParts
from blip.models.blip_config import MomentumConfig
from blip.models.blip_retrieval import BlipRetrieval, Views
from blip.models.contrast import Contrasted, Negatives, Pool, draw_negatives
from blip.models.narrate import caption_loss, decoder_labels
from blip.models.published import starts_of, weights_of
from blip.registry import MODELS

NEGATIVE_FLOOR = 1e-4
"""Added to the weight of every hard negative before one is drawn."""

DEIT = {"vit_init_from": "deit_base_patch16_224-b5f2ef4d.pth"}
BERT = {"med": {"init_from": "bert-base-uncased"}}


@dataclass
class BlipPretrainConfig(MomentumConfig):
    """Sizes and switches of BLIP pre-training."""

    max_txt_len: int = 30
    """Longest text, in tokens, [CLS] and [SEP] included; longer ones are cut."""
    share: Literal["all", "all_but_sa", "all_but_ca", "none"] = "all_but_sa"
    """What the text encoder and decoder share: everything but self-attention (BLIP), or as in its table 3."""
    label_smoothing: float = 0.1
    """Of the LM loss."""
    image_id_targets: bool = False
    """Use `image_id` where a batch has it, as in retrieval; in BLIP every pair is a picture of its own."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        found = super().problems() + self._within(0, 0.9, "label_smoothing")
        if self.negative_all_rank != self.itc_all_rank:
            found.append(
                "negative_all_rank: negatives are drawn by the similarities of the ITC loss here; set"
                " itc_all_rank to the same value"
            )
        return found


@MODELS.register("blip_pretrain")
class BlipPretrain(BlipRetrieval):
    """The retrieval model with a decoder that shares all but self-attention with the encoder.

    Shape:
        batch: as of `BlipRetrieval`.
        returns: `loss` = `loss_itc` + `loss_itm` + `loss_lm` and the figures of `BlipRetrieval`.
    """

    config_class = BlipPretrainConfig
    presets: ClassVar = {
        "base": {**DEIT, **BERT},
        "large": {
            "vit_type": "large",
            "vit_drop_path_rate": 0.1,
            "vit_init_from": "timm/vit_large_patch16_224.augreg_in21k",
            **BERT,
        },
    }

    published: ClassVar = weights_of("blip_pretrain")
    starts: ClassVar = starts_of("blip_pretrain")

    def __init__(self, config: BlipPretrainConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root)
        self.lm_head = self._lm_head()

    def forward(self, batch: dict[str, Any]) -> Output:
        batch = self.with_text(batch)
        views = self.views(batch)
        output, found, pool = self.contrast(batch, views)
        output.update(self.narrate(batch, views))
        # Last, so that the backward pass begins here and frees the largest part before gradients pile up.
        output.update(self.match(batch, views, found, pool))
        output["loss"] = output["loss_itc"] + output["loss_itm"] + output["loss_lm"]
        return output

    def negatives(
        self, batch: dict[str, Any], views: Views, found: Contrasted, pool: Pool
    ) -> tuple[Pool, Negatives]:
        """Hard negatives by the similarities of the ITC loss."""
        hard = self.config.hard_negatives
        return pool, draw_negatives(batch, found, pool, self.negative_sampler, NEGATIVE_FLOOR, hard)

    def narrate(self, batch: dict[str, Any], views: Views) -> Output:
        """The LM loss: each text again, token by token, by the decoder that looks at its image."""
        ids, mask = batch["text_ids"], batch["text_mask"]
        keys = views.keys
        if not self.text.shares_image_keys():
            keys = self.text.image_keys(views.states, "decode")
        hidden = self.text.decode(ids, mask, [(keys, 1)])
        words = self.text.embedding_of("decode").word.weight
        smoothing = self.config.label_smoothing
        loss = caption_loss(hidden, decoder_labels(ids, mask), self.lm_head, words, batch, smoothing)
        return Output(loss_lm=loss)

    def bert_starts(self) -> list[tuple[BertParts, LMHead | None]]:
        """The decoder with its head, and the encoder."""
        return [(self.text.bert_parts("decode"), self.lm_head), *super().bert_starts()]
