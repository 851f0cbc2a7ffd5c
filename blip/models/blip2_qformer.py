"""BLIP-2 stage 1: a frozen vision tower and a Q-Former trained with ITC, ITM and LM (sections 3.1, 3.2).

One forward pass, in the order of the losses:

    tower (no gradient while frozen) -> ln_vision -> cross-attention keys and values, once per layer
    queries alone -> image features; their self-attention keys and values are kept for the LM loss
    text alone    -> text features                 ITC: against the global batch
    text behind the kept keys and values, causal   LM (BLIP-2 calls it ITG)
    [queries ; text] for B pairs and 2B hard negatives, reusing the keys and values   ITM

`represent`, `contrast`, `narrate` and `match` are these steps; cached accumulation (engine/cached.py) runs
the same ones over several micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.batch import FeatureOutput, Output
from blip.errors import UsageError, hint
from blip.layers.attention import ImageKeys, KeyValue
from blip.layers.masks import causal_mask, padding_mask
from blip.layers.text import LMHead, init_bert
from blip.losses import NegativeSampler, at_least_float32, similarity
from blip.models.blip2_base import Blip2Base
from blip.models.blip2_config import OBJECTIVES, Blip2QformerConfig
from blip.models.blip2_weights import BERT, CLIP_L, EVA, stage1_sizes
from blip.models.blip_ranking import Reranking
from blip.models.contrast import (
    Features,
    Negatives,
    Pool,
    contrast,
    draw_negatives,
    gather_pool,
    matching,
)
from blip.models.generate import Captioning, QFormerWriter, TextWriter
from blip.models.narrate import caption_loss, decoder_input, decoder_labels
from blip.models.published import starts_of, weights_of
from blip.registry import MODELS

LOSSES = tuple(f"loss_{name}" for name in OBJECTIVES)


class Representation(NamedTuple):
    """What the uni-modal passes leave for the losses."""

    feats: Features | None
    """None where neither ITC nor ITM is computed; without gradient where ITC is not."""
    states: Tensor
    """(B, P, D_image), the tower's output before `ln_vision`."""
    keys: ImageKeys
    cache: list[KeyValue]
    """Self-attention keys and values of the queries, per layer."""


