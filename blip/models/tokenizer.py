"""BERT word pieces with [DEC] and [ENC], encoded by the Rust tokenizer: fast enough for loader workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import Tensor

from blip.errors import ConfigError, brief
from blip.places import find_file

EMBEDDED = "scenes"
KNOWN = {"bert-base-uncased": 30522}
"""Vocabularies whose number of pieces is known by their name, so that sizes need no file."""
# Loader workers are forked; the Rust tokenizer's threads would warn of it and compete with them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
DEC, ENC = "[DEC]", "[ENC]"
STRANGE = "a \u2603"
"""Has a letter that vocabularies lack."""


class Ends(NamedTuple):
    """Ids behind a text."""

    end_id: int
    pad_id: int


BERT_ENDS = Ends(102, 0)
"""[SEP] and [PAD] of BERT's vocabulary."""


class WordPieces:
    """Lower-cased BERT word pieces; added tokens stand behind the vocabulary (BLIP and LAVIS: from 30522).

    Every text becomes `[CLS] ... [SEP]`; the models replace the first id where they need [DEC] or [ENC].

    Args:
        source: `scenes` (the small embedded vocabulary), a `vocab.txt`, a folder with one or with a
            `tokenizer.json`, both as given, else below the data root, or a Hugging Face name such as
            `bert-base-uncased`.
        added: tokens to append, in order; [DEC] for BLIP-2, [DEC] and [ENC] for BLIP.
        data_root: None: the environment variable BLIP_DATA, else `data`.

    Raises:
        ConfigError: there is no such vocabulary.
    """

    def __init__(
        self, source: str, added: tuple[str, ...] = (DEC,), data_root: str | Path | None = None
    ) -> None:
        self.source = source
        self._tokenizer = _load(source, data_root)
        self._tokenizer.add_special_tokens(list(added))
        try:
            self._tokenizer.encode(STRANGE)
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(f"model.tokenizer: {source!r} cannot be used ({brief(error)})") from error
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.pad_id, self.cls_id, self.sep_id = (self._id(token) for token in (PAD, CLS, SEP))
        self.dec_id = self._id(DEC)
        self.enc_id = self._id(ENC) if ENC in added else self.cls_id

    def __call__(
        self, texts: list[str], max_length: int | None = None, cut: Literal["left", "right"] = "right"
    ) -> dict[str, Tensor]:
        """Ids and mask, padded to the longest text.

        Args:
            texts: B texts.
            max_length: texts are cut to this many tokens, [CLS] and [SEP] included; None = not cut.
            cut: which end of a longer text is lost.

        Returns:
            text_ids: int64 (B, T); text_mask: bool (B, T), True = real token.
        """
        if not texts:
            return {
                "text_ids": torch.zeros(0, 1, dtype=torch.long),
                "text_mask": torch.zeros(0, 1, dtype=torch.bool),
            }
        encoded = [e.ids for e in self._tokenizer.encode_batch(texts)]
        if max_length is not None:
            encoded = [_cut(ids, max_length, cut) for ids in encoded]
        ids, mask = id_rows(encoded, self.pad_id)
        return {"text_ids": ids, "text_mask": mask}

    def decode(self, ids: Tensor) -> list[str]:
        """Texts of (B, T) ids, without special tokens."""
        return [text.strip() for text in self._tokenizer.decode_batch(ids.tolist(), skip_special_tokens=True)]

    def as_theirs(self) -> Tokenizer:
        """The tokenizer as the package `tokenizers` knows it."""
        return getattr(self._tokenizer, "_tokenizer", self._tokenizer)

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ConfigError(
                f"model.tokenizer: {self.source!r} has no {token} token; a BERT-like vocabulary is needed"
            )
        return found


def known_rows(
    source: str, added: tuple[str, ...] = (DEC,), data_root: str | Path | None = None
) -> int | None:
    """How many pieces a vocabulary has, where its name alone tells; arguments as of `WordPieces`."""
    if source not in KNOWN or find_file(source, data_root) is not None:  # a file may say something else
        return None
    return KNOWN[source] + len(added)


def id_rows(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Lists of ids as int64 (B, T), padded on the right, and a mask bool (B, T), True = real token."""
    longest = max(map(len, rows), default=0)
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return ids.view(len(rows), longest), torch.arange(longest) < lengths[:, None]


def _cut(ids: list[int], length: int, side: str) -> list[int]:
    """At most `length` of the ids, of which the first and the last stay."""
    if len(ids) <= length:
        return ids
    return [*ids[: length - 1], ids[-1]] if side == "right" else [ids[0], *ids[len(ids) - length + 1 :]]


def _load(source: str, data_root: str | Path | None) -> Tokenizer:
    if source == EMBEDDED:
        return _word_pieces(Path(str(resources.files("blip") / "models" / "scenes_vocab.txt")))
    path = find_file(source, data_root) or Path(source)
    if os.path.isfile(path / "tokenizer.json"):  # also of names that no file can have
        try:
            return _plain(Tokenizer.from_file(str(path / "tokenizer.json")))
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(
                f"model.tokenizer: '{path / 'tokenizer.json'}' is no tokenizer ({brief(error)})"
            ) from error
    for file in (path, path / "vocab.txt"):
        if os.path.isfile(file):
            return _word_pieces(file)
    return _from_hub(source)


def _word_pieces(file: Path) -> Tokenizer:
    try:
        return BertWordPieceTokenizer(str(file), lowercase=True)
    except Exception as error:  # tokenizers raises plain Exception and TypeError
        raise ConfigError(
            f"model.tokenizer: '{file}' is no vocabulary of BERT word pieces ({error}); it has one piece a"
            f" line, {PAD}, {UNK}, {CLS}, {SEP} and {MASK} among them"
        ) from error


def _from_hub(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return _plain(AutoTokenizer.from_pretrained(name, use_fast=True).backend_tokenizer)
    except Exception as error:  # the hub client raises errors of many packages
        raise ConfigError(
            f"model.tokenizer: no vocabulary {name!r}: not a vocab.txt or folder on disk, and not in the"
            f" Hugging Face cache or reachable on its hub ({type(error).__name__}); give the path of a"
            " vocab.txt, or 'scenes' for the embedded one"
        ) from error


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Without the file's own cutting and padding, which are decided per call."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
