"""Facts about parameter groups, schedules and the moving average."""

from __future__ import annotations

import copy
import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip.config.schema import RunConfig
from blip.engine.optim import Ema, Schedule, build_optimizer
from blip.errors import CheckpointError, ConfigError, TrainingError
from blip.models.blip2_qformer import Blip2Qformer


def config(**keys: Any) -> RunConfig:
    return RunConfig(**{"max_iters": 100, **keys})


class Toy(nn.Module):
    """Names as the models use them."""

    vision: Any

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.norm = nn.LayerNorm(3)
        self.position = nn.Embedding(4, 3)
        self.word = nn.Embedding(5, 3)
        self.query_tokens = nn.Parameter(torch.randn(1, 2, 3))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 3))
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def lr_scale(self, name: str, decay: float) -> float:
        return decay ** (2 - int(name.split(".")[1])) if name.startswith("vision") else 1.0

    def forward(self) -> Tensor:
        return torch.stack([p.square().sum() for p in self.parameters() if p.requires_grad]).sum()


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()


# Groups


def test_only_matrices_decay_and_frozen_parameters_are_left_out() -> None:
    groups = build_optimizer(toy(), config(weight_decay=0.1)).param_groups
    assert {name: group["weight_decay"] for group in groups for name in group["param_names"]} == {
        "cls_token": 0.0,
        "norm.bias": 0.0,
        "norm.weight": 0.0,
        "position.weight": 0.0,
        "query_tokens": 0.0,
        "temp": 0.0,
        "vision.0.bias": 0.0,
        "vision.0.weight": 0.1,
        "vision.1.bias": 0.0,
        "vision.1.weight": 0.1,
        "word.weight": 0.1,
    }


def test_temperature_queries_and_positions_of_stage_1_do_not_decay() -> None:
    with torch.device("meta"):  # the paper's sizes, without their memory
        model = Blip2Qformer.from_preset("coco", tokenizer="scenes", vocab_size=30)
    groups = build_optimizer(model, config()).param_groups
    exempt = {name for group in groups if not group["weight_decay"] for name in group["param_names"]}
    assert {"temp", "qformer.query_tokens", "vision.vit.pos_embed", "vision.vit.cls_token"} <= exempt
    assert "qformer.embedding.position.weight" in exempt
    assert "qformer.embedding.word.weight" not in exempt
    assert {n for n, p in model.named_parameters() if p.ndim < 2} <= exempt


def test_layer_decay_makes_the_rates_of_two_layers_differ() -> None:
    """LAVIS stores `lr_scale` and every scheduler overwrites `lr` with one value."""
    model = toy()
    settings = config(lr_layer_decay=0.5, init_lr=0.1, warmup_steps=10)
    optimizer = build_optimizer(model, settings)
    schedule = Schedule(optimizer, settings, 100, 100)
    for step in range(100):
        rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
        assert rates["vision.0.weight"] == 0.25 * schedule.at(step)
        assert rates["vision.1.weight"] == 0.5 * schedule.at(step)
        assert rates["word.weight"] == schedule.at(step)
        schedule.step()


def test_layer_decay_changes_how_far_a_layer_moves() -> None:
    moved = []
    for decay in (1.0, 0.5):
        model = toy()
        before = copy.deepcopy(model)
        settings = config(lr_layer_decay=decay, init_lr=0.01, weight_decay=0.0)
        optimizer = build_optimizer(model, settings)
        Schedule(optimizer, settings, 10, 10)
        train(model, optimizer)
        moved.append((model.vision[0].weight - before.vision[0].weight).abs().mean().item())
    # AdamW's first step is the rate itself wherever there is a gradient.
    assert moved == pytest.approx([0.01, 0.0025], rel=1e-3)


def test_a_part_may_have_a_rate_of_its_own() -> None:
    scales = {"vision": 0.5, "vision.1": 0.1, "temp": 2.0, "*.bias": 7.0}
    settings = config(lr_scales=scales, lr_layer_decay=0.5)
    optimizer = build_optimizer(toy(), settings)
    Schedule(optimizer, settings, 100, 100)
    rates = {name: group["lr"] / 1e-4 for group in optimizer.param_groups for name in group["param_names"]}
    assert rates["vision.0.weight"] == pytest.approx(0.5 * 0.25)
    assert rates["vision.1.bias"] == pytest.approx(0.1 * 0.5)
    assert (rates["temp"], rates["word.weight"]) == pytest.approx((2.0, 1.0))
    assert rates["norm.bias"] == pytest.approx(7.0)


