"""What a pickle of `torch.save` would do, found out without doing it.

`torch.load(weights_only=True)` calls a short list of functions only. Some of them still take memory without
bound or keep the processor busy when a pickle wants them to, so pickles are followed first, step by step and
with stand-ins for all values: what `torch.save` does not write is refused before anything is built.
"""

from __future__ import annotations

import io
import pickletools
import re
from typing import Any, NamedTuple

import torch

from blip.stored.files import shown

MOST_BYTES = 64 << 20
"""Of a pickle. Tensors are stored beside it, so that even large models have less than one megabyte."""
MOST_STEPS = 1_000_000
"""Of a pickle, which take seconds; a tensor takes about 45."""
DEEPEST = 50
"""Tuples in tuples; what looks into them, looks into all at once."""
MAGIC = 0x1950A86A20F9469CFC6C
"""What files begin with that torch wrote before 1.6."""

_SIZES = {
    **dict.fromkeys(("Bool", "Byte", "Char", "QInt8", "QUInt4x2", "QUInt2x4", "QUInt8", "Untyped"), 1),
    **dict.fromkeys(("BFloat16", "Half", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("ComplexFloat", "Double", "Long"), 8),
    "ComplexDouble": 16,
}
"""Bytes of a number, by the kind of storage."""
_STORAGE = re.compile(r"torch(?:\.storage)? (\w+)Storage")
_DTYPES = {f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_PLAIN = {
    "NONE": "none",
    "NEWTRUE": "number",
    "NEWFALSE": "number",
    "BININT": "number",
    "BININT1": "number",
    "BININT2": "number",
    "LONG1": "number",
    "BINFLOAT": "number",
    "BINUNICODE": "text",
    "SHORT_BINSTRING": "text",
    "EMPTY_DICT": "dict",
    "EMPTY_LIST": "list",
    "EMPTY_TUPLE": "tuple",
}
_KEYS = ("text", "number", "none")
_WIDEST = 1 << 71
"""Numbers beyond it are equal to the dictionaries of Python by the thousand."""


class Refused(Exception):
    """Why a pickle is not read: the end of a sentence about it."""


class Foreign(Refused):
    """It names what is no part of tensors."""


class Followed(NamedTuple):
    """What a pickle asks for."""

    storages: dict[str, int]
    """Key of a storage -> bytes that are to be there."""
    end: int
    """Where the pickle ends."""


class _Item(NamedTuple):
    """What stands for a value."""

    kind: str
    value: Any = None
    """Of a number or text the same; of a tuple what it holds; of a global its name."""
    depth: int = 0


def follow(data: bytes, start: int = 0) -> Followed:
    """Follow one pickle.

    Args:
        data: with the pickle; more may come behind it.
        start: where it begins.

    Raises:
        Refused: it is damaged, or does what `torch.save` never asks for.
    """
    machine = _Machine()
    stream = io.BytesIO(data)
    stream.seek(start)
    try:
        for number, (step, argument, _) in enumerate(pickletools.genops(stream)):
            if number > MOST_STEPS:
                raise Refused(f"its pickle has more than {MOST_STEPS} steps")
            machine.do(step.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise Refused("its pickle is damaged or cut off") from error
    return Followed(machine.storages, stream.tell())


class _Machine:
    """The stack and the memory of an unpickler, with stand-ins."""

    def __init__(self) -> None:
        self.storages: dict[str, int] = {}
        self._stack: list[_Item] = []
        self._below: list[list[_Item]] = []
        self._memory: dict[int, _Item] = {}
        self._encoded = 0

    def do(self, step: str, argument: Any) -> None:
        """One step of the pickle."""
        stack = self._stack
        if step in _PLAIN:
            stack.append(_plain(_PLAIN[step], argument))
        elif step == "GLOBAL":
            stack.append(_Item("global", _known(argument)))
        elif step in ("PROTO", "STOP"):
            pass
        elif step == "MARK":
            self._below.append(stack)
            self._stack = []
        elif step in ("BINPUT", "LONG_BINPUT"):
            self._memory[argument] = stack[-1]
        elif step in ("BINGET", "LONG_BINGET"):
            stack.append(self._memory[argument])
        elif step == "TUPLE":
            items = self._to_mark()
            self._stack.append(_tuple(items))
        elif step in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(step[-1])
            if len(stack) < count:
                raise IndexError(step)
            stack[-count:] = [_tuple(stack[-count:])]
        elif step in ("APPEND", "APPENDS"):
            items = self._to_mark() if step == "APPENDS" else [stack.pop()]
            _must(self._stack[-1].kind == "list", "appends to what is no list")
        elif step in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if step == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _must(self._stack[-1].kind in ("dict", "ordered"), "sets keys of what is no dictionary")
            _must(len(items) % 2 == 0, "has a key without a value")
            _must(all(key.kind in _KEYS for key in items[::2]), "has keys that are neither text nor numbers")
        elif step == "BUILD":
            _must(stack.pop().kind == "dict" and stack[-1].kind == "ordered", "gives attributes to a value")
        elif step == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            _must(arguments.kind == "tuple" and called.kind == "global", "calls what is no function")
            stack.append(self._called(called.value, arguments.value))
        elif step == "BINPERSID":
            stack.append(self._stored(stack.pop()))
        else:
            raise Refused(f"its pickle has the step {step}, which torch.save does not write")

    def _to_mark(self) -> list[_Item]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _called(self, name: str, items: tuple[_Item, ...]) -> _Item:
        """What a function gives; every one that is known has a rule here."""
        kinds = [item.kind for item in items]
        if name in _BUILDERS:
            _must(kinds[:1] == [_BUILDERS[name]], "builds a tensor out of something else")
            return _Item("tensor")
        if name == "collections OrderedDict":
            _must(not items, "fills an OrderedDict at once")
            return _Item("ordered")
        if name == "collections Counter":
            _must(kinds in ([], ["dict"]), "counts what is no dictionary")
            return _Item("dict")
        if name == "_codecs encode":  # as pickles of this protocol write bytes
            _must(kinds == ["text", "text"] and items[1].value == "latin1", "encodes text")
            self._encoded += len(items[0].value)
            _must(self._encoded <= MOST_BYTES, "encodes the same text again and again")
        elif name == "torch Size":
            _must(kinds == ["tuple"], "has a size that is no tuple")
        else:
            _must(name in _SIMPLE and {*kinds} <= {"text", "number"}, f"calls {name.replace(' ', '.')}")
        return _Item("other")

    def _stored(self, item: _Item) -> _Item:
        """A storage: ("storage", type, key, place, numbers), in old files with a part of another one."""
        _must(item.kind == "tuple" and len(item.value) in (5, 6), "names a storage in another way")
        word, kind, key, place, count, *part = item.value
        found = _STORAGE.fullmatch(kind.value) if kind.kind == "global" else None
        kinds = [word.kind, key.kind, place.kind, count.kind]
        good = kinds == ["text", "text", "text", "number"] and word.value == "storage"
        good = good and all(p.kind in ("none", "tuple") for p in part) and isinstance(count.value, int)
        if found is None or not good or count.value < 0:
            raise Refused("its pickle names a storage in another way than torch.save")
        size = count.value * _SIZES[found[1]]
        self.storages[key.value] = max(size, self.storages.get(key.value, 0))
        return _Item("storage")


_BUILDERS = {
    "torch._utils _rebuild_tensor": "storage",
    "torch._utils _rebuild_tensor_v2": "storage",
    "torch._utils _rebuild_tensor_v3": "storage",
    "torch._utils _rebuild_parameter": "tensor",
}
"""Function -> what its first argument is."""
_SIMPLE = ("torch device", "__builtin__ complex", "builtins complex")
"""Functions of texts and numbers."""
_NAMES = (
    *_BUILDERS,
    *_SIMPLE,
    "collections OrderedDict",
    "collections Counter",
    "_codecs encode",
    "torch Size",
)
_NO_PLAIN = {"_rebuild_sparse_tensor": "sparse", "_rebuild_qtensor": "quantised"}


def _known(name: str) -> str:
    """A global's "module name", if it belongs to tensors."""
    storage = _STORAGE.fullmatch(name)
    if name in _NAMES or (storage and storage[1] in _SIZES) or name in _DTYPES:
        return name
    for function, kind in _NO_PLAIN.items():
        if name == f"torch._utils {function}":
            raise Refused(f"it holds {kind} tensors; save plain ones")
    raise Foreign(shown(name.replace(" ", ".")))


def _plain(kind: str, argument: Any) -> _Item:
    if isinstance(argument, int) and abs(argument) >= _WIDEST and argument != MAGIC:
        raise Refused("its pickle has a number of more than 9 bytes")
    if isinstance(argument, bytes):
        argument = argument.decode("latin1")
    return _Item(kind, () if kind == "tuple" else argument)


def _tuple(items: list[_Item]) -> _Item:
    depth = 1 + max((item.depth for item in items), default=0)
    _must(depth <= DEEPEST, f"has tuples in tuples, more than {DEEPEST} deep")
    return _Item("tuple", tuple(items), depth)


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Refused(f"its pickle {otherwise}, as torch.save never does")
