"""Datasets of instructions by the ordinary way: sections and names, batches, evaluation."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import blip
from blip.config.schema import SectionError
from blip.data.check import check_split
from blip.data.eval_instruct import EvalInstructions
from blip.data.loader import EvalLoader, LoaderConfig, TrainLoader
from blip.data.locate import MissingData, locate
from blip.data.official.prepare import prepare
from blip.data.readers import read_file
from blip.data.scenes.make import TASK_TYPES, make_scenes
from blip.data.sources import build_dataset
from blip.errors import ConfigError, DataError
from blip.templates import TEMPLATES
from tests.unit.data.test_kinds_of_datasets import assert_same
from tests.unit.data.test_sources import put, root, section, shard

__all__ = ["root"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_scenes(folder, size=16, train=60, val=4, test=8, web=0, workers=0)
    return folder


def train(root: Path, name: str, **options: Any) -> Any:
    return build_dataset(name, section(**options), "train", root, wanted="instruct")


def judged(root: Path, name: str, split: str = "test", **options: Any) -> Any:
    return build_dataset(name, section(**options), split, root, train=False, wanted="instruct")


def annotations(root: Path, file: str) -> list[dict[str, Any]]:
    return json.loads((root / "scenes/annotations" / file).read_text())


# Training


def test_the_embedded_instructions_are_samples_as_they_stand(scenes: Path) -> None:
    data, listed = train(scenes, "scenes_instruct"), annotations(scenes, "instruct_train.json")
    assert len(data) == len(listed) == 180
    assert [(s["text_input"], s["text_output"]) for s in data] == [
        (item["text_input"], item["text_output"]) for item in listed
    ]
    assert sorted(data[0]) == ["image", "image_norm", "instance_id", "text_input", "text_output"]


@pytest.mark.parametrize("types", [["count"], ["caption", "verify", "locate"]])
def test_only_records_of_some_types_are_read(scenes: Path, types: list[str]) -> None:
    listed = annotations(scenes, "instruct_train.json")
    kept = [(n, item) for n, item in enumerate(listed) if item["type"] in types]
    data = train(scenes, "scenes_instruct", types=types)
    assert [sample["text_input"] for sample in data] == [item["text_input"] for _, item in kept]
    assert data.records.where(1).endswith(f"instruct_train.json[{kept[1][0]}]")
    assert data.num_images == len({item["image"] for _, item in kept})
    assert len(train(scenes, "scenes_instruct", types=types, max_samples=3)) == 3


def test_types_part_the_data_into_held_in_and_held_out(scenes: Path) -> None:
    parts = [
        train(scenes, "scenes_instruct", types=list(types)) for types in (TASK_TYPES[:5], TASK_TYPES[5:])
    ]
    assert sum(map(len, parts)) == len(train(scenes, "scenes_instruct"))
    asked = [
        judged(scenes, "scenes_instruct", types=list(types)) for types in (TASK_TYPES[:5], TASK_TYPES[5:])
    ]
    for data, types in zip(asked, (TASK_TYPES[:5], TASK_TYPES[5:]), strict=True):
        assert {data.task_type(i) for i in range(len(data))} <= set(types)


def test_types_of_other_kinds_of_records_are_read_likewise(scenes: Path) -> None:
    data: Any = build_dataset("scenes_vqa", section(types=["count"]), "train", scenes)
    assert 0 < len(data) < 240
    assert all("how many" in sample["text_input"] or "number" in sample["text_input"] for sample in data)


def test_a_type_that_no_record_has_is_an_error(scenes: Path, root: Path) -> None:
    with pytest.raises(
        DataError, match=r"scenes_instruct\.types: no record is of type 'coutn'; did you mean"
    ):
        train(scenes, "scenes_instruct", types=["coutn"])
    put(root / "own/list.json", [{"image": "pictures/a.jpg", "caption": "x"}])
    with pytest.raises(DataError, match="its records have no column 'type'"):
        train(root, "mine", path="own/list.json", types=["count"])
    shard(root / "own/p0.tar", "ab", root / "own/pictures")
    with pytest.raises(ConfigError, match=r"datasets\.mine\.types: shards have no types"):
        train(root, "mine", path="own/p0.tar", types=["count"])
    with pytest.raises(SectionError, match="types: 'a' stands there twice"):
        section(types=["a", "a"])


def test_captions_become_instructions_one_for_each(scenes: Path) -> None:
    listed = annotations(scenes, "train.json")
    data = train(scenes, "scenes")
    assert len(data) == len(listed) == 120
    told = [data.sample(i, 0, 1) for i in range(len(data))]
    assert [s["text_output"] for s in told] == [item["caption"].replace(".", "").lower() for item in listed]
    assert {s["text_input"] for s in told} == set(TEMPLATES["caption"])
    assert "image_id" not in told[0]


def test_the_template_is_drawn_by_seed_epoch_and_sample(scenes: Path) -> None:
    data = train(scenes, "scenes_vqa", templates="vqa")

    def told(epoch: int, seed: int) -> list[str]:
        return [data.sample(i, epoch, seed)["text_input"] for i in range(40)]

    assert told(0, 1) == told(0, 1)
    assert len({tuple(told(*key)) for key in ((0, 1), (1, 1), (0, 2))}) == 3
    assert len({text.split(data.records[0]["question"][:4])[0] for text in told(0, 1)}) > 3


def test_other_tasks_train_with_templates_only_where_they_are_named(scenes: Path) -> None:
    plain: Any = build_dataset("scenes_vqa", section(), "train", scenes, wanted="vqa")
    assert "answer" in plain[0]
    told: Any = build_dataset("scenes_vqa", section(templates="Q: {} A:"), "train", scenes, wanted="vqa")
    item = annotations(scenes, "vqa_train.json")[0]
    assert told[0]["text_input"] == f"Q: {item['question'].rstrip(' ')} A:"
    assert told[0]["text_output"] == item["answer"]
    asked: Any = build_dataset("scenes_vqa", section(templates="vqa"), "test", scenes, False, wanted="vqa")
    assert not isinstance(asked, EvalInstructions)


def test_lavis_s_processor_chooses_the_templates(scenes: Path) -> None:
    texts = {"train": {"name": "blip_instruction", "modality": "image", "task": "qa"}}
    data: Any = build_dataset("scenes_vqa", section(text_processor=texts), "train", scenes, wanted="vqa")
    assert {"text_input", "text_output"} <= set(data[0])
    assert len({data.sample(0, epoch)["text_input"] for epoch in range(30)}) == len(TEMPLATES["vqa"])


def test_pairs_of_pictures_take_no_instructions(scenes: Path) -> None:
    with pytest.raises(ConfigError, match=r"of kind nlvr, run\.task needs instruct or caption or vqa"):
        train(scenes, "scenes_nlvr")


def test_shards_of_captions_become_instructions(root: Path) -> None:
    shard(root / "own/p0.tar", "ab", root / "own/pictures")
    data = train(root, "mine", path="own/p0.tar", columns={"caption": "TEXT"}, templates="caption")
    ref = next(iter(data.scan(0)))
    with data.shards.open(0) as file:
        sample = data.sample(ref, file, 0, 0)
    assert sample["text_output"] == "picture a"
    assert sample["text_input"] in TEMPLATES["caption"]


# Mixtures


def mixture(root: Path, sampling: str | None, **options: Any) -> TrainLoader:
    vis = {"train": {"name": "blip_image_train", "image_size": 16}}
    named = {"scenes_instruct": {"types": ["count"]}, "scenes_vqa": {}, "scenes": {}}
    data: Any = {name: train(root, name, vis_processor=vis, **own) for name, own in named.items()}
    ratios = options.pop("ratios", {})
    return TrainLoader(data, LoaderConfig(**{"batch_size": 4, "sampling": sampling, **options}), ratios)


def test_a_mixture_draws_datasets_by_the_square_root_of_their_sizes(scenes: Path) -> None:
    loader = mixture(scenes, "sqrt", ratios={"scenes_vqa": 0.5})
    sizes = {source.name: source.num_samples for source in loader._sources}
    weights = {name: size**0.5 * (0.5 if name == "scenes_vqa" else 1) for name, size in sizes.items()}
    assert loader.plan.weights == pytest.approx(tuple(weights.values()))
    counts = [0] * len(sizes)
    drawn: Counter[int] = Counter()
    for number in range(3000):
        draw = loader.plan.draw(number, counts)
        counts[draw.source] += 1
        drawn[draw.source] += 1
    for number, weight in enumerate(weights.values()):
        p = weight / sum(weights.values())
        assert abs(drawn[number] - 3000 * p) < 5 * (3000 * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(("sampling", "weights"), [("uniform", [1, 1, 1]), ("proportional", None)])
def test_other_ways_of_sampling(scenes: Path, sampling: str, weights: list[int] | None) -> None:
    loader = mixture(scenes, sampling)
    sizes = [source.num_samples for source in loader._sources]
    assert list(loader.plan.weights) == [float(weight) for weight in weights or sizes]


def test_batches_of_a_mixture_are_instructions_whatever_they_are_made_of(scenes: Path) -> None:
    batches = list(islice(mixture(scenes, "uniform"), 12))
    assert {batch["source"] for batch in batches} == {"scenes_instruct", "scenes_vqa", "scenes"}
    for batch in batches:
        assert len(batch["text_input"]) == len(batch["text_output"]) == 4
        assert all(isinstance(text, str) and text for text in batch["text_output"])
    for one, other in zip(batches, islice(mixture(scenes, "uniform", num_workers=2), 12), strict=True):
        assert_same(one, other)
    resumed = mixture(scenes, "uniform")
    resumed.load_state_dict(batches[4]["position"])
    assert_same(next(resumed), batches[5])
    ranks = [next(mixture(scenes, "uniform", batch_size=2, world=2, rank=rank)) for rank in range(2)]
    assert [text for part in ranks for text in part["text_output"]] == batches[0]["text_output"]


# Evaluation


def test_instructions_are_evaluated_by_type(scenes: Path) -> None:
    listed = annotations(scenes, "instruct_test.json")
    data = judged(scenes, "scenes_instruct")
    assert len(data) == len(listed)
    for i, item in enumerate(listed):
        assert (data.instruction(i), data.references(i), data.task_type(i)) == (
            item["text_input"],
            [item["text_output"]],
            item["type"],
        )
    assert (data.in_words, data.choices(0)) == (False, [])
    outputs = sorted(
        {r["text_output"] for r in annotations(scenes, "instruct_train.json") if r["type"] == "count"}
    )
    count = next(i for i, item in enumerate(listed) if item["type"] == "count")
    assert data.candidates(count) == outputs
    batch = next(iter(EvalLoader(data, 5).batches()))
    assert sorted(batch) == ["image", "image_norm", "index", "instance_id", "text_input"]
    assert batch["text_input"] == [item["text_input"] for item in listed[:5]]
    assert (data.bad, data.lost, data.total, data.unit) == ([], 0, len(listed), "instructions")


def test_questions_are_evaluated_as_instructions(scenes: Path) -> None:
    listed = annotations(scenes, "vqa_test.json")
    data = judged(scenes, "scenes_vqa", templates=["Question: {} Short answer:"])
    assert data.instruction(0) == f"Question: {listed[0]['question']} Short answer:"
    assert data.references(0) == [listed[0]["answer"]]
    assert data.task_type(0) == listed[0]["type"]
    assert set(data.candidates(0)) == {item["answer"] for item in annotations(scenes, "vqa_train.json")}
    asked = judged(scenes, "scenes_vqa", templates="vqg")
    assert asked.in_words
    assert asked.references(0) == [listed[0]["question"]]
    assert asked.candidates(0) == []
    assert f"answer is: {listed[0]['answer']}." in asked.instruction(0)


def test_captions_are_evaluated_one_instruction_for_each_picture(scenes: Path) -> None:
    data = judged(scenes, "scenes")
    assert (len(data), data.in_words, data.choices(0), data.candidates(0)) == (8, True, [], [])
    assert {data.instruction(i) for i in range(8)} == {TEMPLATES["caption"][0]}
    assert data.references(3) == annotations(scenes, "test.json")[3]["caption"]


def test_labels_are_choices(scenes: Path) -> None:
    data = judged(scenes, "scenes_answers")
    item = annotations(scenes, "vqa_test.json")[0]
    assert data.references(0) == [item["answer"]]
    assert item["answer"] in data.choices(0) == data.candidates(0)


def test_choices_of_records_are_ranked(root: Path) -> None:
    record = {
        "image": "pictures/a.jpg",
        "text_input": "Which?",
        "choices": ["red", "blue"],
        "correct_choice": 1,
    }
    put(root / "own/list.json", [record, {**record, "text_output": "blue"}, {**record, "image": "none.jpg"}])
    data = judged(root, "mine", path={"test": "own/list.json"}, kind="instruct", columns={})
    assert len(data) == 2
    assert [error.cause for error in data.bad] == ["missing_image"]
    assert [data.references(i) for i in range(2)] == [["blue"], ["blue"]]
    assert [data.candidates(i) for i in range(2)] == [["red", "blue"]] * 2


def test_multiple_choice_questions_are_evaluated_as_instructions(root: Path) -> None:
    records = [
        {
            "image": "pictures/a.jpg",
            "question": "Which?",
            "choices": ["red", "blue"],
            "answer": 1,
            "hint": "Sky",
        },
        {"image": "pictures/b.jpg", "question": "What?", "choices": ["x", "y", "z"], "answer": 0, "hint": ""},
    ]
    records.append({"image": "pictures/c.jpg", "question": "Without choices?"})
    put(root / "own/list.json", records)
    columns = {"correct_choice": "answer", "context": "hint"}
    options = {"path": {"test": "own/list.json"}, "columns": columns, "templates": "choice"}
    data = judged(root, "mine", **options)
    shown = "Question: which? Options: (a) red (b) blue. Short answer:"
    assert [data.instruction(i) for i in range(2)] == [
        f"context: Sky. {shown}",
        "Question: what? Options: (a) x (b) y (c) z. Short answer:",
    ]
    assert [data.references(i) for i in range(2)] == [["blue"], ["x"]]
    assert data.candidates(1) == ["x", "y", "z"]
    assert [error.cause for error in data.bad] == ["no_choices"]
    assert (len(data), data.total) == (2, 3)
    learnt: Any = train(root, "mine", **{**options, "path": "own/list.json"})
    assert learnt[0]["text_output"] == "blue"


# Layouts


def test_ocr_vqa_has_a_record_for_each_question(root: Path) -> None:
    content = {
        "a": {"questions": ["Who wrote it?", "What year?"], "answers": ["X", "1990"], "split": 1},
        "b": {"questions": ["Genre?"], "answers": ["Y"], "ocr_tokens": ["big", "book"], "split": 1},
        "c": {"questions": ["Title?"], "answers": ["Z"], "split": 3},
    }
    put(root / "ocrvqa/annotations/ocrvqa.json", content)
    (root / "own/pictures").rename(root / "ocrvqa/images")
    data = train(root, "ocr_vqa")
    assert [s["text_output"] for s in data] == ["X", "1990", "Y"]
    assert [data.records[i]["image"] for i in range(3)] == ["a.jpg", "a.jpg", "b.jpg"]
    texts = [data.sample(2, epoch)["text_input"] for epoch in range(5)]
    assert all(text.startswith("OCR tokens: big, book. ") for text in texts)
    # Its file holds all splits; what is to be tested is not trained on.
    held_out = blip.load_dataset("ocr_vqa", root, split="test")["test"]
    assert [item["answer"] for item in held_out] == [["Z"]]
    with pytest.raises(DataError, match="no record has split '2'"):
        blip.load_dataset("ocr_vqa", root, split="val")


def test_a_dialog_gives_a_record_for_each_turn(tmp_path: Path) -> None:
    turns = [
        {"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 1},
        {"question": 1, "answer": 0, "answer_options": [0, 1], "gt_index": 0},
    ]
    dialogs = [{"image_id": 185, "caption": "a dog", "dialog": turns}]
    data = {"questions": ["is it big", "what color"], "answers": ["black", "yes"], "dialogs": dialogs}
    path = put(tmp_path / "v.json", {"version": "1.0", "split": "val2018", "data": data})
    first, second = read_file(path, "json")
    assert first["image"] == "VisualDialog_val2018/VisualDialog_val2018_000000000185.jpg"
    assert (first["question"], first["answer"], first["history"]) == ("is it big", "yes", "")
    assert (first["choices"], first["correct_choice"]) == (["black", "yes"], 1)
    assert second["history"] == "q: is it big a: yes"
    # In the test split, which goes to the server, only the last turn has candidates.
    dialogs[0]["dialog"] = [{"question": 0, "answer": 1}, {"question": 1, "answer_options": [0, 1]}]
    put(path, {"split": "test2018", "data": data})
    (last,) = read_file(path, "json")
    assert (last["question_id"], last["history"], "answer" in last) == ("185#1", "q: is it big a: yes", False)
    dialogs[0]["dialog"] = [{"question": 9}]
    put(path, {"data": data})
    with pytest.raises(DataError, match=r"v\.json: has 'dialogs' that cannot be read \(IndexError"):
        list(read_file(path, "json"))


def test_words_read_in_pictures_may_lie_in_a_file_of_their_own(root: Path) -> None:
    put(root / "own/list.json", [{"image": "pictures/a.jpg", "question": "Brand?", "answer": "x"}])
    put(root / "own/read.json", {"data": [{"image_id": "a", "ocr_tokens": ["big", "sign"]}]})
    options: dict[str, Any] = {"path": "own/list.json", "templates": ["[Read: {ocr}. ]{}"]}
    data = train(root, "mine", ocr_file="own/read.json", **options)
    assert data[0]["text_input"] == "Read: big, sign. brand?"
    assert train(root, "mine", **options)[0]["text_input"] == "brand?"
    with pytest.raises(MissingData, match=r"datasets\.mine\.ocr_file: no file 'own/raed.json'"):
        train(root, "mine", ocr_file="own/raed.json", **options)


def test_a_named_dataset_s_words_are_missed_only_where_they_are_shown(root: Path) -> None:
    put(
        root / "TextCaps/annotations/TextCaps_0.1_train.json",
        {"data": [{"image_id": "a", "caption_str": "A sign."}]},
    )
    (root / "own/pictures").rename(root / "TextCaps/images")
    with pytest.raises(MissingData, match=r"Rosetta_OCR_v0\.2_train\.json.* empty goes without.*textcaps"):
        train(root, "textcaps_caption")
    data = train(root, "textcaps_caption", ocr_file="")
    assert data[0]["text_output"] == "a sign"
    plain: Any = build_dataset("textcaps_caption", section(), "train", root, wanted="caption")
    assert plain[0]["text_input"] == "a sign"
    put(
        root / "textvqa/annotations/TextVQA_Rosetta_OCR_v0.2_train.json",
        {"data": [{"image_id": "a", "ocr_tokens": ["go"]}]},
    )
    assert train(root, "textcaps_caption")[0]["text_input"].startswith("OCR tokens: go. ")


def test_lava_s_conversations_are_trained_on(root: Path) -> None:
    told = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A picture."}]
    put(
        root / "LLaVA-Instruct-150K/annotations/detail_23k.json",
        [{"id": "1", "image": "a.jpg", "conversations": told}],
    )
    (root / "coco/images").mkdir(parents=True)
    (root / "own/pictures").rename(root / "coco/images/train2017")
    data = train(root, "llava_detail")
    assert (data[0]["text_input"], data[0]["text_output"]) == ("What is it?", "A picture.")
    assert torch.is_tensor(data[0]["image"])


# Looking at data


def test_instructions_are_shown_and_checked(scenes: Path) -> None:
    shown = blip.load_dataset("scenes_instruct", root=scenes, split="val", types=["count"])["val"]
    item = next(i for i in annotations(scenes, "instruct_val.json") if i["type"] == "count")
    sample = shown[0]
    assert (sample["text_input"], sample["text_output"]) == (item["text_input"], item["text_output"])
    config = section()
    report = check_split(
        "scenes_instruct", "val", locate("scenes_instruct", config, "val", scenes), config, scenes
    )
    first = annotations(scenes, "instruct_val.json")[0]
    assert report.texts == len(annotations(scenes, "instruct_val.json"))
    assert report.lines()[2].startswith("  instruction tokens: ")
    assert f"'{first['text_input']} {first['text_output']}'" in report.samples[0]


def test_official_files_with_pictures_in_another_column_are_prepared(root: Path, tmp_path: Path) -> None:
    (root / "hateful_memes").mkdir()
    (root / "own/pictures").rename(root / "hateful_memes/img")
    lines = [
        {"id": n, "img": f"/export/memes/img/{n}.jpg", "label": i, "text": "Hm."} for i, n in enumerate("ab")
    ]
    for name in ("train", "dev_seen", "test_seen"):
        put(tmp_path / f"downloads/{name}.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    outcome = prepare("hateful_memes", root, tmp_path / "downloads")
    assert outcome.missing == []
    assert any("2 image paths adapted" in line for line in outcome.lines)
    written = (root / "hateful_memes/annotations/train.jsonl").read_text().splitlines()
    assert [json.loads(line)["img"] for line in written] == ["img/a.jpg", "img/b.jpg"]
    data = train(root, "hateful_memes")
    asked = 'This is an image with: "hm" written on it. Is it hateful? Answer:'
    assert [(s["text_input"], s["text_output"]) for s in data] == [(asked, "no"), (asked, "yes")]
    put(tmp_path / "downloads/ocrvqa.json", {"x": {"questions": ["Q?"], "answers": ["A"], "split": 1}})
    (root / "ocrvqa/images/deep").mkdir(parents=True)
    (root / "hateful_memes/img/a.jpg").rename(root / "ocrvqa/images/deep/x.jpg")
    outcome = prepare("ocr_vqa", root, tmp_path / "downloads")
    assert outcome.missing == []
    assert outcome.lines[0].startswith("train and val and test: 1 records, 1 questions")
    assert train(root, "ocr_vqa")[0]["text_output"] == "A"
