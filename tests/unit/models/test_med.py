"""MED: who shares what, and that each pass is the plain one (float64) and transformers' (float32)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
)
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from blip.layers.attention import PairAttention
from blip.layers.cache import TokenCache
from blip.layers.masks import causal_mask, padding_mask
from blip.layers.text import LMHead
from blip.models.blip_caption import BlipCaption
from blip.models.blip_features import BlipImageTextMatching
from blip.models.blip_pretrain import BlipPretrain
from blip.models.blip_vqa import BlipVqa
from blip.models.med import Med, MedConfig
from tests.reference import blip as reference
from tests.reference.small_blip import (
    IMAGE_WIDTH,
    PATCHES,
    WIDTH,
    picture_states,
    small_blip,
    small_med,
    texts,
)
from tests.reference.small_stage1 import VOCAB, assert_same, gradients

NEAR: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-8}
SHARES = ("all", "all_but_sa", "all_but_ca", "none")
ROWS = 4

# Sizes and sharing


def parameters(model: torch.nn.Module) -> int:
    """Of those that train; a twin does not."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("share", "millions"), [("all", 224), ("all_but_sa", 252), ("all_but_ca", 252), ("none", 361)]
)
def test_pre_training_has_the_papers_sizes(share: str, millions: int) -> None:
    with torch.device("meta"):
        model = BlipPretrain.from_preset("base", share=share, vocab_size=30524)
    assert round(parameters(model) / 1e6) == millions
    twin = sum(p.numel() for p in model.twin.parameters())
    assert round(twin / 1e6) == 195  # neither cross-attention nor a decoder


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (BlipCaption, BlipForConditionalGeneration),
        (BlipVqa, BlipForQuestionAnswering),
        (BlipImageTextMatching, BlipForImageTextRetrieval),
    ],
)
def test_downstream_models_have_the_sizes_of_transformers(ours: Any, theirs: Any) -> None:
    with torch.device("meta"):
        model = ours.from_preset(image_size=384, vocab_size=30524)
        other = theirs(BlipConfig(text_config={"vocab_size": 30524}))
    assert parameters(model) == parameters(other)


def test_the_large_model_has_a_wider_tower_and_wider_keys() -> None:
    with torch.device("meta"):
        model = BlipPretrain.from_preset("large", vocab_size=30524)
    tower = sum(p.numel() for p in model.vision.parameters())
    assert tower == 303_301_632
    assert model.text.layers[0].cross_attn.key.weight.shape == (768, 1024)


@pytest.mark.parametrize("share", SHARES)
def test_each_parameter_stands_once_everywhere(share: str, tmp_path: Any) -> None:
    model = small_blip("pretrain", share=share)
    listed = [p.data_ptr() for p in model.parameters()]
    assert len(listed) == len(set(listed))
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert len(state) == len(set(state.values()))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys()
    count = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert sum(tensor.numel() for tensor in saved.values()) == count


EVERYTHING = ("embedding", "self_attn", "cross_attn", "ffn")
OWN = {"all": (), "all_but_sa": ("self_attn",), "all_but_ca": ("cross_attn",), "none": EVERYTHING}


def used(med: Med, output: Tensor) -> set[str]:
    """Kinds of parameters that an output depends on, `decode.` in front of the decoder's own."""
    med.zero_grad()
    output.square().sum().backward()
    kinds = set()
    for name, grad in gradients(med).items():
        if grad.abs().max() > 1e-9:
            found = re.fullmatch(
                r"(decode_)?(?:embedding|layers\.\d+\.(decode\.)?(\w+))\.\w+(?:\.\w+)?", name
            )
            assert found is not None, name
            own = "decode." if found[1] or found[2] else ""
            kinds.add(own + (found[3] or "embedding"))
    return kinds


@pytest.mark.parametrize("share", SHARES)
def test_each_pass_uses_its_own_and_the_shared_parts(share: str) -> None:
    med, (ids, mask), states = small_med(share), texts(ROWS), picture_states(ROWS)
    kinds = {re.sub(r"^(decode_|.*decode\.).*", "decode", name) for name, _ in med.named_parameters()}
    assert ("decode" in kinds) == bool(OWN[share])
    assert used(med, med.unimodal(ids, mask)) == {"embedding", "self_attn", "ffn"}
    assert used(med, med.grounded(ids, mask, [(med.image_keys(states), 1)])) == set(EVERYTHING)
    decoded = med.decode(ids, mask, [(med.image_keys(states, "decode"), 1)])
    assert used(med, decoded) == {f"decode.{kind}" if kind in OWN[share] else kind for kind in EVERYTHING}
    assert med.shares_image_keys() == ("cross_attn" not in OWN[share])


