"""BLIP-2 stage 2: a Q-Former that speaks to a frozen language model (section 3.3).

    tower -> ln_vision -> Q-Former, queries alone (or beside a question) -> llm_proj -> soft tokens
    soft tokens before the text's embeddings -> the language model, whose loss trains what is before it

What a batch asks for is in its texts:

    text_input, text_output    continue the first by the second: instructions
    text_input, answer         the same, a question and one of its answers
    text_input alone           describe the picture. A decoder writes all of it but the prompt; an
                               encoder-decoder is given the prompt and writes the rest, or, where there is no
                               prompt, a random part of the text (prefix language modelling)
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blip import keyed
from blip.batch import Output
from blip.errors import UsageError, hint
from blip.layers.decoding import Decoding
from blip.layers.masks import padding_mask
from blip.models import llm_ids
from blip.models import prompts as ask
from blip.models.base import Adopted, Sizes
from blip.models.bert_init import load_bert
from blip.models.blip2_base import Blip2Base
from blip.models.blip2_config import Blip2LlmConfig
from blip.models.blip2_weights import adopt_stage2, is_text_side, stage2_sizes
from blip.models.generate import draws_of
from blip.models.lemmas import lemmatize
from blip.models.llm import build_llm
from blip.models.llm_tokenizer import Side
from blip.models.tokenizer import id_rows
from blip.models.vision import RecomputeMode
from blip.registry import MODELS

log = logging.getLogger(__name__)

LLM = "llm.model."
"""What the names of the frozen language model's tensors begin with."""


class Texts(NamedTuple):
    """What the texts of a batch ask for, B each."""

    given: list[str]
    """Read by the language model first."""
    wanted: list[str] | None
    """What it is to continue that by; None: what is given is to be written."""
    read: list[str]
    """Read by the Q-Former beside its queries, if it reads."""


class Asked(NamedTuple):
    """What the language model is to continue, B rows."""

    prefix: Tensor
    """(B, Q, H), soft tokens."""
    ids: Tensor
    """int64 (B, T), prompts."""
    mask: Tensor
    """bool (B, T), True = real token."""


