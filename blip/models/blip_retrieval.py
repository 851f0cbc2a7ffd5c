"""BLIP for retrieval: ITC against a momentum twin and its queue, ITM with hard negatives (section 3.2).

One forward pass:

    tower -> image features ([CLS]);  text alone -> text features ([CLS])
    ITC  twin's tower and text encoder, without gradient -> what the features are contrasted with, and targets
    ITM  cross-attention keys and values of the images, once per layer; texts that look at them, for B pairs
         and 2B hard negatives

`forward` reads state only; twin, queue and temperature move in `after_step`, once per successful step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import dist
from blip.batch import Output
from blip.layers.attention import ImageKeys
from blip.layers.momentum import FeatureQueue, MomentumTwin
from blip.losses import NegativeSampler, at_least_float32
from blip.models.blip_base import BlipBase, ramp
from blip.models.blip_config import MomentumConfig
from blip.models.blip_ranking import Judging
from blip.models.contrast import (
    Contrasted,
    Features,
    Negatives,
    Pool,
    TwinFeatures,
    draw_negatives,
    gather_pool,
    local_pool,
    matching,
    momentum_contrast,
    online_similarities,
)
from blip.models.med import Med
from blip.models.published import starts_of, weights_of
from blip.models.vision import VisionTower
from blip.registry import MODELS


@dataclass
class BlipRetrievalConfig(MomentumConfig):
    """Sizes and switches of BLIP for retrieval."""

    image_id_targets: bool = True
    """Use `image_id` where a batch has it: the same picture's texts are positives, never negatives."""


class Views(NamedTuple):
    """What a batch looks like to the losses."""

    states: Tensor
    """(B, P, D_image), the tower's."""
    feats: Features
    keys: ImageKeys
    """Cross-attention keys and values of the encoder."""


class EveryonesFeatures(NamedTuple):
    """The twin's features of a global micro-batch, in row order."""

    image: Tensor
    """(N, 1, E)."""
    text: Tensor
    """(N, E)."""
    image_id: Tensor | None
    """int64 (N,)."""


_LARGE = {"image_size": 384, "vit_type": "large", "vit_drop_path_rate": 0.1, "vit_grad_ckpt": True}


