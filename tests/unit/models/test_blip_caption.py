"""BLIP for captioning: the loss is that of plain loops, and the prompt is given, not learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip.errors import DataError
from blip.models.blip_caption import BlipCaptionConfig
from blip.models.med import MedConfig
from tests.reference import blip as reference
from tests.reference.small_blip import SIZES, small_blip
from tests.reference.small_stage1 import assert_same, global_batch, gradients, part_of

ROWS = 4
CAPTIONS = ["a picture of a red circle", "a picture of a blue square and a green star"]


def plain_loss(model: Any, batch: dict[str, Any], prompt_length: int) -> Tensor:
    weights = dict(model.named_parameters())
    text, head = reference.part(weights, "text"), reference.part(weights, "lm_head")
    states, total, count = model.vision(batch["image"]), torch.zeros((), dtype=torch.double), 0
    for row in range(len(states)):
        ids = reference.real(batch, row)
        hidden = reference.med(text, [model.text.dec_id, *ids[1:]], [states[row]], decode=True)
        logits = reference.words(hidden, head, text["embedding.word.weight"])
        loss, tokens = reference.told(logits, ids, model.config.label_smoothing, prompt_length)
        total, count = total + loss, count + tokens
    return total / count


def captioner(**values: Any) -> Any:
    """With real words."""
    med = MedConfig(**{**SIZES["med"], "max_positions": 40})
    return small_blip(
        "caption",
        tokenizer="scenes",
        vocab_size=None,
        max_txt_len=40,
        med=med,
        **{"prompt": "a picture of ", **values},
    )


def captions(model: Any, texts: list[str]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(len(texts), 3, 16, 16, generator=generator, dtype=torch.double)
    return {"image": image, "text_input": texts, **model.tokenize(texts)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_plain_loops(smoothing: float) -> None:
    ours, plain = (small_blip("caption", label_smoothing=smoothing) for _ in range(2))
    batch = global_batch(ROWS, ids=False)
    got, expected = ours(batch), plain_loss(plain, batch, 0)
    assert list(got) == ["loss", "loss_lm"]
    torch.testing.assert_close(got.loss, expected, atol=1e-8, rtol=1e-8)
    got.loss.backward()
    expected.backward()
    assert_same(gradients(ours), gradients(plain), 1e-8)
    assert set(gradients(ours)) == {name for name, _ in ours.named_parameters()}


def test_the_four_tokens_of_the_prompt_are_not_learned() -> None:
    model = captioner()
    assert model.prompt_length == 4  # [DEC], a, picture, of
    batch = captions(model, CAPTIONS)
    torch.testing.assert_close(model(batch).loss, plain_loss(model, batch, 4), atol=1e-8, rtol=1e-8)
    # The first that is learned is the one behind "of"; the end is learned too.
    words = [len(model.tokenize([text])["text_ids"][0]) - 4 for text in CAPTIONS]
    assert model.count_targets(batch) == sum(words)
    assert words == [4, 8]  # a red circle [SEP]


@pytest.mark.parametrize("prompt", ["", " "])
def test_without_a_prompt_all_is_learned(prompt: str) -> None:
    model = captioner(prompt=prompt)
    batch = captions(model, CAPTIONS)
    assert model.prompt_length == 0
    torch.testing.assert_close(model(batch).loss, plain_loss(model, batch, 0), atol=1e-8, rtol=1e-8)
    assert model.count_targets(batch) == int(batch["text_mask"][:, 1:].sum())


def test_strings_are_encoded_as_the_loader_does() -> None:
    model = captioner()
    batch = captions(model, CAPTIONS)
    named = {key: batch[key] for key in ("image", "text_input")}
    torch.testing.assert_close(model(named).loss, model(batch).loss)


@pytest.mark.parametrize("texts", [["a red circle"], [CAPTIONS[0], "the picture of a circle"], ["a picture"]])
def test_a_caption_without_the_prompt_is_refused_by_name(texts: list[str]) -> None:
    """Else real words would count as the prompt and never be learned."""
    model = captioner()
    with pytest.raises(DataError, match=f"{texts[-1]!r} does not begin with 'a picture of '"):
        model.count_targets(captions(model, texts))


def test_parts_of_a_batch_add_up_to_its_loss() -> None:
    """As ranks and micro-batches see it: sums over all tokens of the step."""
    model, batch = small_blip("caption"), global_batch(ROWS, ids=False)
    parts = [part_of(batch, 0, 1, shares=2), part_of(batch, 1, ROWS, shares=2)]
    halves = torch.stack([model(part).loss for part in parts])
    torch.testing.assert_close(halves.mean(), model(batch).loss)


def test_defaults_are_lavis() -> None:
    config = BlipCaptionConfig()
    assert (config.prompt, config.max_txt_len, config.label_smoothing) == ("a picture of ", 40, 0.1)
