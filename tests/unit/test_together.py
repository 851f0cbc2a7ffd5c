"""Facts about doing things together: what fails on one rank fails on all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blip import dist
from blip.errors import BlipError, CheckpointError
from blip.together import on_all, on_main


def failing(error: Exception, cause: Exception | None = None) -> Callable[[], None]:
    def action() -> None:
        raise error from cause

    return action


@pytest.mark.parametrize("together", [on_all, on_main])
def test_one_process_raises_what_it_meets(together: Callable[[Callable[[], None]], None]) -> None:
    for error in (ValueError("odd"), CheckpointError("none there")):
        with pytest.raises(type(error)) as raised:
            together(failing(error, KeyError("why")))
        assert raised.value is error
        assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(BlipError, match=r"'no file': No such file"):
        together(lambda: open("no file").close())  # type: ignore[func-returns-value]


def test_all_ranks_raise_what_one_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_objects", lambda own: [own, None])
    with pytest.raises(RuntimeError, match="ValueError: odd") as raised:
        on_all(failing(ValueError("odd")))
    assert isinstance(raised.value.__cause__, ValueError)  # on the rank that met it
    monkeypatch.setattr(dist, "gather_objects", lambda own: [own, CheckpointError("none there")])
    with pytest.raises(CheckpointError, match="none there"):
        on_all(lambda: "all is well here")
