"""BLIP for questions: weighted answers, and ranking, against plain loops (float64, 1e-8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip.errors import UsageError
from blip.layers.decoding import candidate_scores, shortlist
from blip.models.blip_vqa import BlipVqa
from blip.models.med import MedConfig
from blip.models.narrate import decoder_labels
from tests.reference import blip as reference
from tests.reference.small_blip import SIZES, small_blip, texts
from tests.reference.small_stage1 import assert_same, global_batch, gradients

COUNTS = [2, 1, 3]
"""Answers of each question."""
WEIGHTS = [0.7, 0.3, 1.0, 0.5, 0.3, 0.2]


def questions() -> dict[str, Any]:
    """Three questions with six answers."""
    ids, mask = texts(6)
    generator = torch.Generator().manual_seed(9)
    answers = torch.randint(1, 38, ids.shape, generator=generator).masked_fill(~mask, 0)
    given = {
        "answer_ids": answers,
        "answer_mask": mask,
        "n_answers": torch.tensor(COUNTS),
        "weight": torch.tensor(WEIGHTS, dtype=torch.double),
    }
    return global_batch(3, ids=False) | given


def question_states(model: Any, batch: dict[str, Any], row: int, image: Tensor) -> Tensor:
    text = reference.part(dict(model.named_parameters()), "text")
    return reference.med(text, [model.text.enc_id, *reference.real(batch, row)[1:]], [image])


def answer_loss(model: Any, seen: Tensor, answer: list[int]) -> Tensor:
    """Sum over the answer's tokens, told by a decoder that looks at the question."""
    weights = dict(model.named_parameters())
    text, head = reference.part(weights, "answer_decoder"), reference.part(weights, "lm_head")
    hidden = reference.med(text, [model.answer_decoder.dec_id, *answer[1:]], [seen], decode=True)
    logits = reference.words(hidden, head, text["embedding.word.weight"])
    return reference.told(logits, answer, model.config.label_smoothing)[0]


def plain_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    states, total, number = model.vision(batch["image"]), torch.zeros((), dtype=torch.double), 0
    for row, count in enumerate(batch["n_answers"].tolist()):
        seen = question_states(model, batch, row, states[row])
        for _ in range(count):
            answer = batch["answer_ids"][number][batch["answer_mask"][number]].tolist()
            total = total + batch["weight"][number] * answer_loss(model, seen, answer)
            number += 1
    return total / len(states)


# The loss


def test_a_video_of_equal_frames_trains_as_the_picture_does() -> None:
    pictures, models = questions(), [small_blip("vqa") for _ in range(2)]
    videos = pictures | {"image": pictures["image"][:, None].expand(-1, 4, -1, -1, -1)}
    losses = [model(batch).loss for model, batch in zip(models, (pictures, videos), strict=True)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-10, rtol=1e-10)
    for loss in losses:
        loss.backward()
    assert_same(gradients(models[1]), gradients(models[0]), 1e-8)


def test_loss_and_gradients_are_those_of_plain_loops() -> None:
    ours, plain, batch = small_blip("vqa"), small_blip("vqa"), questions()
    got, expected = ours(batch), plain_loss(plain, batch)
    torch.testing.assert_close(got.loss, expected, atol=1e-8, rtol=1e-8)
    assert list(got) == ["loss", "loss_lm"]
    got.loss.backward()
    expected.backward()
    assert_same(gradients(ours), gradients(plain), 1e-8)
    assert set(gradients(ours)) == {name for name, _ in ours.named_parameters()}


def test_encoder_and_decoder_share_nothing() -> None:
    model = small_blip("vqa")
    one, other = ({p.data_ptr() for p in part.parameters()} for part in (model.text, model.answer_decoder))
    assert not one & other
    # The decoder looks at questions, which are as wide as text.
    assert model.answer_decoder.layers[0].cross_attn.key.weight.shape == (16, 16)
    assert model.text.layers[0].cross_attn.key.weight.shape == (16, 12)


def test_padding_of_questions_and_answers_changes_nothing() -> None:
    model, batch = small_blip("vqa"), questions()
    loss = model(batch).loss
    for name in ("text", "answer"):
        ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
        longest = int(mask.sum(dim=1).max())
        for changed in (
            {f"{name}_ids": ids[:, :longest], f"{name}_mask": mask[:, :longest]},
            {f"{name}_ids": ids.masked_fill(~mask, 17)},
        ):
            torch.testing.assert_close(model(batch | changed).loss, loss, atol=1e-10, rtol=1e-10)


def test_the_loss_is_per_question_so_that_weights_count() -> None:
    model, batch = small_blip("vqa"), questions()
    double = batch | {"weight": 2 * batch["weight"]}
    torch.testing.assert_close(model(double).loss, 2 * model(batch).loss)
    # 0.2 is what BLIP gives an answer of Visual Genome, where LAVIS gives 1.
    light = batch | {"weight": torch.full((6,), 0.2, dtype=torch.double)}
    heavy = batch | {"weight": torch.ones(6, dtype=torch.double)}
    torch.testing.assert_close(model(light).loss, 0.2 * model(heavy).loss)