@pytest.mark.parametrize("part", ["visio", "frozen", "word.weights"])
def test_a_rate_of_nothing_that_trains_is_refused(part: str) -> None:
    with pytest.raises(ConfigError, match=rf"^run\.lr_scales\.{part}: no parameter that trains"):
        build_optimizer(toy(), config(lr_scales={part: 0.5}))


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lr_scales\.vision: 0\.0 is not above 0"):
        config(lr_scales={"vision": 0.0})


def test_groups_do_not_depend_on_the_order_in_which_a_model_was_built() -> None:
    first, second = toy(), nn.Module()
    for name, part in reversed([*first.named_children(), *first.named_parameters(recurse=False)]):
        setattr(second, name, part)
    names = [[g["param_names"] for g in build_optimizer(m, config()).param_groups] for m in (first, second)]
    assert names[0] == names[1]
    assert [sorted(group) for group in names[0]] == names[0]


def test_a_model_without_trainable_parameters_cannot_be_trained() -> None:
    with pytest.raises(TrainingError, match="no trainable parameter"):
        build_optimizer(toy().requires_grad_(False), config())


def test_the_optimizer_is_plain_adamw_in_its_settings() -> None:
    model, reference = toy(), toy()
    settings = config(weight_decay=0.1, beta1=0.8, beta2=0.95, adam_eps=1e-5, init_lr=0.01)
    train(model, build_optimizer(model, settings), steps=5)
    exempt = {"temp", "query_tokens", "cls_token", "position.weight", "norm.weight"}
    named = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    free = [p for n, p in named.items() if n in exempt or n.endswith("bias")]
    rest = [p for n, p in named.items() if n not in exempt and not n.endswith("bias")]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": free, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1, foreach=False)
    train(reference, plain, steps=5)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    model = toy()
    optimizer = build_optimizer(model, config())
    train(model, optimizer, steps=3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, steps=3)
    again = toy()
    again.load_state_dict(weights)
    restored = build_optimizer(again, config())
    restored.load_state_dict(state)
    train(again, restored, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_restored_optimizer_keeps_the_settings_of_this_run() -> None:
    model = toy()
    optimizer = build_optimizer(model, config(weight_decay=0.1))
    train(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    changed = build_optimizer(model, config(weight_decay=0.2, beta2=0.9, lr_layer_decay=0.5))
    changed.load_state_dict(state)
    assert {group["weight_decay"] for group in changed.param_groups} == {0.0, 0.2}
    assert {group["betas"] for group in changed.param_groups} == {(0.9, 0.9)}
    # The groups are cut differently now; each parameter has its own moments all the same.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(changed.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"]), (
                name
            )


def test_an_optimizer_state_of_other_parameters_is_refused() -> None:
    model = toy()
    optimizer = build_optimizer(model, config())
    train(model, optimizer)
    state = optimizer.state_dict()
    model.word.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"trained 11 parameters, this run 10 .*word\.weight"):
        build_optimizer(model, config()).load_state_dict(state)


# Schedules