def test_changing_the_decoders_self_attention_changes_no_encoder_output() -> None:
    med, (ids, mask), states = small_med(), texts(ROWS), picture_states(ROWS)

    def passes() -> list[Tensor]:
        images = [(med.image_keys(states), 1)]
        return [med.unimodal(ids, mask), med.grounded(ids, mask, images), med.decode(ids, mask, images)]

    before = passes()
    with torch.no_grad():
        for layer in med.blocks():
            for parameter in layer.decode.parameters():
                parameter.add_(1)
    unimodal, grounded, decoded = passes()
    assert torch.equal(unimodal, before[0])
    assert torch.equal(grounded, before[1])
    assert not torch.allclose(decoded, before[2])


# Passes


@pytest.mark.parametrize("share", SHARES)
def test_the_three_passes_are_those_of_plain_loops(share: str) -> None:
    med, (ids, mask), states = small_med(share), texts(ROWS), picture_states(ROWS)
    weights = dict(med.named_parameters())
    images = [(med.image_keys(states), 1)]
    decode_images = [(med.image_keys(states, "decode"), 1)]
    unimodal, grounded = med.unimodal(ids, mask), med.grounded(ids, mask, images)
    decoded = med.decode(ids, mask, decode_images)
    for row in range(ROWS):
        own = ids[row][mask[row]].tolist()
        with torch.no_grad():
            alone = reference.med(weights, own, [])
            looking = reference.med(weights, [med.enc_id, *own[1:]], [states[row]])
            telling = reference.med(weights, [med.dec_id, *own[1:]], [states[row]], decode=True)
        torch.testing.assert_close(unimodal[row, : len(own)], alone, **NEAR)
        torch.testing.assert_close(grounded[row, : len(own)], looking, **NEAR)
        torch.testing.assert_close(decoded[row, : len(own)], telling[: decoded.shape[1]], **NEAR)


def test_the_first_token_alone_is_the_first_of_all() -> None:
    med, (ids, mask), states = small_med(), texts(ROWS), picture_states(ROWS)
    images = [(med.image_keys(states), 1)]
    for whole, first in (
        (med.unimodal(ids, mask), med.unimodal(ids, mask, first_only=True)),
        (med.grounded(ids, mask, images), med.grounded(ids, mask, images, first_only=True)),
    ):
        assert first.shape == (ROWS, 1, WIDTH)
        torch.testing.assert_close(first, whole[:, :1], **NEAR)


def test_first_ids_are_replaced_and_the_rest_is_not() -> None:
    med, (ids, mask), states = small_med(), texts(ROWS), picture_states(ROWS)
    images, others = [(med.image_keys(states), 1)], ids.clone()
    others[:, 0] = 7
    assert (med.dec_id, med.enc_id) == (VOCAB - 2, VOCAB - 1)
    assert torch.equal(med.grounded(ids, mask, images), med.grounded(others, mask, images))
    assert torch.equal(med.decode(ids, mask, images), med.decode(others, mask, images))
    assert not torch.allclose(med.unimodal(ids, mask), med.unimodal(others, mask))
    assert int(ids[0, 0]) != 7  # what was handed in stays as it is
    as_they_are = med.grounded(others, mask, images, as_is=True)
    torch.testing.assert_close(as_they_are, med(others, padding_mask(mask), images).states, **NEAR)


