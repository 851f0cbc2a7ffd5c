"""Shards behind urls: a run on them is that on the files, bit for bit, mixed, killed, in any processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Recipe
from tests.e2e.runs import EYES, HELD_OUT, Commands, contents, differences, lines
from tests.shard_server import ShardServer, serving

SHARDS = "{00000..00031}.tar"


@pytest.fixture(scope="module")
def server(data_root: Path) -> Iterator[ShardServer]:
    with serving(data_root / "scenes" / "shards") as found:
        yield found


def put(recipe: Path, far: dict[str, Any], **run: Any) -> Path:
    """The recipe on a mixture of files, shards on disk, and shards that lie `far`."""
    content = yaml.safe_load(recipe.read_text())
    far = {"sample_ratio": 2, **far, **EYES}
    files = {"path": {"train": "scenes/annotations/train.json"}, "images": "scenes", **EYES}
    near = {"path": f"scenes/shards/train-{SHARDS}", "sample_ratio": 1, **EYES}
    content["datasets"] = {
        "scenes": {**files, "sample_ratio": 1},
        "near": near,
        "far": far,
        "held_out": {**HELD_OUT, **EYES, "sample_ratio": 1},
    }
    content["run"].update({"batch_size_train": 8, "log_freq": 1, **run})
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe


def remote(server: ShardServer, cache: Path) -> dict[str, Any]:
    return {"path": f"{server.url}/train-{SHARDS}", "remote": True, "cache_dir": str(cache)}


@pytest.mark.multi
@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 2)])
def test_a_killed_run_on_urls_is_the_uninterrupted_one_on_files(
    commands: Commands, recipe: Recipe, server: ShardServer, tmp_path: Path, workers: int, world: int
) -> None:
    run = {"num_workers": workers, "max_iters": 8, "batch_size_train": 8 // world, "eval_freq": 8}
    on_disk = put(recipe(), {"path": f"scenes/shards/train-{SHARDS}"}, **run)
    ended = commands("--cfg", on_disk, f"run.output_dir={tmp_path / 'files'}", world=world)
    assert ended.code == 0, ended.output
    far = put(recipe(), {**remote(server, tmp_path / "cache"), "cache_gb": 0.0005}, **run)
    argv = ["--cfg", far, f"run.output_dir={tmp_path / 'urls'}", "run.resume=auto"]
    killed = ["die_at", "torch.optim.AdamW.step", 5, "before"]
    ended = commands(*argv, world=world, traps=[killed])
    assert -signal.SIGKILL in ended.codes, ended.output
    # What the killed run has fetched is there for the next one, or not.
    ended = commands(*argv, f"datasets.far.cache_dir={tmp_path / 'other'}", world=world)
    assert ended.code == 0, ended.output
    assert differences(contents(tmp_path / "urls"), contents(tmp_path / "files")) == []
    assert server.asked.total() > 0
    assert list((tmp_path / "other").rglob(".partial-*")) == []


def test_shards_that_cannot_be_fetched_end_a_run_before_it_begins(
    commands: Commands, recipe: Recipe, server: ShardServer, tmp_path: Path
) -> None:
    far = {**remote(server, tmp_path / "cache"), "path": f"{server.url}/train-{{00030..00033}}.tar"}
    path = put(recipe(), far, num_workers=0, max_iters=2)
    text = commands("--cfg", path, f"run.output_dir={tmp_path / 'run'}").refusal()
    assert "2 of 4 shards cannot be read (far: 2 unreadable_shard), more than run.max_bad_ratio" in text
    assert f"train-00032.tar: unreadable_shard ({server.url}/train-00032.tar: HTTP 404 Not Found)" in text
    assert not (tmp_path / "run").exists()


def test_a_shard_that_is_lost_on_the_way_is_listed_and_the_run_goes_on(
    commands: Commands, recipe: Recipe, server: ShardServer, tmp_path: Path
) -> None:
    path = put(recipe(), {**remote(server, tmp_path / "cache"), "sample_ratio": 20}, max_iters=12)
    server.refuse = {f"train-{n:05d}.tar": [200, 404] for n in (3, 9)}
    try:
        ended = commands("--cfg", path, f"run.output_dir={tmp_path / 'run'}", "run.max_bad_ratio=0.5")
    finally:
        server.refuse = {}
    assert ended.code == 0, ended.output
    found = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {(line["dataset"], line["record"], line["cause"]) for line in found} == {
        ("far", "train-00003.tar", "unreadable_shard"),
        ("far", "train-00009.tar", "unreadable_shard"),
    }
    assert all("HTTP 404" in line["detail"] for line in found)
    assert [line["step"] for line in lines(tmp_path / "run") if line["split"] == "train"] == [*range(1, 13)]


def test_data_check_reads_urls_where_it_is_told_to(
    commands: Commands, server: ShardServer, tmp_path: Path
) -> None:
    url, root = f"{server.url}/train-{SHARDS}", tmp_path / "root"
    argv = ["check", url, "--data-root", root, "--limit", "2"]
    refusal = commands(*argv, module="blip.data.__main__").refusal()
    assert f"{url}: is not on this machine; to fetch its shards, add --remote" in refusal
    ended = commands(*argv, "--remote", module="blip.data.__main__")
    assert ended.code == 0, ended.output
    assert "unusable:       none" in ended.output
    assert len(list((root / "remote").rglob("*.tar"))) <= 3
