"""What a step of BLIP pre-training reads and changes.

That the losses are right is shown in `tests/parity/test_blip_pretrain_reference.py`.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from blip import dist
from blip.errors import ConfigError
from blip.losses import argmax_sampler
from blip.models.blip_pretrain import NEGATIVE_FLOOR, BlipPretrain, BlipPretrainConfig
from blip.models.med import Med, MedConfig
from tests.reference.small_blip import MODELS, SIZES, small_blip, steps_of
from tests.reference.small_stage1 import (
    VOCAB,
    assert_same,
    global_batch,
    gradients,
    part_of,
    small_model,
)

FIGURES = {"loss", "loss_itc", "loss_itm", "loss_lm", "itc_acc", "itm_acc", "temp", "alpha"}
KINDS = ["pretrain", "retrieval"]


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(model: Any, batches: list[dict[str, Any]], lr: float = 1e-2) -> list[dict[str, Tensor]]:
    """Outputs of the steps taken."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    outputs = []
    for batch in batches:
        output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.after_step([output])
        outputs.append(output)
    return outputs


# What goes in and out


def test_a_step_gives_its_losses_and_figures() -> None:
    output = small_blip("pretrain")(global_batch(4, ids=True))
    assert set(output.scalars()) == FIGURES
    torch.testing.assert_close(output.loss, output.loss_itc + output.loss_itm + output.loss_lm)
    assert output.image_feats_m.shape == output.text_feats_m.shape == (4, 8)
    assert [k for k, v in output.items() if v.requires_grad] == ["loss_itc", "loss_lm", "loss_itm", "loss"]


def test_lavis_samples_train_in_one_process_without_a_group() -> None:
    """Pictures and strings, and the epoch and iteration that LAVIS's loop tells."""
    assert not dist.initialized()
    for kind in KINDS:
        model = small_blip(kind, tokenizer="scenes", vocab_size=None, med=long_texts()).float()
        samples = {
            "image": torch.randn(3, 3, 16, 16),
            "text_input": ["a red circle", "two blue squares", "a green star"],
            "image_id": torch.tensor([1, 1, 2]),
            "epoch": 1,
            "iters": 3,
            "num_iters_per_epoch": 4,
        }
        output = model(samples)
        assert float(output.alpha) == pytest.approx(0.4 * 7 / 8)
        assert torch.isfinite(output.loss)


def long_texts() -> Any:
    _, config_class, _ = MODELS["pretrain"]
    return type(config_class().med)(**{**SIZES["med"], "max_positions": 40})


def test_features_of_a_tower_may_stand_in_for_pictures() -> None:
    model, batch = small_blip("pretrain"), global_batch(4, ids=True)
    given = {k: v for k, v in batch.items() if k != "image"} | {"image_embeds": model.vision(batch["image"])}
    model.twin.copy_from(model)
    torch.testing.assert_close(model(given).loss, model(batch).loss)


def test_alpha_grows_over_two_epochs_and_stays() -> None:
    model = small_blip("pretrain")
    steps = [model.alpha({"step": step, "num_iters_per_epoch": 10}) for step in (0, 5, 10, 19, 20, 500)]
    assert steps == pytest.approx([0, 0.1, 0.2, 0.38, 0.4, 0.4])
    named = [
        model.alpha({"epoch": e, "iters": i, "num_iters_per_epoch": 10}) for e, i in ((0, 5), (1, 9), (7, 0))
    ]
    assert named == pytest.approx([0.1, 0.38, 0.4])
    assert model.alpha({"step": 3}) == 0.4
    assert small_blip("pretrain", alpha_ramp_epochs=0).alpha({"step": 0, "num_iters_per_epoch": 10}) == 0.4


# What a step reads, and what it changes


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_change_nothing(kind: str) -> None:
    """So a step that is skipped leaves no trace; LAVIS moves twin and queue before it knows."""
    model = small_blip(kind)
    before = state(model)
    first = model(global_batch(4, ids=True))
    first.loss.backward()
    assert_same(state(model), before, 0.0)
    assert_same({"loss": model(global_batch(4, ids=True)).loss.detach()}, {"loss": first.loss.detach()}, 0.0)


