from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip.errors import ConfigError, DataError
from blip.layers.decoding import (
    Decoding,
    Draws,
    Generated,
    candidate_scores,
    draw,
    flush_left,
    generate,
    shortlist,
)

END, PAD, WIDTH = 2, 0, 8


class Recurrent:
    """A tiny recurrent network: a row's state is its cache, an item's vector is its image."""

    def __init__(self, seed: int, images: Tensor, vocab_size: int = 7) -> None:
        maker = torch.Generator().manual_seed(seed)
        self.words, self.back, self.out = (
            torch.randn(*shape, generator=maker, dtype=torch.double)
            for shape in ((vocab_size, WIDTH), (WIDTH, WIDTH), (WIDTH, vocab_size))
        )
        self.images = images

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        images = self.images.repeat(len(state) // len(self.images), 1)
        return torch.tanh(state @ self.back * 0.4 + self.words[tokens] + images)

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        self.state = torch.zeros(len(prompt_ids), WIDTH, dtype=torch.double)
        for tokens, real in zip(prompt_ids.T, prompt_mask.T, strict=True):
            self.state = self.advance(self.state, tokens).where(real[:, None], self.state)
        return self.logits(self.state)

    def reorder(self, rows: Tensor, items: Tensor | None) -> None:
        self.state = self.state[rows]
        if items is not None:
            self.images = self.images[items]

    def step(self, tokens: Tensor) -> Tensor:
        self.state = self.advance(self.state, tokens)
        return self.logits(self.state)

    def logits(self, state: Tensor) -> Tensor:
        logits = state @ self.out
        logits[..., PAD] -= 99  # never written, so that padding can be told from words
        return logits

    def logits_after(self, item: int, text: list[int]) -> Tensor:
        """(V,), from the start of the text."""
        state = torch.zeros(WIDTH, dtype=torch.double)
        for token in text:
            state = torch.tanh(state @ self.back * 0.4 + self.words[token] + self.images[item])
        return self.logits(state).float()


class Scripted:
    """Writes a fixed text per item, whatever was chosen before."""

    def __init__(self, texts: list[list[int]], vocab_size: int = 8) -> None:
        self.texts, self.vocab_size, self.length = texts, vocab_size, 0
        self.rows = list(range(len(texts)))
        self.steps: list[list[int]] = []

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        return self.logits()

    def reorder(self, rows: Tensor, items: Tensor | None) -> None:
        self.rows = [self.rows[row] for row in rows]

    def step(self, tokens: Tensor) -> Tensor:
        self.steps.append(self.rows)
        self.length += 1
        return self.logits()

    def logits(self) -> Tensor:
        tokens = [self.texts[row][min(self.length, len(self.texts[row]) - 1)] for row in self.rows]
        return F.one_hot(torch.tensor(tokens), self.vocab_size) * 20.0


def setting(**changes: Any) -> Decoding:
    return Decoding(**({"end_id": END, "pad_id": PAD, "max_length": 6, "count_prompt": False} | changes))


def plain_beam_search(
    decoder: Recurrent, item: int, prompt: list[int], decoding: Decoding
) -> list[tuple[float, list[int]]]:
    """Beam search over lists, for one item: finished texts with their scores, best first."""
    used = len(prompt) if decoding.count_prompt else 0
    most, least = decoding.max_length - used, decoding.min_length - used
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    beams, lengths = decoding.num_beams, decoding.beam_lengths
    first = len(prompt) if lengths == "whole" else 1
    for length in range(1, most + 1):
        candidates = []
        for score, text in live:
            log_probs = decoder.logits_after(item, prompt + text).log_softmax(0)
            for token in set(prompt * decoding.penalize_prompt + text):
                old = log_probs[token]
                log_probs[token] = (
                    old * decoding.repetition_penalty if old < 0 else old / decoding.repetition_penalty
                )
            if length <= least:
                log_probs[decoding.end_id] = -torch.inf
            candidates += [(score + p, [*text, token]) for token, p in enumerate(log_probs.tolist())]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        if lengths != "new":  # transformers' BeamSearchScorer: 4.25 (whole), 4.33 behind soft tokens (start)
            before = (first + length - 1) ** decoding.length_penalty  # without the token of this step
            hope = candidates[0][0] / (first + length - (lengths == "whole")) ** decoding.length_penalty
            said = [(s / before, t) for s, t in candidates[:beams] if t[-1] == decoding.end_id]
            finished = sorted(finished + said, reverse=True)[:beams]
            if len(finished) == beams and hope <= finished[-1][0]:
                break
            live = [(s, t) for s, t in candidates if t[-1] != decoding.end_id][:beams]
            if length == most:
                after = (first + length) ** decoding.length_penalty
                finished = sorted(finished + [(s / after, t) for s, t in live], reverse=True)[:beams]
            continue
        ended = [text[-1] == decoding.end_id or length == most for _, text in candidates]
        for (score, text), has_ended in list(zip(candidates, ended, strict=True))[: decoding.num_beams]:
            if has_ended:
                finished.append((score / length**decoding.length_penalty, text))
        finished = sorted(finished, reverse=True)[: decoding.num_beams]
        live = [c for c, has_ended in zip(candidates, ended, strict=True) if not has_ended]
        live = live[:beams]
        full = len(finished) == beams
        if full and live and live[0][0] / length**decoding.length_penalty <= finished[-1][0]:
            break
    return finished


def texts(ids: Tensor) -> list[list[int]]:
    """Rows without padding."""
    return [[token for token in row if token != PAD] for row in ids.tolist()]


def run(seed: int, decoding: Decoding, prompts: Tensor, mask: Tensor, images: Tensor) -> Generated:
    draws = Draws((5, "sample", "test"), torch.arange(100, 100 + len(prompts))) if decoding.sample else None
    return generate(Recurrent(seed, images), prompts, mask, decoding, draws)


def batch(seed: int, size: int, length: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of different length, padded on the left with a token that a prompt may hold; masks; images."""
    torch.manual_seed(seed)
    prompts = torch.randint(3, 7, (size, length))
    first = torch.randint(0, length, (size, 1))
    first[0] = 0
    mask = torch.arange(length) >= first
    return prompts, mask, torch.randn(size, WIDTH, dtype=torch.double)


@pytest.mark.parametrize("seed", range(60))
def test_beam_search_is_the_plain_one_of_each_item(seed: int) -> None:
    chance = random.Random(seed)
    beams = chance.randint(2, 4)
    most = chance.randint(5, 9)
    decoding = setting(
        num_beams=beams,
        num_captions=chance.randint(1, beams),
        max_length=most,
        min_length=chance.randint(0, most),
        count_prompt=chance.random() < 0.5,
        length_penalty=chance.choice([-0.5, 0.0, 1.0, 2.5]),
        repetition_penalty=chance.choice([1.0, 1.3, 0.7]),
        penalize_prompt=chance.random() < 0.5,
        beam_lengths=("new", "whole", "start")[seed % 3],
    )
    vocab_size = 10  # padding, the end and twice four beams: no step runs out of candidates
    prompts, mask, images = batch(seed, size=4)
    result = generate(Recurrent(seed, images, vocab_size), prompts, mask, decoding)
    plain = Recurrent(seed, images, vocab_size)
    expected = []
    for item in range(4):
        prompt = prompts[item][mask[item]].tolist()
        expected += plain_beam_search(plain, item, prompt, decoding)[: decoding.num_captions]
    assert texts(result.ids) == [text for _, text in expected]
    torch.testing.assert_close(result.scores, torch.tensor([score for score, _ in expected]))
    assert result.ids.shape[1] == max(len(text) for _, text in expected)
    for row, (_, text) in zip(result.ids.tolist(), expected, strict=True):
        assert row[len(text) :] == [PAD] * (len(row) - len(text))


def test_beams_enough_for_every_text_find_the_best_of_all_texts() -> None:
    vocab_size, most = 5, 4  # padding, the end, and three more
    for seed in range(5):
        decoding = setting(num_beams=40, max_length=most, length_penalty=0.0)
        prompts, images = torch.tensor([[3]]), torch.randn(1, WIDTH, dtype=torch.double)
        result = generate(Recurrent(seed, images, vocab_size), prompts, prompts > 0, decoding)
        plain = Recurrent(seed, images, vocab_size)
        scores = {}
        for text in itertools.product(range(1, vocab_size), repeat=most):
            cut = list(text[: text.index(END) + 1]) if END in text else list(text)
            rows = [plain.logits_after(0, [3, *cut[:i]]).log_softmax(0)[t] for i, t in enumerate(cut)]
            scores[tuple(cut)] = float(sum(rows))
        best = max(scores, key=scores.__getitem__)
        assert texts(result.ids) == [list(best)]
        assert result.scores.item() == pytest.approx(scores[best], abs=1e-5)


def test_one_beam_takes_the_likeliest_token_each_time() -> None:
    for seed in range(10):
        prompts, mask, images = batch(seed, size=3)
        result = run(seed, setting(max_length=8, min_length=2), prompts, mask, images)
        plain = Recurrent(seed, images)
        for item in range(3):
            text: list[int] = []
            score = 0.0
            while len(text) < 8 and END not in text:
                logits = plain.logits_after(item, prompts[item][mask[item]].tolist() + text)
                if len(text) < 2:
                    logits[END] = -torch.inf
                text.append(int(logits.argmax()))
                score += float(logits.log_softmax(0).max())
            assert texts(result.ids)[item] == text
            assert result.scores[item].item() == pytest.approx(score, abs=1e-5)


KINDS = [
    {"num_beams": 3, "num_captions": 2, "repetition_penalty": 1.2},
    {"num_beams": 1, "repetition_penalty": 1.2, "min_length": 3},
    {"sample": True, "num_captions": 3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2},
    {"sample": True, "num_captions": 1, "temperature": 2.0},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count_prompt", [True, False])
def test_a_text_depends_neither_on_its_batch_nor_on_padding(kind: dict[str, Any], count_prompt: bool) -> None:
    decoding = setting(**kind, max_length=12, count_prompt=count_prompt)
    copies = decoding.num_captions
    for seed in range(5):
        prompts, mask, images = batch(seed, size=6)
        together = run(seed, decoding, prompts, mask, images)
        right, right_mask = flush_left(prompts, mask)
        wide = F.pad(right, (0, 3), value=5)
        padded = run(seed, decoding, wide, F.pad(right_mask, (0, 3)), images)
        assert torch.equal(together.ids, padded.ids)
        assert torch.equal(together.scores, padded.scores)
        for item in range(6):
            draws = Draws((5, "sample", "test"), torch.tensor([100 + item]))
            alone = generate(
                Recurrent(seed, images[item : item + 1]),
                prompts[item][mask[item]][None],
                torch.ones_like(prompts[item][mask[item]][None], dtype=torch.bool),
                decoding,
                draws if decoding.sample else None,
            )
            mine = slice(item * copies, (item + 1) * copies)
            assert texts(alone.ids) == texts(together.ids[mine])
            torch.testing.assert_close(alone.scores, together.scores[mine])


def test_a_sample_does_not_depend_on_how_many_are_drawn() -> None:
    prompts, mask, images = batch(0, size=4)
    three = run(0, setting(sample=True, num_captions=3), prompts, mask, images)
    one = run(0, setting(sample=True, num_captions=1), prompts, mask, images)
    assert texts(three.ids[::3]) == texts(one.ids)
    assert len({tuple(text) for text in texts(three.ids)}) > 6  # captions of an item are drawn separately


def test_other_keys_draw_other_texts() -> None:
    prompts, mask, images = batch(0, size=8)
    results = []
    for key in ((1, "sample", "a"), (1, "sample", "a"), (2, "sample", "a"), (1, "sample", "b")):
        draws = Draws(key, torch.arange(8))
        decoding = setting(sample=True, temperature=3.0)
        results.append(texts(generate(Recurrent(0, images), prompts, mask, decoding, draws).ids))
    assert results[0] == results[1]
    assert results[0] != results[2] != results[3] != results[0]


def test_the_score_of_a_sample_is_the_log_probability_it_was_drawn_with() -> None:
    prompts, mask, images = batch(1, size=5)
    result = run(1, setting(sample=True, temperature=1.7), prompts, mask, images)
    plain = Recurrent(1, images)
    for item, text in enumerate(texts(result.ids)):
        prompt = prompts[item][mask[item]].tolist()
        steps = [
            plain.logits_after(item, prompt + text[:i]).div(1.7).log_softmax(0)[t] for i, t in enumerate(text)
        ]
        assert result.scores[item].item() == pytest.approx(float(sum(steps)), abs=1e-4)


@pytest.mark.parametrize("kind", [{"num_beams": 1}, {"num_beams": 2}, {"sample": True, "num_captions": 2}])
def test_finished_items_are_read_no_further(kind: dict[str, Any]) -> None:
    written = [[5, END], [3, 4, 5, 6, END], [6, 5, 4, END], [4, END]]
    prompts = torch.full((4, 1), 7)
    decoder = Scripted(written)
    decoding = setting(**kind, max_length=20, top_k=1) if "sample" in kind else setting(**kind, max_length=20)
    copies = decoding.num_captions if decoding.sample else decoding.num_beams
    result = generate(decoder, prompts, prompts > 0, decoding, Draws((0,), torch.arange(4)))
    assert texts(result.ids)[:: decoding.num_captions] == written
    items = [Counter(rows) for rows in decoder.steps]
    assert all(set(count.values()) == {copies} for count in items)  # rows of an item come and go together
    if decoding.num_beams == 1:
        # The last item takes the place of one that leaves; the others stay where they are.
        first_copy = [rows[: len(rows) // copies] for rows in decoder.steps]
        assert first_copy == [[0, 1, 2, 3], [2, 1], [2, 1], [1]]
    else:
        assert len(items[-1]) < 4


def test_beams_of_finished_items_do_not_change_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [setting(num_beams=3, max_length=14), setting(max_length=14), setting(sample=True, max_length=14)]
    for seed, decoding in itertools.product(range(5), kinds):
        prompts, mask, images = batch(seed, size=5)
        often = run(seed, decoding, prompts, mask, images)
        with monkeypatch.context() as patch:
            patch.setattr("blip.layers.decoding._Rules.time_to_look", lambda rules, step: step % 5 == 4)
            seldom = run(seed, decoding, prompts, mask, images)
        assert torch.equal(often.ids, seldom.ids)
        torch.testing.assert_close(often.scores, seldom.scores)


def test_the_number_of_steps_is_that_of_the_longest_text() -> None:
    decoder = Scripted([[5, END], [3, 4, END]])
    generate(decoder, torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1) > 0, setting(max_length=20))
    assert len(decoder.steps) == 2  # the first tokens come from the prompt


def test_no_items_give_no_texts() -> None:
    prompts = torch.zeros(0, 3, dtype=torch.long)
    result = generate(Scripted([]), prompts, prompts > 0, setting(num_beams=2))
    assert result.ids.shape[0] == 0
    assert result.scores.shape == (0,)


def test_draws_meet_the_cumulative_distribution() -> None:
    scores = torch.tensor([[0.1, 0.6, 0.3, 0.0]]).log().repeat(6, 1)
    points = torch.tensor([0.0, 0.59, 0.61, 0.89, 0.91, 1 - 2**-53], dtype=torch.double)
    tokens, log_probs = draw(scores, setting(sample=True), points)
    assert tokens.tolist() == [1, 1, 2, 2, 0, 0]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.6, 0.6, 0.3, 0.3, 0.1, 0.1]))
    few, _ = draw(scores, setting(sample=True, top_p=0.7), points)
    assert few.tolist() == [1, 1, 1, 2, 2, 2]


def test_flush_left_moves_padding_to_the_right() -> None:
    ids = torch.tensor([[9, 9, 4, 5], [6, 7, 9, 9], [1, 9, 2, 9]])
    moved, mask = flush_left(ids, torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]]).bool())
    assert [row[real].tolist() for row, real in zip(moved, mask, strict=True)] == [[4, 5], [6, 7], [1, 2]]
    assert mask.int().tolist() == [[1, 1, 0, 0]] * 3


def test_a_prompt_that_fills_the_length_is_refused() -> None:
    prompts = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(DataError, match=r"prompt of 5 tokens .* max_length 5"):
        generate(Scripted([[3], [3]]), prompts, prompts > 0, setting(max_length=5, count_prompt=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0, but must be at least 1"),
        ({"min_length": 9}, "min_length is 9, but must be at most max_length, 6"),
        ({"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be above 0"),
        ({"num_captions": 3, "num_beams": 2}, "num_captions is 3, but num_beams 2"),
        ({"sample": True, "num_beams": 2}, "sampling follows no beams"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setting(**changes)


def test_shortlist_takes_the_likeliest_first_tokens_and_the_earlier_of_equals() -> None:
    first_logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 1.0, 0.0]])
    first_ids = torch.tensor([2, 0, 1, 2, 3, 1])
    assert shortlist(first_logits, first_ids, 4).tolist() == [[2, 5, 4, 0], [1, 0, 3, 2]]
    assert shortlist(first_logits, first_ids, 99).shape == (2, 6)


def test_candidate_scores_are_minus_the_summed_smoothed_losses() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[1, 4, -100], [2, -100, -100], [0, 3, 4]])
    logits = torch.randn(3, 3, 5, dtype=torch.double)
    expected = [
        -sum(F.cross_entropy(row[i], target[i], label_smoothing=0.1) for i in range(3) if target[i] >= 0)
        for row, target in zip(logits, labels, strict=True)
    ]
    scores = candidate_scores(logits[labels >= 0], labels, 0.1)
    torch.testing.assert_close(scores, torch.stack([torch.as_tensor(score) for score in expected]))
