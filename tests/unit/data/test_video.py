"""Videos as folders of frames, lists of them and files: their order, their damage and their batches."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip.batch import to_device
from blip.config.schema import DatasetConfig
from blip.data import samples, sources, video
from blip.data.__main__ import main
from blip.data.browse import open_splits
from blip.data.evaluation import EvalPairs
from blip.data.loader import EvalLoader, LoaderConfig, TrainLoader
from blip.data.makers import Defaults
from blip.data.records import PackedRecords
from blip.data.samples import BadRecord, Clip, SampleMaker, read_clip
from blip.data.skips import SkipLog
from blip.data.sources import build_dataset
from blip.data.video import find_frames
from blip.errors import BlipError
from blip.processors.text import BlipCaption
from blip.processors.video import AlproVideoEval
from tests.videos import FRAMES, make_videos, write_frames

MAKER = SampleMaker(AlproVideoEval(image_size=8, n_frms=3), BlipCaption())
CLIPS = {
    "train": {"name": "alpro_video_train", "image_size": 8, "n_frms": 4},
    "eval": {"name": "alpro_video_eval", "image_size": 8, "n_frms": 4},
}


def shade(value: int) -> Image.Image:
    """One grey, which tells a frame."""
    return Image.new("RGB", (6, 5), (value, value, value))


def shades(frames: list[Image.Image]) -> list[int]:
    return [frame.getpixel((0, 0))[0] for frame in frames]  # type: ignore[index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`v0`: 12 frames; `v1`: 5 of which the third is cut off and the fourth empty; `bad`; `empty`."""
    write_frames(tmp_path / "v0", [shade(number) for number in range(12)])
    write_frames(tmp_path / "v1", [shade(number) for number in range(5)])
    cut = (tmp_path / "v1" / "frame_3.png").read_bytes()
    (tmp_path / "v1" / "frame_3.png").write_bytes(cut[:-20])
    (tmp_path / "v1" / "frame_4.png").write_bytes(b"")
    write_frames(tmp_path / "bad", [shade(0)] * 2)
    for path in (tmp_path / "bad").iterdir():
        path.write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    make_videos(made, train=10, val=2, test=12)
    return made


def packed(folder: Path, *videos: Any) -> PackedRecords:
    records = [{"video": video, "caption": f"text {number}"} for number, video in enumerate(videos)]
    return PackedRecords(records, [str(folder)], columns=("video", "caption"))


# Where frames are


def test_frames_come_in_the_order_of_the_numbers_in_their_names(folder: Path) -> None:
    (folder / "v0" / "notes.txt").write_text("no frame")
    found = find_frames([str(folder / "v0")])
    assert [Path(place).name for place in found] == [f"frame_{number}.png" for number in range(1, 13)]
    for name in ("b10.jpg", "a2.JPG", "b9.jpg", "10.jpg", "9.jpg"):
        (folder / "empty" / name).touch()
    found = find_frames([str(folder / "empty")])
    assert [Path(place).name for place in found] == ["9.jpg", "10.jpg", "a2.JPG", "b9.jpg", "b10.jpg"]


def test_a_video_is_a_folder_or_a_file_or_what_was_extracted_beside_it(folder: Path) -> None:
    assert find_frames([str(folder / "v0.mp4")]) == find_frames([str(folder / "v0")])
    (folder / "v0.mp4").touch()
    assert len(find_frames([str(folder / "v0.mp4")])) == 12  # frames go before the file
    (folder / "v2.webm").touch()
    assert find_frames([str(folder / "v2")]) == find_frames([str(folder / "v2.webm")])
    assert find_frames([str(folder / "v2.webm")]) == str(folder / "v2.webm")
    picture = str(folder / "v0" / "frame_1.png")
    assert find_frames([picture]) == [picture]
    assert find_frames(["b.png", "a.png"]) == ["b.png", "a.png"]
    with pytest.raises(FileNotFoundError, match="v3"):
        find_frames([str(folder / "v3.avi")])


def test_only_wanted_frames_are_read_in_their_order(folder: Path) -> None:
    asked = []

    def choose(total: int) -> list[int]:
        asked.append(total)
        return [0, 5, 5, 11]

    frames, damaged = read_clip(Clip((str(folder / "v0"),)), "v", choose)
    assert (shades(frames), damaged, asked) == ([0, 5, 5, 11], [], [12])
    listed = Clip(tuple(str(folder / "v0" / f"frame_{number}.png") for number in (7, 2)))
    assert shades(read_clip(listed, "v", lambda total: [0, 1])[0]) == [6, 1]