def test_after_step_moves_the_twin_fills_the_queue_and_bounds_the_temperature() -> None:
    model, batch = small_blip("pretrain"), global_batch(4, ids=True)
    before, output = state(model), model(batch)
    model.after_step([output])
    after = state(model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"twin", "queue"}
    twin = [name for name in before if name.startswith("twin.")]
    for name in twin:
        wanted = 0.9 * before[name] + 0.1 * after[name.removeprefix("twin.")]
        torch.testing.assert_close(after[name], wanted, atol=1e-12, rtol=0)
    assert torch.equal(after["queue.image"][:4], output.image_feats_m)
    assert torch.equal(after["queue.text"][:4], output.text_feats_m)
    assert torch.equal(after["queue.image"][4:], before["queue.image"][4:])
    assert after["queue.ids"].tolist() == [-100] * 10  # every pair is a picture of its own
    assert int(after["queue.pointer"]) == 4
    for value, bound in ((0.7, 0.5), (-0.1, 0.001), (0.2, 0.2)):
        model.temp.data.fill_(value)
        model.after_step([])
        assert float(model.temp.detach()) == pytest.approx(bound)


def test_micro_batches_enter_the_queue_in_order_and_the_twin_moves_once() -> None:
    model, batch = small_blip("pretrain", queue_size=6), global_batch(8, ids=True)
    before = state(model)
    outputs = [model(part_of(batch, *cut, shares=2)) for cut in ((0, 3), (3, 8))]
    model.after_step(outputs)
    features = torch.cat([output.text_feats_m for output in outputs])
    assert torch.equal(model.queue.text, torch.cat([features[6:], features[2:6]]))
    name = "text.embedding.word.weight"
    wanted = 0.9 * before[f"twin.{name}"] + 0.1 * before[name]
    torch.testing.assert_close(model.state_dict()[f"twin.{name}"], wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, 3, 5, 100])
def test_any_batch_goes_with_any_queue(kind: str, size: int) -> None:
    """LAVIS needs a queue that the batch divides (BLIP issue 101), and one pair is too few for it."""
    model = small_blip(kind, queue_size=size)
    for output in train(model, steps_of(4, rows=[5, 1, 8, 3])):
        assert all(torch.isfinite(value) for value in output.scalars().values())
    assert int(model.queue.pointer) == (17 % size if size else 0)
    assert all(torch.isfinite(value).all() for value in state(model).values())


def test_no_random_entry_is_left_when_as_many_pairs_have_passed() -> None:
    model = small_blip("pretrain")
    random = model.queue.text.clone()
    train(model, steps_of(3, rows=[4, 4, 1]))
    assert (model.queue.text == random).all(dim=1).tolist() == [False] * 9 + [True]
    train(model, steps_of(1, rows=[1]))
    assert not (model.queue.text == random).all(dim=1).any()


def test_queue_and_twin_have_no_gradient_and_the_rest_has() -> None:
    model = small_blip("pretrain")
    model(global_batch(4, ids=True)).loss.backward()
    assert set(gradients(model)) == {n for n, _ in model.named_parameters() if not n.startswith("twin.")}


def test_saved_and_loaded_training_goes_on_bit_by_bit() -> None:
    batches = steps_of(6, rows=[5, 8, 2])
    model = small_blip("retrieval")
    train(model, batches[:3])
    saved = deepcopy(model.state_dict())
    again = small_blip("retrieval")
    again.load_state_dict(saved)
    for trained in (model, again):
        train(trained, batches[3:])
    assert_same(state(again), state(model), 0.0)


# The twin's noise


@pytest.mark.parametrize("kind", ["pretrain", "retrieval", "classification"])
@pytest.mark.parametrize("noise", [True, False])
def test_dropout_acts_in_the_twin_as_in_blip_unless_it_is_switched_off(kind: str, noise: bool) -> None:
    model = small_blip(kind, dropout=0.5, vit_drop_path_rate=0.5, twin_dropout=noise)
    batch = global_batch(6, ids=True)
    tell = model.twin_logits if kind == "classification" else (lambda some: model.twin_feats(some).text)
    one, other = tell(batch), tell(batch)
    assert torch.equal(one, other) != noise
    model.eval()
    assert torch.equal(tell(batch), tell(batch))
    model.train()
    assert any(part.training for part in model.twin.modules()) == noise
    assert model.text.training


def test_the_drop_path_that_is_asked_for_is_the_one_of_both_towers() -> None:
    for rate in (0.0, 0.3):
        model = small_blip("pretrain", vit_drop_path_rate=rate)
        for tower in (model.vision, model.twin["vision"]):
            assert tower.config.drop_path_rate == rate


