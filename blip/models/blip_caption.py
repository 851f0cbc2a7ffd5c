"""BLIP for captioning: the image-grounded decoder by itself (section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blip.batch import Output
from blip.errors import DataError
from blip.layers.text import LMHead, init_bert
from blip.models.base import BlipModel
from blip.models.bert_init import load_bert
from blip.models.blip_config import BlipConfig
from blip.models.med import Med
from blip.models.narrate import caption_loss, decoder_labels
from blip.models.tokenizer import DEC, ENC
from blip.models.vision import VisionTower, find_file
from blip.registry import MODELS


@dataclass
class BlipCaptionConfig(BlipConfig):
    """Sizes and switches of BLIP for captioning."""

    max_txt_len: int = 40
    """Longest caption with its prompt, in tokens, [CLS] and [SEP] included; longer ones are cut."""
    prompt: str = "a picture of "
    """What every caption begins with: given, not learned. The text processor of training puts it there."""
    label_smoothing: float = 0.1
    """Of the loss."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        return super().problems() + self._within(0, 0.9, "label_smoothing")


@MODELS.register("blip_caption")
class BlipCaption(BlipModel):
    """A tower and a decoder.

    Shape:
        batch: `image` (B, 3, H, W) or `image_embeds` (B, P, D_image); `text_input` with the prompt, or
            `text_ids` and `text_mask`.
        returns: `loss` = `loss_lm`.
    """

    config_class = BlipCaptionConfig
    presets: ClassVar = {
        "base_coco": {"image_size": 384},
        "large_coco": {
            "image_size": 384,
            "vit_type": "large",
            "vit_drop_path_rate": 0.1,
            "vit_grad_ckpt": True,
            "vit_ckpt_layer": 5,
        },
    }
    added_tokens = (DEC, ENC)

    def __init__(self, config: BlipCaptionConfig) -> None:
        super().__init__(config)
        self.vision = VisionTower(config.tower())
        vocab_size = config.vocab_size or self.word_pieces.vocab_size
        self.text = Med(config.med, vocab_size, self.vision.width, config.dropout)
        self.lm_head = LMHead(config.med.width, vocab_size, config.med.norm_eps)
        init_bert(self.lm_head, config.med.init_std)

    def forward(self, batch: dict[str, Any]) -> Output:
        batch = self.with_text(batch)
        ids, mask = batch["text_ids"], batch["text_mask"]
        keys = self.text.image_keys(self.image_states(batch))
        hidden = self.text.decode(ids, mask, [(keys, 1)])
        labels = decoder_labels(ids, mask, self.prompt_length)
        words, smoothing = self.text.embedding.word.weight, self.config.label_smoothing
        loss = caption_loss(hidden, labels, self.lm_head, words, batch, smoothing)
        return Output(loss=loss, loss_lm=loss)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, [DEC] included, that are not learned; 0 without a prompt."""
        if self._prompt_ids is None:
            self._prompt_ids = self._encode_prompt()
        return len(self._prompt_ids) + 1 if len(self._prompt_ids) else 0

    _prompt_ids: Tensor | None = None

    def _encode_prompt(self) -> Tensor:
        """Ids of the prompt's own tokens."""
        if not self.config.prompt.strip():
            return torch.zeros(0, dtype=torch.int64)
        return self.word_pieces([self.config.prompt])["text_ids"][0, 1:-1]

    def count_targets(self, batch: dict[str, Any]) -> int:
        """Tokens behind the prompt.

        Raises:
            DataError: a text that does not begin with the prompt; real words would not be learned.
        """
        ids, mask = batch["text_ids"], batch["text_mask"]
        length = self.prompt_length
        if length:
            assert self._prompt_ids is not None
            same = (ids[:, 1:length] == self._prompt_ids[: ids.shape[1] - 1]).all(dim=1)
            if ids.shape[1] < length or not bool(same.all()):
                number = int((~same).nonzero()[0, 0])
                text = repr(batch["text_input"][number]) if "text_input" in batch else "a text"
                raise DataError(
                    f"model.prompt: {text} does not begin with {self.config.prompt!r}, which the loss leaves"
                    " out; set text_processor.train.prompt of the dataset to it, or model.prompt to ''"
                )
        return int((decoder_labels(ids, mask, length) != -100).sum())

    def blocks(self) -> list[nn.Module]:
        """The tower's blocks and the decoder's layers."""
        return [*self.vision.blocks(), *self.text.blocks()]

    def load_parts(self, data_root: str | Path | None = None) -> list[str]:
        """Load the tower from `vit_init_from` and the decoder from `med.init_from`."""
        report = self.vision.load_initial(data_root)
        source = self.config.med.init_from
        if source:
            place = str(find_file(source, data_root) or source)
            report.append(load_bert(self.text.bert_parts("decode"), self.lm_head, place))
        return report
