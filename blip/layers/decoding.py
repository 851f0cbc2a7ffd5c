"""Text generation over one step function: greedy, beam search and sampling, and ranking given answers.

A decoder predicts the next token of every row; what becomes of the predictions is decided here, for all
decoders alike. Ids and scores are those of transformers' `generate` for the same logits. Rows lie copy by
copy: row r is beam (or caption) r // B of item r % B, as `Segment` lets several rows look at one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blip import keyed
from blip.errors import ConfigError, DataError

BeamLengths = Literal["new", "whole", "start"]

NEVER = -1.0e9
"""Score of what does not count: transformers' value, finite so that what is added to it keeps its order."""
CHECK_EVERY = 4
"""Steps between two looks at what is finished, where a look makes the host wait for the device."""


class StepDecoder(Protocol):
    """Predicts next tokens and keeps what it needs of the tokens before."""

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Read the prompts, once per item.

        Args:
            prompt_ids: int64 (B, T), padded on the right, at least one token each.
            prompt_mask: bool (B, T), True = real token.

        Returns:
            logits (B, V) of what follows each prompt's last token.
        """

    def reorder(self, rows: Tensor, items: Tensor | None) -> None:
        """Continue other rows. Called before the first `step` if there are several copies.

        Args:
            rows: int64 (R,), the present row that each new row continues; row b of B after `start`.
            items: int64 (B',), the present item in each place: some are finished and gone, the last ones
                have taken their places. None: all stay where they are.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token int64 (R,) to every row. -> logits (R, V) of what follows."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Raises:
        ConfigError: values that contradict each other or have no meaning.
    """

    end_id: int
    """Ends a text; part of it."""
    pad_id: int
    """Fills what comes behind the end."""
    max_length: int = 30
    """Tokens at most, the end included."""
    min_length: int = 0
    """The end is not chosen while there are fewer tokens."""
    count_prompt: bool = True
    """Both lengths count the item's own prompt, without its padding."""
    num_beams: int = 1
    """Texts that are followed at once; 1 = greedy."""
    num_captions: int = 1
    """Texts to return per item: the best beams, or so many samples."""
    length_penalty: float = 1.0
    """Scores of beams are divided by their length to this power."""
    beam_lengths: BeamLengths = "new"
    """That length: `new`, the tokens behind the prompt, the end included, as in transformers today; `whole`,
    those of the whole text without its end, as in transformers when BLIP and LAVIS were written (4.25);
    `start`, the new tokens and what a decoder starts with, without the end, as in transformers 4.33, which
    LAVIS runs language models with."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the text so far become less likely."""
    penalize_prompt: bool = True
    """The prompt's tokens count for the repetition penalty too."""
    sample: bool = False
    """Draw tokens, with the three settings below."""
    temperature: float = 1.0
    """Logits are divided by it."""
    top_k: int = 0
    """Draw among so many most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that have this probability together."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {getattr(self, name)}, but must be {rule}"
            for name, rule, right in (
                ("num_beams", "at least 1", self.num_beams >= 1),
                ("num_captions", "at least 1", self.num_captions >= 1),
                ("max_length", "at least 1", self.max_length >= 1),
                ("min_length", f"at most max_length, {self.max_length}", self.min_length <= self.max_length),
                ("repetition_penalty", "above 0", self.repetition_penalty > 0),
                ("temperature", "above 0", self.temperature > 0),
                ("top_k", "at least 0 (0 = all)", self.top_k >= 0),
                ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            )
            if not right
        ]
        if self.sample and self.num_beams > 1:
            wrong.append(f"num_beams is {self.num_beams}, but sampling follows no beams: 1")
        if not self.sample and self.num_captions > self.num_beams:
            wrong.append(
                f"num_captions is {self.num_captions}, but num_beams {self.num_beams} ends in no more texts"
                " than that; use more beams, or nucleus sampling"
            )
        if wrong:
            raise ConfigError("generation: " + "; ".join(wrong))


class Draws(NamedTuple):
    """Names the random numbers of a sampling, so that no text depends on the others of its batch."""

    key: tuple[int | str, ...]
    """For example (seed, "sample", name of the dataset)."""
    items: Tensor
    """int64 (B,), number of each item, for example its place in the dataset; below 2**40."""


class Generated(NamedTuple):
    """What was written, an item's texts together; those of beams the best one first."""

    ids: Tensor
    """int64 (B * num_captions, L): new tokens without the prompt, the end included, then padding."""
    scores: Tensor
    """(B * num_captions,), summed log-probabilities; those of beams over length ** length_penalty."""


@torch.no_grad()
def generate(
    decoder: StepDecoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    decoding: Decoding,
    draws: Draws | None = None,
) -> Generated:
    """Continue each prompt. No text depends on which others are in the batch, nor on padding.

    Args:
        decoder: predicts.
        prompt_ids: int64 (B, T), padded on either side.
        prompt_mask: bool (B, T), True = real token; at least one per item.
        decoding: how tokens are chosen.
        draws: needed for sampling.

    Raises:
        DataError: a prompt that leaves no room below `max_length`.
    """
    prompt_ids, prompt_mask = flush_left(prompt_ids, prompt_mask)
    rules = _Rules(decoding, prompt_ids, prompt_mask)
    if not len(prompt_ids):
        return Generated(prompt_ids.new_zeros(0, 0), torch.zeros(0, device=prompt_ids.device))
    logits = decoder.start(prompt_ids, prompt_mask)
    if decoding.num_beams > 1:
        ids, scores = _beam_search(decoder, rules, logits)
    else:
        ids, scores = _one_token_each(decoder, rules, logits, draws)
    ids = ids[:, : decoding.num_captions].flatten(0, 1)
    limits = rules.all_limits.repeat_interleave(decoding.num_captions)
    ids = ids[:, : _longest(ids, decoding.end_id, limits)]
    return Generated(ids, scores[:, : decoding.num_captions].flatten())


def flush_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) with the padding on the right, wherever it was; real tokens keep their order."""
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


class _Rules:
    """What each live row may write: the lengths of its item, the tokens it has seen."""

    def __init__(self, decoding: Decoding, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        self.decoding = decoding
        self.copies = decoding.num_captions if decoding.sample else decoding.num_beams
        prompt = prompt_mask.sum(dim=1)
        self.before = prompt if decoding.beam_lengths == "whole" else torch.ones_like(prompt)
        """(B,), tokens before the new ones that count for the length of a beam, where any do."""
        used = prompt * decoding.count_prompt
        self.limits = self.all_limits = decoding.max_length - used
        """(B,), new tokens at most."""
        self.least = decoding.min_length - used
        """(B,), new tokens before an end."""
        self.first_limit, self.steps = (int(x) for x in self.limits.aminmax()) if len(used) else (0, 0)
        if len(used) and self.first_limit < 1:
            raise DataError(
                f"generation: a prompt of {int(used.max())} tokens leaves no room for a text: max_length"
                f" {decoding.max_length} counts it; raise max_length or shorten the prompt"
            )
        self.seen: Tensor | None = None
        if decoding.repetition_penalty != 1:
            # A token that is there twice counts once, so the first one can stand for the padding.
            seen = torch.where(prompt_mask, prompt_ids, prompt_ids[:, :1])
            seen = seen if decoding.penalize_prompt else seen[:, :0]
            self.seen = seen.repeat(self.copies, 1)  # (R, T)

    def apply(self, scores: Tensor, step: int) -> Tensor:
        """Scores (R, V) of the next tokens, after repetition penalty and minimal length; changes them."""
        if self.seen is not None:
            penalty = self.decoding.repetition_penalty
            old = scores.gather(1, self.seen)
            scores.scatter_(1, self.seen, torch.where(old < 0, old * penalty, old / penalty))
        early = (step < self.least).repeat(self.copies)
        scores[:, self.decoding.end_id].masked_fill_(early, -torch.inf)
        return scores

    def ends(self, tokens: Tensor, step: int) -> Tensor:
        """Whether each of the tokens (B, N) is the last of its text."""
        return (tokens == self.decoding.end_id) | (step + 1 >= self.limits)[:, None]

    def reorder(self, rows: Tensor, items: Tensor | None, tokens: Tensor) -> None:
        """Continue other rows, with a new token (R,) each."""
        if items is not None:
            self.limits, self.least = self.limits[items], self.least[items]
            self.before = self.before[items]
        if self.seen is not None:
            self.seen = torch.cat([self.seen[rows], tokens[:, None]], dim=1)

    def time_to_look(self, step: int) -> bool:
        """Whether to ask what is finished: for free, now and then, or lest a text outgrows `max_length`."""
        free = self.limits.device.type == "cpu"
        return free or step % CHECK_EVERY == CHECK_EVERY - 1 or step + 1 >= self.first_limit


def _places(done: Tensor) -> Tensor:
    """The item in each place once the done ones (B,) are gone: the last ones fill the holes. -> (B',)."""
    left = (~done).nonzero()[:, 0]
    places = torch.arange(len(left), device=done.device)
    places[done[: len(left)]] = left[left >= len(left)]
    return places


def _rows(copies: Tensor, num_items: int, items: Tensor | None) -> Tensor:
    """Row that copy `copies` (C, B) of each item is, for the items that stay: (C * B',)."""
    rows = copies * num_items + torch.arange(num_items, device=copies.device)
    return (rows if items is None else rows[:, items]).flatten()


def _longest(ids: Tensor, end_id: int, limits: Tensor) -> int:
    """Tokens of the longest text (R, L), up to the end or to its limit (R,)."""
    ends = ids == end_id
    return int(torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, limits).max())