# Negatives


def test_weights_of_negatives_are_the_softmax_and_a_floor() -> None:
    seen: dict[str, Tensor] = {}

    def noted(weights: Tensor, rows: Tensor, stream: str) -> Tensor:
        seen[stream] = weights
        return argmax_sampler(weights, rows, stream)

    model, batch = small_blip("pretrain"), global_batch(5, ids=True)
    model.negative_sampler = noted
    views = model.views(batch)
    _, found, _ = model.contrast(batch, views)
    model(batch)
    off = ~torch.eye(5, dtype=torch.bool)
    for stream, sim in (("image", found.sim_t2i), ("text", found.sim_i2t)):
        wanted = (torch.softmax(sim, dim=1) + NEGATIVE_FLOOR) * off
        torch.testing.assert_close(seen[stream], wanted.detach())
    assert set(seen) == {"image", "text"}


@pytest.mark.parametrize("kind", ["pretrain", "retrieval", "stage 1"])
def test_negatives_are_drawn_equally_often_where_they_need_not_be_hard(kind: str) -> None:
    seen: dict[str, Tensor] = {}

    def noted(weights: Tensor, rows: Tensor, stream: str) -> Tensor:
        seen[stream] = weights / weights.sum(dim=1, keepdim=True)
        return argmax_sampler(weights, rows, stream)

    batch = global_batch(5, ids=False)
    off = ~torch.eye(5, dtype=torch.bool)
    for hard in (True, False):
        make = small_model if kind == "stage 1" else partial(small_blip, kind)
        model = make(hard_negatives=hard)
        model.negative_sampler = noted
        assert torch.isfinite(model(batch).loss_itm)
        assert set(seen) == {"image", "text"}
        for weights in seen.values():
            equal = torch.allclose(weights, off.to(weights) / 4, atol=1e-9)
            assert equal != hard
            assert torch.equal(weights > 0, off)


def test_drawn_negatives_depend_on_seed_and_step_alone() -> None:
    model, drawn = small_blip("pretrain", temp=0.5), []
    for seed, step in ((1, 2), (1, 2), (1, 3), (2, 2)):
        batch = global_batch(8, ids=False) | {"seed": seed, "step": step}
        views = model.views(batch)
        _, found, pool = model.contrast(batch, views)
        _, negatives = model.negatives(batch, views, found, pool)
        drawn.append(negatives.image.tolist() + negatives.text.tolist())
    assert drawn[0] == drawn[1]
    assert len({tuple(some) for some in drawn}) == 3
    assert all(i != j for some in drawn for i, j in enumerate(some[:8]))


# Configuration


def test_the_recipes_sizes_are_blips() -> None:
    config = BlipPretrainConfig()
    assert (config.queue_size, config.momentum, config.alpha, config.temp) == (57600, 0.995, 0.4, 0.07)
    assert (config.min_temp, config.max_temp, config.max_txt_len) == (0.001, 0.5, 30)
    assert (config.share, config.label_smoothing, config.embed_dim) == ("all_but_sa", 0.1, 256)
    assert BlipPretrain.presets["large"]["vit_drop_path_rate"] == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"negative_all_rank": True}, "set itc_all_rank to the same value"),
        ({"temp": 0.6}, "is not between min_temp"),
        ({"queue_size": -1}, "queue_size"),
        ({"momentum": 1.5}, "momentum"),
        ({"alpha": -0.1}, "alpha"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlipPretrainConfig(**values)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="no preset 'huge'"):
        BlipPretrain.from_preset("huge")


# What a step costs


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Calls of a function from now on, by the number of rows of their first tensor."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(next(arg for arg in args if isinstance(arg, Tensor))))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)
    return calls


def test_a_step_has_one_pass_for_all_pairs_and_computes_keys_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLIP has two passes for pairs and computes an image's keys for each pair and for the decoder again."""
    model, batch = small_blip("pretrain"), global_batch(4, ids=True)
    passes, keys = counted(monkeypatch, Med, "forward"), counted(monkeypatch, Med, "image_keys")
    model(batch)
    assert passes == [4, 4, 4, 12]  # text alone, the twin's, the decoder's, and all pairs
    assert keys == [4]


