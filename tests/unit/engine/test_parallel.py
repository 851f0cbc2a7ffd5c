"""What a run's processes need of a model."""

from __future__ import annotations

import pytest
from torch import nn

from blip.config.schema import RunConfig
from blip.engine.parallel import Parallel
from blip.errors import ConfigError


def test_a_model_on_two_devices_is_one_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    parallel = Parallel(RunConfig(max_iters=1, device="cpu"))
    assert parallel.wrap(model) is model
    monkeypatch.setattr("blip.dist.world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"model\.llm\.device: with several processes"):
        parallel.wrap(model)


def test_a_cpu_computes_in_float32_unless_told() -> None:
    assert Parallel(RunConfig(max_iters=1, device="cpu")).precision == "fp32"
    assert Parallel(RunConfig(max_iters=1, device="cpu", precision="bf16")).precision == "bf16"
    with pytest.raises(ConfigError, match="fp16"):
        Parallel(RunConfig(max_iters=1, device="cpu", precision="fp16"))
