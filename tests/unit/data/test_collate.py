"""Ragged values in batches, and text columns tokenised one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip.batch import normalize, to_device
from blip.data.collate import Flat, collate, merge


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    """A token per word, its length; 0 fills up."""
    rows = [[len(word) for word in text.split()] for text in texts]
    ids = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    return {"text_ids": ids, "text_mask": ids != 0}


def asked(question: str, answers: list[str]) -> dict[str, Any]:
    weights = Flat([1 / len(answers)] * len(answers))
    return {"text_input": question, "answer": Flat(answers), "weight": weights, "n_answers": len(answers)}


SAMPLES = [asked("what is it", ["a cat", "dog"]), asked("who", ["me"]), asked("where", ["a", "b c d", "e"])]


def test_answers_of_all_questions_stand_flat() -> None:
    batch = collate(SAMPLES, {"text_input": tokenize, "answer": tokenize, "absent": tokenize})
    assert batch["answer"] == ["a cat", "dog", "me", "a", "b c d", "e"]
    assert batch["n_answers"].tolist() == [2, 1, 3]
    assert (batch["weight"].dtype, batch["weight"].shape) == (torch.float32, (6,))
    assert batch["text_ids"].tolist() == [[4, 2, 2], [3, 0, 0], [5, 0, 0]]
    assert batch["answer_ids"].tolist() == [[1, 3, 0], [3, 0, 0], [2, 0, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert torch.equal(batch["answer_mask"], batch["answer_ids"] != 0)
    assert "absent_ids" not in batch


def test_parts_of_a_batch_give_the_whole() -> None:
    columns = {"text_input": tokenize, "answer": tokenize}
    whole = collate(SAMPLES, columns)
    parts = merge(
        [collate(SAMPLES[:1], columns), collate(SAMPLES[1:2], columns), collate(SAMPLES[2:], columns)]
    )
    assert list(parts) == list(whole)
    for key, value in whole.items():
        same = torch.equal(parts[key], value) if isinstance(value, Tensor) else parts[key] == value
        assert same, key


def test_a_single_tokenizer_is_that_of_the_text() -> None:
    batch = collate(SAMPLES[:1], tokenize)
    assert sorted(batch) == ["answer", "n_answers", "text_ids", "text_input", "text_mask", "weight"]


def test_both_of_two_pictures_are_normalised_on_the_device() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    norm = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]]).expand(2, 2, 3)
    moved = to_device({"image0": pixels, "image1": 255 - pixels, "image_norm": norm}, torch.device("cpu"))
    assert sorted(moved) == ["image0", "image1"]
    assert torch.equal(moved["image0"], normalize(pixels, norm))
    assert torch.equal(moved["image1"], normalize(255 - pixels, norm))
    floats = {"image0": torch.zeros(1, 3, 2, 2), "image1": torch.ones(1, 3, 2, 2)}
    assert to_device(dict(floats), torch.device("cpu")) == floats
