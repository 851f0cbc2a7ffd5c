"""Stage-1 inference against transformers' `Blip2ForImageTextRetrieval` with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

from blip.formats import hf
from blip.models.blip2_qformer import Blip2ImageTextMatching, Blip2QformerConfig
from blip.models.qformer import QFormerConfig
from blip.models.vision import VisionConfig
from blip.weights import load_into

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
IMAGE, PATCH, WIDTH, QUERIES, VOCAB, POSITIONS, EMBED = 40, 8, 48, 5, 60, 20, 16
# transformers has one epsilon for the blocks and for the norm that LAVIS calls `ln_vision` and gives 1e-5.
EPS = 1e-5
TRAINED_ONLY = ("lm_head.*", "temp")


@pytest.fixture(scope="module")
def theirs() -> Blip2ForImageTextRetrieval:
    vision = Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=IMAGE,
        patch_size=PATCH,
        layer_norm_eps=EPS,
        attention_dropout=0.0,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=72,
        max_position_embeddings=POSITIONS,
        use_qformer_text_input=True,
    )
    text = OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=32)
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=QUERIES,
        image_text_hidden_size=EMBED,
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    randomize(model)
    return model


def randomize(model: torch.nn.Module) -> None:
    """Weights at which nothing is negligible: norms, biases, [CLS] and queries too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else noise * (0.2 if parameter.ndim > 1 else 0.1))
        for name, parameter in model.named_parameters():
            if name.endswith("self_attn.qkv.bias"):
                parameter[WIDTH : 2 * WIDTH] = 0  # as in every released checkpoint


@pytest.fixture(scope="module")
def ours(theirs: Blip2ForImageTextRetrieval) -> Blip2ImageTextMatching:
    config = Blip2QformerConfig(
        image_size=IMAGE,
        vit_precision="fp32",
        vit=VisionConfig(patch_size=PATCH, width=WIDTH, depth=3, heads=3, mlp_dim=100, norm_eps=EPS),
        num_query_token=QUERIES,
        qformer=QFormerConfig(width=32, depth=4, num_heads=4, mlp_dim=72, max_positions=POSITIONS),
        embed_dim=EMBED,
        max_txt_len=12,
        vocab_size=VOCAB,
    )
    model = Blip2ImageTextMatching(config).eval()
    weights = hf.table("blip2_image_text_matching").to_ours(theirs.state_dict()).state
    report = load_into(model, weights, source="transformers", allow_missing=TRAINED_ONLY)
    assert report.unexpected == []
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text_mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    text_ids = torch.randint(1, VOCAB, (3, 7), generator=generator).masked_fill(~text_mask, 0)
    return {
        "image": torch.randn(3, 3, IMAGE, IMAGE, generator=generator),
        "text_ids": text_ids,
        "text_mask": text_mask,
    }


def outputs(model: Blip2ForImageTextRetrieval, batch: dict[str, Tensor], itm: bool) -> Any:
    tokens = {"input_ids": batch["text_ids"], "attention_mask": batch["text_mask"].long()}
    with torch.no_grad():
        return model(pixel_values=batch["image"], use_image_text_matching_head=itm, **tokens)


@torch.no_grad()
def test_features_are_those_of_transformers(
    theirs: Blip2ForImageTextRetrieval, ours: Blip2ImageTextMatching, batch: dict[str, Tensor]
) -> None:
    expected = outputs(theirs, batch, itm=False)
    image = ours.extract_features(batch, mode="image")
    text = ours.extract_features(batch, mode="text")
    states = ours.normed(ours.image_states(batch))
    torch.testing.assert_close(states, expected.vision_model_output.last_hidden_state, **CLOSE)
    torch.testing.assert_close(image.image_embeds_proj, expected.image_embeds, **CLOSE)
    torch.testing.assert_close(text.text_embeds_proj[:, 0], expected.text_embeds, **CLOSE)
    real = batch["text_mask"]
    torch.testing.assert_close(
        text.text_embeds[real], expected.text_model_output.last_hidden_state[real], **CLOSE
    )


@torch.no_grad()
def test_itc_scores_are_those_of_transformers(
    theirs: Blip2ForImageTextRetrieval, ours: Blip2ImageTextMatching, batch: dict[str, Tensor]
) -> None:
    # Theirs are (queries' images, texts): all images against all texts.
    expected = outputs(theirs, batch, itm=False).logits_per_image
    image_feats, _ = ours.retrieval_images(batch)
    text_feats = ours.retrieval_texts(batch["text_ids"], batch["text_mask"])
    torch.testing.assert_close(ours.retrieval_scores(image_feats, text_feats), expected, **CLOSE)
    aligned = ours(batch, match_head="itc")
    torch.testing.assert_close(aligned[:, 0], expected.diagonal(), **CLOSE)


@torch.no_grad()
def test_itm_logits_are_those_of_transformers(
    theirs: Blip2ForImageTextRetrieval, ours: Blip2ImageTextMatching, batch: dict[str, Tensor]
) -> None:
    expected = outputs(theirs, batch, itm=True).logits_per_image
    torch.testing.assert_close(ours(batch, match_head="itm"), expected, **CLOSE)
    states = ours.normed(ours.image_states(batch))
    scores = ours.compute_itm(states, batch["text_ids"], batch["text_mask"])
    torch.testing.assert_close(scores, expected[:, 1], **CLOSE)


def test_the_export_is_their_state_dict(
    theirs: Blip2ForImageTextRetrieval, ours: Blip2ImageTextMatching
) -> None:
    exported, report = hf.table("blip2").to_theirs(ours.state_dict())
    expected = theirs.state_dict()
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=0, msg=name)
    omitted = {key for line in report if not line.target for key in line.source}
    assert omitted == {name for name in ours.state_dict() if name == "temp" or name.startswith("lm_head.")}
