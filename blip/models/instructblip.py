"""InstructBLIP: BLIP-2 whose Q-Former reads the instruction, too (InstructBLIP, section 2.3).

Training continues instructions, `text_input`, by `text_output`. Inference generates, or ranks candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from blip.errors import UsageError
from blip.models import prompts as ask
from blip.models.blip2_config import Blip2LlmConfig
from blip.models.blip2_llm import Asked, Blip2Llm
from blip.models.blip2_weights import BERT, EVA
from blip.models.llm_presets import FLAN_T5_XL, FLAN_T5_XXL, VICUNA_7B, VICUNA_13B
from blip.models.llm_tokenizer import Side
from blip.models.published import starts_of, weights_of
from blip.registry import MODELS
from blip.templates import dialog


@dataclass
class Blip2LlmInstructConfig(Blip2LlmConfig):
    """Sizes and switches of InstructBLIP."""

    may_read: ClassVar[bool] = True

    qformer_text_input: bool = True
    """Let the Q-Former read the instruction beside its queries; false: BLIP-2's stage 2, for which
    `qformer.init_from` says nothing."""
    max_txt_len: int = 128
    """Longest instruction, in tokens; the beginning of a longer one is cut off."""
    max_output_txt_len: int | None = 256
    """Longest text to be learned, in tokens; longer ones are cut; null: `max_txt_len`."""


@MODELS.register("blip2_llm_instruct")
class Blip2LlmInstruct(Blip2Llm):
    """Tower, instruction-aware Q-Former and a frozen language model; shapes as `Blip2Llm`."""

    config_class = Blip2LlmInstructConfig
    generation: ClassVar[dict[str, Any]] = {"max_length": 256, "repetition_penalty": 1.5}
    reads_prompt: ClassVar[bool] = True

    @property
    def cut(self) -> Side:
        """The beginning of a long instruction."""
        return "left"

    @torch.no_grad()
    def predict_class(
        self,
        samples: dict[str, Any],
        candidates: Sequence[Any],
        n_segments: int = 1,
        prompt: str | Sequence[str] | None = None,
    ) -> Tensor | list[Tensor]:
        """Candidates from the most likely to the least likely one.

        Args:
            samples: `image`; optional `prompt`, as of `generate`; optional `text_input`, one text, or a list
                of texts for a prompt with several places, per picture; optional `context`, `history` (of a
                dialog) and `caption`, one each; or ids in place of the whole prompt (`llm_ids.py`).
            candidates: N texts, or a list of texts for each picture; lists of ids may stand for texts.
            n_segments: parts in which candidates are scored, to save memory.
            prompt: as of `generate`, with `{}` for `text_input`.

        Returns:
            int64 (B, N), numbers of candidates; of lists of different length a list of (N,).

        Raises:
            UsageError: no candidates for a picture, or no parts.
        """
        scores = self.class_scores(samples, candidates, n_segments, prompt)
        if isinstance(scores, Tensor):
            return scores.argsort(dim=1, descending=True, stable=True)
        return [row.argsort(descending=True, stable=True) for row in scores]

    def class_scores(
        self,
        samples: dict[str, Any],
        candidates: Sequence[Any],
        n_segments: int = 1,
        prompt: str | Sequence[str] | None = None,
    ) -> Tensor | list[Tensor]:
        """Log-probability of each candidate behind its prompt; arguments and errors as `predict_class`.

        Returns:
            float32 (B, N); of lists of different length a list of (N,).
        """
        samples = {key: value for key, value in samples.items() if key != "ocr_tokens"}
        asked = self._given(samples)
        if asked is None:
            prompts = ask.class_prompts(samples, self.prompts(samples, prompt))
            asked = self._asked(samples, prompts, prompts)
        own = bool(candidates) and _of_each_picture(candidates)
        rows = len(asked.ids)
        if not candidates or (own and (len(candidates) != rows or not all(candidates))):
            raise UsageError(f"candidates: give some texts, or some for each of the {rows} pictures")
        if n_segments < 1:
            raise UsageError(f"n_segments: {n_segments} is below 1")
        if not own:
            return self._scores(asked, candidates, -(-len(candidates) // n_segments))
        found = []
        for row, some in enumerate(candidates):
            one = Asked(*(part[row : row + 1] for part in asked))
            found.append(self._scores(one, some, -(-len(some) // n_segments))[0])
        return torch.stack(found) if len({len(scores) for scores in found}) == 1 else found

    def dialog(self, message: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """A conversation as one prompt: what was said is put in front as of ranking, the first turn bare."""
        return dialog(message, history)


def _of_each_picture(candidates: Sequence[Any]) -> bool:
    """Whether they are lists of candidates; a candidate may itself be a list, of ids."""
    first = candidates[0]
    return not isinstance(first, str) and not (len(first) and isinstance(first[0], int))


@MODELS.register("blip2_t5_instruct")
class Blip2T5Instruct(Blip2LlmInstruct):
    """InstructBLIP with FlanT5."""

    presets: ClassVar = {
        "flant5xl": {**EVA, **BERT, **FLAN_T5_XL},
        "flant5xxl": {**EVA, **BERT, **FLAN_T5_XXL},
    }
    published: ClassVar = weights_of("blip2_t5_instruct")
    starts: ClassVar = starts_of("blip2_t5_instruct")


@MODELS.register("blip2_vicuna_instruct")
class Blip2VicunaInstruct(Blip2LlmInstruct):
    """InstructBLIP with Vicuna."""

    presets: ClassVar = {
        "vicuna7b": {**EVA, **BERT, **VICUNA_7B},
        "vicuna13b": {**EVA, **BERT, **VICUNA_13B},
    }
    published: ClassVar = weights_of("blip2_vicuna_instruct")
    starts: ClassVar = starts_of("blip2_vicuna_instruct")
    default_processors: ClassVar = {
        "vis_processor": {"train": {"name": "blip2_image_train"}, "eval": {"name": "blip_image_eval"}},
        "text_processor": {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption"}},
    }
