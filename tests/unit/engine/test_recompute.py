"""Facts about activation checkpointing: same numbers, same names, less kept."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from blip.engine.recompute import apply_recompute
from blip.errors import ConfigError
from blip.layers.vit import NAMED, Vit

MODES = ["torch", "offload"]


def needs(mode: str) -> None:
    if mode == "offload":
        pytest.importorskip("fairscale", reason="the offloading mode needs fairscale")


def tower(drop_path_rate: float = 0.0) -> Vit:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 4, "heads": 3, "mlp_dim": 40}
    vit = Vit(replace(NAMED["eva_clip_g"], drop_path_rate=drop_path_rate, **sizes))  # type: ignore[arg-type]
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit.train()


def step(vit: Vit, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one forward and backward pass, from a fixed seed."""
    torch.manual_seed(1)
    image = torch.randn(6, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        output = vit(image)
        loss = output.float().pow(2).mean()
    loss.backward()
    return output.detach(), {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}


def runs_per_block(vit: Vit) -> list[int]:
    """How often each block's attention runs in one forward and backward pass."""
    counts = [0] * len(vit.blocks)
    for k, block in enumerate(vit.blocks):
        block.get_submodule("attn").register_forward_hook(
            lambda *_, k=k: counts.__setitem__(k, counts[k] + 1)  # type: ignore[misc]
        )
    step(vit)
    return counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_recomputing_changes_neither_outputs_nor_gradients(
    mode: str, autocast: bool, drop_path_rate: float
) -> None:
    needs(mode)
    plain, recomputed = tower(drop_path_rate), tower(drop_path_rate)
    apply_recompute(list(recomputed.blocks), mode)  # type: ignore[arg-type]
    output, grads = step(plain, autocast)
    output_again, grads_again = step(recomputed, autocast)
    assert torch.equal(output, output_again)
    assert len(grads) == len(list(plain.parameters()))
    assert grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("last", "expected"), [(None, [2, 2, 2, 2]), (0, [1, 1, 1, 1]), (3, [1, 2, 2, 2]), (9, [2] * 4)]
)
def test_only_the_last_blocks_run_twice(mode: str, last: int | None, expected: list[int]) -> None:
    needs(mode)
    vit = tower()
    apply_recompute(list(vit.blocks), mode, last)  # type: ignore[arg-type]
    assert runs_per_block(vit) == expected


def test_mode_none_runs_every_block_once() -> None:
    vit = tower()
    apply_recompute(list(vit.blocks), "none")
    assert runs_per_block(vit) == [1, 1, 1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_parameter_names_stay_and_inference_is_untouched(mode: str) -> None:
    needs(mode)
    vit = tower()
    names = list(vit.state_dict())
    apply_recompute(list(vit.blocks), mode)  # type: ignore[arg-type]
    assert list(vit.state_dict()) == names
    with torch.no_grad():
        image = torch.randn(1, 3, 32, 32)
        assert torch.equal(vit.eval()(image), tower().eval()(image))


def test_torch_mode_keeps_fewer_activations() -> None:
    def kept(vit: Vit) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            vit(torch.randn(2, 3, 32, 32)).sum()
        return total

    recomputed = tower()
    apply_recompute(list(recomputed.blocks), "torch")
    assert kept(recomputed) < kept(tower()) / 3


def test_unknown_mode_and_negative_count_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'torch'"):
        apply_recompute([], "torc")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="-1 last blocks"):
        apply_recompute([], "torch", last=-1)


def test_offload_without_fairscale_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairscale.nn.checkpoint", None)
    with pytest.raises(ConfigError, match=r"blip\[fairscale\]"):
        apply_recompute(list(tower().blocks), "offload")


@pytest.mark.parametrize("mode", MODES)
def test_keyword_arguments_reach_the_block(mode: str) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, *, by: float) -> Tensor:
            return x * self.weight * by

    needs(mode)
    block = Scale()
    apply_recompute([block], mode)  # type: ignore[arg-type]
    block(torch.ones(3, requires_grad=True), by=2.0).sum().backward()
    assert block.weight.grad is not None
    assert block.weight.grad.tolist() == [2.0, 2.0, 2.0]


def test_copies_made_before_are_independent() -> None:
    vit = tower()
    twin = copy.deepcopy(vit)
    apply_recompute(list(vit.blocks), "torch")
    step(vit)
    assert all(p.grad is None for p in twin.parameters())
    assert runs_per_block(twin) == [1, 1, 1, 1]
