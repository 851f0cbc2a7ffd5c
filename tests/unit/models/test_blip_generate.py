"""What BLIP's models write belongs to picture, prompt and seed, whatever else is in the batch (float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blip.errors import UsageError
from blip.layers.masks import causal_mask
from blip.models import generate as models_generate
from blip.models.generate import write
from blip.models.med import MedConfig
from tests.reference.small_blip import SIZES, small_blip

PROMPTS = ["a picture of", "", "a small red circle and a", "there is", "a", "two large stars above a blue"]
QUESTIONS = [
    "what color is the circle?",
    "where?",
    "how many large blue squares are in the picture?",
    "is there a star?",
]


def small(kind: str, **values: Any) -> Any:
    med = MedConfig(**{**SIZES["med"], "max_positions": 40})
    return small_blip(kind, tokenizer="scenes", vocab_size=None, max_txt_len=35, med=med, **values).eval()


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.double)


def one(samples: dict[str, Any], row: int) -> dict[str, Any]:
    return {key: value[row : row + 1] for key, value in samples.items()}


# Captions


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("num_captions", [1, 2])
def test_captions_do_not_depend_on_the_batch(num_beams: int, num_captions: int) -> None:
    if num_captions > num_beams:
        pytest.skip("so many texts need so many beams")
    model, samples = small("caption"), {"image": pictures(6), "prompt": PROMPTS}
    how: dict[str, Any] = {"num_beams": num_beams, "num_captions": num_captions, "min_length": 3}
    whole = model.generate(samples, max_length=14, **how)
    assert len(whole) == 6 * num_captions
    assert len(set(whole)) > 3
    for row in range(6):
        own = model.generate(one(samples, row), max_length=14, **how)
        assert whole[row * num_captions : (row + 1) * num_captions] == own


def test_sampled_captions_belong_to_seed_and_number() -> None:
    model = small("caption")
    samples = {"image": pictures(6), "prompt": PROMPTS, "index": torch.arange(6)}
    how: dict[str, Any] = {"use_nucleus_sampling": True, "max_length": 12, "min_length": 1, "num_captions": 3}
    whole = model.generate(samples, seed=3, **how)
    assert model.generate(samples, seed=3, **how) == whole
    assert model.generate(samples, seed=4, **how) != whole
    for row in range(6):
        assert model.generate(one(samples, row), seed=3, **how) == whole[3 * row : 3 * row + 3]
    without = {key: value for key, value in samples.items() if key != "index"}  # then places are numbers
    assert model.generate(without, seed=3, **how) == whole
    assert model.generate(samples, seed=3, repetition_penalty=1.1, **how) == whole
    assert model.generate(samples, seed=3, repetition_penalty=3.0, **how) != whole


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, 1.0),
        ({"use_nucleus_sampling": True}, 1.1),
        ({"use_nucleus_sampling": True, "repetition_penalty": 1.5}, 1.5),
    ],
)
def test_repetition_is_penalised_in_sampling_only_unless_told(
    how: dict[str, Any], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = small("caption"), []
    monkeypatch.setattr(
        models_generate, "write", lambda *rest: found.append(rest[3].repetition_penalty) or write(*rest)
    )
    model.generate({"image": pictures(1)}, max_length=12, **how)
    assert found == [expected]


def test_greedy_captions_are_those_of_whole_passes() -> None:
    """Without a cache, the whole text again for every token."""
    model, samples = small("caption"), {"image": pictures(6), "prompt": PROMPTS}
    written = model.generate(samples, num_beams=1, max_length=12, min_length=1)
    for row, prompt in enumerate(PROMPTS):
        ids = model.word_pieces([prompt])["text_ids"][:, :-1]
        ids = torch.cat([torch.full_like(ids[:, :1], model.text.dec_id), ids[:, 1:]], dim=1)
        length = ids.shape[1]
        with torch.no_grad():
            keys = model.text.image_keys(model.vision(samples["image"][row : row + 1]))
            while ids.shape[1] < 12 and int(ids[0, -1]) != model.word_pieces.sep_id:
                mask = causal_mask(torch.ones_like(ids, dtype=torch.bool))
                states = model.text(ids, mask, [(keys, 1)], "decode").states
                logits = model.lm_head(states[:, -1], model.text.embedding.word.weight)
                ids = torch.cat([ids, logits.argmax(dim=1, keepdim=True)], dim=1)
        assert written[row] == model.word_pieces.decode(ids[:, length:])[0]


def test_a_prompt_is_the_models_the_samples_or_the_pictures() -> None:
    model, image = small("caption", prompt="a picture of"), pictures(3)
    usual = model.generate({"image": image})
    assert model.generate({"image": image, "prompt": "a picture of"}) == usual
    assert model.generate({"image": image, "prompt": ["a picture of"] * 3}) == usual
    assert model.generate({"image": image, "prompt": "there is"}) != usual
    with pytest.raises(UsageError, match="2 prompts for 3 pictures"):
        model.generate({"image": image, "prompt": ["a", "b"]})


# Answers


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_do_not_depend_on_other_questions(num_beams: int) -> None:
    model = small("vqa", generate_attends_padding=False)
    samples = {"image": pictures(4), "text_input": QUESTIONS}
    how: dict[str, Any] = {"inference_method": "generate", "num_beams": num_beams, "max_len": 8}
    whole = model.predict_answers(samples, **how)
    assert len(set(whole)) > 1
    assert [model.predict_answers(one(samples, row), **how)[0] for row in range(4)] == whole
    ids = model.tokenize(QUESTIONS)
    assert model.predict_answers({"image": samples["image"], **ids}, **how) == whole


def test_answers_look_at_padding_where_lavis_does() -> None:
    """A switch, for scores like LAVIS's: its generated answers see the padding of shorter questions."""
    image, how = pictures(4), {"inference_method": "generate", "num_beams": 1, "max_len": 8}
    looks, does_not = (small("vqa", generate_attends_padding=value) for value in (True, False))
    longest = max(range(4), key=lambda i: len(QUESTIONS[i].split()))
    seen = looks.predict_answers({"image": image, "text_input": QUESTIONS}, **how)
    unseen = does_not.predict_answers({"image": image, "text_input": QUESTIONS}, **how)
    assert seen != unseen
    assert seen[longest] == unseen[longest]  # it has no padding


