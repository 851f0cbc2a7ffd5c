"""Batches are the same for any number of ranks and workers, and after any interruption."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blip import keyed
from blip.data.collate import collate, merge
from blip.data.loader import EvalLoader, LoaderConfig, TrainLoader
from blip.data.samples import BadRecord, SampleMaker
from blip.data.skips import SkipLog
from blip.data.streams.shards import ShardDataset
from blip.data.streams.stores import LocalShards, RemoteShards
from blip.errors import CheckpointError, ConfigError, DataError
from tests.shard_server import serving

Loaders = Callable[..., TrainLoader]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@dataclass
class Toy:
    """Pairs that tell what they are; records in `broken` are bad, their substitute is the next one."""

    name: str
    size: int
    broken: set[int] = field(default_factory=set)
    extra: dict[str, Any] = field(default_factory=dict)
    side: int = 2

    def __len__(self) -> int:
        return self.size

    def sample_or_substitute(
        self, index: int, epoch: int, seed: int
    ) -> tuple[dict[str, Any], list[BadRecord]]:
        bad = []
        while index in self.broken:
            bad.append(BadRecord("truncated_image", f"{self.name}/{index}"))
            index = (index + 1) % self.size
        return self[index, epoch, seed], bad

    def __getitem__(self, place: int | tuple[int, int, int]) -> dict[str, Any]:
        index, epoch, seed = place if isinstance(place, tuple) else (place, 0, 0)
        rng = keyed.generator(seed, "augment", self.name, epoch, index)
        noise = rng.integers(256, size=(3, self.side, self.side), dtype=np.uint8)
        return {
            "image": torch.from_numpy(noise),
            "image_norm": torch.ones(2, 3),
            "text_input": " ".join([self.name, *["w"] * (index % 5)]),
            "image_id": index // 2,
            "instance_id": f"{self.name}/{index}",
            **self.extra,
        }


class Noise:
    """A picture processor whose result shows the picture and the generator."""

    def pixels(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        assert rng is not None
        pixels = torch.from_numpy(np.array(image.convert("RGB")).transpose(2, 0, 1).copy())
        pixels[0] = int(rng.integers(256))
        return pixels

    def norm(self) -> Tensor:
        return torch.ones(2, 3)


def write_shards(folder: Path, sizes: list[int]) -> list[Path]:
    folder.mkdir()
    paths = []
    for shard, size in enumerate(sizes):
        paths.append(folder / f"{shard:03d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for i in range(size):
                picture = io.BytesIO()
                Image.new("RGB", (2, 2), (0, shard, i)).save(picture, "PNG")
                record = {"caption": f"shard {shard} sample {i}" + " w" * (i % 4)}
                for name, data in (
                    (f"{i}.png", picture.getvalue()),
                    (f"{i}.json", json.dumps(record).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    lengths = [len(text.split()) for text in texts]
    ids = torch.full((len(texts), max(lengths)), 9)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(1, length + 1)
    return {"text_ids": ids, "text_mask": ids != 9}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    paths = write_shards(tmp_path_factory.mktemp("data") / "shards", [5, 3, 7, 4, 6, 1, 5, 4, 3])
    return ShardDataset("web", paths, SampleMaker(Noise(), str), lanes=4, window=4)


@pytest.fixture(scope="module")
def fetched(shards: ShardDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardDataset]:
    """The same shards behind urls, in a folder that has room for a few of them."""
    assert isinstance(shards.shards, LocalShards)
    paths = shards.shards.paths
    with serving(paths[0].parent) as server:
        urls = [f"{server.url}/{path.name}" for path in paths]
        store = RemoteShards("far", urls, tmp_path_factory.mktemp("cache"), 100_000, 38)
        yield ShardDataset("far", store, SampleMaker(Noise(), str), lanes=4, window=4)


@pytest.fixture(params=["map", "concatenated", "mixed", "shards", "mixed with shards", "all mixed"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build(kind: str, shards: ShardDataset, fetched: ShardDataset) -> Loaders:
    one, two = Toy("one", 19, broken={3}), Toy("two", 22)
    ratios: dict[str, float | None] = {}
    datasets: dict[str, Any] = {
        "map": {"one": one},
        "concatenated": {"one": one, "two": two},
        "mixed": {"one": one, "two": two},
        "shards": {"web": shards},
        "mixed with shards": {"one": one, "two": two, "web": shards},
        "all mixed": {"one": one, "web": shards, "far": fetched},
    }[kind]
    if "mixed" in kind:
        ratios = dict(zip(datasets, (1.0, 2.0, 1.5), strict=False))

    def make(world: int = 1, rank: int = 0, **options: Any) -> TrainLoader:
        config = LoaderConfig(**{"batch_size": 4 // world, "seed": 7, "pad_id": 9} | options)
        config.world, config.rank = world, rank
        return TrainLoader(datasets, config, ratios, tokenize)

    return make


def take(loader: TrainLoader, count: int) -> list[dict[str, Any]]:
    batches = [dict(batch) for batch in islice(loader, count)]
    loader.close()
    return batches


def gathered(build: Loaders, world: int, count: int, **options: Any) -> list[dict[str, Any]]:
    """What all ranks together see: the parts of each micro-batch put together."""
    per_rank = [take(build(world, rank, **options), count) for rank in range(world)]
    return [merge([rows_of(part) for part in parts], pad_id=9) for parts in zip(*per_rank, strict=True)]


def rows_of(batch: dict[str, Any]) -> dict[str, Any]:
    size = len(batch["rows"])
    about = ("batch_total", "epoch", "step", "micro_batch", "num_micro_batches", "source")
    rows = {k: v for k, v in batch.items() if k not in (*about, "position")}
    return rows | {key: [batch[key]] * size for key in about}


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            if isinstance(value, Tensor):
                assert a[key].dtype == value.dtype
                assert torch.equal(a[key], value), key
            else:
                assert a[key] == value, key


@pytest.mark.parametrize("world", [2, 4])
def test_batches_do_not_depend_on_the_number_of_ranks(build: Loaders, world: int) -> None:
    assert_same(gathered(build, world, 24), gathered(build, 1, 24))


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 2)])
def test_batches_do_not_depend_on_the_number_of_workers(build: Loaders, world: int, workers: int) -> None:
    assert_same(gathered(build, world, 14, num_workers=workers), gathered(build, world, 14))


def test_fetched_shards_give_the_batches_of_the_files(shards: ShardDataset, fetched: ShardDataset) -> None:
    ours, theirs = (
        TrainLoader({"web": ShardDataset("web", data.shards, data.maker, 4, 4)}, LoaderConfig(4, seed=7))
        for data in (shards, fetched)
    )
    found = take(theirs, 30)
    assert_same(found, take(ours, 30))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_it_took_to_make_batches_is_told_once(
    fetched: ShardDataset, tmp_path: Path, workers: int
) -> None:
    store = fetched.shards
    assert isinstance(store, RemoteShards)
    fresh = RemoteShards("far", store.urls, tmp_path, 10**9, 38)
    data = ShardDataset("far", fresh, fetched.maker, lanes=4, window=4)
    loader = TrainLoader({"far": data}, LoaderConfig(4, num_workers=workers))
    take(loader, 20)
    busy, waited, size = loader.take_traffic()
    assert busy >= waited > 0
    assert size == sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))
    assert loader.num_workers == max(1, workers)
    assert loader.take_traffic() == (0.0, 0.0, 0)
    plain = TrainLoader({"one": Toy("one", 19)}, LoaderConfig(4, num_workers=workers))
    take(plain, 3)
    busy, waited, size = plain.take_traffic()
    assert (busy > 0, waited, size) == (True, 0.0, 0)


@pytest.mark.parametrize("accum", [1, 3])
def test_a_run_resumed_behind_any_batch_goes_on_as_if_uninterrupted(build: Loaders, accum: int) -> None:
    whole = take(build(accum=accum), 26)
    for used, batch in enumerate(whole[:-3], start=1):
        resumed = build(accum=accum)
        resumed.load_state_dict(json.loads(json.dumps(batch["position"])))
        assert_same(take(resumed, min(12, len(whole) - used)), whole[used : used + 12])


@pytest.mark.parametrize("workers", [1, 3])
def test_what_workers_have_prefetched_is_not_part_of_the_position(build: Loaders, workers: int) -> None:
    whole = take(build(2, 1), 9)
    first = build(2, 1, num_workers=workers)
    used = take(first, 4)
    assert_same(used, whole[:4])
    assert first.state_dict() == used[-1]["position"] == whole[3]["position"]
    resumed = build(2, 1, num_workers=4 - workers)
    resumed.load_state_dict(first.state_dict())
    assert_same(take(resumed, 5), whole[4:])


def test_a_loader_that_was_closed_goes_on_where_it_was(build: Loaders) -> None:
    loader = build(num_workers=1)
    found = [batch for _ in range(3) for batch in take(loader, 2)]
    assert_same(found, take(build(), 6))


def test_order_is_the_same_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; from itertools import islice; import test_loader as t;"
        "loader = t.TrainLoader({'one': t.Toy('one', 19)}, t.LoaderConfig(4));"
        "print([b['instance_id'] for b in islice(loader, 9)])"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[3])]
    run = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    here = [
        batch["instance_id"] for batch in islice(TrainLoader({"one": Toy("one", 19)}, LoaderConfig(4)), 9)
    ]
    assert run.stdout.strip() == str(here)


def epochs(loader: TrainLoader, count: int) -> list[list[dict[str, Any]]]:
    return [[dict(batch) for batch in loader.rest_of_epoch()] for _ in range(count)]


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    datasets = {"one": Toy("one", 11), "two": Toy("two", 12)}
    loader = TrainLoader(datasets, LoaderConfig(4, drop_last=False))
    names = [[name for batch in epoch for name in batch["instance_id"]] for epoch in epochs(loader, 3)]
    everything = sorted([f"one/{i}" for i in range(11)] + [f"two/{i}" for i in range(12)])
    assert [sorted(epoch) for epoch in names] == [everything] * 3
    assert names[0] != names[1] != names[2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_ends_with_a_short_batch_and_a_short_step(world: int) -> None:
    def batches(rank: int) -> list[dict[str, Any]]:
        config = LoaderConfig(6 // world, accum=3, drop_last=False, world=world, rank=rank)
        loader = TrainLoader({"one": Toy("one", 29)}, config)
        assert loader.steps_per_epoch == 2
        return epochs(loader, 2)[1]

    parts = [batches(rank) for rank in range(world)]
    assert [batch["batch_total"] for batch in parts[0]] == [6, 6, 6, 6, 5]
    assert [batch["step"] for batch in parts[0]] == [2, 2, 2, 3, 3]
    assert [batch["num_micro_batches"] for batch in parts[0]] == [3, 3, 3, 2, 2]
    rows = torch.cat([torch.cat([part[i]["rows"] for part in parts]) for i in range(5)])
    assert rows.tolist() == [*range(18), *range(11)]


def test_dropping_the_last_batch_leaves_whole_steps() -> None:
    loader = TrainLoader({"one": Toy("one", 29)}, LoaderConfig(3, accum=3))
    assert loader.steps_per_epoch == 3
    first, second = epochs(loader, 2)
    assert [batch["batch_total"] for batch in first + second] == [3] * 18
    assert [batch["epoch"] for batch in first + second] == [0] * 9 + [1] * 9
    assert torch.cat([batch["rows"] for batch in second]).tolist() == [*range(9)] * 3


def test_accumulated_micro_batches_are_the_rows_of_the_big_batch() -> None:
    def steps(batch_size: int, accum: int) -> Iterator[list[Any]]:
        return TrainLoader({"one": Toy("one", 29)}, LoaderConfig(batch_size, accum=accum)).steps()

    for small, big in islice(zip(steps(2, 3), steps(6, 1), strict=True), 8):
        assert len(small) == 3
        assert len(big) == 1
        merged = merge([rows_of(batch) for batch in small])
        assert merged["instance_id"] == big[0]["instance_id"]
        assert torch.equal(merged["image"], big[0]["image"])
        assert torch.equal(merged["rows"], big[0]["rows"])


def test_steps_of_a_mixture_have_one_source_where_asked() -> None:
    datasets = {"one": Toy("one", 29), "two": Toy("two", 23)}
    config = LoaderConfig(2, accum=3, whole_steps=True)
    loader = TrainLoader(datasets, config, {"one": 0.5, "two": 0.5})
    sources = [[batch["source"] for batch in step] for step in islice(loader.steps(), 30)]
    assert {tuple(step) for step in sources} == {("one",) * 3, ("two",) * 3}


def test_image_ids_of_datasets_do_not_collide_and_the_first_keeps_its_own() -> None:
    datasets = {"one": Toy("one", 8), "two": Toy("two", 8)}
    batch = next(TrainLoader(datasets, LoaderConfig(16)))
    ids = dict(zip(batch["instance_id"], batch["image_id"].tolist(), strict=True))
    assert [ids[f"one/{i}"] for i in range(8)] == [i // 2 for i in range(8)]
    assert len(set(ids.values())) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_replaced_counted_and_listed(tmp_path: Path, workers: int) -> None:
    skips = SkipLog(tmp_path, max_bad_ratio=0.5)
    datasets = {"one": Toy("one", 12, broken={3, 4}), "two": Toy("two", 12, broken={0})}
    loader = TrainLoader(datasets, LoaderConfig(6, num_workers=workers, drop_last=False), skips=skips)
    rows = [name for batch in loader.rest_of_epoch() for name in batch["instance_id"]]
    loader.close()
    assert len(rows) == 24
    assert rows.count("one/5") == 3
    assert rows.count("two/1") == 2
    assert skips.good == 24
    assert skips.counts == {"one": {"truncated_image": 3}, "two": {"truncated_image": 1}}
    listed = {json.loads(line)["record"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()}
    assert listed == {"one/3", "one/4", "two/0"}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_one_plain_line(workers: int) -> None:
    class Hopeless(Toy):
        def sample_or_substitute(
            self, index: int, epoch: int, seed: int
        ) -> tuple[dict[str, Any], list[BadRecord]]:
            if epoch:
                raise DataError(f"datasets.{self.name}: nothing can be read")
            return super().sample_or_substitute(index, epoch, seed)

    loader = TrainLoader({"one": Hopeless("one", 8)}, LoaderConfig(4, num_workers=workers))
    take(loader, 2)
    with pytest.raises(DataError, match=r"^datasets\.one: nothing can be read$"):
        next(loader)


def test_the_global_generators_of_the_process_are_left_alone() -> None:
    loader = TrainLoader({"one": Toy("one", 19)}, LoaderConfig(4, num_workers=1))
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(loader, 6)
    list(EvalLoader(Toy("one", 5), 2, num_workers=1).batches())
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_workers_ignore_stop_signals_and_use_one_thread() -> None:
    class Asking(Toy):
        def __getitem__(self, place: int | tuple[int, int, int]) -> dict[str, Any]:
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            ignored = all(signal.getsignal(number) == signal.SIG_IGN for number in numbers)
            return {**super().__getitem__(place), "ignored": ignored, "threads": torch.get_num_threads()}

    batch: Any = take(TrainLoader({"one": Asking("one", 9)}, LoaderConfig(4, num_workers=1)), 1)[0]
    assert batch["ignored"].tolist() == [True] * 4
    assert batch["threads"].tolist() == [1] * 4


def test_workers_use_the_tokenizer_without_threads_and_this_process_as_it_likes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "TOKENIZERS_PARALLELISM"

    def tokenize_and_tell(texts: list[str]) -> dict[str, Any]:
        return {**tokenize(texts), "told": [os.environ.get(name)] * len(texts)}

    for here in (None, "true"):
        if here is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, here)
        loader = TrainLoader(
            {"one": Toy("one", 9)}, LoaderConfig(4, num_workers=1), tokenize=tokenize_and_tell
        )
        assert take(loader, 1)[0]["told"] == ["false"] * 4
        assert os.environ.get(name) == here


def test_an_interrupted_read_is_done_again() -> None:
    class Interrupted(Toy):
        calls = 0

        def sample_or_substitute(
            self, index: int, epoch: int, seed: int
        ) -> tuple[dict[str, Any], list[BadRecord]]:
            self.calls += 1
            if self.calls == 8:
                raise KeyboardInterrupt
            return super().sample_or_substitute(index, epoch, seed)

    loader = TrainLoader({"one": Interrupted("one", 19)}, LoaderConfig(4))
    found = take(loader, 1)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    assert_same(found + take(loader, 3), take(TrainLoader({"one": Toy("one", 19)}, LoaderConfig(4)), 4))


def test_a_process_that_ends_without_closing_its_loader_ends(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; import test_loader as t;"
        "loader = t.TrainLoader({'one': t.Toy('one', 19)}, t.LoaderConfig(4, num_workers=2)); next(loader)"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[3])]
    run = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 8}, "seed is 8, was 7"),
        ({"batch_size": 2}, "global batch is 2, was 4"),
        ({"accum": 2}, "accum_grad_iters is 2, was 1"),
        ({"world": 2}, "ranks is 2, was 1"),
    ],
)
def test_a_position_of_another_setup_is_refused(
    build: Loaders, kind: str, change: dict[str, int], told: str
) -> None:
    loader = build()
    next(loader)
    state = loader.state_dict()
    loader.close()
    with pytest.raises(CheckpointError, match=told):
        build(**change).load_state_dict(state)


def test_a_position_in_other_data_is_refused() -> None:
    state = TrainLoader({"one": Toy("one", 19)}, LoaderConfig(4)).state_dict()
    with pytest.raises(CheckpointError, match="20 samples"):
        TrainLoader({"one": Toy("one", 20)}, LoaderConfig(4)).load_state_dict(state)


@pytest.mark.parametrize(
    ("datasets", "options", "ratios", "error", "told"),
    [
        ({}, {}, {}, ConfigError, "there is none"),
        ({"one": Toy("one", 0)}, {}, {}, DataError, "datasets.one: it has no samples"),
        ({"one": Toy("one", 3)}, {}, {}, ConfigError, "one has 3 samples, fewer than one step"),
        ({"one": Toy("one", 7)}, {"accum": 2}, {}, ConfigError, "x 2"),
        (
            {"one": Toy("one", 9)},
            {"batch_size": 2, "world": 2, "rank": 0, "drop_last": False},
            {},
            ConfigError,
            r"1 row\(s\), too few for 2 ranks",
        ),
        (
            {"one": Toy("one", 9), "two": Toy("two", 3)},
            {},
            {"one": 1.0, "two": 1.0},
            ConfigError,
            "two has 3 samples",
        ),
        (
            {"one": Toy("one", 9), "two": Toy("two", 9)},
            {},
            {"one": 1.0},
            ConfigError,
            "datasets.two.sample_ratio",
        ),
        ({"one": Toy("one", 9)}, {}, {"one": 0.0}, ConfigError, "sample_ratio is 0 for one"),
        (
            {"one": Toy("one", 9), "two": Toy("two", 9, extra={"weight": 1.0})},
            {},
            {},
            DataError,
            r"different keys \(weight\)",
        ),
        ({"one": Toy("one", 9), "two": Toy("two", 9, side=3)}, {}, {}, DataError, "different shapes"),
    ],
)
def test_batches_that_cannot_be_made_are_refused_at_the_start(
    datasets: dict[str, Toy],
    options: dict[str, Any],
    ratios: dict[str, float],
    error: type[Exception],
    told: str,
) -> None:
    with pytest.raises(error, match=told):
        TrainLoader(datasets, LoaderConfig(**{"batch_size": 4} | options), ratios)


def test_waiting_for_data_is_measured() -> None:
    loader = TrainLoader({"one": Toy("one", 19)}, LoaderConfig(4))
    take(loader, 3)
    assert loader.wait_s > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_sees_every_sample_once(world: int, workers: int) -> None:
    seen: list[int] = []
    for rank in range(world):
        loader = EvalLoader(Toy("one", 7), 2, workers if world < 3 else 0, tokenize, world, rank)
        assert len(loader) == 7
        assert loader.name == "one"
        for batch in loader.batches():
            assert batch["image"].dtype == torch.uint8
            assert batch["text_ids"].shape == batch["text_mask"].shape
            index = batch["index"].tolist()  # type: ignore[typeddict-item]
            assert batch["instance_id"] == [f"one/{i}" for i in index]
            seen += index
    assert seen == list(range(7))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_evaluation_cannot_read_is_an_error(workers: int) -> None:
    class Broken(Toy):
        def __getitem__(self, place: int | tuple[int, int, int]) -> dict[str, Any]:
            if place == 3:
                raise BadRecord("missing_image", "one/3")
            return super().__getitem__(place)

    with pytest.raises(DataError, match=r"^one/3: missing_image$"):
        list(EvalLoader(Broken("one", 7), 2, workers).batches())


def test_collation_is_typed_by_value() -> None:
    samples = [
        {
            "a": True,
            "b": 1,
            "c": 0.5,
            "d": "x",
            "e": torch.zeros(2),
            "f": np.int64(3),
            "g": ["p"],
            "h": np.ones(2),
        },
        {
            "a": False,
            "b": 2,
            "c": 1,
            "d": "y",
            "e": torch.ones(2),
            "f": np.int64(4),
            "g": [],
            "h": np.ones(2),
        },
    ]
    batch = collate(samples)
    kinds = {key: value.dtype for key, value in batch.items() if isinstance(value, Tensor)}
    assert kinds == {
        "a": torch.bool,
        "b": torch.int64,
        "c": torch.float32,
        "e": torch.float32,
        "f": torch.int64,
        "h": torch.float64,
    }
    assert batch["b"].tolist() == [1, 2]
    assert (batch["d"], batch["g"]) == (["x", "y"], [["p"], []])
    assert batch["e"].shape == (2, 2)


def test_parts_of_texts_are_padded_to_the_longest_part() -> None:
    parts = [tokenize(["a b", "a"]), tokenize(["a b c"])]
    merged = merge(parts, pad_id=5)
    assert merged["text_ids"].tolist() == [[1, 2, 5], [1, 9, 5], [1, 2, 3]]
    assert merged["text_mask"].tolist() == [[True, True, False], [True, False, False], [True, True, True]]
