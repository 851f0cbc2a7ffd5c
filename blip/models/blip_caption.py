"""BLIP for captioning: the image-grounded decoder by itself (section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from blip.batch import Output
from blip.errors import DataError, UsageError
from blip.layers.text import LMHead
from blip.models.bert_init import BertParts
from blip.models.blip_base import BlipBase
from blip.models.blip_config import WritingConfig
from blip.models.blip_weights import PUBLISHED, STARTS
from blip.models.generate import decoding, draws_of, write
from blip.models.narrate import caption_loss, decoder_labels
from blip.registry import MODELS


@dataclass
class BlipCaptionConfig(WritingConfig):
    """Sizes and switches of BLIP for captioning."""

    max_txt_len: int = 40
    """Longest caption with its prompt, in tokens, [CLS] and [SEP] included; longer ones are cut."""
    prompt: str = "a picture of "
    """What every caption begins with: given, not learned. The text processor of training puts it there."""


@MODELS.register("blip_caption")
class BlipCaption(BlipBase):
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
    default_processors: ClassVar = {
        "vis_processor": {"train": {"name": "blip_image_train"}, "eval": {"name": "blip_image_eval"}},
        "text_processor": {
            "train": {"name": "blip_caption", "prompt": "a picture of "},
            "eval": {"name": "blip_caption"},
        },
    }
    published: ClassVar = PUBLISHED["blip_caption"]
    starts: ClassVar = STARTS["blip_caption"]

    def __init__(self, config: BlipCaptionConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root)
        self.lm_head = self._lm_head()

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

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float | None = None,
        num_captions: int = 1,
        length_penalty: float = 1.0,
        top_k: int = 50,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> list[str]:
        """Captions, without their prompts.

        Args:
            samples: `image` (B, 3, H, W) or `image_embeds`; optional `prompt`, a text or one per picture, in
                place of the model's own; optional `index` (B,), which keys the random numbers.
            use_nucleus_sampling: draw tokens, with `top_p`, `top_k` and `temperature`; else follow beams.
            num_beams: captions that are followed at once.
            max_length, min_length: in tokens, those of the prompt and [DEC] included.
            top_p: draw among the fewest tokens that have this probability together.
            repetition_penalty: above 1, tokens that are there become less likely; None: 1, and 1.1 with
                nucleus sampling, as in BLIP.
            num_captions: per picture.
            length_penalty: scores of beams are divided by their length (`model.beam_lengths`) to this power.
            top_k: draw among so many tokens.
            temperature: logits are divided by it before drawing.
            seed: of the random numbers; None takes one of torch's global generator.

        Returns:
            B * num_captions texts, a picture's together, the best first.
        """
        rules = decoding(
            self.word_pieces,
            use_nucleus_sampling,
            num_beams=num_beams,
            num_captions=num_captions,
            max_length=max_length,
            min_length=min_length,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            beam_lengths=self.config.beam_lengths,
        )
        keys = self.text.image_keys(self.image_states(samples))
        draws = draws_of(samples, keys.rows, seed, self.device) if use_nucleus_sampling else None
        prompt_ids, prompt_mask = self._prompts(samples.get("prompt", self.config.prompt), keys.rows)
        written = write(self.text, self.lm_head, keys, prompt_ids, prompt_mask, rules, draws)
        return self.word_pieces.decode(written.ids)

    def _prompts(self, prompt: str | list[str], rows: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of prompts without their [SEP]."""
        prompts = [prompt] * rows if isinstance(prompt, str) else list(prompt)
        if len(prompts) != rows:
            raise UsageError(f"prompt: {len(prompts)} prompts for {rows} pictures; give one, or one each")
        tokens = self.word_pieces(prompts)
        ids, mask = tokens["text_ids"].to(self.device), tokens["text_mask"].to(self.device)
        # The last real token of each row is [SEP]; without it rows are one token shorter.
        return ids[:, :-1], mask[:, 1:]

    def bert_starts(self) -> list[tuple[BertParts, LMHead | None]]:
        """The decoder and its head."""
        return [(self.text.bert_parts("decode"), self.lm_head)]