@pytest.mark.parametrize(("ids", "calls"), [(False, [4]), (True, [4, 4])])
def test_features_of_both_kinds_travel_together(
    ids: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One collective for the queue's features, and one for picture numbers, which are integers."""
    gathers = counted(monkeypatch, dist, "gather_rows")
    small_blip("retrieval")(global_batch(4, ids=ids))
    assert gathers == calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [False, True])
def test_a_step_reads_nothing_back_from_the_device(
    kind: str, ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAVIS reads each negative back, twice per pair. Nor does it wait for a number on its way there."""
    model, batch = small_blip(kind), part_of(global_batch(8, ids=ids), 0, 8)
    batch["num_targets"] = int(batch["text_mask"][:, 1:].sum())  # the trainer counts them before the copy
    reads: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
        original = getattr(Tensor, name)

        def noted(self: Tensor, *args: Any, _name: str = name, _original: Any = original, **kw: Any) -> Any:
            reads.append(_name)
            return _original(self, *args, **kw)

        monkeypatch.setattr(Tensor, name, noted)
    monkeypatch.setattr(torch, "tensor", lambda *args, **kw: pytest.fail("a number is copied to the device"))
    output = model(batch)
    output["loss"].backward()
    model.after_step([output])
    monkeypatch.undo()
    # On a CPU, which waits for nothing, targets of the LM loss are found by `nonzero`.
    assert reads == (["nonzero"] if kind == "pretrain" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_leaves_queue_temperature_and_losses_in_float32(kind: str) -> None:
    model, batch = small_blip(kind).float(), global_batch(8, ids=True)
    batch["image"] = batch["image"].float()
    whole = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch)
    output.loss.backward()
    model.after_step([output])
    assert all(value.dtype == torch.float32 for value in output.scalars().values())
    assert {value.dtype for value in model.queue.buffers()} == {torch.float32, torch.int64}
    for name in ("loss_itc", "loss_itm"):
        torch.testing.assert_close(output[name], whole[name], atol=0.1, rtol=0.05)


# What the parts start from


def bert_folder(folder: Path) -> Path:
    """A BERT without [DEC] and [ENC]."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCAB - 2,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("share", ["all", "all_but_sa", "all_but_ca", "none"])
def test_encoder_decoder_and_twin_start_from_bert(share: str, tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    med = MedConfig(**SIZES["med"], init_from=str(folder))
    model = small_blip("pretrain", share=share, med=med)
    assert len(model.load_parts()) >= 1
    bert = BertForMaskedLM.from_pretrained(folder).state_dict()
    theirs = {name.removeprefix("bert."): value.double() for name, value in bert.items()}
    for mode in ("encode", "decode"):
        word = model.text.embedding_of(mode).word.weight
        assert torch.equal(word[:-2], theirs["embeddings.word_embeddings.weight"])
        for i, layer in enumerate(model.text.blocks()):
            query = layer.part("self_attn", mode).query.weight
            assert torch.equal(query, theirs[f"encoder.layer.{i}.attention.self.query.weight"])
            expand = layer.part("ffn", mode).expand.weight
            assert torch.equal(expand, theirs[f"encoder.layer.{i}.intermediate.dense.weight"])
    assert torch.equal(model.lm_head.transform.weight, theirs["cls.predictions.transform.dense.weight"])
    state = model.state_dict()
    twin = {n: v for n, v in state.items() if n.startswith("twin.")}
    assert_same(twin, {n: state[n.removeprefix("twin.")] for n in twin}, 0.0)


def test_a_bert_without_a_head_leaves_ours_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = bert_folder(tmp_path / "bert")
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(tmp_path / "plain")
    capfd.readouterr()
    model = small_blip("pretrain", med=MedConfig(**SIZES["med"], init_from=str(tmp_path / "plain")))
    before = {name: value.clone() for name, value in model.lm_head.named_parameters() if "word" not in name}
    drawn = torch.get_rng_state()
    model.load_parts()
    assert torch.equal(torch.get_rng_state(), drawn)  # nor is anything drawn for it
    bert = BertModel.from_pretrained(tmp_path / "plain", add_pooling_layer=False).state_dict()
    word = bert["embeddings.word_embeddings.weight"].double()
    assert torch.equal(model.text.embedding_of("encode").word.weight[:-2], word)
    after = dict(model.lm_head.named_parameters())
    assert {"transform.weight", "norm.weight"} <= before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "MISSING" not in capfd.readouterr().err