@pytest.mark.parametrize("method", ["generate", "rank"])
def test_a_question_stands_in_the_prompt(method: str) -> None:
    model, image = small("vqa"), pictures(2)
    how: dict[str, Any] = {"inference_method": method, "answer_list": ["red", "blue", "two", "yes", "left"]}
    asked = model.predict_answers({"image": image, "text_input": ["what? color", "how? many"]}, **how)
    for prompt, questions in (("what? ", ["color"]), ("{} many", ["how?"])):
        row = 0 if questions == ["color"] else 1
        samples = {"image": image[row : row + 1], "text_input": questions}
        assert model.predict_answers(samples, prompt=prompt, **how) == asked[row : row + 1]
    samples = {"image": image[:1], "text_input": "what? color"}  # one question, not in a list
    assert model.predict_answers(samples, **how) == asked[:1]


def test_what_cannot_be_answered_is_refused() -> None:
    model, samples = small("vqa"), {"image": pictures(1), "text_input": ["what?"]}
    with pytest.raises(UsageError, match="did you mean 'rank'"):
        model.predict_answers(samples, inference_method="ranks")
    with pytest.raises(UsageError, match="ranking needs candidates"):
        model.predict_answers(samples)
    ids = {"image": samples["image"], **model.tokenize(["what?"])}
    with pytest.raises(UsageError, match="give the questions as text_input"):
        model.predict_answers(ids, prompt="question: {}", inference_method="generate")