def test_a_table_may_hold_the_frames_themselves(folder: Path) -> None:
    contents = [(folder / "v0" / f"frame_{number}.png").read_bytes() for number in (3, 9, 1)]
    sample = MAKER.picture(Clip(tuple(contents)), "v")
    assert sample["image"][:, 0, 0, 0].tolist() == [2, 8, 0]
    with pytest.raises(BadRecord, match="unreadable_video"):
        MAKER.picture(Clip((b"not a picture",)), "v")


# What is damaged


def test_the_nearest_frame_stands_in_for_a_damaged_one_and_this_is_told(folder: Path) -> None:
    frames, damaged = read_clip(Clip((str(folder / "v1"),)), "v", lambda total: [0, 1, 2, 2, 3, 4])
    assert shades(frames) == [0, 1, 1, 1, 4, 4]
    assert [(bad.name, bad.cause) for bad in damaged] == [("v", "damaged_frame")] * 2
    assert damaged[0].detail.startswith("truncated_image, ")
    assert damaged[1].detail.startswith("empty_image, ")
    assert shades(read_clip(Clip((str(folder / "v1"),)), "v", lambda total: [0, 4])[0]) == [0, 4]


@pytest.mark.parametrize(
    ("places", "cause"),
    [
        (["bad"], "unreadable_video"),
        (["v0/frame_1.jpg", "v0/frame_2.jpg"], "unreadable_video"),
        (["empty"], "empty_video"),
        (["v3"], "missing_video"),
        (["v3.mp4"], "missing_video"),
    ],
)
def test_a_video_without_any_frame_is_a_bad_record(folder: Path, places: list[str], cause: str) -> None:
    with pytest.raises(BadRecord) as caught:
        read_clip(Clip(tuple(str(folder / place) for place in places)), "v", lambda total: [0, total - 1])
    assert (caught.value.cause, caught.value.name) == (cause, "v")


