"""Files as `torch.save` writes them, one tensor after the other: none has to wait in memory for the rest."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.errors import CheckpointError

_AT_ONCE = 32 << 20
"""Bytes that are written with one call."""
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}
_ALIGNED = 64
"""Tensors begin at multiples of it, as torch has them, so that a file can be mapped."""
_HEADER, _EXTRA, _LARGE = 30, 4, 20
"""Bytes before a member's name, before what fills the gap, and of what says the size of a large member."""


class _Storage:
    """Stands for the numbers of a tensor."""

    def __init__(self, key: str, tensor: Tensor) -> None:
        if tensor.dtype not in _STORAGES:
            raise CheckpointError(f"files of torch.save have no place for {tensor.dtype}; convert it first")
        self.named = ("storage", _STORAGES[tensor.dtype], key, "cpu", tensor.numel())


class _Written:
    """Stands for a tensor whose numbers have been written."""

    def __init__(self, storage: _Storage, tensor: Tensor) -> None:
        plain = torch.empty(tensor.shape, device="meta")
        self._made_of: tuple[Any, ...] = (
            storage,
            0,
            tuple(tensor.shape),
            plain.stride(),
            False,
            OrderedDict(),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self._made_of


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.named if isinstance(obj, _Storage) else None


def write_torch(
    tensors: Mapping[str, Tensor],
    path: Path,
    wrapper: str,
    same: Callable[[str], Hashable],
    at_once: int,
    release: Callable[[], None],
) -> None:
    """Write `{wrapper: tensors}`, which `torch.load` reads, with `weights_only` and mapped into memory, too.

    Args:
        tensors: asked for one after the other, and forgotten when they are written.
        path: file to make.
        wrapper: the only key of what is read.
        same: equal for two names of one tensor, which is then written once.
        at_once: bytes of tensors between two calls of `release`, unless a single one has more.
        release: told when no tensor is in use.

    Raises:
        CheckpointError: a type of numbers that the format does not have.
        OSError: the file cannot be written.
    """
    written: dict[Hashable, _Written] = {}
    content: dict[str, _Written] = {}
    waiting = 0
    with zipfile.ZipFile(path, "w") as archive:
        for name in tensors:
            if (which := same(name)) not in written:
                tensor = tensors[name]
                if waiting and waiting + tensor.nbytes > at_once:
                    waiting = 0
                    del tensor  # or its file would stay open
                    release()
                    tensor = tensors[name]
                waiting += tensor.nbytes
                tensor = tensor.detach().to("cpu").contiguous()
                storage = _Storage(str(len(written)), tensor)
                _add(archive, f"data/{len(written)}", tensor.flatten().view(torch.uint8).numpy().data)
                written[which] = _Written(storage, tensor)
                del tensor
            content[name] = written[which]
        structure = io.BytesIO()
        _Pickler(structure, protocol=2).dump({wrapper: content})
        _add(archive, "data.pkl", structure.getbuffer())
        _add(archive, "byteorder", memoryview(sys.byteorder.encode()))
        _add(archive, "version", memoryview(b"3\n"))


def _add(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """A member whose bytes begin at a multiple of `_ALIGNED`."""
    assert archive.fp is not None
    info = zipfile.ZipInfo(f"archive/{name}")
    large = data.nbytes >= zipfile.ZIP64_LIMIT
    start = archive.fp.tell() + _HEADER + len(info.filename) + _EXTRA + _LARGE * large
    gap = -start % _ALIGNED
    info.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
    with archive.open(info, "w", force_zip64=large) as member:
        for begin in range(0, data.nbytes, _AT_ONCE):
            member.write(data[begin : begin + _AT_ONCE])
