"""BLIP for visual question answering: a question encoder and an answer decoder (section 5.3).

The encoder reads the question and looks at the image; the decoder looks at the question's states and says the
answer. Answers are generated, or a list of candidates is ranked by their likelihood.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from blip.batch import Output
from blip.errors import UsageError, hint
from blip.layers.attention import ImageKeys, KeyValue
from blip.layers.decoding import candidate_scores, shortlist
from blip.layers.masks import causal_mask
from blip.layers.text import LMHead
from blip.losses import at_least_float32
from blip.models.bert_init import BertParts
from blip.models.blip_base import BlipBase
from blip.models.blip_config import WritingConfig
from blip.models.generate import MedWriter, decoding, write
from blip.models.narrate import answer_loss, decoder_labels
from blip.models.published import starts_of, weights_of
from blip.models.tokenizer import id_rows
from blip.registry import MODELS

METHODS = ("rank", "generate")
RANK_ROWS = 1024
"""Candidates that are scored at once."""


@dataclass
class BlipVqaConfig(WritingConfig):
    """Sizes and switches of BLIP for question answering."""

    question_token: Literal["enc", "cls"] = "enc"
    """First token of a question: [ENC], as in training, or [CLS], as Hugging Face leaves it."""
    generate_attends_padding: bool = False
    """Let generated answers look at the padding of questions, as the original code, LAVIS and Hugging Face
    do; answers then depend on the other questions of the batch."""


class Begun(NamedTuple):
    """The decoder behind [DEC]."""

    logits: Tensor
    """(B, V) of the first token."""
    cache: list[KeyValue]
    """Self-attention keys and values of [DEC], a layer each."""

    def first_scores(self, first_ids: Tensor, smoothing: float) -> Tensor:
        """Negative losses (B, k) of first tokens, int64 (B, k), as `candidate_scores` has them."""
        likely = at_least_float32(self.logits).log_softmax(dim=1)
        return (1 - smoothing) * likely.gather(1, first_ids) + smoothing * likely.mean(dim=1, keepdim=True)


@MODELS.register("blip_vqa")
class BlipVqa(BlipBase):
    """A tower, a question encoder and an answer decoder, which share nothing.

    Shape:
        batch: `image` (B, 3, H, W) or `image_embeds` (B, P, D_image); `text_input` (questions), or `text_ids`
            and `text_mask` (B, T); `answer`, a flat list of A, or `answer_ids` and `answer_mask` (A, L);
            `n_answers` int64 (B,), which sum to A; `weight` float (A,).
        returns: `loss` = `loss_lm`.
    """

    config_class = BlipVqaConfig
    presets: ClassVar = {
        "vqav2": {"image_size": 480, "vit_drop_path_rate": 0.1},
        "okvqa": {"image_size": 480, "vit_drop_path_rate": 0.1},
        "aokvqa": {"image_size": 480, "vit_drop_path_rate": 0.1},
    }
    default_processors: ClassVar = {
        "vis_processor": {"train": {"name": "blip_image_train"}, "eval": {"name": "blip_image_eval"}},
        "text_processor": {"train": {"name": "blip_question"}, "eval": {"name": "blip_question"}},
    }
    published: ClassVar = weights_of("blip_vqa")
    starts: ClassVar = starts_of("blip_vqa")

    def __init__(self, config: BlipVqaConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root)
        self.answer_decoder = self._med(config.med.width)
        self.lm_head = self._lm_head()

    # Training

    def text_columns(self) -> dict[str, int | None]:
        """Questions are cut, answers are not."""
        return {**super().text_columns(), "answer": None}

    def count_targets(self, batch: dict[str, Any]) -> int:
        """Tokens of all answers."""
        return int(batch["answer_mask"][:, 1:].sum())

    def forward(self, batch: dict[str, Any]) -> Output:
        batch = self._with_answers(self.with_text(batch))
        ids, mask, counts = batch["answer_ids"], batch["answer_mask"], batch["n_answers"]
        rows = torch.arange(len(counts), device=ids.device)
        question = rows.repeat_interleave(counts, output_size=len(ids))  # (A,), of each answer
        keys = self.question_keys(batch).select(question)
        hidden = self.answer_decoder.decode(ids, mask, [(keys, 1)])
        labels, words = decoder_labels(ids, mask), self.answer_decoder.embedding.word.weight
        loss = answer_loss(hidden, labels, self.lm_head, words, batch, self.config.label_smoothing)
        return Output(loss=loss, loss_lm=loss)

    def _with_answers(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answers tokenised where they are not; one answer each and weight 1 where nothing else is said."""
        batch = dict(batch)
        if "answer_ids" in batch:
            full = torch.ones_like(batch["answer_ids"], dtype=torch.bool)
            batch["answer_mask"] = batch.get("answer_mask", full).bool()
        else:
            tokens = self.word_pieces(list(batch["answer"]))  # answers are not cut
            batch["answer_ids"] = tokens["text_ids"].to(self.device)
            batch["answer_mask"] = tokens["text_mask"].to(self.device)
        answers = batch["answer_ids"]
        if "n_answers" not in batch:
            if len(answers) != len(batch["text_ids"]):
                raise UsageError(
                    f"n_answers: {len(answers)} answers to {len(batch['text_ids'])} questions; say how many"
                    " each question has"
                )
            batch["n_answers"] = answers.new_ones(len(answers))
        batch.setdefault("weight", torch.ones(len(answers), device=answers.device))
        return {k: v.to(self.device) if k in ("n_answers", "weight") else v for k, v in batch.items()}

    def question_keys(self, batch: dict[str, Any]) -> ImageKeys:
        """What answers look at: the states of questions that have looked at their images."""
        images = [(self.text.image_keys(self.image_states(batch)), 1)]
        mask = batch["text_mask"]
        as_is = self.config.question_token == "cls"
        states = self.text.grounded(batch["text_ids"], mask, images, as_is=as_is)
        return self.answer_decoder.image_keys(states, mask=mask)

    # Inference

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        num_beams: int = 3,
        inference_method: str = "rank",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | Sequence[Sequence[int]] | None = None,
        length_penalty: float = 1.0,
        prompt: str = "",
        return_ids: bool = False,
    ) -> list[Any] | Tensor:
        """An answer to each question.

        Args:
            samples: `image` (B, 3, H, W) or `image_embeds`; `text_input`, or `text_ids` and `text_mask`.
            num_beams: answers that are followed at once (`generate`).
            inference_method: `rank` the candidates of `answer_list`, or `generate`.
            max_len, min_len: length of a generated answer in tokens, [DEC] included.
            num_ans_candidates: how many candidates are scored in full.
            answer_list: candidates, texts or lists of ids, [CLS] and [SEP] included; the likeliest one is the
                answer.
            length_penalty: as of `BlipCaption.generate`.
            prompt: put around each question, which stands where the prompt has `{}`; else in front of it.
            return_ids: as of `BlipCaption.generate`, of generated answers.

        Raises:
            UsageError: unknown method, no candidates to rank, or a prompt for questions that are ids.
        """
        if inference_method not in METHODS:
            raise UsageError(f"inference_method: {inference_method!r}{hint(inference_method, METHODS)}")
        if prompt:
            if "text_input" not in samples:
                raise UsageError(
                    "prompt: it is put around text; give the questions as text_input, not as ids"
                )
            questions = samples["text_input"]
            questions = [questions] if isinstance(questions, str) else questions
            texts = [prompt.format(q) if "{}" in prompt else prompt + q for q in questions]
            samples = {k: v for k, v in samples.items() if k not in ("text_ids", "text_mask")}
            samples["text_input"] = texts
        keys = self.question_keys(self.with_text(samples))
        if inference_method == "rank":
            if not answer_list:
                raise UsageError("answer_list: ranking needs candidates; give them, or generate answers")
            return self.rank_answers(keys, answer_list, num_ans_candidates)
        rules = decoding(
            self.text_ends,
            use_nucleus_sampling=False,
            num_beams=num_beams,
            max_length=max_len,
            min_length=min_len,
            length_penalty=length_penalty,
            beam_lengths=self.config.beam_lengths,
        )
        if self.config.generate_attends_padding:
            keys = keys._replace(mask=None)
        start = torch.zeros(keys.rows, 1, dtype=torch.int64, device=self.device)  # becomes [DEC]
        once = torch.ones_like(start, dtype=torch.bool)
        writer = MedWriter(self.answer_decoder, self.lm_head, keys)
        written = write(writer, start, once, rules, None)
        return written.ids if return_ids else self.word_pieces.decode(written.ids)

    def rank_answers(self, keys: ImageKeys, answer_list: Sequence[Any], num_candidates: int) -> list[Any]:
        """The most likely of `answer_list` for each question (BLIP, section 5.3).

        The candidates with the most likely first tokens are scored in full; a score is the negative sum of
        the token losses, label smoothing included, with no normalisation by length.

        Args:
            keys: of the questions.
            answer_list: candidates, texts or lists of ids.
            num_candidates: k, how many of them are scored in full.
        """
        if isinstance(answer_list[0], str):
            tokens = self.word_pieces(list(answer_list))
            found = tokens["text_ids"], tokens["text_mask"]
        else:
            found = id_rows(answer_list)
        ids, mask = (part.to(self.device) for part in found)
        begun = self.begin_answers(keys)
        best = shortlist(begun.logits, ids[:, 1], num_candidates)  # (B, k)
        scores = self.score_answers(keys, begun, ids[best], mask[best])
        chosen = best.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]
        return [answer_list[i] for i in chosen.tolist()]

    def begin_answers(self, keys: ImageKeys) -> Begun:
        """What [DEC] says to each question: all that the first token of its answers depends on."""
        start = torch.full((keys.rows, 1), self.answer_decoder.dec_id, device=self.device)
        once = torch.ones_like(start, dtype=torch.bool)[:, None, None]
        found = self.answer_decoder(start, once, [(keys, 1)], "decode")
        return Begun(self._logits(found.states[:, 0]), found.cache)

    def score_answers(self, keys: ImageKeys, begun: Begun, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        """Negative summed losses (B, k) of k candidates for each of B questions.

        The decoder reads what stands between a candidate's first and last token. Candidates of about the same
        length go together: a list's longest answer has several times the tokens of most, which would
        otherwise be padding.

        Args:
            keys: of the questions; the candidates of one share them without a copy.
            begun: of the questions, likewise shared.
            answer_ids: int64 (B, k, L), padding behind.
            answer_mask: bool (B, k, L).
        """
        smoothing = self.config.label_smoothing
        first = begun.first_scores(answer_ids[..., 1], smoothing)
        num_rows, count = answer_ids.shape[:2]
        lengths, order = answer_mask.sum(dim=2).sort(dim=1, stable=True)  # each question's shortest first
        longest = lengths.amax(dim=0).tolist()
        at_once, start = max(RANK_ROWS // num_rows, 1), 0
        parts = []
        while start < count:
            width = longest[start]
            end = min(bisect_right(longest, width), start + at_once)
            some = order[:, start:end, None].expand(-1, -1, width)
            ids, mask = (part[..., :width].gather(1, some) for part in (answer_ids, answer_mask))
            # Rows that look at one question are spread over copies of the batch: row r looks at r % B.
            flat_ids, flat_mask = ids.transpose(0, 1).flatten(0, 1), mask.transpose(0, 1).flatten(0, 1)
            scores = self._score_rest(keys, begun, flat_ids[:, 1:], flat_mask[:, 1:])
            parts.append(scores.view(end - start, num_rows).T)
            start = end
        rest = torch.cat(parts, dim=1)
        return first + torch.empty_like(rest).scatter_(1, order, rest)

    def _score_rest(self, keys: ImageKeys, begun: Begun, ids: Tensor, mask: Tensor) -> Tensor:
        """Negative summed losses (R,) of all tokens but the first; ids and mask (R, T) begin with that."""
        if ids.shape[1] == 1:  # answers without a word
            return at_least_float32(begun.logits).new_zeros(len(ids))
        copies = len(ids) // keys.rows
        rows = torch.arange(keys.rows, device=ids.device).repeat(copies)
        past = [kv.select(rows) for kv in begun.cache]
        seen = causal_mask(mask[:, :-1], num_prefix=1)
        hidden = self.answer_decoder(ids[:, :-1], seen, [(keys, copies)], "decode", past=past).states
        labels = decoder_labels(ids, mask)
        return candidate_scores(self._logits(hidden[labels != -100]), labels, self.config.label_smoothing)

    def _logits(self, states: Tensor) -> Tensor:
        return self.lm_head(states, self.answer_decoder.embedding.word.weight)

    def bert_starts(self) -> list[tuple[BertParts, LMHead | None]]:
        """Both text transformers, and the decoder's head."""
        return [*super().bert_starts(), (self.answer_decoder.bert_parts("decode"), self.lm_head)]
