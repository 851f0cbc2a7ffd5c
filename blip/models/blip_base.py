"""What BLIP's models have in common: a vision tower, a text transformer, and what they start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from blip.layers.text import LMHead, init_bert
from blip.models.base import Adopted, BlipModel, Sizes
from blip.models.bert_init import BertParts, load_bert
from blip.models.blip_config import BlipConfig
from blip.models.blip_weights import adopt, blip_sizes
from blip.models.med import Med
from blip.models.tokenizer import DEC, ENC, WordPieces
from blip.models.vision import VisionTower


class BlipBase(BlipModel):
    """Tower and text transformer.

    Args:
        config: sizes.
        data_root: where the tokenizer may lie; None: the environment variable BLIP_DATA, else `data`.
    """

    added_tokens = (DEC, ENC)

    def __init__(self, config: BlipConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root)
        self.vision = VisionTower(config.tower())
        self.text = self._text()

    @classmethod
    def build(cls, config: Any, data_root: str | Path | None = None) -> Self:
        """A model with random weights; the tokenizer may be read from files."""
        return cls(config, data_root)

    def _text(self) -> Med:
        """The text transformer, which looks at the tower's states."""
        return self._med(self.vision.width)

    def _med(self, image_width: int | None, **how: Any) -> Med:
        """A text transformer of the configured sizes; arguments as of `Med`."""
        config = self.config
        med = Med(config.med, self.word_rows, image_width, config.dropout, **how)
        if self._word_pieces is not None:
            med.dec_id, med.enc_id = self._word_pieces.dec_id, self._word_pieces.enc_id
        med.dec_id = config.special_ids.get("dec", med.dec_id)
        med.enc_id = config.special_ids.get("enc", med.enc_id)
        return med

    def take_ids(self, word_pieces: WordPieces) -> None:
        """Texts begin with the tokenizer's [DEC] and [ENC], wherever it has them."""
        for part in self.modules():
            if isinstance(part, Med):
                part.dec_id, part.enc_id = word_pieces.dec_id, word_pieces.enc_id

    def _lm_head(self) -> LMHead:
        """The head of a decoder."""
        med = self.config.med
        head = LMHead(med.width, self.text.embedding.word.num_embeddings, med.norm_eps)
        init_bert(head, med.init_std)
        return head

    # Weights

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor]) -> Sizes:
        """What weights of any model of the family tell of the configuration."""
        return blip_sizes(tensors, cls.config_class)

    def adopt(self, tensors: dict[str, Tensor]) -> Adopted:
        """Weights of any model of the family."""
        return adopt(tensors, self.state_dict())

    def bert_starts(self) -> list[tuple[BertParts, LMHead | None]]:
        """What `med.init_from` starts: text transformers, with the head of a decoder."""
        return [(self.text.bert_parts("encode"), None)]

    def load_parts(self, data_root: str | Path | None = None) -> list[str]:
        """Load the tower from `vit_init_from` and the text transformers from `med.init_from`."""
        report = self.vision.load_initial(data_root)
        if source := self.config.med.init_from:
            report += [load_bert(parts, head, source, data_root) for parts, head in self.bert_starts()]
        return report


def ramp(batch: dict[str, Any], alpha: float, epochs: float) -> float:
    """Share of a twin's opinion at this step: from 0 to `alpha` in a line over the first epochs.

    Args:
        batch: `step`, or `epoch` and `iters`; without `num_iters_per_epoch` there is no ramp.
        alpha: share behind the ramp.
        epochs: its length.
    """
    per_epoch = batch.get("num_iters_per_epoch") or 0
    if not epochs * per_epoch:
        return alpha
    step = batch["step"] if "step" in batch else batch.get("epoch", 0) * per_epoch + batch.get("iters", 0)
    return alpha * min(1.0, step / (epochs * per_epoch))
