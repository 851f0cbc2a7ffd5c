"""Ids in the place of texts: every model does with them what it does with the texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip
from blip.errors import ConfigError, UsageError
from blip.models.tokenizer import id_rows
from tests.reference.small_blip import small_blip
from tests.reference.small_stage2 import ANSWERS, LLMS, QUESTIONS, pictures, small_stage2

NOWHERE = "no-such-vocabulary.txt"
KINDS = ["opt", "llama", "t5"]


def flipped(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows, padded on the left."""
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    longest = ids.shape[1]
    padded = torch.tensor([[7] * (longest - len(row)) + row for row in rows])
    return padded, torch.arange(longest) >= longest - torch.tensor([[len(row)] for row in rows])


def tokens(model: Any, texts: list[str], name: str, **how: Any) -> dict[str, Tensor]:
    """Ids and a mask of integers, as transformers has them, of the language model."""
    ids, mask = model.llm.tokenizer.encode(texts, **how)
    return {f"{name}_ids": ids, f"{name}_mask": mask.long()}


def read(model: Any, texts: list[str]) -> dict[str, Tensor]:
    """Ids for the Q-Former."""
    found = model.word_pieces(texts)
    return {"text_ids": found["text_ids"], "text_mask": found["text_mask"].long()}


def equal(model: Any, found: Any, texts: list[str]) -> None:
    """Ids say what the texts say."""
    assert model.llm.tokenizer.decode(found) == texts


