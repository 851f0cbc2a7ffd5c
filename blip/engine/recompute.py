"""Activation checkpointing: blocks keep their input and compute the rest again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blip.errors import ConfigError, hint

RecomputeMode = Literal["none", "torch", "offload"]
MODES: tuple[RecomputeMode, ...] = ("none", "torch", "offload")


def apply_recompute(blocks: Sequence[nn.Module], mode: RecomputeMode, last: int | None = None) -> None:
    """Make `blocks` recompute their activations; results and parameter names stay the same.

    Call it once, after the model is built and before DDP wraps it. It replaces the `forward` of each block; a
    deep copy of an offloading block would compute with the original's weights, so copy (momentum twin) first.

    Args:
        blocks: in order of execution; whole blocks, each recomputed on its own.
        mode: `none`; `torch`: `torch.utils.checkpoint`, not reentrant; `offload`: fairscale's wrapper, which
            also keeps the blocks' inputs in CPU memory.
        last: only this many blocks from the end (LAVIS's `vit_ckpt_layer`), 0 = none; None = all.

    Raises:
        ConfigError: unknown mode, negative `last`, or `offload` without fairscale.
    """
    if mode not in MODES:
        raise ConfigError(f"recompute: unknown mode {mode!r}{hint(mode, MODES)}")
    if last is not None and last < 0:
        raise ConfigError(f"recompute: {last} last blocks; give 0 for none, or null for all {len(blocks)}")
    if mode == "none":
        return
    wrap = _with_torch if mode == "torch" else _offloading()
    for block in blocks[max(len(blocks) - last, 0) if last is not None else 0 :]:
        block.forward = wrap(block)  # type: ignore[method-assign]


def _with_torch(block: nn.Module) -> Callable[..., Any]:
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # generating: nothing to save, and the random state is not looked at
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, **kwargs)

    return forward


def _offloading() -> Callable[[nn.Module], Callable[..., Any]]:
    try:
        from fairscale.nn.checkpoint import checkpoint_wrapper
    except ImportError as error:
        raise ConfigError(
            "recompute: mode 'offload' needs the fairscale package; install the extra with"
            " `pip install 'blip[fairscale]'`, or use 'torch'"
        ) from error

    def wrap(block: nn.Module) -> Callable[..., Any]:
        # fairscale recomputes in CUDA's default autocast dtype, whatever the forward pass ran in: bf16 runs
        # would recompute in fp16. So the state of autocast travels along as an argument.
        keeper = checkpoint_wrapper(_InAutocast(block), offload_to_cpu=True)
        return lambda *args, **kwargs: keeper(_autocast_states(), *args, **kwargs)

    return wrap


class _AutocastState(NamedTuple):
    device_type: str
    enabled: bool
    dtype: torch.dtype


class _AutocastStates:
    """Of every kind of device in use; one opaque object, since fairscale looks into tuples for tensors."""

    def __init__(self, states: list[_AutocastState]) -> None:
        self.states = states


def _autocast_states() -> _AutocastStates:
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return _AutocastStates(
        [_AutocastState(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
    )


class _InAutocast(nn.Module):
    """The block's own forward, in a given state of autocast."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.call = block.forward

    def forward(self, autocast: _AutocastStates, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for kind, enabled, dtype in autocast.states:
                # No cache: a weight cast in the first, gradient-free pass must not be met again later.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            return self.call(*args, **kwargs)
