"""Models without memory: names, shapes and types of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILLING = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "orthogonal_")


class _Unfilled(TorchFunctionMode):
    """Draws no numbers: on the device meta that has no effect, but makes torch import its compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__name__", "") in _FILLING:
            tensor = given.get("tensor", args[0] if args else None)
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **given)


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built within has no values and takes no memory."""
    with torch.device("meta"), _Unfilled():
        yield