def _float32(logits: Tensor) -> Tensor:
    """A copy in float32, as transformers makes it."""
    return logits.to(torch.float32, copy=True)


@dataclass
class _Beams:
    """The state of the items that a beam search still works on."""

    number: Tensor
    """(B,), which item of the batch it is."""
    ids: Tensor
    """(B, beams, L): texts that go on, best first, padded."""
    scores: Tensor
    """(B, beams): their summed log-probabilities."""
    best_ids: Tensor
    """(B, beams, L): finished texts, best first."""
    best_scores: Tensor
    """(B, beams): their final scores; NEVER = none yet."""
    open: Tensor
    """(B,): a text that goes on might still become one of the best."""

    @classmethod
    def new(cls, batch: int, beams: int, length: int, pad_id: int, device: torch.device) -> _Beams:
        ids = torch.full((batch, beams, length), pad_id, device=device)
        best_scores = torch.full((batch, beams), NEVER, device=device)
        scores = best_scores.clone()
        scores[:, 0] = 0  # all beams begin alike: only the first one counts
        alive = torch.ones(batch, dtype=torch.bool, device=device)
        return cls(torch.arange(batch, device=device), ids, scores, ids.clone(), best_scores, alive)

    def advance(self, log_probs: Tensor, step: int, rules: _Rules) -> Tensor:
        """Give every beam a token: log_probs (beams * B, V) -> which beam each one continues, (B, beams).

        Twice as many candidates as beams are kept, so that enough go on where many of them end. Those that
        end count only if they are among the first `beams` of them.
        """
        batch, beams, _ = self.ids.shape
        width = min(2 * beams, log_probs.shape[1])
        log_probs, tokens = (x.unflatten(0, (beams, batch)).transpose(0, 1) for x in log_probs.topk(width))
        scores = (log_probs + self.scores[:, :, None]).flatten(1)  # (B, beams * width)
        scores, chosen = scores.topk(min(2 * beams, scores.shape[1]))
        tokens = tokens.flatten(1).gather(1, chosen)
        source = chosen // width
        ids = _of_item(self.ids, source)
        ids[:, :, step] = tokens
        first = torch.arange(scores.shape[1], device=scores.device) < beams
        lengths = rules.decoding.beam_lengths
        if lengths != "new":
            ends, length = tokens == rules.decoding.end_id, rules.before + step
            self._finish(scores, ids, ends & first, length, rules)
            self._close(scores[:, 0], length + (lengths == "start"), rules)
            going_on = self._go_on(scores, ids, ends)
            last = (step + 1 >= rules.limits)[:, None]  # beams without an end count once all have been seen
            self._finish(self.scores, self.ids, last.expand_as(self.scores), length + 1, rules)
        else:
            ends = rules.ends(tokens, step)
            length = torch.full_like(rules.before, step + 1)
            self._finish(scores, ids, ends & first, length, rules)
            going_on = self._go_on(scores, ids, ends)
            self._close(self.scores[:, 0], length, rules)
        self.open = self.open & (step + 1 < rules.limits)
        return source.gather(1, going_on)

    def _finish(self, scores: Tensor, ids: Tensor, counts: Tensor, length: Tensor, rules: _Rules) -> None:
        """Put the texts (B, N, L) that count among the finished ones; their length is (B,)."""
        final = scores / length[:, None] ** rules.decoding.length_penalty
        final = torch.cat([self.best_scores, final.where(counts & self.open[:, None], NEVER)], dim=1)
        self.best_scores, best = final.topk(self.best_scores.shape[1])
        self.best_ids = _of_item(torch.cat([self.best_ids, ids], dim=1), best)

    def _go_on(self, scores: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        """Keep the best candidates (B, N) that do not end; which they are, (B, beams)."""
        self.scores, going_on = (scores + ends * NEVER).topk(self.scores.shape[1])
        self.ids = _of_item(ids, going_on)
        return going_on

    def _close(self, best: Tensor, length: Tensor, rules: _Rules) -> None:
        """Close items whose best text (B,), ending now, would be no better than the worst finished one."""
        hope = best / length**rules.decoding.length_penalty
        self.open = self.open & (hope > self.best_scores[:, -1])

    def keep(self, items: Tensor) -> None:
        """Go on with some of the items (B',)."""
        for name, value in vars(self).items():
            setattr(self, name, value[items])


def _of_item(values: Tensor, chosen: Tensor) -> Tensor:
    """The chosen (B, N) of each item's values (B, M, L). -> (B, N, L)."""
    return values.take_along_dim(chosen[:, :, None], dim=1)


def _beam_search(decoder: StepDecoder, rules: _Rules, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, beams, L) and scores (B, beams), best first."""
    decoding, batch = rules.decoding, len(logits)
    state = _Beams.new(batch, decoding.num_beams, rules.steps, decoding.pad_id, logits.device)
    all_ids, all_scores = state.best_ids.clone(), state.best_scores.clone()
    logits = logits.repeat(decoding.num_beams, 1)
    for step in range(rules.steps):
        log_probs = rules.apply(F.log_softmax(_float32(logits), dim=1), step)
        source = state.advance(log_probs, step, rules)
        if step + 1 == rules.steps:
            break
        items, num_items = None, len(source)
        if rules.time_to_look(step) and not bool(state.open.all()):
            items = _places(~state.open)
            if not len(items):
                break
            all_ids[state.number], all_scores[state.number] = state.best_ids, state.best_scores
            state.keep(items)
        # After `start` the decoder has one row per item, whatever the beam.
        rows = _rows(source.T * bool(step), num_items, items)
        tokens = state.ids[:, :, step].T.flatten()
        rules.reorder(rows, items, tokens)
        decoder.reorder(rows, items)
        logits = decoder.step(tokens)
    all_ids[state.number], all_scores[state.number] = state.best_ids, state.best_scores
    return all_ids, all_scores


def _one_token_each(
    decoder: StepDecoder, rules: _Rules, logits: Tensor, draws: Draws | None
) -> tuple[Tensor, Tensor]:
    """Greedy or sampled: ids (B, copies, L) and scores (B, copies)."""
    decoding, batch, copies, device = rules.decoding, len(logits), rules.copies, logits.device
    all_ids = torch.full((batch, copies, rules.steps), decoding.pad_id, device=device)
    all_scores = torch.zeros(batch, copies, device=device)
    number = torch.arange(batch, device=device)
    going_on = torch.ones(batch, copies, dtype=torch.bool, device=device)
    same = torch.arange(copies, device=device)[:, None].expand(-1, batch)
    logits = logits.repeat(copies, 1)
    for step in range(rules.steps):
        scores = rules.apply(_float32(logits), step)
        if decoding.sample:
            points = _points(draws, number, copies, step)
            tokens, log_prob = draw(scores, decoding, points)
        else:
            log_prob, tokens = scores.max(dim=1)
            log_prob = log_prob - scores.logsumexp(dim=1)
        by_item = tokens.view(copies, -1).T.where(going_on, decoding.pad_id)  # (B, copies)
        all_ids[number, :, step] = by_item
        all_scores[number] += log_prob.view(copies, -1).T * going_on
        going_on = going_on & ~rules.ends(by_item, step)
        if step + 1 == rules.steps:
            break
        items = None
        if rules.time_to_look(step) and not bool(going_on.any(dim=1).all()):
            items = _places(~going_on.any(dim=1))
            if not len(items):
                break
        num_items = len(number)
        if items is not None:
            number, going_on, by_item = number[items], going_on[items], by_item[items]
        # After `start` the decoder has one row per item, whatever the copy.
        rows = _rows(same[:, :num_items] * bool(step), num_items, items)
        tokens = by_item.T.flatten()
        rules.reorder(rows, items, tokens)
        if items is not None or (step == 0 and copies > 1):
            decoder.reorder(rows, items)
        logits = decoder.step(tokens)
    return all_ids, all_scores


def _points(draws: Draws | None, number: Tensor, copies: int, step: int) -> Tensor:
    """A number in [0, 1) per live row, of its item, copy and step alone: float64 (copies * B,)."""
    assert draws is not None, "sampling needs `draws`"
    copy = torch.arange(copies, device=number.device)[:, None] << 40
    return keyed.uniform((draws.items[number] + copy).flatten(), *draws.key, step)


def likely(scores: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities, most likely first.

    Temperature, then top-k, then top-p, as transformers does. Tokens as likely as the k-th one are kept too
    (in half precision there are such), up to twice k in all.

    Args:
        scores: (R, V), logits after the other rules.

    Returns:
        tokens int64 (R, N), and probabilities (R, N) that sum to 1; 0 = must not be drawn.
    """
    vocab_size = scores.shape[1]
    scores = scores / decoding.temperature
    top_k = min(decoding.top_k or vocab_size, vocab_size)
    scores, tokens = scores.topk(min(2 * top_k, vocab_size), dim=1)
    scores = scores.masked_fill(scores < scores[:, top_k - 1 : top_k], -torch.inf)
    if decoding.top_p < 1:
        # Summed from the least likely one, so that the most likely one always stays.
        tail = scores.flip(1).softmax(dim=1).cumsum(dim=1).flip(1)
        tail[:, 0] = 1
        scores = scores.masked_fill(tail <= 1 - decoding.top_p, -torch.inf)
    return tokens, scores.softmax(dim=1)


def draw(scores: Tensor, decoding: Decoding, points: Tensor) -> tuple[Tensor, Tensor]:
    """A token per row of scores (R, V), at points (R,) in [0, 1) of its cumulative distribution.

    Returns:
        tokens int64 (R,), and the logarithms of the probabilities they were drawn with, (R,).
    """
    tokens, probs = likely(scores, decoding)
    cumulative = probs.double().cumsum(dim=1)
    place = torch.searchsorted(cumulative, (points * cumulative[:, -1])[:, None], right=True)
    # Rounding must not lead to what must not be drawn, which stands behind the rest.
    place = place.minimum((probs > 0).sum(dim=1, keepdim=True) - 1)
    return tokens.gather(1, place)[:, 0], probs.gather(1, place)[:, 0].log()


def shortlist(first_logits: Tensor, first_ids: Tensor, k: int) -> Tensor:
    """The k candidates whose first tokens are most likely (BLIP's VQA ranking); the earlier ones of equals.

    Args:
        first_logits: (B, V) of what follows the prompt.
        first_ids: int64 (N,), first token of each candidate.
        k: at most N count.

    Returns:
        int64 (B, min(k, N)), most likely first.
    """
    prior = first_logits.index_select(1, first_ids)
    return prior.argsort(dim=1, descending=True, stable=True)[:, :k]


def candidate_scores(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Minus the summed loss of each candidate (BLIP's VQA ranking): label smoothing in, length not.

    Args:
        logits: (M, V), at the positions whose next token is a target, candidate by candidate.
        labels: int64 (R, T), M of them targets; -100 = no target.
        smoothing: label smoothing.

    Returns:
        (R,), higher is better.
    """
    targets = labels != -100
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels[targets], reduction="none", label_smoothing=smoothing)
    return -losses.new_zeros(labels.shape).masked_scatter(targets, losses).sum(dim=1)
