"""Renaming rules that account for every key: one table carries weights in both directions.

A key that no rule names is an error, so a layout that changed is noticed instead of half loaded. Keys are
written as templates: `{i}` and `{j}` stand for a number, `{rest}` for names and the dots between them, any
other field for one name between dots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blip.errors import CheckpointError, nearest
from blip.weights import origin

State = Mapping[str, Tensor]
Change = Callable[..., tuple[Tensor, ...]]

_FIELD = re.compile(r"\{(\w+)\}")
_NUMBERS = ("i", "j")
_REST = "rest"
_SHOWN = 5


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name. Both templates have the same fields."""

    theirs: str
    ours: str


@dataclass(frozen=True)
class Transform:
    """Several tensors of one side make several of the other, for example a fused bias and its parts.

    Every template has the same fields. `to_ours` takes the tensors of `theirs` in order and returns those of
    `ours`; `to_theirs` is its inverse. Either raises ValueError when the values cannot be carried over.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Change
    to_theirs: Change


@dataclass(frozen=True)
class Drop:
    """Their key that holds nothing of ours, with the reason.

    `rebuild` makes its value from the rest of their weights: on import the two must be equal, since otherwise
    something would be lost; on export it is written. None from `rebuild`: there is nothing to make it from.
    A rule with `rebuild` stands for one key, so its template has no fields.
    """

    theirs: str
    reason: str
    rebuild: Callable[[State], Tensor | None] | None = None


@dataclass(frozen=True)
class Copy:
    """Their second name for a tensor that has another name there, with the reason.

    Both templates have the same fields. On import the two must be equal, unless `exact` is false: then the
    values of the second name are given up. On export it is written wherever the first is.
    """

    theirs: str
    of: str
    reason: str
    exact: bool = True


@dataclass(frozen=True)
class Omit:
    """Our key that their layout has no place for, with the reason: left out on export, missing on import."""

    ours: str
    reason: str


Rule = Rename | Transform | Drop | Copy | Omit
Side = Callable[[Rule], tuple[str, ...]]
Group = tuple[Rule, dict[str, str], tuple[str, ...]]


class Line(NamedTuple):
    """What became of some keys."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    """Empty = left out."""
    note: str
    """`renamed`, `transformed`, `rebuilt`, `copied`, or why it was left out."""

    def __str__(self) -> str:
        return f"{', '.join(self.source) or '-'} -> {', '.join(self.target) or '-'} ({self.note})"


class Move(NamedTuple):
    """How some keys become others."""

    line: Line
    change: Change | None = None
    """Makes the targets of the sources; None: they are the same."""


class Converted(Mapping[str, Tensor]):
    """Weights under other names, each made when it is asked for, so that none needs to be in memory before.

    Args:
        name: what error messages call the layout.
        state: weights as they are; may read its tensors when asked, too.
        moves: what becomes of its keys.

    Raises:
        CheckpointError: two keys become one; when a tensor is asked for: its values cannot be converted.
    """

    def __init__(self, name: str, state: State, moves: Sequence[Move]) -> None:
        self._name, self._state = name, state
        self._made: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Move, int]] = {}
        self.report = [move.line for move in moves]
        for move in moves:
            for place, key in enumerate(move.line.target):
                self._place(key, (move, place))

    def _place(self, key: str, place: tuple[Move, int] | None) -> None:
        if key in self._places or key in self._made:
            raise CheckpointError(f"{self._name}: two keys of the file become {key}; keep one of them")
        if place is not None:
            self._places[key] = place

    def add(self, key: str, value: Tensor) -> None:
        """A small tensor that is in no file."""
        self._place(key, None)
        self._made[key] = value
        self.report.append(Line((), (key,), "rebuilt"))

    def copy(self, key: str, of: str) -> None:
        """A second name of a tensor."""
        self._place(key, self._places[of])
        self.report.append(Line((), (key,), "copied"))

    def __getitem__(self, key: str) -> Tensor:
        if key in self._made:
            return self._made[key]
        move, place = self._places[key]
        values = tuple(self._state[source] for source in move.line.source)
        if move.change is None:
            return values[place]
        try:
            return move.change(*values)[place]
        except ValueError as error:
            keys = ", ".join(move.line.source)
            raise CheckpointError(f"{self._name}: {keys} cannot be converted: {error}") from error

    def origin(self, key: str) -> Hashable:
        """As of `blip.weights.origin`: a second name has that of the first."""
        move, place = self._places.get(key, (None, 0))
        if move is None:
            return key
        return (id(move), place) if move.change else origin(self._state, move.line.source[place])

    def __iter__(self) -> Iterator[str]:
        return iter([*self._places, *self._made])

    def __len__(self) -> int:
        return len(self._places) + len(self._made)


class Conversion(NamedTuple):
    """Converted weights, and one line for every group of keys."""

    state: dict[str, Tensor]
    report: list[Line]


class Table:
    """Rules for one layout of foreign weights.

    Args:
        name: what error messages call the layout.
        rules: each key is served by the first rule that has a template for it.
        needs: beginnings of names, of each of which such weights have at least one.
    """

    def __init__(self, name: str, rules: Sequence[Rule], needs: Sequence[str] = ()) -> None:
        self.name = name
        self.rules = list(rules)
        self.needs = tuple(needs)
        self._theirs = [(_pattern(t), rule) for rule in rules for t in _theirs(rule)]
        self._ours = [(_pattern(t), rule) for rule in rules for t in _ours(rule)]

    def is_about(self, names: Iterable[str]) -> bool:
        """Whether weights with these names have all parts that such weights need."""
        names = list(names)
        return all(any(name.startswith(part) for name in names) for part in self.needs)

    def knows(self, names: Iterable[str]) -> bool:
        """Whether there is a rule for each of these names; `ours` says what is wrong where there is not."""
        return all(any(pattern.fullmatch(name) for pattern, _ in self._theirs) for name in names)

    def to_ours(self, state: State) -> Conversion:
        """Foreign weights under our names; raises what `ours` and reading it raise."""
        return _all_of(self.ours(state))

    def to_theirs(self, state: State) -> Conversion:
        """Our weights under the foreign names; raises what `theirs` and reading it raise."""
        return _all_of(self.theirs(state))

    def ours(self, state: State) -> Converted:
        """Foreign weights under our names, made when asked for.

        Raises:
            CheckpointError: keys without a rule, an incomplete group, or a dropped tensor that is not what
                the rule says.
        """
        groups = self._groups(state, self._theirs, _theirs)
        for rule, fields, keys in groups:
            if isinstance(rule, Drop) and rule.rebuild is not None:
                self._check_dropped(rule, keys[0], state, rule.rebuild(state))
            if isinstance(rule, Copy) and rule.exact:
                self._check_dropped(rule, keys[0], state, state.get(rule.of.format_map(fields)))
        return Converted(self.name, state, _moves(groups, _ours))

    def theirs(self, state: State) -> Converted:
        """Our weights under the foreign names, with what they keep besides, made when asked for.

        Raises:
            CheckpointError: keys without a rule, or an incomplete group.
        """
        found = Converted(self.name, state, _moves(self._groups(state, self._ours, _ours), _theirs))
        for rule in self.rules:
            value = rule.rebuild(found) if isinstance(rule, Drop) and rule.rebuild is not None else None
            if value is not None:
                found.add(_theirs(rule)[0], value)
            for key, copy in self._copies(rule, found) if isinstance(rule, Copy) else ():
                found.copy(copy, key)
        return found

    def _groups(self, state: State, patterns: list[tuple[re.Pattern[str], Rule]], side: Side) -> list[Group]:
        """(rule, fields, the state's keys that it takes), in the order of the state."""
        found: dict[tuple[int, tuple[str, ...]], Group] = {}
        unknown = []
        for key in state:
            match = next(((rule, m.groupdict()) for p, rule in patterns if (m := p.fullmatch(key))), None)
            if match is None:
                unknown.append(key)
                continue
            rule, fields = match
            keys = tuple(template.format_map(fields) for template in side(rule))
            found[id(rule), keys] = (rule, fields, keys)
        if unknown:
            raise CheckpointError(self._unknown(unknown, [t for rule in self.rules for t in side(rule)]))
        for _, _, keys in found.values():
            if missing := [key for key in keys if key not in state]:
                raise CheckpointError(
                    f"{self.name}: {', '.join(missing)} is missing, which belongs to {', '.join(keys)};"
                    " the file is incomplete, so fetch or write it again"
                )
        return list(found.values())

    def _unknown(self, keys: list[str], templates: list[str]) -> str:
        shown = ", ".join(f"{key!r}{_like(key, templates)}" for key in keys[:_SHOWN])
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        return (
            f"{self.name}: no rule for {shown}{more}; these weights are of another model or layout,"
            " so check the architecture they are loaded into"
        )

    @staticmethod
    def _copies(rule: Copy, state: State) -> list[tuple[str, str]]:
        """What there is to copy: (first name, second name)."""
        pattern = _pattern(rule.of)
        matches = [(key, pattern.fullmatch(key)) for key in state]
        return [(key, rule.theirs.format_map(m.groupdict())) for key, m in matches if m]

    def _check_dropped(self, rule: Drop | Copy, key: str, state: State, expected: Tensor | None) -> None:
        if expected is None or not _same(expected, state[key]):
            raise CheckpointError(
                f"{self.name}: {key} would be dropped ({rule.reason}), but its values say something else;"
                " the model has no place for them"
            )


def expand(rules: Iterable[Rule], **fields: Sequence[str]) -> list[Rule]:
    """The rules once for each value of each field, e.g. `part=("weight", "bias")` in the templates."""
    result = list(rules)
    for name, values in fields.items():
        result = [_filled(rule, name, value) for rule in result for value in values]
    return list(dict.fromkeys(result))


def _filled(rule: Rule, name: str, value: str) -> Rule:
    def fill(template: str) -> str:
        return template.replace("{" + name + "}", value)

    if isinstance(rule, Rename):
        return Rename(fill(rule.theirs), fill(rule.ours))
    if isinstance(rule, Drop):
        return Drop(fill(rule.theirs), rule.reason, rule.rebuild)
    if isinstance(rule, Copy):
        return Copy(fill(rule.theirs), fill(rule.of), rule.reason, rule.exact)
    if isinstance(rule, Omit):
        return Omit(fill(rule.ours), rule.reason)
    theirs, ours = tuple(map(fill, rule.theirs)), tuple(map(fill, rule.ours))
    return Transform(theirs, ours, rule.to_ours, rule.to_theirs)


def _moves(groups: list[Group], target: Side) -> list[Move]:
    moves = []
    for rule, fields, keys in groups:
        if isinstance(rule, Drop | Copy | Omit):
            moves.append(Move(Line(keys, (), rule.reason)))
            continue
        targets = tuple(template.format_map(fields) for template in target(rule))
        if isinstance(rule, Transform):
            change = rule.to_ours if target is _ours else rule.to_theirs
            moves.append(Move(Line(keys, targets, "transformed"), change))
        else:
            moves.append(Move(Line(keys, targets, "renamed")))
    return moves


def _all_of(found: Converted) -> Conversion:
    return Conversion(dict(found), found.report)


def _theirs(rule: Rule) -> tuple[str, ...]:
    if isinstance(rule, Omit):
        return ()
    return rule.theirs if isinstance(rule, Transform) else (rule.theirs,)


def _ours(rule: Rule) -> tuple[str, ...]:
    if isinstance(rule, Drop | Copy):
        return ()
    return rule.ours if isinstance(rule, Transform) else (rule.ours,)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal values; of tensors without memory, equal shapes."""
    if a.is_meta or b.is_meta:
        return a.shape == b.shape
    return torch.equal(a.to(b.dtype), b)


def _pattern(template: str) -> re.Pattern[str]:
    pieces = _FIELD.split(template)  # text, field, text, field, ..., text
    texts, names = [re.escape(piece) for piece in pieces[::2]], pieces[1::2]
    fields = [f"(?P<{name}>{_meaning(name)})" for name in names]
    return re.compile("".join(a + b for a, b in zip(texts, [*fields, ""], strict=True)))


def _meaning(field: str) -> str:
    if field == _REST:
        return ".+"
    return r"\d+" if field in _NUMBERS else r"[^.]+"


def _like(key: str, templates: list[str]) -> str:
    close = nearest(re.sub(r"\.\d+\.", ".{i}.", key), templates)
    return f" (nearest: {close[0]})" if close else ""
