"""The folder of fetched files: whole files only, none twice, bounded, nothing removed that is in use."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import IO

import pytest

from blip.data.streams.cache import ShardCache


def put(cache: ShardCache, name: str, size: int = 10) -> IO[bytes]:
    return cache.open(name, lambda out: writing(cache, out, size))


def writing(cache: ShardCache, out: IO[bytes], size: int) -> None:
    cache.make_room(size)
    out.write(b"x" * size)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_longest_unused_files_make_room_but_none_that_is_open(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 30)
    held = put(cache, "a")
    for name in "bc":
        put(cache, name).close()
        time.sleep(0.01)
    put(cache, "b").close()  # used again
    put(cache, "d").close()
    assert names(tmp_path) == {"a", "b", "d"}
    assert held.read() == b"x" * 10
    with put(cache, "e"), put(cache, "f"), put(cache, "g"):
        assert names(tmp_path) == {"a", "e", "f", "g"}  # all are in use: more than the limit
        assert not cache.make_room(0)
    held.close()
    assert cache.make_room(10)
    assert len(names(tmp_path)) == 2


def test_a_file_that_could_not_be_fetched_is_not_there(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)

    def fail(out: IO[bytes]) -> None:
        out.write(b"half")
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.open("a", fail)
    assert names(tmp_path) == set()
    for name in (".partial-a", ".lock-a", ".partial-b"):
        (tmp_path / name).write_bytes(b"left by a killed process, longer than the file")
    assert put(cache, "a").read() == b"x" * 10
    assert names(tmp_path) == {"a", ".partial-b"}
    assert cache.make_room(90)
    assert ".partial-b" not in names(tmp_path)


def fetch_slowly(folder: Path, everyone: Barrier) -> None:
    def write(out: IO[bytes]) -> None:
        with (folder / "log").open("a") as log:
            log.write("fetched\n")
        time.sleep(0.2)
        out.write(b"y" * 10)

    def use() -> None:
        for name in "ab":
            everyone.wait(30)
            with ShardCache(folder / "cache", 100).open(name, write) as file:
                everyone.wait(30)  # nobody has to let go of it for another one to have it
                assert file.read() == b"y" * 10

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_what_several_processes_and_threads_ask_for_is_fetched_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    everyone = context.Barrier(9)
    processes = [context.Process(target=fetch_slowly, args=(tmp_path, everyone)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert not everyone.broken
    assert (tmp_path / "log").read_text() == "fetched\n" * 2
    assert names(tmp_path / "cache") == {"a", "b"}


def hold(folder: str) -> None:
    put(ShardCache(Path(folder), 10), "a")
    os._exit(0)  # without closing


def test_what_a_process_held_is_free_when_it_has_ended(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=hold, args=(str(tmp_path),))
    process.start()
    process.join()
    assert names(tmp_path) == {"a"}
    put(ShardCache(tmp_path, 10), "b").close()
    assert names(tmp_path) == {"b"}
