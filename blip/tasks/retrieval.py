"""Image-text retrieval: similarities of all pairs first, then re-ranking of the best k by ITM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip import dist
from blip.batch import EvalContext, to_device
from blip.config.schema import RunConfig
from blip.errors import ConfigError, DataError
from blip.metrics.retrieval import NOT_FOUND, recalls_from_ranks
from blip.registry import TASKS
from blip.tasks.base import EvalData, Evaluation, Prediction, Task

RERANK_ROWS = 128


class RetrievalData(EvalData, Protocol):
    """Images, texts, and which belong together, as LAVIS's evaluation datasets expose them."""

    text: list[str]
    txt2img: list[int]
    img2txt: list[list[int]]
    of_videos: bool
    """Whether the images are videos: median ranks are reported too."""


@dataclass
class RetrievalRun(RunConfig):
    """Run keys of retrieval."""

    k_test: int = 128
    """Candidates per query that the ITM head re-ranks; 0 ranks by similarity alone."""
    eval_max_txt_len: int = 35
    """Longest text in evaluation, in tokens."""

    def problems(self) -> list[str]:
        """k must reach the largest recall that is reported."""
        found = super().problems() + self._at_least(3, "eval_max_txt_len")
        if 0 < self.k_test < 10:
            found.append(
                f"k_test: {self.k_test} is below 10, so R@10 would have no meaning; use 0 or at least 10"
            )
        return found


@TASKS.register("retrieval")
class Retrieval(Task):
    """Recall at 1, 5 and 10, image to text (`txt_r*`) and text to image (`img_r*`), in percent.

    Of videos, also the median ranks (`txt_mdR`, `img_mdR`).

    Every rank encodes and re-ranks its own images, so image states never travel. Each query's candidates
    are the k most similar; a candidate's score is its matching logit plus its similarity (LAVIS). A pair that
    both directions ask for is scored once.

    What a rank keeps of its I own images, among all N images and T texts:

        main memory   states, where k_test > 0: I x P x D_image numbers, of the autocast type or as the tower
                      gives them; one image's at a time are on the device, with its cross-attention keys
        device        features: I x Q x E and T x E; I x T similarities and scores, float32 each, and
                      candidates, bool

    BLIP with ViT-B at 384 pixels has 577 states of 768 numbers, so that COCO's 5,000 test pictures take
    8.9 GB in float32 and 4.4 GB under autocast, divided by the number of ranks; their 25,010 texts make
    matrices of 0.5 GB, several of which are there at once while recalls are counted. A video's states are
    those of all its frames: eight take 14 MB in float32.
    """

    run_config_class = RetrievalRun
    needs = ("retrieval_images", "retrieval_texts", "retrieval_scores")
    monitor: ClassVar[str] = "r_mean"

    def check(self, model: Any) -> None:
        """Raise where `model` has no features to compare, or no judge of pairs and `k_test` asks for one."""
        super().check(model)
        if self.config.k_test and not (hasattr(model, "retrieval_keys") and hasattr(model, "rerank")):
            raise ConfigError(
                f"run.k_test: {self.config.k_test}, but {model.config.arch!r} has no matching head to re-rank"
                " with; set it to 0"
            )

    def scores(self, data: Any = None) -> list[str]:
        """Recalls; those of similarity alone have their own names where there are matching scores too.

        Of videos, or where it is not known what the data is, median ranks too.
        """
        medians = data is None or getattr(data, "of_videos", False)
        names = list(recalls_from_ranks(np.zeros(1), np.zeros(1), medians))
        return names + [f"itc_{name}" for name in names] if self.config.k_test else names

    def less_is_better(self, score: str) -> bool:
        """Median ranks: the best is 1."""
        return score.endswith("_mdR")

    def evaluate(self, model: Any, data: RetrievalData, context: EvalContext) -> Evaluation:
        if min(len(data), len(data.text)) < dist.world_size():
            raise DataError(
                f"datasets.{data.name}: {len(data)} pictures and {len(data.text)} texts are too few for"
                f" {dist.world_size()} processes; evaluate with fewer"
            )
        with context.autocast():
            image_feats, states = self._encode_images(model, data, context)
            tokens = _tokenize(model, data.text, self.config.eval_max_txt_len)
            text_feats = self._encode_texts(model, tokens, context)
            sim = model.retrieval_scores(image_feats, text_feats).float()  # (own images, all texts)
        everything = torch.ones_like(sim, dtype=torch.bool)
        scores, to_texts, to_images = sim, everything, everything
        if self.config.k_test:
            to_texts, to_images = _candidates(sim, self.config.k_test, len(data))
            with context.autocast():
                scores = sim + self._rerank(model, states, tokens, to_texts | to_images, context)

        def metrics() -> dict[str, float]:
            truth = _truth(data, sim.device)
            medians = getattr(data, "of_videos", False)
            found = _recalls(scores, to_texts, to_images, truth, medians)
            if not self.config.k_test:
                return found
            first = _recalls(sim, everything, everything, truth, medians)
            return {f"itc_{name}": value for name, value in first.items()} | found

        return Evaluation(_predictions(scores.masked_fill(~to_texts, -torch.inf), data), metrics)

    def _encode_images(
        self, model: Any, data: RetrievalData, context: EvalContext
    ) -> tuple[Tensor, list[Tensor]]:
        """Features (own images, Q, E), and the states of each own image, if they are wanted again."""
        feats, states = [], []
        for batch in data.batches():
            found, state = model.retrieval_images(to_device(dict(batch), context.device))
            feats.append(found)
            if self.config.k_test:
                states.extend(state.cpu())  # of all images they would fill the device
        return torch.cat(feats), states

    def _encode_texts(self, model: Any, tokens: list[Tensor], context: EvalContext) -> Tensor:
        """Features (all texts, E); every rank encodes its share."""
        start, end = dist.slices(len(tokens))[dist.rank()]
        feats = []
        for at in range(start, end, context.batch_size):
            ids, mask = _pad(tokens[at : min(at + context.batch_size, end)], context.device)
            feats.append(model.retrieval_texts(ids, mask))
        return dist.gather_rows(torch.cat(feats), len(tokens))

    def _rerank(
        self, model: Any, states: list[Tensor], tokens: list[Tensor], wanted: Tensor, context: EvalContext
    ) -> Tensor:
        """Matching logits of the wanted pairs, (own images, all texts), -inf elsewhere; image by image."""
        scores = torch.full(wanted.shape, -torch.inf, device=wanted.device)
        for i, state in enumerate(states):
            keys = model.retrieval_keys(state[None].to(context.device))  # for all batches of texts
            # Texts of similar length share a batch, so that little of it is padding.
            texts = sorted(wanted[i].nonzero()[:, 0].tolist(), key=lambda t: len(tokens[t]))
            for at in range(0, len(texts), RERANK_ROWS):
                some = texts[at : at + RERANK_ROWS]
                ids, mask = _pad([tokens[t] for t in some], context.device)
                logits = model.rerank(keys, ids[:, None], mask[:, None])[:, 0]
                scores[i, torch.tensor(some, device=scores.device)] = logits.float()
        return scores