# A language model


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_text_of_ids_is_learned_like_the_text(kind: str) -> None:
    model = small_stage2(kind, prompt="a ").eval()
    texts = ["a red circle above a blue square", "a star"]
    expected = model({"image": pictures(2), "text_input": texts}).loss
    given = tokens(model, texts, "llm", end=True)
    assert torch.equal(model({"image": pictures(2), **given}).loss, expected)
    also = {key.replace("llm", "text"): value for key, value in given.items()}  # this Q-Former reads nothing
    assert torch.equal(model(image=pictures(2), **also).loss, expected)
    ids, mask = flipped(given["llm_ids"], given["llm_mask"].bool())
    assert torch.equal(model(image=pictures(2), llm_ids=ids, llm_mask=mask).loss, expected)
    prompt = tokens(model, ["a"], "prompt")["prompt_ids"]
    model.config.prompt = ""
    assert not torch.equal(model(image=pictures(2), **given).loss, expected)
    assert torch.equal(model(image=pictures(2), **given, prompt_ids=prompt).loss, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_continues_a_text_may_be_ids(kind: str) -> None:
    model = small_stage2(kind).eval()
    expected = model({"image": pictures(), "text_input": QUESTIONS, "text_output": ANSWERS}).loss
    # LAVIS's tokenizers put a beginning before the second text, too, and what is joined loses it.
    output = tokens(model, ANSWERS, "output", end=True)
    assert output["output_ids"][0, 0] == 2 or kind == "t5"
    found = model(image=pictures(), **tokens(model, QUESTIONS, "llm"), **output).loss
    torch.testing.assert_close(found, expected)


def test_an_encoder_needs_ids_to_be_written() -> None:
    model = small_stage2("t5")
    with pytest.raises(UsageError, match="output_ids: an encoder-decoder needs the ids that it is to write"):
        model({"image": pictures(), **tokens(model, QUESTIONS, "llm")})


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_ids_is_continued_like_the_prompt(kind: str, beams: int) -> None:
    model = small_stage2(kind).eval()
    image, how = pictures(), {"num_beams": beams, "max_length": 8}
    texts = model.generate({"image": image, "prompt": QUESTIONS}, **how)
    given = tokens(model, QUESTIONS, "llm")
    assert model.generate({"image": image, **given}, **how) == texts
    equal(model, model.generate({"image": image, **given}, return_ids=True, **how), texts)
    ids, mask = flipped(given["llm_ids"], given["llm_mask"].bool())
    assert model.generate({"image": image, "llm_ids": ids, "llm_mask": mask}, **how) == texts
    answers = model.predict_answers({"image": image, "text_input": QUESTIONS})
    assert model.predict_answers({"image": image, **given}) == answers
    equal(model, model.predict_answers({"image": image, **given}, return_ids=True), answers)


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_may_be_ids(kind: str) -> None:
    model = small_stage2(kind).eval()
    image = pictures()
    chosen = model.predict_answers(
        {"image": image, "text_input": QUESTIONS}, inference_method="rank", answer_list=ANSWERS
    )
    ids, mask = model.llm.tokenizer.candidates(ANSWERS)
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    given = tokens(model, QUESTIONS, "llm")
    found = model.predict_answers({"image": image, **given}, inference_method="rank", answer_list=rows)
    assert found == [rows[ANSWERS.index(answer)] for answer in chosen]


@pytest.mark.parametrize("kind", KINDS)
def test_an_instruction_of_ids(kind: str) -> None:
    model = small_stage2(kind, "blip2_llm_instruct").eval()
    image, given = pictures(), tokens(small_stage2(kind), QUESTIONS, "llm")
    both = {**given, **read(model, QUESTIONS)}
    expected = model({"image": image, "text_input": QUESTIONS, "text_output": ANSWERS}).loss
    found = model(image=image, **both, **tokens(model, ANSWERS, "output", end=True)).loss
    torch.testing.assert_close(found, expected)
    texts = model.generate({"image": image, "prompt": QUESTIONS}, num_beams=2, max_length=8)
    assert model.generate({"image": image, **both}, num_beams=2, max_length=8) == texts
    ids, mask = model.llm.tokenizer.candidates(ANSWERS)
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    order = model.predict_class({"image": image, "text_input": QUESTIONS}, ANSWERS)
    assert torch.equal(model.predict_class({"image": image, **both}, rows), order)
    own = model.predict_class({"image": image, **both}, [rows, rows[:2], rows[1:], rows])
    assert torch.equal(own[0], order[0])
    assert len(own[1]) == 2


def test_both_readers_need_their_ids() -> None:
    model = small_stage2("opt", "blip2_llm_instruct").eval()
    given = tokens(model, QUESTIONS, "llm")
    with pytest.raises(UsageError, match="text_ids: llm_ids are given, so the Q-Former needs its ids, too"):
        model.generate({"image": pictures(), **given})
    with pytest.raises(UsageError, match="llm_ids: text_ids are given, so the language model needs"):
        model.generate({"image": pictures(), **read(model, QUESTIONS)})


@pytest.mark.parametrize("kind", KINDS)
def test_ids_need_no_tokenizer(kind: str) -> None:
    known = small_stage2(kind, "blip2_llm_instruct").eval()
    tokenizer = known.llm.tokenizer
    sizes = {
        **LLMS[kind],
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
        **(
            {"decoder_start_token_id": tokenizer.pad_id}
            if kind == "t5"
            else {"bos_token_id": tokenizer.lead[0]}
        ),
    }
    rows = known.qformer.embedding.word.num_embeddings
    model = small_stage2(
        kind,
        "blip2_llm_instruct",
        tokenizer=NOWHERE,
        vocab_size=rows,
        llm={"sizes": sizes, "tokenizer": None},
    ).eval()
    model.load_state_dict(known.state_dict())
    image = pictures()
    given = {"image": image, **tokens(known, QUESTIONS, "llm"), **read(known, QUESTIONS)}
    output = tokens(known, ANSWERS, "output", end=True)
    assert torch.equal(model(given, **output).loss, known(given, **output).loss)
    ids = model.generate(given, num_beams=2, max_length=6, return_ids=True)
    assert torch.equal(ids, known.generate(given, num_beams=2, max_length=6, return_ids=True))
    with pytest.raises(ConfigError, match=r"model\.llm\.tokenizer"):
        model.generate(given, num_beams=2, max_length=6)


# BLIP and stage 1


def test_a_caption_s_prompt_may_be_ids() -> None:
    model = small_blip("caption", tokenizer="scenes", vocab_size=None, prompt="a picture of ").float().eval()
    image = pictures(2)
    texts = model.generate({"image": image}, num_beams=2, max_length=12, min_length=3)
    ids = model.word_pieces(["a picture of "])["text_ids"][:, :-1]
    how = {"num_beams": 2, "max_length": 12, "min_length": 3}
    assert model.generate({"image": image, "prompt_ids": ids}, **how) == texts
    found = model.generate({"image": image, "prompt_ids": ids}, **how, return_ids=True)
    assert model.word_pieces.decode(found) == texts
    learned = {"image": image, "text_input": ["a picture of a red star", "a picture of two"]}
    expected = model(learned).loss
    model.config.prompt, model._prompt_ids = "", None
    assert not torch.equal(model(learned).loss, expected)
    assert torch.equal(model(learned, prompt_ids=ids).loss, expected)


def test_answers_and_candidates_may_be_ids() -> None:
    model = small_blip("vqa", tokenizer="scenes", vocab_size=None).float().eval()
    image = pictures()
    asked, said = model.word_pieces(QUESTIONS), model.word_pieces(ANSWERS)
    expected = model({"image": image, "text_input": QUESTIONS, "answer": ANSWERS}).loss
    given = {"text_ids": asked["text_ids"], "text_mask": asked["text_mask"].long()}
    answers = {"answer_ids": said["text_ids"], "answer_mask": said["text_mask"].long()}
    assert torch.equal(model(image=image, **given, **answers).loss, expected)
    rows = [row[kept].tolist() for row, kept in zip(said["text_ids"], said["text_mask"], strict=True)]
    chosen = model.predict_answers({"image": image, "text_input": QUESTIONS}, answer_list=ANSWERS)
    found = model.predict_answers({"image": image, **given}, answer_list=rows)
    assert found == [rows[ANSWERS.index(answer)] for answer in chosen]
    texts = model.predict_answers({"image": image, **given}, inference_method="generate")
    ids = model.predict_answers({"image": image, **given}, inference_method="generate", return_ids=True)
    assert model.word_pieces.decode(ids) == texts


@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_blip_s_ids_need_no_tokenizer(kind: str) -> None:
    known = small_blip(kind, tokenizer="scenes", vocab_size=None).float().eval()
    pieces = known.word_pieces
    ids = {"dec": pieces.dec_id, "enc": pieces.enc_id, "sep": pieces.sep_id}
    rows = known.text.embedding.word.num_embeddings
    model = small_blip(kind, tokenizer=NOWHERE, vocab_size=rows, special_ids=ids).float().eval()
    model.load_state_dict(known.state_dict())
    if kind == "caption":
        samples = {"image": pictures(), "prompt_ids": torch.tensor([[0]])}
        how = {"num_beams": 2, "max_length": 12, "min_length": 3, "return_ids": True}
        found, expected = (each.generate(samples, **how) for each in (model, known))
    else:
        samples = {"image": pictures(), **pieces(QUESTIONS)}
        how = {"inference_method": "generate", "return_ids": True}
        found, expected = (each.predict_answers(samples, **how) for each in (model, known))
    assert torch.equal(found, expected)
    assert expected.shape[1] > 1


def test_small_vocabularies_without_a_tokenizer_must_say_what_ends_a_text() -> None:
    model = small_blip("caption", tokenizer=NOWHERE, vocab_size=60).float().eval()
    with pytest.raises(ConfigError, match=r"model\.special_ids\.sep says what ends them"):
        model.generate({"image": pictures(1), "prompt_ids": torch.tensor([[0]])}, return_ids=True)
    large = small_blip("caption", tokenizer=NOWHERE, vocab_size=30524).float().eval()
    assert large.text_ends == (102, 0)
    with pytest.raises(ConfigError, match="special_ids: no token 'seq'; did you mean 'sep'"):
        small_blip("caption", special_ids={"seq": 3})
    with pytest.raises(ConfigError, match=r"special_ids\.sep: below 0"):
        small_blip("caption", special_ids={"sep": -3})


def test_nothing_to_read_is_said() -> None:
    model = small_blip("caption", tokenizer="scenes", vocab_size=None)
    with pytest.raises(UsageError, match="text_input: no texts"):
        model({"image": pictures(1)})


def test_rows_of_ids() -> None:
    ids, mask = id_rows([[3, 4], [5]], pad_id=9)
    assert ids.tolist() == [[3, 4], [5, 9]]
    assert mask.tolist() == [[True, True], [True, False]]
    assert id_rows([])[0].shape == (0, 0)


def test_special_ids_are_saved(tmp_path: Path) -> None:
    model = small_blip("caption", tokenizer=NOWHERE, vocab_size=60, special_ids={"dec": 7, "sep": 8})
    assert model.text.dec_id == 7
    back = blip.from_pretrained(model.save_pretrained(tmp_path), arch="blip_caption")
    assert back.text.dec_id == 7
    assert back.text_ends == (8, 0)
    assert asdict(back.config)["special_ids"] == {"dec": 7, "sep": 8}


def test_longer_texts_than_there_are_positions_are_refused() -> None:
    model = small_blip("caption").float().eval()  # 16 positions
    samples = {"image": pictures(1), "prompt_ids": torch.tensor([[0]])}
    model.config.special_ids = {"sep": 1}
    model.generate(samples, max_length=16, min_length=16, return_ids=True)
    with pytest.raises(UsageError, match="max_length: 17, where texts have at most 16 positions"):
        model.generate(samples, max_length=17)