def rates(total: int, per_epoch: int, **keys: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    schedule = Schedule(optimizer, config(**keys), total, per_epoch)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        assert found[-1] == schedule.lr
        schedule.step()
        assert schedule.last_lr == found[-1]
    return found


def test_warm_up_goes_on_across_epochs_without_a_jump() -> None:
    """LAVIS warms up in epoch 0 only: 868 steps per epoch and 5000 of warm-up make it jump fivefold."""
    found = rates(10_000, 868, init_lr=1e-4, warmup_lr=1e-6, warmup_steps=5000)
    assert found[0] == 1e-6
    assert found[868] == pytest.approx(1e-6 + (1e-4 - 1e-6) * 868 / 5000)
    assert found[5000] == max(found) == 1e-4
    steepest = max(abs(b - a) for a, b in pairwise(found))
    assert steepest < 1.6 * (1e-4 - 1e-6) / 5000  # cosine over as many steps is pi/2 times as steep


def test_cosine_changes_every_step_and_ends_at_min_lr() -> None:
    """LAVIS changes the rate once per epoch and ends five epochs at a tenth of the range."""
    found = rates(100, 20, init_lr=1e-4, min_lr=1e-5, warmup_steps=10)
    after = found[10:]
    assert after[0] == 1e-4
    assert after[-1] == 1e-5
    assert all(a > b for a, b in pairwise(after))
    assert found[10 + 89 // 3] == pytest.approx(1e-5 + 9e-5 * 0.5 * (1 + 0.5), rel=0.03)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert rates(3, 3, init_lr=0.5, warmup_lr=0.1) == [0.5, 0.25, 0.0]


def test_step_decay_waits_for_the_end_of_the_warm_up() -> None:
    keys: dict[str, Any] = {
        "lr_sched": "linear_warmup_step_lr",
        "init_lr": 1.0,
        "lr_decay_rate": 0.5,
        "min_lr": 0.2,
    }
    assert rates(8, 2, **keys) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2]
    assert rates(8, 4, warmup_steps=4, **keys) == [0, 0.25, 0.5, 0.75, 0.5, 0.5, 0.5, 0.5]


def test_constant_rates_are_constant_after_the_warm_up() -> None:
    found = rates(6, 2, lr_sched="constant_lr", init_lr=1.0, warmup_steps=4)
    assert found == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("total", [1, 4, 5, 6])
def test_a_run_no_longer_than_its_warm_up_still_has_rates(
    total: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="blip.engine.optim"):
        found = rates(total, total, init_lr=1.0, warmup_steps=5)
    assert found == [0, 0.2, 0.4, pytest.approx(0.6), 0.8, 1][:total]
    assert ("run.warmup_steps" in caplog.text) == (total <= 5)


@pytest.mark.parametrize("kind", ["linear_warmup_cosine_lr", "linear_warmup_step_lr", "constant_lr"])
@pytest.mark.parametrize("per_epoch", [False, True])
def test_a_restored_schedule_goes_on_where_it_was(kind: str, per_epoch: bool) -> None:
    settings = config(
        lr_sched=kind, lr_per_epoch=per_epoch, max_epoch=5, warmup_steps=7, min_lr=1e-6, lr_decay_rate=0.9
    )
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0) for _ in range(2)]
    first, second = (Schedule(optimizer, settings, 50, 10) for optimizer in optimizers)
    for _ in range(13):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(37):
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
        first.step()
        second.step()


# Moving average


def test_the_average_is_the_written_out_recursion() -> None:
    model = toy()
    ema, optimizer = Ema(model, 0.5), build_optimizer(model, config(init_lr=0.1))
    expected = model.word.weight.detach().clone()
    for n in range(6):
        train(model, optimizer)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.word.weight.detach()
        ema.update()
    with ema.averaged():
        torch.testing.assert_close(model.word.weight.detach(), expected)


def test_the_present_weights_return_bit_for_bit_also_after_an_error() -> None:
    model = toy()
    ema, optimizer = Ema(model, 0.9), build_optimizer(model, config(init_lr=0.1))
    train(model, optimizer)
    ema.update()
    before = copy.deepcopy(model.state_dict())
    with ema.averaged():
        assert not torch.equal(model.word.weight, before["word.weight"])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), ema.averaged():
        _ = 1 / 0
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_restored_average_goes_on_bit_for_bit() -> None:
    model = toy()
    ema, optimizer = Ema(model, 0.9), build_optimizer(model, config(init_lr=0.1))
    train(model, optimizer)
    ema.update()
    restored = Ema(model, 0.9)
    restored.load_state_dict(copy.deepcopy(ema.state_dict()))
    train(model, optimizer)
    ema.update()
    restored.update()
    for name, tensor in ema.state_dict()["averages"].items():
        assert torch.equal(tensor, restored.state_dict()["averages"][name]), name


def test_a_part_that_is_frozen_on_the_way_is_seen_as_it_is() -> None:
    model = toy()
    ema, optimizer = Ema(model, 0.99), build_optimizer(model, config(init_lr=0.1))
    train(model, optimizer, steps=3)
    ema.update()
    model.vision.requires_grad_(False).half()
    ema.update()
    present = model.vision[0].weight.clone()
    with ema.averaged():
        assert torch.equal(model.vision[0].weight, present)
        assert torch.equal(model.word.weight, ema.state_dict()["averages"]["word.weight"])
    later = Ema(toy(), 0.99)
    later.load_state_dict(ema.state_dict())
    assert "vision.0.weight" not in later.state_dict()["averages"]


def test_an_average_of_another_model_is_refused() -> None:
    state = Ema(toy(), 0.9).state_dict()
    other = toy()
    other.word = nn.Embedding(9, 3)
    with pytest.raises(CheckpointError, match=r"word\.weight"):
        Ema(other, 0.9).load_state_dict(state)
