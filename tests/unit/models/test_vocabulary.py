"""Where a model's words come from: a tokenizer below the data root, whose own [DEC] and [ENC] begin texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from blip.errors import CheckpointError, ConfigError
from blip.formats.load import load_any
from blip.layers.text import MOST_ADDED
from blip.models.med import Med
from tests.reference.small_blip import MODELS, small_blip
from tests.reference.small_stage1 import IMAGE, small_model

PLAIN = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["red", "blue", "ball", "box", "a"]
FILES = {
    "added": [*PLAIN, *WORDS],  # [DEC] and [ENC] are appended
    "own": [*PLAIN, "[DEC]", "[ENC]", *WORDS],
}
IDS = {"added": (10, 11), "own": (5, 6)}
ROWS = 12
TEXTS = ["a red ball", "a blue box"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with vocabularies."""
    for name, words in FILES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("\n".join(words) + "\n")
    return tmp_path


def made(kind: str, root: Path, name: str = "own", rows: int | None = None) -> Any:
    """A small model whose tokenizer lies below the data root."""
    return small_blip(kind, data_root=root, tokenizer=f"{name}/vocab.txt", vocab_size=rows)


@pytest.mark.parametrize("kind", MODELS)
def test_a_tokenizer_may_lie_below_the_data_root_of_a_run(kind: str, root: Path, tmp_path: Path) -> None:
    model = made(kind, root)
    assert model.text.embedding.word.num_embeddings == ROWS
    assert model.word_pieces.decode(model.tokenize(TEXTS)["text_ids"]) == TEXTS
    with pytest.raises(ConfigError, match=r"model\.tokenizer"):
        made(kind, tmp_path / "elsewhere")


@pytest.mark.parametrize("rows", [None, ROWS, ROWS + 8])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", MODELS)
def test_texts_begin_with_the_tokenizer_s_tokens(kind: str, name: str, rows: int | None, root: Path) -> None:
    """Rows that no word has may follow; LAVIS takes the tokenizer's ids, too."""
    model = made(kind, root, name, rows)
    tokens = model.tokenize(TEXTS)
    parts = [part for part in model.modules() if isinstance(part, Med)]
    assert {(part.dec_id, part.enc_id) for part in parts} == {IDS[name]}
    assert int(tokens["text_ids"].max()) < ROWS


@pytest.mark.parametrize("name", FILES)
def test_it_is_their_rows_that_texts_begin_with(name: str, root: Path) -> None:
    model = made("pretrain", root, name, ROWS + 8).eval()
    tokens = model.tokenize(TEXTS)
    ids, mask = tokens["text_ids"], tokens["text_mask"]
    keys = [(model.text.image_keys(model.image_states({"image": images()})), 1)]

    @torch.no_grad()
    def states() -> tuple[torch.Tensor, torch.Tensor]:
        return model.text.grounded(ids, mask, keys), model.text.decode(ids, mask, keys)

    def changed(row: int) -> tuple[bool, bool]:
        before = states()
        with torch.no_grad():
            model.text.embedding.word.weight[row] += torch.linspace(-1, 1, model.config.med.width)
        one, other = (not torch.equal(a, b) for a, b in zip(before, states(), strict=True))
        return one, other

    dec, enc = IDS[name]
    assert [changed(row) for row in range(ROWS, ROWS + 8)] == [(False, False)] * 8
    assert changed(dec) == (False, True)
    assert changed(enc) == (True, False)


def test_where_ids_are_given_the_last_rows_are_meant(root: Path) -> None:
    model = made("caption", root, rows=20)
    assert (model.text.dec_id, model.text.enc_id) == (18, 19)
    assert model._word_pieces is None


@pytest.mark.parametrize("name", FILES)
def test_stage_1_begins_texts_with_the_tokenizer_s_token(name: str, root: Path) -> None:
    model = small_model(tokenizer=str(root / name), vocab_size=ROWS + 8)
    assert model.dec_id == ROWS + 7
    assert model.tokenize(TEXTS)["text_ids"].shape == (2, 5)
    assert model.dec_id == IDS[name][0]


@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_a_vocabulary_with_spare_rows_trains_and_writes(kind: str, root: Path) -> None:
    model = made(kind, root, "own", ROWS + 8)
    batch = {"image": images(), "text_input": TEXTS, "answer": ["red", "blue"]}
    model(batch).loss.backward()
    model.eval()
    if kind == "vqa":
        assert model.predict_answers(batch, answer_list=["red", "blue"])[0] in ("red", "blue")
    else:
        assert len(model.generate({"image": images()}, max_length=6, min_length=1)) == 2


def images() -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, IMAGE, IMAGE, generator=random, dtype=torch.double)


@pytest.mark.parametrize("kind", ["pretrain", "caption"])
def test_rows_of_added_tokens_begin_anew(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = small_blip(kind)
    rows = first.text.embedding.word.num_embeddings
    folder = first.save_pretrained(tmp_path)
    more = small_blip(kind, vocab_size=rows + 3)
    new = more.text.embedding.word.weight[rows:].detach().clone()
    lines = load_any(more, folder)
    assert "reshaped" in lines[0]
    assert "3 rows were added and begin anew" in caplog.text
    words = more.text.embedding.word.weight
    assert torch.equal(words[:rows], first.text.embedding.word.weight)
    assert torch.equal(words[rows:], new)
    assert torch.equal(more.lm_head.bias[:rows], first.lm_head.bias)
    for other in (rows - 1, rows + MOST_ADDED + 1):
        with pytest.raises(CheckpointError, match=r"of another shape"):
            load_any(small_blip(kind, vocab_size=other), folder)
