"""BLIP for captioning: the image-grounded decoder by itself (section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from blip.batch import Output
from blip.errors import DataError
from blip.layers.text import LMHead
from blip.models.bert_init import BertParts
from blip.models.blip_base import BlipBase
from blip.models.blip_config import WritingConfig
from blip.models.generate import Captioning, MedWriter, TextWriter
from blip.models.narrate import caption_loss, decoder_labels
from blip.models.published import starts_of, weights_of
from blip.registry import MODELS


@dataclass
class BlipCaptionConfig(WritingConfig):
    """Sizes and switches of BLIP for captioning."""

    max_txt_len: int = 40
    """Longest caption with its prompt, in tokens, [CLS] and [SEP] included; longer ones are cut."""
    prompt: str = "a picture of "
    """What every caption begins with: given, not learned. The text processor of training puts it there."""


@MODELS.register("blip_caption")
class BlipCaption(Captioning, BlipBase):
    """A tower and a decoder.

    Shape:
        batch: `image` (B, 3, H, W) or `image_embeds` (B, P, D_image); `text_input` with the prompt, or
            `text_ids` and `text_mask`; with `prompt_ids` (1, T), [CLS] in front, those T are not learned.
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
    default_processors: ClassVar = {
        "vis_processor": {"train": {"name": "blip_image_train"}, "eval": {"name": "blip_image_eval"}},
        "text_processor": {
            "train": {"name": "blip_caption", "prompt": "a picture of "},
            "eval": {"name": "blip_caption"},
        },
    }
    published: ClassVar = weights_of("blip_caption")
    starts: ClassVar = starts_of("blip_caption")
    sampling_penalty: ClassVar = 1.1  # as in BLIP

    def __init__(self, config: BlipCaptionConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root)
        self.lm_head = self._lm_head()

    def forward(self, batch: dict[str, Any]) -> Output:
        batch = self.with_text(batch)
        ids, mask = batch["text_ids"], batch["text_mask"]
        keys = self.text.image_keys(self.image_states(batch))
        hidden = self.text.decode(ids, mask, [(keys, 1)])
        labels = decoder_labels(ids, mask, self._unlearned(batch))
        words, smoothing = self.text.embedding.word.weight, self.config.label_smoothing
        loss = caption_loss(hidden, labels, self.lm_head, words, batch, smoothing)
        return Output(loss=loss, loss_lm=loss)

    def _unlearned(self, batch: dict[str, Any]) -> int:
        """`prompt_length`, or that of the batch's `prompt_ids` (..., T)."""
        return batch["prompt_ids"].shape[-1] if "prompt_ids" in batch else self.prompt_length

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
        length = self._unlearned(batch)
        if length and "prompt_ids" not in batch:
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

    def caption_writer(self, samples: dict[str, Any]) -> tuple[TextWriter, int]:
        """The decoder, looking at the pictures."""
        keys = self.text.image_keys(self.image_states(samples))
        return MedWriter(self.text, self.lm_head, keys), keys.rows

    def bert_starts(self) -> list[tuple[BertParts, LMHead | None]]:
        """The decoder and its head."""
        return [(self.text.bert_parts("decode"), self.lm_head)]