def test_an_evaluation_leaves_out_videos_without_frames_and_counts_damaged_frames(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = EvalPairs("val", packed(folder, "v0", "bad", "v1", "v3", None), MAKER).verify(threads=2)
    assert data.text == ["text 0", "text 2"]
    causes = [(bad.name, bad.cause) for bad in data.bad]
    assert causes == [("val/1", "unreadable_video"), ("val/3", "missing_video"), ("val/4", "missing_video")]
    assert [(bad.name, bad.cause) for bad in data.damaged] == [("val/2", "damaged_frame")]
    assert (data.lost, data.total, data.of_videos) == (3, 5, True)
    assert "1 frames cannot be read; the nearest ones stand in for them" in caplog.text
    assert data.picture(0) == str(folder / "v0" / "frame_7.png")
    assert sorted(data[1]) == ["image", "image_id", "image_norm", "instance_id"]


def test_training_skips_and_counts_the_same(folder: Path) -> None:
    path = folder / "own.json"
    entries = ["v0", "v1", "bad", "v0", ["v0/frame_1.png", "v0/frame_2.png"]]
    path.write_text(json.dumps([{"video": entry, "caption": "a"} for entry in entries]))
    eyes = {"train": {**CLIPS["eval"], "n_frms": 5}}
    data: Any = build_dataset("own", DatasetConfig(path=str(path), vis_processor=eyes), data_root=folder)
    skips = SkipLog(max_bad_ratio=1.0)
    loader = TrainLoader({"own": data}, LoaderConfig(5), skips=skips)
    batch = next(loader)
    assert batch["image"].shape == (5, 5, 3, 8, 8)
    assert "damaged" not in batch
    assert skips.counts["own"]["unreadable_video"] >= 1
    assert skips.counts["own"]["damaged_frame"] >= 2
    assert [bad.cause for bad in data.sample_or_substitute(1, 0, 0)[1]] == ["damaged_frame"] * 2
    assert data.image_ids
    assert data.sample(0)["image_id"] == data.sample(3)["image_id"] != data.sample(1)["image_id"]


# Batches


def test_training_batches_of_videos_do_not_depend_on_workers_and_go_on_where_they_stopped(root: Path) -> None:
    config = DatasetConfig(vis_processor=CLIPS)
    runs = []
    for workers in (0, 2):
        data: Any = build_dataset("msrvtt_retrieval", config, data_root=root)
        loader = TrainLoader({"msrvtt": data}, LoaderConfig(4, num_workers=workers))
        runs.append([next(loader) for _ in range(4)])
        loader.close()
    for one, other in zip(*runs, strict=True):
        assert one["image"].shape == (4, 4, 3, 8, 8)
        assert one["image"].dtype == torch.uint8
        assert torch.equal(one["image"], other["image"])
        assert one["text_input"] == other["text_input"]
    again = TrainLoader({"msrvtt": data}, LoaderConfig(4))
    again.load_state_dict(pickle.loads(pickle.dumps(runs[0][1]["position"])))
    assert torch.equal(next(again)["image"], runs[0][2]["image"])


def test_videos_travel_to_the_device_as_bytes_and_are_normalised_there(root: Path) -> None:
    data: Any = build_dataset(
        "msrvtt_retrieval", DatasetConfig(vis_processor=CLIPS), "test", root, train=False
    )
    batch: Any = next(EvalLoader(data, 5).batches())
    assert batch["image"].shape == (5, 4, 3, 8, 8)
    moved = to_device(batch, torch.device("cpu"))
    processor = AlproVideoEval(image_size=8, n_frms=4)
    frames = [
        Image.open(root / "msrvtt" / "videos" / "test2" / f"frame_{number}.png").convert("RGB")
        for number in range(1, FRAMES + 1)
    ]
    assert torch.equal(moved["image"][2], processor(frames))


def test_lavis_s_names_read_its_annotations(root: Path) -> None:
    config = DatasetConfig(vis_processor=CLIPS, data_type="videos")
    data: Any = build_dataset("msrvtt_retrieval", config, "test", root, train=False, wanted="retrieval")
    assert (len(data), len(data.text), data.txt2img) == (12, 12, list(range(12)))
    asked: Any = build_dataset("msrvtt_qa", config, "test", root, train=False, wanted="vqa")
    told = json.loads((root / "msrvtt/annotations/qa_test.json").read_text())
    assert [asked.question(i) for i in range(12)] == [record["question"] for record in told]
    assert [asked.answers(i) for i in range(12)] == [[record["answer"]] for record in told]
    assert asked.answer_list == list(json.loads((root / "msrvtt/annotations/qa_ans2label.json").read_text()))
    trained: Any = build_dataset("msrvtt_qa", config, "train", root)
    sample = trained.sample(0)
    assert (sample["image"].shape, sample["n_answers"]) == ((4, 3, 8, 8), 1)
    assert len(build_dataset("msrvtt_retrieval", config, "val", root)) == 2


def test_a_section_of_one_s_own_names_its_column_and_needs_no_processor(root: Path, folder: Path) -> None:
    path = folder / "own.jsonl"
    path.write_text("\n".join(json.dumps({"clip": f"v{n}", "path": "x.png", "text": "a"}) for n in (0, 1)))
    config = DatasetConfig(path=str(path), columns={"video": "clip"})
    data: Any = build_dataset("own", config, data_root=root, train=False, defaults=Defaults(16))
    assert data[0]["image"].shape == (8, 3, 16, 16)
    listed: Any = build_dataset("own", config, data_root=root, defaults=Defaults(16))
    assert listed[1]["image"].shape == (8, 3, 16, 16)
    half = DatasetConfig(path=str(path), columns={"video": "clip"}, vis_processor={"train": CLIPS["train"]})
    again: Any = build_dataset("own", half, data_root=root, train=False)
    assert again.maker.vis_processor == AlproVideoEval(image_size=8, n_frms=4)


def test_bare_names_of_clips_and_official_names_of_columns_are_found(folder: Path) -> None:
    path = folder / "test.jsonl"
    path.write_text(json.dumps({"clip_name": "v0", "caption": "a", "retrieval_key": "r"}))
    data: Any = build_dataset("own", DatasetConfig(path=str(path), vis_processor=CLIPS), train=False)
    assert data[0]["image"].shape == (4, 3, 8, 8)


# Mistakes


@pytest.mark.parametrize(
    ("keys", "record", "problem"),
    [
        (
            {"vis_processor": {"train": {"name": "blip_image_eval", "image_size": 8}}},
            {"video": "v0"},
            r"vis_processor.train.name: blip_image_eval is for pictures, and the records have videos; use"
            r" \{name: alpro_video_train, n_frms: 8, image_size: 8\}",
        ),
        (
            {"vis_processor": CLIPS},
            {"image": "v0/frame_1.png"},
            r"alpro_video_train is for videos, and the records have no column 'video', only image, caption",
        ),
        (
            {"data_type": "videos", "vis_processor": CLIPS},
            {"image": "v0/frame_1.png"},
            "data_type: videos, and",
        ),
        (
            {"data_type": "videos", "vis_processor": CLIPS, "features": "states"},
            {"video": "v0"},
            "features: there are features of pictures only",
        ),
        ({"vis_processor": CLIPS}, {"video": "v9"}, "images: none of the first 1 videos is there, not even"),
        ({"vis_processor": CLIPS}, {"clip": "v0"}, r"has no column 'image', only clip, caption"),
        (
            {"vis_processor": CLIPS},
            {"video": "raw.mp4"},
            r"raw.mp4 is a video file, which takes a reader: install",
        ),
    ],
)
def test_what_does_not_fit_is_one_error_that_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], record: dict[str, str], problem: str
) -> None:
    monkeypatch.setattr(sources, "installed_reader", lambda: None)
    (folder / "raw.mp4").write_bytes(b"video")
    (folder / "own.json").write_text(json.dumps([{**record, "caption": "a"}]))
    with pytest.raises(BlipError, match=problem):
        build_dataset("own", DatasetConfig(path=str(folder / "own.json"), **keys))


