"""Videos through the real commands: trained on, found by text and asked about, at tiny size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from blip.data.scenes.render import PALETTE
from tests.e2e.runs import Commands, lines
from tests.videos import make_videos

SIZES: dict[str, Any] = {
    "image_size": 32,
    "vit": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64},
    "med": {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "max_positions": 64},
    "tokenizer": "scenes",
    "dropout": 0.0,
}
TWIN = {"embed_dim": 16, "queue_size": 16, "vit_grad_ckpt": False}
EYES = {stage: {"name": f"alpro_video_{stage}", "image_size": 32, "n_frms": 3} for stage in ("train", "eval")}
SCORES = {f"{way}_{name}" for way in ("txt", "img") for name in ("r1", "r5", "r10", "mdR")}
RETRIEVAL = ["run.k_test=10", "run.eval_max_txt_len=60"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 videos to train on and 12 to test, a damaged frame and a lost video among these."""
    root = tmp_path_factory.mktemp("videos")
    make_videos(root, train=12, test=21)
    clips = root / "msrvtt" / "videos"
    (clips / "test3" / "frame_1.png").write_bytes(b"")
    shutil.rmtree(clips / "test4")
    return root


def recipe(path: Path, root: Path, data: str, **run: Any) -> Path:
    retrieval = data == "msrvtt_retrieval"
    model = {"arch": "blip_retrieval" if retrieval else "blip_vqa", **SIZES, **(TWIN if retrieval else {})}
    settings = {
        "task": "retrieval" if retrieval else "gqa",
        "device": "cpu",
        "precision": "fp32",
        "data_root": str(root),
        "batch_size_train": 4,
        "batch_size_eval": 5,
        "max_bad_ratio": 0.5,
        "init_lr": 1e-3,
        "max_iters": 3,
        "num_workers": 0,
        "log_freq": 1,
        "test_splits": ["test"],
        **run,
    }
    content = {"model": model, "datasets": {data: {"vis_processor": EYES}}, "run": settings}
    path.write_text(yaml.safe_dump(content))
    return path


def tiny(data: str, root: Path, start: Path, folder: Path) -> list[str]:
    """What makes a shipped recipe small enough."""
    sizes = SIZES | (TWIN if data == "msrvtt_retrieval" else {})
    model = [f"model.{key}={json.dumps(value)}" for key, value in sizes.items()]
    eyes = f"datasets.{data}.vis_processor.eval."
    run = ["num_workers=0", "max_bad_ratio=0.5", "device=cpu", f"data_root={root}", f"output_dir={folder}"]
    places = [f"{eyes}image_size=32", f"{eyes}n_frms=3", f"model.init_from={start}"]
    return [*model, *places, *(f"run.{text}" for text in run)]


@pytest.fixture(scope="module")
def trained(commands: Commands, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    made = recipe(folder / "videos.yaml", videos, "msrvtt_retrieval", k_test=10, eval_max_txt_len=60)
    ended = commands("--cfg", made, f"run.output_dir={folder / 'run'}")
    assert ended.code == 0, ended.output
    return folder / "run"


def test_retrieval_trains_on_videos_and_the_shipped_recipe_evaluates_it(
    commands: Commands, videos: Path, trained: Path, tmp_path: Path
) -> None:
    small = tiny("msrvtt_retrieval", videos, trained, tmp_path / "run")
    sampling = ["datasets.msrvtt_retrieval.vis_processor.eval.sampling=ends"]
    ended = commands(
        *("--cfg", "blip/retrieval_msrvtt_eval.yaml", *small, *RETRIEVAL, *sampling), module="blip.evaluate"
    )
    assert ended.code == 0, ended.output
    before, found = lines(trained)[-1], lines(tmp_path / "run")[-1]
    assert found.keys() >= SCORES | {f"itc_{name}" for name in SCORES}
    assert 1 <= found["img_mdR"] <= 20
    assert {name: found[name] for name in SCORES} == pytest.approx({name: before[name] for name in SCORES})
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["record"].rpartition("/")[2], line["cause"]) for line in skipped] == [
        ("4", "missing_video"),
        ("3", "damaged_frame"),
    ]
    [predicted] = (tmp_path / "run" / "predictions").glob("test-*.json")
    shown = json.loads(predicted.read_text())
    assert len(shown) == 20
    assert shown[0]["image"].endswith("test0/frame_4.png")
    assert "data:image/" in (tmp_path / "run" / "report.html").read_text()


