"""The staircase of `lr_per_epoch` beside the rates that LAVIS's own schedulers gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from blip.config.schema import RunConfig
from blip.engine.optim import Schedule

RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "goldens/aux_text_lr.json").read_text())[
    "lr"
]


@pytest.mark.parametrize("record", RECORDED, ids=[record["kind"] for record in RECORDED])
def test_lr_per_epoch_gives_the_rates_of_lavis_to_the_bit(record: dict[str, Any]) -> None:
    given = record["kwargs"]
    config = RunConfig(
        lr_sched=record["kind"],
        lr_per_epoch=True,
        max_epoch=given["max_epoch"],
        init_lr=given["init_lr"],
        min_lr=given["min_lr"],
        warmup_steps=given["warmup_steps"],
        warmup_lr=given["warmup_start_lr"],
        lr_decay_rate=given.get("decay_rate", 1.0),
    )
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    per_epoch = 20
    schedule = Schedule(optimizer, config, given["max_epoch"] * per_epoch, per_epoch)
    rates = []
    for step in range(given["max_epoch"] * per_epoch):
        rates.append([*divmod(step, per_epoch), *(group["lr"] for group in optimizer.param_groups)])
        schedule.step()
    assert rates == record["rows"]