def test_a_single_video_file_without_a_reader_is_a_bad_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "installed_reader", lambda: None)
    (folder / "raw.mp4").write_bytes(b"video")
    with pytest.raises(BadRecord, match=r"no_video_reader .*extract the frames"):
        MAKER.picture(Clip((str(folder / "raw.mp4"),)), "v")


def test_a_video_file_is_asked_for_the_wanted_frames_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(path: str, choose: video.Choose) -> list[Image.Image]:
        if "broken" in path:
            raise RuntimeError("no header")
        return [shade(number) for number in choose(100)]

    monkeypatch.setattr(samples, "decode", decoded)
    for name in ("raw.mp4", "broken.mp4"):
        (folder / name).write_bytes(b"video")
    sample = MAKER.picture(Clip((str(folder / "raw.mp4"),)), "v")
    assert sample["image"][:, 0, 0, 0].tolist() == [0, 49, 99]
    with pytest.raises(BadRecord, match=r"unreadable_video .*broken.mp4: no header"):
        MAKER.picture(Clip((str(folder / "broken.mp4"),)), "v")


def test_frames_of_a_real_video_file_are_those_that_were_written(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "real.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(20):
            pixels = np.full((32, 32, 3), (10 * number, 0, 0), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    frames, damaged = read_clip(Clip((str(path),)), "v", lambda total: [0, 7, 13, total - 1])
    assert damaged == []
    red = [frame.getpixel((9, 9)) for frame in frames]
    assert [round(pixel[0] / 10) for pixel in red] == [0, 7, 13, 19]
    assert all(pixel[2] < 12 for pixel in red)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadRecord, match="unreadable_video"):
        read_clip(Clip((str(path),)), "v", lambda total: [0])


# Looking at them


def test_blip_data_reads_videos(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "msrvtt_qa", "--data-root", str(root), "--split", "test"]) == 0
    printed = capsys.readouterr().out
    assert "msrvtt_qa test: 12 records, 12 pictures, 12 questions" in printed
    assert "pictures read:  12 of 12" in printed
    assert "frames of 32 x 32 RGB" in printed
    assert main(["prepare", "msrvtt_retrieval", "--data-root", str(root)]) == 0
    assert "12 of 12 pictures looked for are there" in capsys.readouterr().out


def test_blip_data_check_lists_damaged_frames(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.json").write_text(json.dumps([{"video": v, "caption": "a"} for v in ("v0", "v1", "bad")]))
    assert main(["check", str(folder / "own.json")]) == 2
    assert "2 damaged_frame, 1 unreadable_video" in capsys.readouterr().out


def test_a_loaded_dataset_shows_frames(root: Path) -> None:
    shown = open_splits("msrvtt_retrieval", root, ["val"], {})["val"][0]
    assert [frame.size for frame in shown["image"]] == [(32, 32)] * FRAMES
    assert shown["text_input"]
