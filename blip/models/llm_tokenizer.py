"""Texts for a language model: which tokens it reads, which it learns, and what its tokens say.

Any tokenizer of transformers gives the bare tokens of a text. What goes before and behind them, which side is
cut and where the padding goes is decided here, so that a tokenizer's own settings make no difference.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from blip.errors import ConfigError, DataError, brief
from blip.models.tokenizer import CLS, EMBEDDED, MASK, PAD, SEP, STRANGE, UNK, id_rows
from blip.places import find_file

SENTENCEPIECE = ("tokenizer.model", "spiece.model")
"""What SentencePiece's own file is called."""
_IMAGE = "<image>"
Kind = Literal["causal", "seq2seq"]
Side = Literal["left", "right"]
_NAMES = {
    "pad_token": ("[PAD]", "<pad>", "<|pad|>"),
    "bos_token": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "[CLS]"),
    "eos_token": ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "[SEP]"),
    "unk_token": ("<unk>", "[UNK]"),
}
"""What a bare `tokenizer.json`, which does not say so, is likely to call its special tokens."""


class LlmTokenizer:
    """Token ids for a language model, and texts for token ids. Can be pickled.

    Args:
        tokenizer: of transformers; gets "[PAD]" where it has no padding token, as LAVIS does for Vicuna.
        kind: `causal`, or `seq2seq` for an encoder and a decoder.
        end: text of one token that ends what is written; None: the tokenizer's end token.
        bos: what a text begins with: what the tokenizer puts there, the end token, or none.

    Raises:
        ConfigError: no end token, or `end` is not one token.
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: Kind,
        end: str | None = None,
        bos: Literal["tokenizer", "end", "none"] = "tokenizer",
    ) -> None:
        self._tokenizer = tokenizer
        self.kind = kind
        if tokenizer.pad_token_id is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
        self.pad_id: int = tokenizer.pad_token_id
        self.vocab_size: int = len(tokenizer)
        lead, tail = self._surroundings()
        self._end_token: str | None = tokenizer.eos_token or tokenizer.sep_token
        self.end_id = self._end_id(end)
        """Ends a generated text and the target of a decoder."""
        self.end_text: str = end if end is not None else str(self._end_token)
        self._ends_by_name = self.raw([self.end_text]) != self.raw([self.end_text], control=False)
        if bos != "tokenizer":
            lead = [self._token_id(self._end_token)] if bos == "end" and self._end_token else []
        self.lead: list[int] = lead
        """What a text begins with; may be empty."""
        own = kind == "seq2seq" and end is None and tail
        self.tail: list[int] = tail if own else [self.end_id]
        """What a text ends with, where it has an end."""
        self.spaced = self._plain_decode(self.raw(["a"])[0] + self.raw(["b"])[0]).strip() == "a b"
        """Whether a text's first token is the beginning of a word without a space before it."""

    @classmethod
    def load(
        cls,
        source: str,
        kind: Kind,
        end: str | None = None,
        bos: Literal["tokenizer", "end", "none"] = "tokenizer",
        data_root: str | Path | None = None,
    ) -> LlmTokenizer:
        """From a folder, `tokenizer.json`, `.gguf` or Hugging Face name, or `scenes`.

        Args:
            source: a path as given, else below the data root.
            kind, end, bos: as of the class.
            data_root: None: the environment variable BLIP_DATA, else `data`.

        Raises:
            ConfigError: there is no such tokenizer, or it cannot be used.
        """
        tokenizer = _load(source, data_root)
        try:
            made = cls(tokenizer, kind, end, bos)
            made.raw([STRANGE])
            return made
        except ConfigError:
            raise
        except Exception as error:  # what a damaged one makes of texts
            raise ConfigError(
                f"model.llm.tokenizer: {source!r} cannot be used ({brief(error)}); write it again"
            ) from error

    def raw(self, texts: Sequence[str], control: bool = True) -> list[list[int]]:
        """The bare tokens of each text.

        Args:
            texts: B texts.
            control: "</s>" and the like are the tokens of that name, as a prompt of a chat model has them;
                False: they are letters like others, as in data, which must not end a text where it likes.
        """
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, verbose=False, split_special_tokens=not control
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def encode(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        side: Side = "right",
        bos: bool = True,
        end: bool | None = None,
        continues: bool = False,
        control: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the right.

        Args:
            texts: B texts.
            max_length: longest, in tokens, what stands before and behind the text included, which stays.
            side: which end of a longer text is cut off.
            bos: begin with `lead`.
            end: end with `tail`; None: for an encoder and its decoder.
            continues: the texts stand behind other ones, so that they need a space before them.
            control: as of `raw`.

        Returns:
            ids int64 (B, T), mask bool (B, T), True = real token.
        """
        head = self.lead if bos else []
        tail = self.tail if (self.kind == "seq2seq" if end is None else end) else []
        room = None if max_length is None else max(max_length - len(head) - len(tail), 0)
        words = self.raw([self.behind(text) for text in texts] if continues else texts, control)
        ids, mask, _ = self._pad([[*head, *_cut(row, room, side), *tail] for row in words])
        return ids, mask

    def behind(self, text: str, before: str = "a") -> str:
        """The text with a space before it, where it needs one to stand behind the text `before`."""
        apart = self.spaced or not text or text[:1].isspace() or not before or before[-1:].isspace()
        return text if apart else " " + text

    def train(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        max_prompt: int | None = None,
        max_target: int | None = None,
        bos_is_target: bool = False,
        side: Side = "left",
    ) -> dict[str, Tensor]:
        """What a model reads and learns: targets that follow prompts.

        A causal model reads prompt and target one after the other, padding behind both; an encoder reads the
        prompt, and a decoder learns the target.

        Args:
            prompts: B texts, which may be empty.
            targets: B texts; they get an end. A decoder-only target that is cut loses it, as in LAVIS.
            max_prompt: longest prompt, in tokens, what it begins and ends with included.
            max_target: longest target, in tokens, its end included, and what a decoder's text would begin
                with by itself, as in LAVIS.
            bos_is_target: the first token of an empty prompt is a target too (BLIP-2's stage 2 with OPT).
            side: which end of a long prompt is cut off.

        Returns:
            llm_ids int64 (B, T), llm_mask bool (B, T); llm_labels int64, -100 = no target: (B, T) of the
            same places for a causal model, (B, L) for an encoder and a decoder.
        """
        if self.kind == "seq2seq":
            ids, mask = self.encode(prompts, max_prompt, side)
            target_ids, target_mask = self.encode(targets, max_target, control=False)
            labels = target_ids.masked_fill(~target_mask, -100)
            return {"llm_ids": ids, "llm_mask": mask, "llm_labels": labels}
        room, most = (None if x is None else max(x - len(self.lead), 0) for x in (max_prompt, max_target))
        pairs = zip(prompts, targets, strict=True)
        words = self.raw([self.behind(target, prompt) for prompt, target in pairs], control=False)
        rows, unlearned = [], []
        for prompt, target in zip(self.raw(prompts), words, strict=True):
            before = [*self.lead, *_cut(prompt, room, side)]
            rows.append([*before, *_cut([*target, self.end_id], most, "right")])
            unlearned.append(0 if bos_is_target and not prompt else len(before))
        return self._learned(rows, unlearned)

    def text(
        self, texts: Sequence[str], prompt: str = "", max_length: int | None = None
    ) -> dict[str, Tensor]:
        """What a causal model reads and learns: whole texts that begin with the same prompt.

        As BLIP-2's stage 2 with OPT has it in LAVIS: text and end are one string, of which a cut loses the
        end, and the first token is a target too where there is no prompt.

        Args:
            texts: B texts, prompt included.
            prompt: what they begin with, whose tokens are no targets.
            max_length: longest text, in tokens.

        Returns:
            as of `train`.

        Raises:
            DataError: a text that does not begin with the prompt; real words would not be learned.
        """
        room = None if max_length is None else max(max_length - len(self.lead), 0)
        begins = self.raw([prompt])[0] if prompt.strip() else []
        control = begins != self.raw([prompt], control=False)[0] if begins else False
        if self._ends_by_name:
            words = [[*row, self.end_id] for row in self.raw(texts, control)]
        else:
            words = self.raw([text + self.end_text for text in texts], control)
        for text, row in zip(texts, words, strict=True):
            if row[: len(begins)] != begins:
                raise DataError(
                    f"model.prompt: {text!r} does not begin with {prompt!r}, which the loss leaves out; set"
                    " text_processor.train.prompt of the dataset to it, or model.prompt to ''"
                )
        rows = [[*self.lead, *_cut(row, room, "right")] for row in words]
        return self._learned(rows, [(len(self.lead) + len(begins)) * bool(begins)] * len(rows))

    def prompt(self, texts: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of what is to be continued; the beginning of longer texts is cut off."""
        return self.encode(texts, max_length, "left")

    def candidates(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (N, L) of texts to be ranked behind a prompt.

        As in LAVIS, they have an end with an encoder-decoder, and none with a decoder.
        """
        decoder = self.kind == "causal"
        return self.encode(texts, bos=not decoder, continues=decoder, control=False)

    def decode(self, ids: Tensor) -> list[str]:
        """What each row of ids (B, L) says up to its end, without special tokens and space around it."""
        dropped = {self.pad_id, *self._tokenizer.all_special_ids}
        texts = []
        for row in ids.tolist():
            row = row[: row.index(self.end_id)] if self.end_id in row else row
            texts.append(self._plain_decode([token for token in row if token not in dropped]).strip())
        return texts

    def as_theirs(self) -> Any:
        """A copy as transformers knows it."""
        return copy.deepcopy(self._tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer as transformers does, beside the weights of its model."""
        self._tokenizer.save_pretrained(folder)

    def _plain_decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def _learned(self, rows: list[list[int]], unlearned: list[int]) -> dict[str, Tensor]:
        ids, mask, column = self._pad(rows)
        given = torch.tensor(unlearned, dtype=torch.int64).view(-1, 1)
        labels = ids.masked_fill(~mask | (column < given), -100)
        return {"llm_ids": ids, "llm_mask": mask, "llm_labels": labels}

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask (B, T), and the number of each column (1, T)."""
        ids, mask = id_rows(rows, self.pad_id)
        return ids, mask, torch.arange(ids.shape[1])[None]

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text by itself."""
        bare = self.raw(["a"])[0]
        whole = list(self._tokenizer(["a"], verbose=False)["input_ids"][0])
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    def _end_id(self, end: str | None) -> int:
        if end is None:
            if self._end_token is None:
                raise ConfigError(
                    "model.llm.end: this tokenizer has no end token; give a text of one token, such as '\\n'"
                )
            return self._token_id(self._end_token)
        # Behind a word, since some tokenizers begin every text with a token for a space.
        before, ids = self.raw(["a", "a" + end])
        if len(ids) != len(before) + 1 or ids[:-1] != before:
            raise ConfigError(
                f"model.llm.end: {end!r} is not one token of this tokenizer, but {ids[len(before) :]} behind"
                " a word; give another text, or null for the tokenizer's end token"
            )
        return ids[-1]

    def _token_id(self, token: str) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(token))


def _cut(ids: list[int], room: int | None, side: Side) -> list[int]:
    """At most `room` ids, without those at `side`."""
    if room is None or len(ids) <= room:
        return ids
    return ids[:room] if side == "right" else ids[len(ids) - room :]


class Place(NamedTuple):
    """Where transformers finds a model or tokenizer."""

    name: str
    """A folder, or a Hugging Face name."""
    options: dict[str, str]
    """Further arguments of `from_pretrained`."""


def locate(source: str, data_root: str | Path | None = None) -> Place:
    """A folder or `.gguf` file as given, else below the data root, else a Hugging Face name."""
    found = find_file(source, data_root)
    if found is None:
        return Place(source, {})
    if found.suffix == ".gguf":
        return Place(str(found.parent), {"gguf_file": found.name})
    return Place(str(found), {})


def _load(source: str, data_root: str | Path | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Loader workers are forked; the Rust tokenizer's threads would warn of it and compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if source == EMBEDDED:
            return _embedded(PreTrainedTokenizerFast)
        name, options = locate(source, data_root)
        alone = Path(name) / "tokenizer.json"
        if alone.is_file() and not (alone.parent / "tokenizer_config.json").is_file():
            name = str(alone)
        if name.endswith(".json"):
            return _bare(PreTrainedTokenizerFast, name)
        found = _without_image(AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options))
        # Of a config.json alone it makes one that knows special tokens, and T5's the mark of a space.
        if not {*found.get_vocab()} - {*found.get_added_vocab(), "\u2581"}:
            raise ValueError("there is no vocabulary")
        return found
    except Exception as error:  # tokenizers raises plain Exception, the hub client errors of many packages
        raise ConfigError(
            f"model.llm.tokenizer: no tokenizer {source!r} on disk, in the Hugging Face cache or on its hub"
            f" ({type(error).__name__}: {brief(error)}); give a folder or a tokenizer.json, or"
            f" '{EMBEDDED}' for the embedded one{_needed(source, data_root)}"
        ) from error


def _without_image(tokenizer: Any) -> Any:
    """Take off the last token, if it is what transformers' BLIP-2 writes in place of soft tokens.

    There is none in our ids, nor a row for it in most language models.
    """
    if len(tokenizer) - 1 != tokenizer.get_added_vocab().get(_IMAGE) or not tokenizer.is_fast:
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != _IMAGE]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def _needed(source: str, data_root: str | Path | None) -> str:
    """What a folder with the file of SentencePiece alone (LLaMA, Vicuna) needs besides; empty for others."""
    folder = Path(locate(source, data_root).name)
    files = [name for name in SENTENCEPIECE if os.path.isfile(folder / name)]
    if not files or (folder / "tokenizer.json").is_file() or find_spec("sentencepiece"):
        return ""
    return f". {files[0]} alone is read by sentencepiece, which is not installed: pip install 'blip[llm]'"


def _embedded(wrapper: Any) -> Any:
    from tokenizers import BertWordPieceTokenizer

    file = Path(str(resources.files("blip") / "models" / "scenes_vocab.txt"))
    pieces = Tokenizer.from_str(BertWordPieceTokenizer(str(file), lowercase=True).to_str())
    names = {"pad": PAD, "unk": UNK, "cls": CLS, "sep": SEP, "mask": MASK, "bos": CLS, "eos": SEP}
    return wrapper(tokenizer_object=pieces, **{f"{key}_token": token for key, token in names.items()})


def _bare(wrapper: Any, file: str) -> Any:
    """A tokenizer from a `tokenizer.json` alone; its special tokens are known by their usual names."""
    tokenizer = Tokenizer.from_file(file)
    vocabulary = tokenizer.get_vocab()
    known = {
        key: token
        for key, tokens in _NAMES.items()
        if (token := next((t for t in tokens if t in vocabulary), None)) is not None
    }
    return wrapper(tokenizer_object=tokenizer, **known)