def test_the_median_rank_may_decide_the_best_checkpoint(
    commands: Commands, videos: Path, tmp_path: Path
) -> None:
    decide = {"valid_splits": ["test"], "eval_freq": 1, "monitor": "img_mdR", "keep_last": 9}
    made = recipe(tmp_path / "videos.yaml", videos, "msrvtt_retrieval", k_test=0, **decide)
    start = ["--cfg", made, f"run.output_dir={tmp_path / 'run'}"]
    refusal = commands(*start).refusal()
    assert "run.monitor_mode: max, but of 'img_mdR' less is better; set run.monitor_mode=min" in refusal
    ended = commands(*start, "run.monitor_mode=min")
    assert ended.code == 0, ended.output
    found = {line["step"]: line["img_mdR"] for line in lines(tmp_path / "run") if line["split"] == "test"}
    best = (tmp_path / "run/checkpoints/best").resolve().name
    assert best == f"step-{min(sorted(found), key=lambda step: found[step]):08d}"  # the first of equals


@pytest.mark.multi
def test_a_result_depends_neither_on_the_batch_size_nor_on_the_processes(
    commands: Commands, videos: Path, trained: Path, tmp_path: Path
) -> None:
    found = []
    for number, (batch, world) in enumerate([(16, 1), (3, 1), (2, 2)]):
        folder = tmp_path / str(number)
        small = [*tiny("msrvtt_retrieval", videos, trained, folder), f"run.batch_size_eval={batch}"]
        shipped = ("--cfg", "blip/retrieval_msrvtt_eval.yaml", *small, *RETRIEVAL)
        ended = commands(*shipped, module="blip.evaluate", world=world)
        assert ended.code == 0, ended.output
        [predicted] = (folder / "predictions").glob("test-*.json")
        scores = {row["instance_id"]: row["score"] for row in json.loads(predicted.read_text())}
        found.append((lines(folder)[-1], scores))
    for other in found[1:]:
        assert {name: other[0][name] for name in SCORES} == {name: found[0][0][name] for name in SCORES}
        assert other[1].keys() == found[0][1].keys()
        for name, scores in found[0][1].items():
            assert other[1][name] == pytest.approx(scores, abs=2e-4)


def test_questions_about_videos_are_trained_on_resumed_and_answered_from_the_list(
    commands: Commands, videos: Path, tmp_path: Path
) -> None:
    made = recipe(tmp_path / "videos.yaml", videos, "msrvtt_qa", save_freq=1, lr_sched="constant_lr")
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    for folder, more in ((straight, []), (parts, ["run.max_iters=2"]), (parts, ["run.resume=auto"])):
        ended = commands("--cfg", made, f"run.output_dir={folder}", "run.num_workers=1", *more)
        assert ended.code == 0, ended.output
    losses = [
        {line["step"]: line["loss"] for line in lines(folder) if line["split"] == "train"}
        for folder in (straight, parts)
    ]
    assert losses[0].keys() == losses[1].keys()
    assert losses[0][3] == losses[1][3]
    small = [*tiny("msrvtt_qa", videos, straight, tmp_path / "run"), "run.num_ans_candidates=4"]
    ended = commands("--cfg", "blip/msrvtt_qa_eval.yaml", *small, module="blip.evaluate")
    assert ended.code == 0, ended.output
    assert 0 <= lines(tmp_path / "run")[-1]["acc"] <= 100
    [predicted] = (tmp_path / "run" / "predictions").glob("test-*.json")
    assert {row["answer"] for row in json.loads(predicted.read_text())} <= set(PALETTE)


@pytest.mark.parametrize(
    ("processor", "change", "words"),
    [
        (
            {"name": "blip_image_eval", "image_size": 32},
            {},
            ["vis_processor.eval.name: blip_image_eval is for pictures", "alpro_video_eval, n_frms: 8"],
        ),
        ({**EYES["eval"], "n_frms": 0}, {}, ["vis_processor.eval.n_frms", "0 is no number of frames"]),
        ({**EYES["eval"], "sampling": "end"}, {}, ["vis_processor.eval.sampling", "ends"]),
        ({**EYES["eval"], "image_size": 16}, {}, ["image_size: 16, where model.image_size is 32"]),
        (EYES["eval"], {"data_root": "nowhere"}, ["retrieval_test.json", "blip data prepare msrvtt_retr"]),
    ],
)
def test_what_is_wrong_is_one_paragraph(
    commands: Commands,
    videos: Path,
    tmp_path: Path,
    processor: dict[str, Any],
    change: dict[str, Any],
    words: list[str],
) -> None:
    made = recipe(tmp_path / "videos.yaml", videos, "msrvtt_retrieval", k_test=10, **change)
    content = yaml.safe_load(made.read_text())
    content["datasets"]["msrvtt_retrieval"]["vis_processor"] = {"eval": processor}
    made.write_text(yaml.safe_dump(content))
    ended = commands("--cfg", made, f"run.output_dir={tmp_path / 'run'}", module="blip.evaluate")
    refusal = ended.refusal()
    assert all(word in refusal for word in words), refusal