@MODELS.register("blip2_llm")
class Blip2Llm(Blip2Base):
    """Tower, Q-Former and a frozen language model.

    Args:
        config: sizes.
        data_root: where the language model may lie; None: the environment variable BLIP_DATA, else `data`.

    Shape:
        batch: `image` (B, 3, H, W), or (B, F, 3, H, W) of videos, or `image_embeds` (B, P, D_image) or
            (B, F, P, D_image); `text_input`, B texts; optional `text_output`, B texts; or ids in their place
            (`llm_ids.py`).
        returns: `loss` = `loss_lm`.
    """

    config_class: ClassVar[type[Blip2LlmConfig]] = Blip2LlmConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"base": {}}
    freezable = ("vision.", LLM)
    generation: ClassVar[dict[str, Any]] = {"max_length": 30, "repetition_penalty": 1.0}
    """What `generate` does where it is not told."""
    reads_prompt: ClassVar[bool] = False
    """The Q-Former reads a question as the prompt puts it, not the question alone."""

    def __init__(self, config: Blip2LlmConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root, with_text=config.qformer_text_input)
        last = self.qformer.blocks()[-1]
        if last.text_ffn is not None:  # nobody reads what it makes of the text
            last.text_ffn.requires_grad_(False)
        self.llm = build_llm(config.llm_model, config.language_model(), data_root)
        self.llm_proj = nn.Linear(config.qformer.width, self.llm.hidden_size)

    # Training

    def text_columns(self) -> dict[str, int | None]:
        """Texts are tokenised in `prepare`: their tokens depend on each other."""
        return {}

    @property
    def pad_id(self) -> int:
        """Of the Q-Former's texts, if it reads any."""
        return super().pad_id if self.config.qformer_text_input else 0

    def count_targets(self, batch: dict[str, Any]) -> int:
        """Tokens to be learned."""
        return int((batch["llm_labels"] != -100).sum())

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `llm_ids`, `llm_mask`, `llm_labels`; for the Q-Former `text_ids`, `text_mask`."""
        config = self.config
        given = llm_ids.learned(batch, self.llm, config.prompt, config.qformer_text_input)
        if given is not None:
            return {**(self.with_text(batch) if config.qformer_text_input else batch), **given}
        tokenizer, texts = self.llm.tokenizer, self.texts(batch)
        if texts.wanted is None:
            tokens = tokenizer.text(texts.given, config.prompt, config.max_txt_len)
        else:
            longest = config.max_output_txt_len or config.max_txt_len
            tokens = tokenizer.train(texts.given, texts.wanted, config.max_txt_len, longest, side=self.cut)
        return {**batch, **tokens, **self._for_qformer(texts.read)}

    def texts(self, batch: dict[str, Any]) -> Texts:
        """What a batch asks for; random parts and answers are drawn by (seed, step, row)."""
        texts = ask.as_list(batch["text_input"])
        prompt = self.config.prompt
        if "text_output" in batch:
            return Texts(texts, ask.as_list(batch["text_output"]), texts)
        if "answer" in batch:
            asked = [ask.filled(prompt, [text]) for text in texts] if ask.PLACE in prompt else texts
            return Texts(asked, self._one_answer_each(batch), asked if self.reads_prompt else texts)
        begins = [prompt] * len(texts)
        if not self.llm.is_encoder_decoder:
            return Texts(texts, None, begins)
        if prompt.strip():
            return Texts(begins, [ask.without(prompt, text) for text in texts], begins)
        places = self._random(batch, "prefix")
        parts = [ask.split_text(text, place) for text, place in zip(texts, places, strict=True)]
        given = [prefix for prefix, _ in parts]
        return Texts(given, [rest for _, rest in parts], given)

    def _one_answer_each(self, batch: dict[str, Any]) -> list[str]:
        """An answer per question, drawn by the answers' weights."""
        found, start = [], 0
        weights = batch["weight"].double() if "weight" in batch else torch.ones(len(batch["answer"]))
        for place, count in zip(self._random(batch, "answer"), batch["n_answers"].tolist(), strict=True):
            up_to = weights[start : start + count].double().cumsum(0)
            which = int(torch.searchsorted(up_to, place * up_to[-1], right=True).clamp(max=count - 1))
            found.append(batch["answer"][start + which])
            start += count
        return found

    @property
    def cut(self) -> Side:
        """Which end of a long text is cut off where it is continued: LAVIS's FlanT5 reads its beginning."""
        return "right" if self.llm.is_encoder_decoder else "left"

    def _random(self, batch: dict[str, Any], what: str) -> list[float]:
        """A number in [0, 1) per row of the global batch of this step."""
        rows = batch.get("rows")
        rows = torch.arange(len(ask.as_list(batch["text_input"]))) if rows is None else rows.cpu()
        return keyed.uniform(rows, batch.get("seed", 0), what, batch.get("step", 0)).tolist()

    def _for_qformer(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokens of what the Q-Former reads; the beginning of a long text is cut off."""
        if not self.config.qformer_text_input:
            return {}
        return self.word_pieces(list(texts), self.config.max_txt_len, cut="left")

    def forward(self, batch: dict[str, Any]) -> Output:
        batch = self._on_device(self.prepare(batch))
        tokens = (batch["llm_ids"], batch["llm_mask"], batch["llm_labels"])
        counts = (batch.get("num_targets"), batch.get("loss_tokens"))
        loss = self.llm.loss(self.soft_tokens(batch), *tokens, *counts)
        return Output(loss=loss, loss_lm=loss)

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def soft_tokens(self, batch: dict[str, Any]) -> Tensor:
        """What the language model is given for each picture: (B, Q, H); of videos (B, F * Q, H).

        The Q-Former looks at each frame by itself, with the same text.

        Args:
            batch: `image` or `image_embeds`; with `qformer_text_input` also `text_ids`, `text_mask` (B, T).
        """
        states, frames = self.image_states(batch), 1
        if states.ndim == 4:
            frames, states = states.shape[1], states.flatten(0, 1)
        elif "image_embeds" not in batch and batch["image"].ndim == 5:
            frames = states.shape[1] // self.vision.num_tokens
            states = states.unflatten(1, (frames, -1)).flatten(0, 1)
        images = [(self.image_keys(states), 1)]
        if self.config.qformer_text_input:
            ids, mask = (batch[key].repeat_interleave(frames, dim=0) for key in ("text_ids", "text_mask"))
            mask = torch.cat([mask.new_ones(len(mask), self.config.num_query_token), mask], dim=1)
            found = self.qformer(self.qformer.embedding(ids), padding_mask(mask), images, keep="queries")
        else:
            found = self.qformer(images=images)
        return self.llm_proj(found.queries).unflatten(0, (-1, frames)).flatten(1, 2)

    # Inference

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int | None = None,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float | None = None,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
        prompt: str | Sequence[str] | None = None,
        top_k: int = 0,
        seed: int | None = None,
        return_ids: bool = False,
    ) -> list[str] | Tensor:
        """What the language model writes about each picture.

        Args:
            samples: `image` (or `image_embeds`); optional `prompt`, one text or one per picture; optional
                `ocr_tokens`, lists of words read in the pictures, for a prompt with `{}`; or ids in place of
                the prompt (`llm_ids.py`).
            use_nucleus_sampling: draw with `top_p`, `top_k` and `temperature`, instead of following beams.
            num_beams: texts that are followed at once.
            max_length: new tokens at most; None: 30, of InstructBLIP 256.
            min_length: tokens before the end at least; one of them is what a decoder starts with, but for
                decoders whose `model.beam_lengths` is `new`.
            top_p: draw among the fewest tokens that have this probability together.
            repetition_penalty: above 1, new words that are there become less likely; None: 1, of InstructBLIP
                1.5.
            length_penalty: scores of beams are divided by the length (`model.beam_lengths`) to this power.
            num_captions: texts per picture; a picture's texts are returned together.
            temperature: logits are divided by it before drawing.
            prompt: in place of that of `samples`, which is in place of the model's own.
            top_k: draw among so many most likely tokens; 0 = all.
            seed: of sampling; the same seed gives the same texts, whatever the batch.
            return_ids: give new ids int64 (B * num_captions, L), padded behind the end, in place of texts.

        Raises:
            UsageError: not one prompt per picture.
        """
        how: dict[str, Any] = {
            **self.generation,
            "min_length": min_length,
            "length_penalty": length_penalty,
            "num_captions": num_captions,
        }
        told = {"max_length": max_length, "repetition_penalty": repetition_penalty}
        how |= {key: value for key, value in told.items() if value is not None}
        if use_nucleus_sampling:
            how |= {"sample": True, "top_p": top_p, "top_k": top_k, "temperature": temperature}
        else:
            how["num_beams"] = num_beams
        given = self._given(samples)
        if given is None:
            prompts = self.prompts(samples, prompt)
            given = self._asked(samples, prompts, prompts)
        return self._write(samples, given, how, seed, return_ids)

    def prompts(self, samples: dict[str, Any], prompt: str | Sequence[str] | None = None) -> list[str]:
        """One prompt per picture, as `generate` takes them.

        Raises:
            UsageError: not one per picture, or no picture.
        """
        pictures = next((samples[key] for key in ("image_embeds", "image") if key in samples), None)
        if pictures is None:
            raise UsageError("samples: neither image nor image_embeds")
        given = samples.get("prompt", self.config.prompt) if prompt is None else prompt
        prompts = ask.one_each(given, len(pictures))
        return ask.with_words(prompts, samples["ocr_tokens"]) if "ocr_tokens" in samples else prompts

    @property
    def answer_length_penalty(self) -> float:
        """Of beams of short answers, as in LAVIS: 0 for decoders, -1 for encoder-decoders."""
        return -1.0 if self.llm.is_encoder_decoder else 0.0

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        num_beams: int = 5,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | Sequence[Sequence[int]] | None = None,
        prompt: str | None = "",
        length_penalty: float | None = None,
        return_ids: bool = False,
    ) -> list[Any] | Tensor:
        """An answer to each question.

        Args:
            samples: `image` and `text_input`, B questions; optional `ocr_tokens` or `choices`, a list each;
                or ids in place of the whole prompt (`llm_ids.py`).
            num_beams: answers that are followed at once (`generate`).
            inference_method: `generate` an answer, or `rank` those of `answer_list`.
            max_len: longest generated answer, in tokens.
            min_len: shortest one, as `min_length` of `generate`.
            num_ans_candidates: answers that are scored at a time (`rank`).
            answer_list: candidates, texts or lists of ids; the likeliest one is the answer.
            prompt: with `{}` for the question; two of them: words read in the picture or choices, too. Empty:
                the model's own where it has `{}`, else the question as it is.
            length_penalty: of beams; None: `answer_length_penalty`.
            return_ids: as of `generate`, of generated answers.

        Raises:
            UsageError: unknown method, or nothing to rank.
        """
        if inference_method not in ("generate", "rank"):
            raise UsageError(
                f"inference_method: {inference_method!r}{hint(inference_method, ('generate', 'rank'))}"
            )
        if inference_method == "rank" and not answer_list:
            raise UsageError("inference_method 'rank' needs answer_list")
        given = self._given(samples)
        if given is None:
            prompt = prompt or (self.config.prompt if ask.PLACE in self.config.prompt else ask.PLACE)
            prompts = ask.question_prompts(samples, prompt)
            read = prompts if self.reads_prompt else ask.as_list(samples["text_input"])
            given = self._asked(samples, prompts, read)
        if inference_method == "rank" and answer_list:
            scores = self._scores(given, answer_list, num_ans_candidates)
            answers: Any = [answer_list[i] for i in scores.argmax(dim=1).tolist()]
        else:
            how = {**self.generation, "num_beams": num_beams, "max_length": max_len, "min_length": min_len}
            how["length_penalty"] = self.answer_length_penalty if length_penalty is None else length_penalty
            answers = self._write(samples, given, how, None, return_ids)
        if isinstance(answers, Tensor) or not isinstance(answers[0], str):
            return answers
        wanted = samples.get("apply_lemmatizer", self.config.apply_lemmatizer)
        return lemmatize(answers) if wanted else answers

    def chat(
        self,
        samples: dict[str, Any],
        message: str,
        history: Sequence[tuple[str, str]] = (),
        **generation: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """One turn of a conversation about a picture.

        Args:
            samples: one picture.
            message: what the user says.
            history: earlier turns, (message, reply) each.
            **generation: as of `generate`.

        Returns:
            the reply, and the history with this turn.
        """
        prompt = [self.dialog(message, history)]
        reply = str(self.generate(samples, prompt=prompt, **generation)[0])
        return reply, [*history, (message, reply)]

    def dialog(self, message: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """A conversation as one prompt, as BLIP-2's demonstrations have it."""
        said = [ask.filled("Question: {} Answer: {}.", turn) for turn in history]
        return " ".join([*said, ask.filled("Question: {} Answer:", [message])])

    def _asked(self, samples: dict[str, Any], prompts: list[str], read: list[str]) -> Asked:
        return Asked(
            self._prefix({**samples, **self._for_qformer(read)}), *self.llm.tokenizer.prompt(prompts)
        )

    def _given(self, samples: dict[str, Any]) -> Asked | None:
        """What ids ask, where samples have them."""
        reads = self.config.qformer_text_input
        found = llm_ids.prompts(samples, reads)
        if found is None:
            return None
        return Asked(self._prefix(self.with_text(samples) if reads else samples), *found)

    def _write(
        self,
        samples: dict[str, Any],
        asked: Asked,
        how: dict[str, Any],
        seed: int | None = None,
        return_ids: bool = False,
    ) -> list[str] | Tensor:
        """Texts that continue the prompts, or their ids; `how` are fields of `Decoding`."""
        lengths, known = self.config.beam_lengths, llm_ids.specials(self.llm)
        if self.llm.is_encoder_decoder or lengths == "start":  # what a decoder starts with counts here
            how = {**how, "min_length": max(0, how["min_length"] - 1)}
        rules = Decoding(known.end_id, known.pad_id, count_prompt=False, beam_lengths=lengths, **how)
        draws = draws_of(samples, len(asked.ids), seed, self.device) if rules.sample else None
        found = self.llm.generate(*asked, rules, draws).ids
        return found if return_ids else self.llm.tokenizer.decode(found)

    def _scores(self, asked: Asked, candidates: Sequence[Any], segment: int) -> Tensor:
        """Log-probability of each candidate, texts or lists of ids, behind each prompt, (B, N)."""
        texts = isinstance(candidates[0], str)
        tokens = self.llm.tokenizer.candidates(candidates) if texts else id_rows(candidates)
        return self.llm.log_likelihood(*asked, *tokens, segment)

    def _prefix(self, samples: dict[str, Any]) -> Tensor:
        return self.soft_tokens(self._on_device(samples))

    # Freezing, checkpoints, optimizer

    def recompute(self) -> list[tuple[list[nn.Module], RecomputeMode, int | None]]:
        """Those of the tower, and the language model's layers, which keep more where the tower is frozen."""
        return [*super().recompute(), (self.llm.blocks(), self.config.llm.checkpoint, None)]

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor]) -> Sizes:
        """What weights tell; the language model shows by its width."""
        language_models = [preset.get("llm_model") for preset in cls.presets.values()]
        return stage2_sizes(tensors, language_models, cls.config_class.max_txt_len)

    def adopt(self, tensors: dict[str, Tensor]) -> Adopted:
        """Weights of stage 1, or of stage 2 with this or another language model.

        The text side of the Q-Former starts from BERT where they have none and `qformer.init_from` names one.
        """
        if any(name.startswith(LLM) for name in tensors):
            self.llm.to(self.device)  # until then a language model that is known by its name has no values
        named = self.config.llm_model is not None and self.config.load_llm
        found = adopt_stage2(tensors, self.state_dict(), llm_may_stay=not named)
        bert = self.config.qformer.init_from
        if bert and any(is_text_side(name) for name in found.kept):
            log.info("%s", load_bert(self.qformer.bert_parts(), None, bert, self._data_root))
        return found

    def load_parts(self, data_root: str | Path | None = None) -> list[str]:
        """Load tower, the Q-Former's text side and language model from where the configuration says."""
        report = [*super().load_parts(data_root), *self._load_llm(data_root)]
        self.begin_anew(["llm_proj.weight"])
        return report

    def load_frozen(self, prefixes: Collection[str], data_root: str | Path | None = None) -> list[str]:
        """Load tower and language model, whichever is wanted."""
        lines = super().load_frozen(prefixes, data_root)
        return [*lines, *(self._load_llm(data_root) if LLM in prefixes else [])]

    def begin_anew(self, names: Collection[str]) -> None:
        """A new projection gives soft tokens the size that `soft_tokens` asks for."""
        if "llm_proj.weight" in names and self.config.soft_tokens == "words":
            self._fit_projection()

    @torch.no_grad()
    def _fit_projection(self) -> None:
        """Scale the projection: queries, which the last norm has made, become as large as words."""
        self.llm.to(self.device)  # until then one that is known by its name may have no values
        words = self.llm.model.get_input_embeddings().weight
        projection, norm = self.llm_proj, self.qformer.blocks()[-1].query_ffn.norm
        spread = projection.weight.square() @ (norm.weight.square() + norm.bias.square())
        size = (spread + projection.bias.square()).mean().sqrt()
        scale = words.float().square().mean().sqrt().to(size.device) / size
        projection.weight.mul_(scale)
        projection.bias.mul_(scale)

    def _load_llm(self, data_root: str | Path | None) -> list[str]:
        return self.llm.load_initial(data_root) if self.config.load_llm else []

    def frozen_parts(self) -> dict[str, str]:
        """Tower and language model where they were loaded from elsewhere and never trained here."""
        source = self.llm.loaded_from
        return super().frozen_parts() | ({LLM: source} if source else {})
