"""BLIP's text transformer, losses and training step in plain loops (BLIP, sections 3.1, 3.2 and 5).

One text at a time and without padding, one pair at a time, every probability written out; no keys or values
are reused and no pass is shortened. Parameters are looked up by their names, so gradients reach the model's.
The training step goes as LAVIS's: the twin moves at the start of a step, the queue is filled at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tests.reference.stage1 import log_softmax, smoothed_cross_entropy

FLOOR = 1e-4
"""Added to the weight of every negative in pre-training."""
Weights = Mapping[str, Tensor]


# The text transformer


def norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """LayerNorm of (T, D)."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """(T, D) -> (T, D')."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """By the error function."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def look(hidden: Tensor, source: Tensor, weights: Weights, name: str, heads: int, causal: bool) -> Tensor:
    """Attention of (T, D) to (S, W), projected; with `causal` position t sees source positions up to t."""
    query, key, value = (
        linear(x, weights, f"{name}.{part}")
        for x, part in ((hidden, "query"), (source, "key"), (source, "value"))
    )
    width = query.shape[1] // heads
    parts = []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        weight = (query[:, own] @ key[:, own].T / width**0.5).exp()
        if causal:
            weight = weight * torch.ones(len(hidden), len(source), dtype=weight.dtype).tril()
        parts.append(weight / weight.sum(dim=1, keepdim=True) @ value[:, own])
    return linear(torch.cat(parts, dim=1), weights, f"{name}.out")


def med(
    weights: Weights,
    ids: list[int],
    images: list[Tensor],
    heads: int = 2,
    decode: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """States (T, D) of one text.

    Args:
        weights: of the text transformer, by the names of `Med`.
        ids: as they go in, the first being [CLS], [ENC] or [DEC].
        images: states (P, W) of what is looked at: none, one, or two.
        heads: attention heads.
        decode: with the decoder's parameters, each token seeing its own past.
        eps: of every LayerNorm.
    """

    def own(name: str, part: str) -> str:
        mine = f"{name}.decode.{part}"
        return mine if decode and any(key.startswith(f"{mine}.") for key in weights) else f"{name}.{part}"

    embedding = "decode_embedding" if decode and "decode_embedding.word.weight" in weights else "embedding"
    word, position = weights[f"{embedding}.word.weight"], weights[f"{embedding}.position.weight"]
    hidden = torch.stack([word[token] + position[t] for t, token in enumerate(ids)])
    hidden = norm(hidden, weights, f"{embedding}.norm", eps)
    depth = len({key.split(".")[1] for key in weights if key.startswith("layers.")})
    for i in range(depth):
        layer = f"layers.{i}"
        name = own(layer, "self_attn")
        hidden = norm(
            hidden + look(hidden, hidden, weights, name, heads, decode), weights, f"{name}.norm", eps
        )
        if images:
            name = own(layer, "cross_attn")
            seen = glance(hidden, images, weights, name, heads)
            hidden = norm(hidden + seen, weights, f"{name}.norm", eps)
        name = own(layer, "ffn")
        inner = gelu(linear(hidden, weights, f"{name}.expand"))
        hidden = norm(hidden + linear(inner, weights, f"{name}.contract"), weights, f"{name}.norm", eps)
    return hidden


def glance(hidden: Tensor, images: list[Tensor], weights: Weights, name: str, heads: int) -> Tensor:
    """Cross-attention to one image, or to two that are averaged, or joined by a matrix where there is one."""
    if len(images) == 1:
        return look(hidden, images[0], weights, name, heads, causal=False)
    first, second = (
        look(hidden, image, weights, f"{name}.looks.{i}", heads, causal=False)
        for i, image in enumerate(images)
    )
    if f"{name}.merge.weight" in weights:
        return linear(torch.cat([first, second], dim=1), weights, f"{name}.merge")
    return (first + second) / 2


def words(states: Tensor, weights: Weights, matrix: Tensor, eps: float = 1e-12) -> Tensor:
    """Logits (T, V) of the language-model head, whose matrix is that of the word embeddings."""
    inner = norm(gelu(linear(states, weights, "transform")), weights, "norm", eps)
    return inner @ matrix.T + weights["bias"]


def told(
    logits: Tensor, ids: list[int], smoothing: float = 0.1, prompt_length: int = 0
) -> tuple[Tensor, int]:
    """Sum of the losses of a text's tokens, each from the logits one place before it, and their number.

    Args:
        logits: (T, V) of the text with [DEC] in front.
        ids: of the text.
        smoothing: label smoothing.
        prompt_length: tokens at the start, the first included, that are given.
    """
    places = range(max(prompt_length, 1), len(ids))
    total = logits.new_zeros(())
    for t in places:
        log_probs = log_softmax(logits[t - 1])
        total = total - (1 - smoothing) * log_probs[ids[t]] - smoothing * log_probs.mean()
    return total, len(places)


def part(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights below a prefix, without it."""
    return {k.removeprefix(f"{prefix}."): v for k, v in weights.items() if k.startswith(f"{prefix}.")}


def real(batch: Mapping[str, Any], row: int) -> list[int]:
    """The ids of a row without padding."""
    return batch["text_ids"][row][batch["text_mask"][row]].tolist()


# Contrast


def unit(x: Tensor) -> Tensor:
    """Of length 1."""
    return x / (x * x).sum().sqrt()


def similarities(rows: list[Tensor], columns: list[Tensor], temp: Tensor) -> Tensor:
    """(B, N), divided by the temperature."""
    return torch.stack([torch.stack(columns) @ row for row in rows]) / temp


def itc_direction(sim: Tensor, sim_m: Tensor, right: list[list[bool]], alpha: float) -> Tensor:
    """Sum over rows of the cross-entropy with the mixed targets.

    Args:
        sim: (B, N).
        sim_m: (B, N), of the twin.
        right: for each row, which columns show its picture.
        alpha: share of the twin's opinion.
    """
    total = sim.new_zeros(())
    for row, row_m, yes in zip(sim, sim_m.detach(), right, strict=True):
        hard = torch.tensor([float(y) / sum(yes) for y in yes], dtype=sim.dtype)
        target = alpha * log_softmax(row_m).exp() + (1 - alpha) * hard
        total = total - (target * log_softmax(row)).sum()
    return total


def heaviest(sim: Tensor, wrong: list[list[bool]], floor: float) -> list[int]:
    """For each row the column that a draw would most likely give; `wrong` says which may be drawn.

    With a floor, weights are the softmax over all columns and the floor; else those of the wrong ones only,
    which is the same but for a factor.
    """
    found = []
    for row, may in zip(sim.detach(), wrong, strict=True):
        chances = log_softmax(row).exp() + floor
        allowed = [j for j in range(len(row)) if may[j]]
        found.append(max(allowed, key=lambda j: float(chances[j])) if allowed else 0)
    return found


# The training step


class PlainBlip:
    """Pre-training or retrieval of a small model, its ranks simulated one after another.

    Args:
        model: whose parameters are trained; its twin and queue are copied and then left alone.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.twin = {name: value.detach().clone() for name, value in model.twin.named_parameters()}
        self.queue = [
            {"image": image.clone(), "text": text.clone(), "id": int(number)}
            for image, text, number in zip(model.queue.image, model.queue.text, model.queue.ids, strict=True)
        ]
        self.pointer = int(model.queue.pointer)
        self.decoder = hasattr(model, "lm_head")

    def step(self, ranks: list[dict[str, Any]], alpha: float) -> dict[str, Tensor]:
        """Losses of the global batch, the mean over the rows of all ranks; then the queue is filled."""
        self.model.temp.data.clamp_(self.config.min_temp, self.config.max_temp)
        self.move_twin()
        views = [self.views(batch) for batch in ranks]
        everyone = {key: list(chain.from_iterable(view[key] or [] for view in views)) for key in views[0]}
        num_rows = sum(len(batch["image"]) for batch in ranks)
        for rank, view in enumerate(views):
            view["columns"] = everyone if self.config.itc_all_rank else view
            view["pool"] = everyone if self.config.negative_all_rank else view
            before = sum(len(other["ids"]) for other in views[:rank])
            view["place"] = {id(everyone): before, id(view): 0}
        itc = torch.stack([self.itc(view, alpha) for view in views]).sum() / num_rows
        itm = torch.stack([self.itm(view) for view in views]).sum() / num_rows
        found = {"loss_itc": itc, "loss_itm": itm}
        if self.decoder:
            found["loss_lm"] = self.lm(views)
        found["loss"] = torch.stack(list(found.values())).sum()
        self.enqueue(views)
        return found

    def move_twin(self) -> None:
        """momentum * own + (1 - momentum) * the model's."""
        m, weights = self.config.momentum, dict(self.model.named_parameters())
        for name, own in self.twin.items():
            self.twin[name] = m * own + (1 - m) * weights[name].detach()

    def views(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One rank's rows: states of the tower, texts, features, and the twin's features."""
        weights, count = dict(self.model.named_parameters()), len(batch["image"])
        view: dict[str, Any] = {"ids": [real(batch, row) for row in range(count)]}
        given = self.config.image_id_targets and "image_id" in batch
        view["pictures"] = batch["image_id"].tolist() if given else None
        for suffix, source in (("", weights), ("_m", self.twin)):
            with torch.set_grad_enabled(not suffix):
                states = functional_call(self.model.vision, part(source, "vision"), batch["image"])
                text = part(source, "text")
                cls = [med(text, ids, [], decode=False)[0] for ids in view["ids"]]
                view["states" + suffix] = list(states)
                view["image" + suffix] = [unit(linear(s[0], source, "vision_proj")) for s in states]
                view["text" + suffix] = [unit(linear(c, source, "text_proj")) for c in cls]
        return view

    def wrong(self, view: dict[str, Any], others: dict[str, Any]) -> list[list[bool]]:
        """Which of the other rows, the own ones among them, show another picture than each own row."""
        first, rows, columns = view["place"][id(others)], range(len(view["ids"])), range(len(others["ids"]))
        if view["pictures"]:
            return [[view["pictures"][i] != others["pictures"][j] for j in columns] for i in rows]
        return [[first + i != j for j in columns] for i in rows]

    def itc(self, view: dict[str, Any], alpha: float) -> Tensor:
        """Sum over the rank's rows; columns are the twin's features of rows, then the queue."""
        others = view["columns"]
        right = [[not wrong for wrong in row] for row in self.wrong(view, others)]
        pictures = view["pictures"] or [None] * len(right)
        right = [
            [*row, *(picture is not None and entry["id"] == picture for entry in self.queue)]
            for row, picture in zip(right, pictures, strict=True)
        ]
        columns = {
            kind: others[f"{kind}_m"] + [entry[kind] for entry in self.queue] for kind in ("image", "text")
        }
        temp, total = self.model.temp, torch.zeros((), dtype=torch.double)
        for rows, other in (("image", "text"), ("text", "image")):
            sim = similarities(view[rows], columns[other], temp)
            sim_m = similarities(view[f"{rows}_m"], columns[other], temp)
            total = total + itc_direction(sim, sim_m, right, alpha) / 2
            view[f"sim_{rows}"] = sim[:, : len(others["ids"])]
        return total

    def itm(self, view: dict[str, Any]) -> Tensor:
        """Sum of the rank's 3B losses over 3, or over 1 + twice the share of rows that have a negative."""
        pool, rows = view["pool"], range(len(view["ids"]))
        wrong, first = self.wrong(view, pool), view["place"][id(pool)]
        if self.decoder:
            sims, floor = (view["sim_image"], view["sim_text"]), FLOOR
        else:
            temp = self.model.temp
            sims = (
                similarities(view["image"], pool["text"], temp),
                similarities(view["text"], pool["image"], temp),
            )
            floor = 0.0
        wrong_text, wrong_image = (heaviest(sim, wrong, floor) for sim in sims)
        valid = [i for i in rows if any(wrong[i])]
        # Image and text, as places in the pool.
        pairs = [(first + i, first + i, 1) for i in rows]
        pairs += [(first + i, wrong_text[i], 0) for i in valid]
        pairs += [(wrong_image[i], first + i, 0) for i in valid]
        weights, total = dict(self.model.named_parameters()), torch.zeros((), dtype=torch.double)
        for image, text, label in pairs:
            ids = [self.model.text.enc_id, *pool["ids"][text][1:]]
            enc = med(part(weights, "text"), ids, [pool["states"][image]])[0]
            total = total + smoothed_cross_entropy(linear(enc, weights, "itm_head"), label, 0.0)
        kinds = pool["pictures"] or list(range(len(pool["ids"])))
        share = sum(any(kind != other for other in kinds) for kind in kinds) / len(kinds)
        return total / (1 + 2 * share)

    def lm(self, views: list[dict[str, Any]]) -> Tensor:
        """Mean over the tokens of all ranks."""
        weights, sums, count = dict(self.model.named_parameters()), [], 0
        text, head = part(weights, "text"), part(weights, "lm_head")
        matrix = text.get("decode_embedding.word.weight", text["embedding.word.weight"])
        for view in views:
            for ids, states in zip(view["ids"], view["states"], strict=True):
                hidden = med(text, [self.model.text.dec_id, *ids[1:]], [states], decode=True)
                loss, tokens = told(words(hidden, head, matrix), ids, self.config.label_smoothing)
                sums.append(loss)
                count += tokens
        return torch.stack(sums).sum() / count

    def enqueue(self, views: list[dict[str, Any]]) -> None:
        """One pair after another, rank after rank."""
        for view in views:
            pictures = view["pictures"] or [-100] * len(view["ids"])
            for image, text, picture in zip(view["image_m"], view["text_m"], pictures, strict=True):
                if self.queue:
                    entry = {"image": image.detach(), "text": text.detach(), "id": picture}
                    self.queue[self.pointer] = entry
                    self.pointer = (self.pointer + 1) % len(self.queue)