def _tokenize(model: Any, texts: list[str], max_length: int) -> list[Tensor]:
    tokens = model.tokenize(texts, max_length)
    return [ids[mask] for ids, mask in zip(tokens["text_ids"], tokens["text_mask"], strict=True)]


def _pad(tokens: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and mask (B, T) of token lists, on the device."""
    lengths = torch.tensor([len(t) for t in tokens])
    ids = pad_sequence(tokens, batch_first=True)
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def _truth(data: RetrievalData, device: torch.device) -> Tensor:
    """bool (own images, all texts): which text belongs to which image."""
    start, end = dist.slices(len(data))[dist.rank()]
    owner = torch.tensor(data.txt2img, device=device)
    return owner[None, :] == torch.arange(start, end, device=device)[:, None]


def _candidates(sim: Tensor, k: int, num_images: int) -> tuple[Tensor, Tensor]:
    """bool (own images, all texts), twice: the k best texts of each image, the k best images of each text."""
    num_own, num_texts = sim.shape
    best_texts = sim.topk(min(k, num_texts), dim=1).indices
    to_texts = torch.zeros_like(sim, dtype=torch.bool).scatter_(1, best_texts, value=True)
    # A text's k-th best image is found among the k best of every rank.
    best = torch.full((min(k, num_images), num_texts), -torch.inf, device=sim.device)
    best[:num_own] = sim.topk(min(k, num_own), dim=0).values
    best = dist.gather_rows(best) if dist.world_size() > 1 else best
    threshold = best.topk(min(k, num_images), dim=0).values[-1]
    return to_texts, sim >= threshold


def _recalls(
    scores: Tensor, to_texts: Tensor, to_images: Tensor, truth: Tensor, medians: bool
) -> dict[str, float]:
    """Recalls of all queries, from each rank's own rows of the score matrix.

    A query's rank is the number of wrong candidates that score at least as high as its best right one: a tie
    counts against the model, and a right answer that is not among the candidates is not found.
    """
    lowest = torch.full_like(scores, -torch.inf)
    for_images = torch.where(to_texts, scores, lowest)
    right = torch.where(truth, for_images, lowest).amax(dim=1)  # (own images,)
    image_rank = ((for_images >= right[:, None]) & ~truth).sum(dim=1)
    image_rank[right == -torch.inf] = NOT_FOUND

    for_texts = torch.where(to_images, scores, lowest)
    right = torch.where(truth, for_texts, lowest).amax(dim=0)  # (all texts,)
    right = dist.max_tensor(right)
    text_rank = dist.sum_tensor(((for_texts >= right) & ~truth).sum(dim=0))
    text_rank[right == -torch.inf] = NOT_FOUND
    image_ranks = torch.cat([part.cpu() for part in dist.gather_objects(image_rank.cpu())])
    return recalls_from_ranks(image_ranks.numpy(), text_rank.cpu().numpy(), medians)


def _predictions(scores: Tensor, data: RetrievalData) -> list[Prediction]:
    """The five best texts of each own image, beside the right ones."""
    start, _ = dist.slices(len(data))[dist.rank()]
    values, indices = scores.topk(min(5, scores.shape[1]), dim=1)
    return [
        {
            "index": start + i,
            "instance_id": data.instance_id(start + i),
            "image": data.picture(start + i),
            "truth": [data.text[t] for t in data.img2txt[start + i]],
            "found": [data.text[t] for t in best],
            "score": [round(v, 4) for v in value],
        }
        for i, (best, value) in enumerate(zip(indices.tolist(), values.tolist(), strict=True))
    ]