@MODELS.register("blip2", "blip2_feature_extractor")
class Blip2Qformer(Captioning, Blip2Base, Reranking):
    """BLIP-2 stage 1: a frozen vision tower and a Q-Former trained with ITC, ITM and LM.

    Shape:
        batch: `image` (B, 3, H, W) or `image_embeds` (B, P, D_image); `text_input`, or `text_ids` and
            `text_mask`; optional `image_id` (B,).
        returns: `loss` = `loss_itc` + `loss_itm` + `loss_lm`, `itc_acc`, `itm_acc`, `temp`.
    """

    config_class = Blip2QformerConfig
    presets: ClassVar = {
        "pretrain": {**EVA, **BERT},
        "pretrain_vitL": {**CLIP_L, **BERT},
        "coco": {
            **EVA,
            **BERT,
            "image_size": 364,
            "freeze_vit": False,
            "vit_precision": "fp32",
            "use_grad_checkpoint": True,
        },
    }
    published: ClassVar = weights_of("blip2")
    starts: ClassVar = starts_of("blip2")
    sizes_of = staticmethod(stage1_sizes)
    negative_sampler: NegativeSampler | None = None
    """Replaces the keyed draw of hard negatives, e.g. by `losses.argmax_sampler`."""

    def __init__(self, config: Blip2QformerConfig, data_root: str | Path | None = None) -> None:
        super().__init__(config, data_root, with_text=True)
        vocab_size = self.qformer.embedding.word.num_embeddings
        self.lm_head = LMHead(config.qformer.width, vocab_size, config.qformer.norm_eps)
        self.vision_proj = nn.Linear(config.qformer.width, config.embed_dim)
        self.text_proj = nn.Linear(config.qformer.width, config.embed_dim)
        self.itm_head = nn.Linear(config.qformer.width, 2)
        self.temp = nn.Parameter(torch.tensor(config.temp))
        init_bert(self.lm_head, config.qformer.init_std)

    # The training step

    def forward(self, batch: dict[str, Any]) -> Output:
        batch = self.with_text(batch)
        seen = self.represent(batch, self.image_states(batch))
        output, pool, negatives = Output(), None, None
        if seen.feats is not None:
            pool = self.pool(batch, seen.feats, seen.states, keys=seen.keys)
            output, negatives = self.contrast(batch, seen.feats, pool)
        if "lm" in self.objectives():
            output.update(self.narrate(batch, seen))
        # Last, so that the backward pass begins here and frees the largest part before gradients pile up.
        if pool is not None and negatives is not None:
            output.update(self.match(batch, seen, pool, negatives))
        output["loss"] = sum(output[name] for name in LOSSES if name in output)
        return output

    def objectives(self) -> frozenset[str]:
        """The losses computed at present: `objectives`, or `vit_train_objectives` while the tower trains
        first."""
        first = self.config.vit_train_steps and not self.vision.frozen
        return frozenset(self.config.vit_train_objectives if first else self.config.objectives)

    def idle_parameters(self) -> bool:
        """True while a loss is left out: its heads get no gradient."""
        return len(self.objectives()) < len(OBJECTIVES)

    def trains_states(self, batch: dict[str, Any]) -> bool:
        """Whether the tower's states have a gradient."""
        return "image_embeds" not in batch and not self.vision.frozen

    def represent(self, batch: dict[str, Any], states: Tensor) -> Representation:
        """The uni-modal passes: image features from the queries alone, text features from [CLS] alone."""
        wanted = self.objectives()
        keys = self.image_keys(states)
        image = self.qformer(images=[(keys, 1)])
        feats = None
        if "itc" in wanted:
            feats = Features(self._project_image(image.queries), self.text_feats(batch))
        elif "itm" in wanted:  # to draw negatives only
            feats = Features(self._project_image(image.queries).detach(), self.text_feats(batch).detach())
        return Representation(feats, states, keys, image.cache)

    def text_feats(self, batch: dict[str, Any]) -> Tensor:
        """(B, E), unit norm, from [CLS]."""
        text = self.qformer.embedding(batch["text_ids"])
        states = self.qformer(text, padding_mask(batch["text_mask"]), keep="first").text
        return F.normalize(at_least_float32(self.text_proj(states[:, 0])), dim=-1)

    def _project_image(self, queries: Tensor) -> Tensor:
        return F.normalize(at_least_float32(self.vision_proj(queries)), dim=-1)  # (B, Q, E)

    def pool(self, batch: dict[str, Any], feats: Features, states: Tensor, **where: Any) -> Pool:
        """The global batch that the local rows are contrasted with (`contrast.gather_pool`)."""
        use_ids, grad = self.config.image_id_targets, self.config.gather_with_grad
        return gather_pool(batch, feats, states, use_ids=use_ids, grad=grad, **where)

    def contrast(self, batch: dict[str, Any], feats: Features, pool: Pool) -> tuple[Output, Negatives | None]:
        """The ITC loss of the local rows, and the hard negatives that its similarities suggest for ITM."""
        wanted = self.objectives()
        found = contrast(batch, feats, pool, self.temp, self.config.label_smoothing)
        output = found.figures(self.temp) if "itc" in wanted else Output()
        if "itm" not in wanted:
            return output, None
        hard = self.config.hard_negatives
        return output, draw_negatives(batch, found, pool, self.negative_sampler, hard=hard)

    def match(self, batch: dict[str, Any], seen: Representation, pool: Pool, negatives: Negatives) -> Output:
        """The ITM loss: B pairs, then each image with a wrong text, then each text with a wrong image."""
        images = [(seen.keys, 2), (self._negative_keys(pool, negatives), 1)]
        return matching(batch, pool, negatives, lambda ids, mask: self.itm_logits(images, ids, mask))

    def _negative_keys(self, pool: Pool, negatives: Negatives) -> ImageKeys:
        if pool.keys is not None:
            return pool.keys.select(negatives.image)
        # `ln_vision` and the projections are applied here, to the states as the tower gave them, so that
        # after the mean over ranks their gradients are the global batch's.
        return self.image_keys(pool.fetch_states(negatives.image))

    def itm_logits(self, images: list[tuple[ImageKeys, int]], text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(R, 2): the head on the mean query output, which is the mean of the head over the queries."""
        query_mask = text_mask.new_ones(len(text_mask), self.config.num_query_token)
        mask = padding_mask(torch.cat([query_mask, text_mask], dim=1))
        output = self.qformer(self.qformer.embedding(text_ids), mask, images, keep="queries")
        return self.itm_head(output.queries.mean(dim=1))

    def narrate(self, batch: dict[str, Any], seen: Representation) -> Output:
        """The LM loss: [DEC] and the text, behind the queries of the image pass."""
        ids, mask = decoder_input(batch["text_ids"], batch["text_mask"], self.dec_id)
        attention = causal_mask(mask, self.config.num_query_token)
        hidden = self.qformer(self.qformer.embedding(ids), attention, past=seen.cache).text
        labels = decoder_labels(batch["text_ids"], batch["text_mask"])
        words, smoothing = self.qformer.embedding.word.weight, self.config.label_smoothing
        return Output(loss_lm=caption_loss(hidden, labels, self.lm_head, words, batch, smoothing))

    @property
    def dec_id(self) -> int:
        """Id of [DEC]: the tokenizer's, or the last row of the vocabulary, where LAVIS adds it."""
        read = self._word_pieces
        known = self.qformer.embedding.word.num_embeddings - 1 if read is None else read.dec_id
        return int(self.config.special_ids.get("dec", known))

    # Inference

    def caption_writer(self, samples: dict[str, Any]) -> tuple[TextWriter, int]:
        """Text behind the queries, which look at the pictures as in `narrate`."""
        keys = self.image_keys(self.image_states(samples))
        queries = self.qformer(images=[(keys, 1)]).cache
        return QFormerWriter(self.qformer, self.lm_head, self.dec_id, queries), keys.rows

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        """Features of images, texts or pairs, as LAVIS names them.

        Args:
            samples: `image` and/or `text_input` (or `text_ids`, `text_mask`).
            mode: `image`: `image_embeds` (B, Q, D), `image_embeds_proj` (B, Q, E) unit norm; `text`:
                `text_embeds` (B, T, D), `text_embeds_proj` (B, T, E) unit norm (use token 0); `multimodal`:
                `multimodal_embeds` (B, Q, D), the queries with the text attached.

        Returns:
            What the mode names, without gradients; the others of LAVIS's five names are None.

        Raises:
            UsageError: unknown mode.
        """
        if mode not in ("image", "text", "multimodal"):
            raise UsageError(
                f"extract_features: unknown mode {mode!r}{hint(mode, ('image', 'text', 'multimodal'))}"
            )
        if mode == "image":
            queries = self.qformer(images=[(self.image_keys(self.image_states(samples)), 1)]).queries
            return FeatureOutput(image_embeds=queries, image_embeds_proj=self._project_image(queries))
        samples = self.with_text(samples, self.config.qformer.max_positions)
        text = self.qformer.embedding(samples["text_ids"])
        mask = samples["text_mask"]
        if mode == "text":
            states = self.qformer(text, padding_mask(mask)).text
            return FeatureOutput(
                text_embeds=states, text_embeds_proj=F.normalize(self.text_proj(states), dim=-1)
            )
        mask = torch.cat([mask.new_ones(len(mask), self.config.num_query_token), mask], dim=1)
        keys = self.image_keys(self.image_states(samples))
        output = self.qformer(text, padding_mask(mask), [(keys, 1)], keep="queries")
        return FeatureOutput(multimodal_embeds=output.queries)

    def compute_itm(self, image_inputs: Tensor, text_ids: Tensor, text_atts: Tensor) -> Tensor:
        """(B,) raw matching logits of aligned pairs.

        Args:
            image_inputs: (B, P, D_image), states of the tower after `ln_vision`, as LAVIS passes them.
            text_ids: int64 (B, T).
            text_atts: bool or 0/1 (B, T).
        """
        keys = self.qformer.image_keys(image_inputs)
        return self.itm_logits([(keys, 1)], text_ids, text_atts.bool())[:, 1]

    def retrieval_images(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Image features (B, Q, E), and the tower's states (B, P, D_image) for `rerank`."""
        states = self.image_states(batch)
        queries = self.qformer(images=[(self.image_keys(states), 1)]).queries
        return self._project_image(queries), states

    def retrieval_texts(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Text features (B, E)."""
        return self.text_feats({"text_ids": text_ids, "text_mask": text_mask})

    def retrieval_scores(self, image_feats: Tensor, text_feats: Tensor) -> Tensor:
        """ITC similarities without temperature, (images, texts)."""
        return similarity(image_feats, text_feats)

    def retrieval_keys(self, states: Tensor) -> ImageKeys:
        """What all texts look at that B images of `retrieval_images` are matched with, computed once."""
        return self.image_keys(states)

    # Freezing, checkpoints, optimizer

    def after_step(self, outputs: Sequence[Output]) -> None:
        """Keep the temperature above its bound, where there is one."""
        if self.config.min_temp:
            self.temp.data.clamp_(min=self.config.min_temp)


@MODELS.register("blip2_image_text_matching")
class Blip2ImageTextMatching(Blip2Qformer):
    """Stage 1 as a judge of aligned pairs.

    Shape:
        samples: `image` and `text_input` of B pairs.
        returns: `match_head="itm"`: (B, 2) logits; `"itc"`: (B, 1) cosine of the best query.
    """

    def forward(self, samples: dict[str, Any], match_head: str = "itm") -> Any:
        if match_head not in ("itm", "itc"):
            raise UsageError(f"match_head: unknown head {match_head!r}{hint(match_head, ('itm', 'itc'))}")
        samples = self.with_text(samples)
        keys = self.image_keys(self.image_states(samples))
        if match_head == "itm":
            return self.itm_logits([(keys, 1)], samples["text_ids"], samples["text_mask"])
        image_feats = self._project_image(self.qformer(images=[(keys, 1)]).queries)
        text_feats = self.text_feats(samples)
        return torch.einsum("bqe,be->bq", image_feats, text_feats).max(dim=1, keepdim=True).values
