"""Facts about the training step: which losses are computed while the tower trains first, and how."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from blip.batch import Output
from blip.config.schema import RunConfig
from blip.engine.optim import Ema, build_optimizer
from blip.models.blip2_config import OBJECTIVES
from blip.models.blip2_qformer import Blip2Qformer
from tests.reference.small_stage1 import assert_same, global_batch, gradients, part_of, small_model

SUBSETS = [("itc",), ("itm",), ("lm",), ("itc", "lm"), ("itm", "lm"), ("itc", "itm")]
FIGURES = {"itc": {"loss_itc", "itc_acc", "temp"}, "itm": {"loss_itm", "itm_acc"}, "lm": {"loss_lm"}}


def first_phase(*objectives: str) -> Blip2Qformer:
    return small_model(vit_train_steps=3, vit_train_objectives=list(objectives))


def batch() -> dict[str, Any]:
    return part_of(global_batch(5, ids=True), 0, 5)


@pytest.mark.parametrize("objectives", SUBSETS, ids="+".join)
def test_what_is_left_out_is_absent_and_the_rest_is_unchanged(objectives: tuple[str, ...]) -> None:
    full, part = first_phase(*OBJECTIVES), first_phase(*objectives)
    expected, got = full(batch()), part(batch())
    assert got.keys() == set().union({"loss"}, *(FIGURES[name] for name in objectives))
    assert_same(
        {k: v.detach() for k, v in got.items() if k != "loss"},
        {k: v.detach() for k, v in expected.items() if k in got and k != "loss"},
    )
    wanted = torch.stack([expected[f"loss_{name}"] for name in objectives]).sum()
    torch.testing.assert_close(got.loss, wanted)
    wanted.backward()
    got.loss.backward()
    assert_same(gradients(part), gradients(full))
    assert part.idle_parameters()
    assert not full.idle_parameters()


@pytest.mark.parametrize("objectives", SUBSETS, ids="+".join)
def test_a_loss_that_is_no_objective_is_left_out_to_the_end(objectives: tuple[str, ...]) -> None:
    full, part = small_model(), small_model(objectives=list(objectives))
    expected, got = full(batch()), part(batch())
    assert got.keys() == set().union({"loss"}, *(FIGURES[name] for name in objectives))
    torch.testing.assert_close(got.loss, sum(expected[f"loss_{name}"] for name in objectives))
    assert part.idle_parameters()
    later = small_model(objectives=list(objectives), vit_train_steps=1, vit_train_objectives=["lm"])
    assert later(batch()).keys() == {"loss", "loss_lm"}
    later.on_step(1)
    assert later(batch()).keys() == got.keys()


def test_parts_of_left_out_losses_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("text_feats", "pool", "contrast", "match", "narrate"):
        method = getattr(Blip2Qformer, name)

        def noted(self: Any, *args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
            called.append(_name)
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(Blip2Qformer, name, noted)
    seen = {}
    for objectives in (("itc",), ("lm",), ("itm",), OBJECTIVES):
        called.clear()
        first_phase(*objectives)(batch())
        seen[objectives] = list(called)
    assert seen == {
        ("itc",): ["text_feats", "pool", "contrast"],
        ("lm",): ["narrate"],
        ("itm",): ["text_feats", "pool", "contrast", "match"],
        OBJECTIVES: ["text_feats", "pool", "contrast", "narrate", "match"],
    }


def test_all_losses_begin_when_the_tower_is_frozen() -> None:
    model = first_phase("itc")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    outputs: list[Output] = []
    for step in range(5):
        changed = model.on_step(step)
        assert changed == (step == 3)
        outputs.append(model(batch()))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ["loss_lm" in output for output in outputs] == [False] * 3 + [True] * 2
    assert model.vision.frozen


def test_parameters_without_gradient_are_left_alone_by_the_trainer() -> None:
    model = first_phase("itc")
    config = RunConfig(task="x", max_iters=9, init_lr=1e-2)
    optimizer, ema = build_optimizer(model, config), Ema(model, 0.9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def step() -> None:
        model(batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update()
        optimizer.zero_grad(set_to_none=True)

    step()
    after = model.state_dict()
    for name in ("itm_head.weight", "lm_head.transform.weight", "qformer.layers.2.text_ffn.expand.weight"):
        # Neither decayed nor moved, unless ITC reads it.
        assert torch.equal(after[name], before[name]) == ("head" in name)

    # Such a state is saved and continued like any other.
    saved = deepcopy({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    twin = first_phase("itc")
    twin.load_state_dict(saved["model"])
    again = build_optimizer(twin, config)
    again.load_state_dict(saved["optimizer"])
    for trained, rule in ((model, optimizer), (twin, again)):
        trained.on_step(3)
        trained(batch()).loss.backward()
        rule.step()
    assert_same(twin.state_dict(), model.state_dict(), 0.0)


def test_without_gradients_of_the_tower_none_is_computed_for_its_states() -> None:
    model = small_model()
    states = model.image_states(batch())
    wide: list[torch.Size] = []
    keys = model.image_keys(states)
    node = keys.layers[0].key.grad_fn if keys.layers[0] is not None else None
    stack = [node]
    while stack:
        current = stack.pop()
        if current is None:
            continue
        if hasattr(current, "variable"):
            wide.append(current.variable.shape)
        stack += [parent for parent, _ in current.next_functions]
    # The graph behind the keys ends at parameters alone: a matrix, its bias, and `ln_vision`'s two vectors.
    assert sorted(map(tuple, wide)) == sorted([(12,), (12,), (16,), (16, 12), (16, 12)])


@torch.no_grad()
def test_texts_of_a_re_ranked_picture_are_judged_as_pairs_are() -> None:
    model, batch = small_model().eval(), global_batch(4, ids=False)
    _, states = model.retrieval_images(batch)
    chosen = torch.tensor([[0, 3], [2, 1], [3, 3]])  # of two pictures, three texts each
    ids, mask = batch["text_ids"], batch["text_mask"]
    found = model.rerank(model.retrieval_keys(states[:2]), ids[chosen], mask[chosen])
    for k, texts in enumerate(chosen.tolist()):
        for image, row in enumerate(texts):
            normed = model.normed(states[image : image + 1])
            alone = model.compute_itm(normed, ids[row : row + 1], mask[row : row + 1])
            torch.testing.assert_close(found[k, image], alone[0])