def test_padding_changes_no_result_and_no_gradient() -> None:
    (ids, mask), states, found = texts(ROWS), picture_states(ROWS), []
    longest = int(mask.sum(dim=1).max())
    # One column of padding at least, since `decode` leaves out the last.
    for end, filler in ((longest + 1, 0), (longest + 2, 17)):
        med = small_med()
        some, real = ids[:, :end].masked_fill(~mask[:, :end], filler), mask[:, :end]
        images = [(med.image_keys(states), 1)]
        passes = [med.unimodal(some, real), med.grounded(some, real, images), med.decode(some, real, images)]
        passes = [states[real[:, : states.shape[1]]] for states in passes]
        torch.stack([states.square().sum() for states in passes]).sum().backward()
        found.append((passes, gradients(med)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, **NEAR)
    assert_same(found[0][1], found[1][1], 1e-8)


def test_a_decoded_token_sees_its_own_past_only() -> None:
    med, (ids, mask), states = small_med(), texts(ROWS), picture_states(ROWS)
    mask = torch.ones_like(mask)
    images, changed = [(med.image_keys(states), 1)], ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % (VOCAB - 2)
    one, other = med.decode(ids, mask, images), med.decode(changed, mask, images)
    assert torch.equal(one[:, :5], other[:, :5])
    assert (one[:, 5:] != other[:, 5:]).any(dim=2).all()


@pytest.mark.parametrize("share", SHARES)
def test_decoding_token_by_token_is_the_whole_pass(share: str) -> None:
    med, (ids, _), states = small_med(share), texts(ROWS), picture_states(ROWS)
    images, mask = [(med.image_keys(states, "decode"), 1)], torch.ones_like(ids, dtype=torch.bool)
    whole = med(ids, causal_mask(mask), images, "decode").states
    start = med(ids[:, :3], causal_mask(mask[:, :3]), images, "decode")
    torch.testing.assert_close(start.states, whole[:, :3], **NEAR)
    cache = TokenCache(start.cache, mask[:, :3])
    with torch.no_grad():
        for t in range(3, ids.shape[1]):
            state = med.step(ids[:, t], cache.lengths(), cache, images)
            torch.testing.assert_close(state, whole[:, t], **NEAR)


# Keys and values of images


def test_keys_of_an_image_computed_once_are_those_computed_for_every_pass() -> None:
    """Pairs, negatives and decoder; values and the gradients of everything, the images included."""
    wrong = torch.tensor([2, 0, 3, 1])
    (ids, mask), found = texts(ROWS), []
    for once in (True, False):
        med, states = small_med(), picture_states(ROWS).requires_grad_()
        if once:
            keys = med.image_keys(states)
            images = [(keys, 2), (keys.select(wrong), 1)]
            judged = med.grounded(torch.cat([ids, ids.flip(0), ids]), mask.repeat(3, 1), images)
            told = med.decode(ids, mask, [(keys, 1)])
        else:
            parts = [
                med.grounded(text, mask, [(med.image_keys(seen), 1)])
                for text, seen in ((ids, states), (ids.flip(0), states), (ids, states[wrong]))
            ]
            judged, told = torch.cat(parts), med.decode(ids, mask, [(med.image_keys(states, "decode"), 1)])
        (judged.square().sum() + told.pow(3).sum()).backward()
        assert states.grad is not None
        found.append(
            {"judged": judged.detach(), "told": told.detach(), "states": states.grad} | gradients(med)
        )
    assert_same(found[0], found[1], 1e-8)


def test_masked_states_are_not_looked_at() -> None:
    med, (ids, mask) = small_med(), texts(ROWS)
    seen = torch.arange(PATCHES) < torch.tensor([5, 3, 1, 4])[:, None]
    states = picture_states(ROWS)
    keys = med.image_keys(states, mask=seen)
    other = med.image_keys(states.masked_fill(~seen[..., None], 9.0), mask=seen)
    found = med.grounded(ids, mask, [(keys, 1)])
    torch.testing.assert_close(med.grounded(ids, mask, [(other, 1)]), found, **NEAR)
    short = med.image_keys(states[1:2, :3])
    torch.testing.assert_close(med.grounded(ids[1:2], mask[1:2], [(short, 1)]), found[1:2], **NEAR)
    turned = med.grounded(ids, mask, [(keys.select(torch.arange(ROWS).flip(0)), 1)])
    back = med.image_keys(states.flip(0), mask=seen.flip(0))
    torch.testing.assert_close(turned, med.grounded(ids, mask, [(back, 1)]), **NEAR)


# Two images


def pair(med: Med, ids: Tensor, mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
    images = [(med.image_keys(states, which=i), 1) for i, states in enumerate((first, second))]
    return med.grounded(ids, mask, images)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_two_images_are_averaged_below_and_merged_above(depth: int) -> None:
    med, (ids, mask) = small_med(None, images=2, depth=depth), texts(ROWS)
    merged = [layer.cross_attn.merge is not None for layer in med.blocks()]
    assert merged == [i >= depth // 2 for i in range(depth)]  # BLIP: layers 6 to 11 of 12
    first, second = picture_states(ROWS), picture_states(ROWS, seed=4)
    found, weights = pair(med, ids, mask, first, second), dict(med.named_parameters())
    for row in range(ROWS):
        own = ids[row][mask[row]].tolist()
        wanted = reference.med(weights, [med.enc_id, *own[1:]], [first[row], second[row]])
        torch.testing.assert_close(found[row, : len(own)], wanted, **NEAR)
    assert not torch.allclose(found, pair(med, ids, mask, second, first))


def test_each_image_has_an_attention_of_its_own_and_one_norm() -> None:
    attention = PairAttention(WIDTH, 2, IMAGE_WIDTH, 0.0, 1e-12, merge=True)
    names = {name.rsplit(".", 1)[0] for name, _ in attention.named_parameters()}
    each = {f"looks.{i}.{part}" for i in range(2) for part in ("query", "key", "value", "out")}
    assert names == each | {"merge", "norm"}
    assert attention.merge is not None
    assert attention.merge.weight.shape == (WIDTH, 2 * WIDTH)


# Against transformers

HEADS = {"query": "self.query", "key": "self.key", "value": "self.value", "out": "output.dense"}


def renamed(med: Med, mode: Any, lm_head: LMHead | None = None) -> dict[str, Tensor]:
    """The parameters of a mode by transformers' names."""
    embedding = med.embedding_of(mode)
    found = {
        "embeddings.word_embeddings.weight": embedding.word.weight,
        "embeddings.position_embeddings.weight": embedding.position.weight,
    }
    pairs: list[tuple[str, Any]] = [("embeddings.LayerNorm", embedding.norm)]
    for i, layer in enumerate(med.blocks()):
        for ours, theirs in (("self_attn", "attention"), ("cross_attn", "crossattention")):
            part, name = layer.part(ours, mode), f"encoder.layer.{i}.{theirs}"
            pairs += [(f"{name}.{their}", getattr(part, own)) for own, their in HEADS.items()]
            pairs.append((f"{name}.output.LayerNorm", part.norm))
        ffn, name = layer.part("ffn", mode), f"encoder.layer.{i}"
        pairs += [(f"{name}.intermediate.dense", ffn.expand), (f"{name}.output.dense", ffn.contract)]
        pairs.append((f"{name}.output.LayerNorm", ffn.norm))
    prefix = ""
    if lm_head is not None:
        prefix, head = "bert.", "cls.predictions.transform"
        pairs_of_head = [(f"{head}.dense", lm_head.transform), (f"{head}.LayerNorm", lm_head.norm)]
    found |= parameters_of(pairs)
    found = {prefix + name: value for name, value in found.items()}
    if lm_head is not None:
        found |= {
            f"{n}.{kind}": getattr(part, kind) for n, part in pairs_of_head for kind in ("weight", "bias")
        }
        found["cls.predictions.bias"] = found["cls.predictions.decoder.bias"] = lm_head.bias
        found["cls.predictions.decoder.weight"] = embedding.word.weight
    return {name: value.detach().clone() for name, value in found.items()}


def parameters_of(pairs: list[tuple[str, Any]]) -> dict[str, Tensor]:
    return {f"{name}.{kind}": getattr(part, kind) for name, part in pairs for kind in ("weight", "bias")}


def text_config(**more: Any) -> BlipTextConfig:
    return BlipTextConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        encoder_hidden_size=IMAGE_WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        layer_norm_eps=1e-12,
        bos_token_id=VOCAB - 2,
        **more,
    )


def copied(model: Any, weights: dict[str, Tensor]) -> Any:
    """transformers' model with our weights; nothing is left over on either side."""
    report = model.double().load_state_dict(weights, strict=False)
    assert report.unexpected_keys == []
    assert [name for name in report.missing_keys if not name.endswith("position_ids")] == []
    return model.eval()


def test_the_encoder_is_transformers_blip_text_model() -> None:
    med, (ids, mask), states = small_med(), texts(ROWS), picture_states(ROWS)
    theirs = copied(BlipTextModel(text_config(), add_pooling_layer=False), renamed(med, "encode"))
    with torch.no_grad():
        alone = theirs(ids, attention_mask=mask.long(), is_decoder=False).last_hidden_state
        enc = ids.clone()
        enc[:, 0] = med.enc_id
        seen = theirs(
            enc, attention_mask=mask.long(), encoder_hidden_states=states, is_decoder=False
        ).last_hidden_state
    torch.testing.assert_close(med.unimodal(ids, mask)[mask], alone[mask], **NEAR)
    torch.testing.assert_close(
        med.grounded(ids, mask, [(med.image_keys(states), 1)])[mask], seen[mask], **NEAR
    )


@pytest.mark.parametrize("share", SHARES)
def test_the_decoder_is_transformers_lm_head_model(share: str) -> None:
    med, (ids, mask), states = small_med(share), texts(ROWS), picture_states(ROWS)
    lm_head = LMHead(WIDTH, VOCAB, 1e-12).double()
    torch.nn.init.normal_(lm_head.bias)
    theirs = copied(BlipTextLMHeadModel(text_config(is_decoder=True)), renamed(med, "decode", lm_head))
    dec = ids.clone()
    dec[:, 0] = med.dec_id
    hidden = med.decode(ids, mask, [(med.image_keys(states, "decode"), 1)])
    logits = lm_head(hidden, med.embedding_of("decode").word.weight)
    with torch.no_grad():
        wanted = theirs(dec, attention_mask=mask.long(), encoder_hidden_states=states).logits[:, :-1]
    real = mask[:, :-1]
    torch.testing.assert_close(logits[real], wanted[real], **NEAR)


# Sizes that cannot be


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(Exception, match="num_heads: 3 does not divide the width 16"):
        Med(MedConfig(width=16, num_heads=3), VOCAB, IMAGE_WIDTH)