def test_rows_of_a_step_add_up_to_its_loss() -> None:
    model, batch = small_blip("vqa"), questions()
    parts, first = [], 0
    for start, end in ((0, 1), (1, 3)):
        count = sum(COUNTS[start:end])
        rows = {
            k: v[start:end] for k, v in batch.items() if k in ("image", "text_ids", "text_mask", "n_answers")
        }
        own = {k: batch[k][first : first + count] for k in ("answer_ids", "answer_mask", "weight")}
        parts.append(model(rows | own | {"loss_rows": 1.5}).loss)
        first += count
    torch.testing.assert_close(torch.stack(parts).mean(), model(batch).loss)


def test_strings_with_one_answer_each_need_no_numbers() -> None:
    med = MedConfig(**{**SIZES["med"], "max_positions": 40})
    model = small_blip("vqa", tokenizer="scenes", vocab_size=None, max_txt_len=35, med=med)
    samples = {
        "image": torch.randn(2, 3, 16, 16, dtype=torch.double),
        "text_input": ["what color is the circle?", "how many squares?"],
        "answer": ["red", "two blue"],
    }
    given = samples | {"n_answers": torch.tensor([1, 1]), "weight": torch.ones(2)}
    torch.testing.assert_close(model(samples).loss, model(given).loss)
    torch.testing.assert_close(model(samples).loss, plain_loss(model, encoded(model, given)))
    with pytest.raises(UsageError, match="3 answers to 2 questions"):
        model({**samples, "answer": ["red", "two", "blue"]})


def encoded(model: Any, samples: dict[str, Any]) -> dict[str, Any]:
    answers = model.tokenize(samples["answer"])
    more = {"answer_ids": answers["text_ids"], "answer_mask": answers["text_mask"]}
    return samples | more | model.tokenize(samples["text_input"])


def test_answers_are_targets_and_are_not_cut() -> None:
    model = small_blip("vqa")
    assert model.text_columns() == {"text_input": 12, "answer": None}
    batch = questions()
    assert model.count_targets(batch) == int(batch["answer_mask"].sum()) - 6  # all but the first of each


# Ranking


@pytest.mark.parametrize("count", [1, 3, 6, 100])
def test_ranking_is_that_of_plain_loops(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest first tokens make the shortlist, sums of token losses decide (BLIP, section 5.3)."""
    monkeypatch.setattr("blip.models.blip_vqa.RANK_ROWS", 7)  # several rounds
    model, batch = small_blip("vqa").eval(), questions()
    ids, mask = batch["answer_ids"], batch["answer_mask"]
    with torch.no_grad():
        keys = model.question_keys(batch)
        begun = model.begin_answers(keys)
        best = shortlist(begun.logits, ids[:, 1], count)
        scores = model.score_answers(keys, begun, ids[best], mask[best])
        states = model.vision(batch["image"])
        for row in range(3):
            seen = question_states(model, batch, row, states[row])
            weights = dict(model.named_parameters())
            text, head = reference.part(weights, "answer_decoder"), reference.part(weights, "lm_head")
            start = reference.med(text, [model.answer_decoder.dec_id], [seen], decode=True)
            logits = reference.words(start, head, text["embedding.word.weight"])[0]
            order = sorted(range(6), key=lambda i: -float(logits[ids[i, 1]]))
            assert sorted(best[row].tolist()) == sorted(order[: min(count, 6)])
            for place, answer in enumerate(best[row].tolist()):
                wanted = -answer_loss(model, seen, ids[answer][mask[answer]].tolist())
                torch.testing.assert_close(scores[row, place], wanted, atol=1e-8, rtol=1e-8)


def test_candidates_share_what_they_look_at_and_have_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, rows = small_blip("vqa").eval(), questions(), 3
    tokens = torch.tensor([2, 9, 1, 1, 2, 0, 1])  # of each candidate's words
    ids = torch.randint(5, 20, (rows, len(tokens), 11), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(11) < tokens[:, None] + 2).expand(rows, -1, -1)
    forward, seen = model.answer_decoder.forward, []

    def watched(text_ids: Tensor, mask: Tensor, images: Any, *how: Any, **more: Any) -> Any:
        [(keys, copies)] = images
        assert keys.rows == rows
        assert len(text_ids) == rows * copies
        seen.append((copies, text_ids.shape[1]))
        return forward(text_ids, mask, images, *how, **more)

    with torch.no_grad():
        keys = model.question_keys(batch)
        whole = keys.select(torch.arange(rows).repeat_interleave(len(tokens)))
        hidden = model.answer_decoder.decode(ids.flatten(0, 1), mask.flatten(0, 1), [(whole, 1)])
        labels = decoder_labels(ids.flatten(0, 1), mask.flatten(0, 1))
        words = model.answer_decoder.embedding.word.weight
        wanted = candidate_scores(model.lm_head(hidden, words)[labels != -100], labels, 0.1)
        monkeypatch.setattr(model.answer_decoder, "forward", watched)
        scores = model.score_answers(keys, model.begin_answers(keys), ids, mask)
    assert seen == [(1, 1), (3, 1), (2, 2), (1, 9)]  # copies, and tokens behind [DEC]
    torch.testing.assert_close(scores, wanted.view(rows, -1), atol=1e-12, rtol=1e-12)


def test_presets_are_lavis_recipes() -> None:
    for name in ("vqav2", "okvqa", "aokvqa"):
        assert BlipVqa.presets[name] == {"image_size": 480, "vit_drop_path_rate": 0.1}
