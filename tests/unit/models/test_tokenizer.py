"""The tokenizer: embedded vocabulary, cutting, padding, added tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip.data.scenes.make import vocabulary
from blip.errors import ConfigError
from blip.models.tokenizer import DEC, EMBEDDED, ENC, WordPieces


def test_every_word_of_scenes_is_one_piece() -> None:
    pieces = WordPieces(EMBEDDED)
    for word in vocabulary():
        ids = pieces([word])["text_ids"][0].tolist()
        assert len(ids) == 3, word
        assert pieces.decode(pieces([word])["text_ids"]) == [word]


def test_other_words_are_spelt_and_none_is_unknown() -> None:
    pieces = WordPieces(EMBEDDED)
    ids = pieces(["Zebra xylophones, 42!"])["text_ids"]
    assert pieces.decode(ids) == ["zebra xylophones, 42!"]


def test_added_tokens_stand_behind_the_vocabulary() -> None:
    plain, both = WordPieces(EMBEDDED), WordPieces(EMBEDDED, (DEC, ENC))
    assert plain.dec_id == plain.vocab_size - 1
    assert (both.dec_id, both.enc_id) == (plain.dec_id, plain.dec_id + 1)


def test_long_texts_are_cut_and_short_ones_padded() -> None:
    pieces = WordPieces(EMBEDDED)
    tokens = pieces(["a red circle and a blue square", "red"], max_length=5)
    ids, mask = tokens["text_ids"], tokens["text_mask"]
    assert ids.shape == (2, 5)
    assert ids[0, -1] == pieces.sep_id
    assert mask.sum(dim=1).tolist() == [5, 3]
    assert ids[1, 3:].tolist() == [pieces.pad_id] * 2


def test_a_missing_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.tokenizer.*nowhere"):
        WordPieces(str(tmp_path / "nowhere"))


def test_a_vocabulary_is_found_below_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\nblue\n")
    assert WordPieces("parts", data_root=tmp_path).decode(torch.tensor([[2, 6, 3]])) == ["blue"]
    monkeypatch.setenv("BLIP_DATA", str(tmp_path))
    assert WordPieces("parts/vocab.txt").vocab_size == 8


def test_a_vocabulary_without_bert_s_tokens_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("red\nblue\n")
    with pytest.raises(ConfigError, match=r"\[PAD\]|\[UNK\]|\[SEP\]|\[CLS\]"):
        WordPieces(str(file))