@MODELS.register("blip_retrieval")
class BlipRetrieval(Judging, BlipBase):
    """Tower, text encoder, projections, ITM head; momentum twin and queue.

    Shape:
        batch: `image` (B, 3, H, W), of videos (B, F, 3, H, W), or `image_embeds` (B, P, D_image);
            `text_input`, or `text_ids` and `text_mask`; optional `image_id` (B,); `step` or `epoch` and
            `iters`, with `num_iters_per_epoch`, for the ramp of the soft targets.
        returns: `loss` = `loss_itc` + `loss_itm`, `itc_acc`, `itm_acc`, `temp`, `alpha`; and what
            `after_step` takes into the queue.
    """

    config_class: ClassVar[type[MomentumConfig]] = BlipRetrievalConfig
    presets: ClassVar = {
        "coco": {
            "image_size": 384,
            "vit_grad_ckpt": True,
            "vit_ckpt_layer": 4,
            "negative_all_rank": True,
        },
        "flickr": {"image_size": 384, "vit_grad_ckpt": True, "vit_ckpt_layer": 4},
        # The original code's; LAVIS has none with ViT-L.
        "large_coco": {**_LARGE, "vit_ckpt_layer": 12, "negative_all_rank": True},
        "large_flickr": {**_LARGE, "vit_ckpt_layer": 10},
    }
    published: ClassVar = weights_of("blip_retrieval")
    starts: ClassVar = starts_of("blip_retrieval")
    replaceable = ("twin.", "queue.")
    negative_sampler: NegativeSampler | None = None
    """Replaces the keyed draw of hard negatives, e.g. by `losses.argmax_sampler`."""

    def __init__(self, config: MomentumConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root)
        width = config.med.width
        self.vision_proj = nn.Linear(self.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(config.temp))
        # The twin needs no cross-attention and no decoder: it sees image and text by themselves.
        self.twin = MomentumTwin(
            {
                "vision": VisionTower(config.tower()),
                "text": self._med(None),
                "vision_proj": nn.Linear(self.vision.width, config.embed_dim),
                "text_proj": nn.Linear(width, config.embed_dim),
            },
            config.twin_dropout,
        )
        self.twin.copy_from(self)
        self.queue = FeatureQueue(config.queue_size, config.embed_dim)

    def _text(self) -> Med:
        return self._med(self.vision.width, share=getattr(self.config, "share", None))

    # The training step

    def forward(self, batch: dict[str, Any]) -> Output:
        batch = self.with_text(batch)
        views = self.views(batch)
        output, found, pool = self.contrast(batch, views)
        output.update(self.match(batch, views, found, pool))
        output["loss"] = output["loss_itc"] + output["loss_itm"]
        return output

    def views(self, batch: dict[str, Any]) -> Views:
        """The tower's pass, the unimodal text pass, and the images' keys and values."""
        states = self.image_states(batch)
        feats = Features(self.image_feats(states), self.text_feats(batch))
        return Views(states, feats, self.text.image_keys(states))

    @torch.no_grad()
    def twin_feats(self, batch: dict[str, Any]) -> Features:
        """The twin's features of the local rows."""
        twin: Any = self.twin
        states = self.image_states(batch, twin["vision"])
        text = twin["text"].unimodal(batch["text_ids"], batch["text_mask"], first_only=True)
        image_feats = self.image_feats(states, twin["vision_proj"])
        return Features(image_feats, F.normalize(at_least_float32(twin["text_proj"](text[:, 0])), dim=-1))

    def contrast(self, batch: dict[str, Any], views: Views) -> tuple[Output, Contrasted, Pool]:
        """The ITC loss, the similarities, and the pool that they are of."""
        own = self.twin_feats(batch)
        everyone = self._of_all_ranks(batch, own)
        pool, columns = self._pool(batch, views, self.config.itc_all_rank), own
        if self.config.itc_all_rank:
            columns = Features(everyone.image, everyone.text)
        twin, alpha = TwinFeatures(own, columns), self.alpha(batch)
        found = momentum_contrast(batch, views.feats, twin, pool, self.queue, self.temp, alpha)
        output = found.figures(self.temp)
        output["alpha"] = torch.full((), alpha, device=self.device)
        output["image_feats_m"], output["text_feats_m"] = everyone.image[:, 0], everyone.text
        if everyone.image_id is not None:
            output["image_id"] = everyone.image_id
        return output, found, pool

    def _pool(self, batch: dict[str, Any], views: Views, all_ranks: bool) -> Pool:
        """The rows of all ranks, or this rank's."""
        use_ids = self.config.image_id_targets
        if all_ranks:
            return gather_pool(batch, views.feats, views.states, views.keys, use_ids, grad=False)
        return local_pool(batch, views.feats, views.states, views.keys, use_ids)

    def _of_all_ranks(self, batch: dict[str, Any], own: Features) -> EveryonesFeatures:
        """The twin's features of the global micro-batch, in one collective, and the pictures' numbers."""
        total = batch.get("batch_total") or len(own.text) * dist.world_size()
        both = dist.gather_rows(torch.cat([own.image[:, 0], own.text], dim=1), total)
        image, text = both.chunk(2, dim=1)
        ids = batch.get("image_id") if self.config.image_id_targets else None
        return EveryonesFeatures(image[:, None], text, None if ids is None else dist.gather_rows(ids, total))

    def alpha(self, batch: dict[str, Any]) -> float:
        """Share of the twin's opinion at this step: a ramp over the first epochs."""
        return ramp(batch, self.config.alpha, self.config.alpha_ramp_epochs)

    def negatives(
        self, batch: dict[str, Any], views: Views, found: Contrasted, pool: Pool
    ) -> tuple[Pool, Negatives]:
        """Hard negatives by the model's own similarities, as LAVIS fine-tunes, and the pool they are in."""
        if self.config.negative_all_rank != self.config.itc_all_rank:
            pool = self._pool(batch, views, self.config.negative_all_rank)
        sim_i2t, sim_t2i, positive = online_similarities(views.feats, pool, self.temp)
        seen = Contrasted(found.loss, sim_i2t, sim_t2i, positive)
        hard = self.config.hard_negatives
        return pool, draw_negatives(batch, seen, pool, self.negative_sampler, hard=hard)

    def match(self, batch: dict[str, Any], views: Views, found: Contrasted, pool: Pool) -> Output:
        """The ITM loss over B pairs and 2B hard negatives."""
        pool, negatives = self.negatives(batch, views, found, pool)
        if pool.keys is not None:
            wrong = pool.keys.select(negatives.image)
        else:
            wrong = self.text.image_keys(pool.fetch_states(negatives.image))
        images = [(views.keys, 2), (wrong, 1)]
        return matching(batch, pool, negatives, lambda ids, mask: self.itm_logits(images, ids, mask))

    def num_contrasted(self, batch: int) -> int:
        """The own rank's rows, or all, and the queue."""
        return (batch if self.config.itc_all_rank else batch // dist.world_size()) + len(self.queue)

    def after_step(self, outputs: Sequence[Output]) -> None:
        """The temperature's bounds; the twin follows; the queue takes what the twin has seen."""
        self.temp.data.clamp_(self.config.min_temp, self.config.max_temp)
        self.twin.follow(self, self.config.momentum)
        for output in outputs:
            self.queue.enqueue(output["image_feats_m"], output["text_feats_m"], output.get("image_id"))

    def begin(self) -> None:
        """The queue's features stay, but whose they are means nothing in another run's data."""
        self.queue.forget_ids()
        self.temp.data.clamp_(self.config.min_temp, self.config.max_temp)

    # Weights

    def load_parts(self, data_root: str | Path | None = None) -> list[str]:
        """Load tower and text transformer; the twin starts as their copy."""
        report = super().load_parts(data_root)
        self.twin.copy_from(self)
        return report

    def replace(self, names: Collection[str]) -> list[str]:
        """The twin starts as a copy where weights lack it; the queue starts with random features."""
        lines = []
        if lacking := [name for name in names if name.startswith("twin.")]:
            self.twin.copy_from(self, {name.removeprefix("twin.") for name in lacking})
            lines.append(f"momentum twin: {len(lacking)} tensors copied from the model")
        if any(name.startswith("queue.") for name in names):
            lines.append("queue: starts with random features")
        return lines
