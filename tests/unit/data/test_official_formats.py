"""Files of the benchmarks' own authors become the records that BLIP's and LAVIS's files hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip import load_dataset
from blip.data.__main__ import main
from blip.data.catalog.rows import RENAMED
from blip.data.catalog.table import CATALOG
from blip.data.official.formats import DOCUMENTS, FORMATS
from blip.data.readers import detect, read_file

Captured = pytest.CaptureFixture[str]
Files = dict[str, Any]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLIP_DATA", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "root"


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def karpathy(folder: str) -> Files:
    def image(number: int, split: str) -> Any:
        place = {"filepath": folder, "cocoid": number} if folder else {}
        name = f"COCO_{folder}_{number:012d}.jpg" if folder else f"{number}.jpg"
        texts = [{"raw": f"Text {number} {n}.", "tokens": []} for n in (1, 2)]
        return {"filename": name, "imgid": 0, "split": split, "sentences": texts, **place}

    return {"images": [image(n, s) for n, s in ((1, "train"), (2, "restval"), (3, "val"), (4, "test"))]}


def vqa(numbers: list[int], answers: str = "") -> Files:
    if answers:
        notes = [
            {"question_id": n, "multiple_choice_answer": answers, "answers": [{"answer": answers}] * 10}
            for n in numbers
        ]
        return {"annotations": notes}
    return {"questions": [{"question_id": n, "image_id": n, "question": f"What is {n}?"} for n in numbers]}


def vqa_records(pictures: str, dataset: str, numbers: list[int], answer: str = "") -> list[Any]:
    return [
        {
            "question_id": n,
            "question": f"What is {n}?",
            **({"answer": [answer] * 10} if answer else {}),
            "image": f"{pictures}/COCO_{pictures}_{n:012d}.jpg",
            "dataset": dataset,
        }
        for n in numbers
    ]


def problem(**more: Any) -> Any:
    return {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", **more}


def nlvr(split: str, **more: Any) -> Any:
    return {"sentence": "Two dogs.", "label": "True", "identifier": f"{split}-10-0-1", **more}


def nlvr_record(split: str, folder: str) -> Any:
    images = [f"{folder}{split}-10-0-img{side}.png" for side in (0, 1)]
    return {"images": images, "sentence": "Two dogs.", "label": "True", "identifier": f"{split}-10-0-1"}


NINE = list(range(11, 20))
GENOME = [
    {"image_id": 1, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg", "width": 8},
    {"image_id": 2, "url": "https://cs.stanford.edu/people/rak248/VG_100K/2.jpg", "width": 8},
]
VIDEO = {"answer": "dog", "id": 7, "question": "what is it?", "video_id": 3}
IVQA = "video_id,start,question,answer1,answer2,answer3,answer4,answer5\nabc,1,What?,pan,pan,pot,,lid\n"
IVQA_RECORD = {
    "video": "abc.mp4",
    "question": "What?",
    "answer": ["pan", "pan", "pot", "lid"],
    "question_id": 0,
}
AOKVQA = {"image_id": 5, "question_id": "x", "question": "Why?", "choices": ["a", "b", "c", "d"]}
ANSWERED = {"correct_choice_idx": 0, "direct_answers": ["a"] * 10, "rationales": ["r"]}
SPLIT_NAMES = (("train", "train"), ("val", "dev"), ("test", "test"))

WORDS = {
    f"TextVQA_Rosetta_OCR_v0.2_{split}.json": {"data": [{"image_id": "0a", "ocr_tokens": ["stop"]}]}
    for split in ("train", "val", "test")
}

CASES: dict[str, tuple[Files, dict[str, Any]]] = {
    "coco_caption": (
        {"dataset_coco.json": karpathy("val2014")},
        {
            "coco/annotations/coco_karpathy_train.json": [
                {
                    "image": f"val2014/COCO_val2014_{n:012d}.jpg",
                    "caption": f"Text {n} {k}.",
                    "image_id": f"coco_{n}",
                }
                for n in (1, 2)
                for k in (1, 2)
            ],
            **{
                f"coco/annotations/coco_karpathy_{split}.json": [
                    {
                        "image": f"val2014/COCO_val2014_{n:012d}.jpg",
                        "caption": [f"Text {n} 1.", f"Text {n} 2."],
                    }
                ]
                for split, n in (("val", 3), ("test", 4))
            },
        },
    ),
    "flickr30k": (
        {"flickr/dataset_flickr30k.json": karpathy("")},
        {
            "flickr30k/annotations/train.json": [
                {"image": f"flickr30k-images/{n}.jpg", "caption": f"Text {n} {k}.", "image_id": f"flickr_{n}"}
                for n in (1, 2)
                for k in (1, 2)
            ],
            **{
                f"flickr30k/annotations/{split}.json": [
                    {"image": f"flickr30k-images/{n}.jpg", "caption": [f"Text {n} 1.", f"Text {n} 2."]}
                ]
                for split, n in (("val", 3), ("test", 4))
            },
        },
    ),
    "nocaps": (
        {
            "nocaps_val_4500_captions.json": {
                "images": [{"id": 0, "file_name": "0013ea.jpg", "open_images_id": "0013ea"}],
                "annotations": [{"image_id": 0, "id": 0, "caption": "A baby."}],
            },
            "nocaps_test_image_info.json": {"images": [{"id": 9, "file_name": "00aa.jpg"}], "licenses": []},
        },
        {
            "nocaps/annotations/nocaps_val.json": [{"image": "val/0013ea.jpg", "img_id": 0}],
            "nocaps/annotations/nocaps_test.json": [{"image": "test/00aa.jpg", "img_id": 9}],
        },
    ),
    "coco_vqa": (
        {
            "v2_OpenEnded_mscoco_train2014_questions.json": vqa(NINE),
            "v2_mscoco_train2014_annotations.json": vqa(NINE, "Yes."),
            "v2_OpenEnded_mscoco_val2014_questions.json": vqa([20]),
            "v2_mscoco_val2014_annotations.json": vqa([20], "rare"),
            "v2_OpenEnded_mscoco_test2015_questions.json": vqa([30]),
        },
        {
            "coco/annotations/vqa_train.json": vqa_records("train2014", "vqa", NINE, "Yes."),
            "coco/annotations/vqa_val.json": vqa_records("val2014", "vqa", [20], "rare"),
            "coco/annotations/vqa_val_eval.json": vqa_records("val2014", "vqa", [20]),
            "coco/annotations/vqa_test.json": vqa_records("test2015", "vqa", [30]),
            "coco/annotations/answer_list.json": ["yes"],
        },
    ),
    "ok_vqa": (
        {
            "OpenEnded_mscoco_train2014_questions.json": vqa([1]),
            "mscoco_train2014_annotations.json": {
                "annotations": [
                    {"question_id": 1, "answers": [{"answer": "surf"}] * 6 + [{"answer": "sea"}] * 4}
                ]
            },
            "OpenEnded_mscoco_val2014_questions.json": vqa([2]),
            "mscoco_val2014_annotations.json": vqa([2], "sky"),
        },
        {
            "okvqa/annotations/okvqa_train.json": [
                {**record, "answer": ["surf"] * 6 + ["sea"] * 4}
                for record in vqa_records("train2014", "okvqa", [1], "surf")
            ],
            "okvqa/annotations/vqa_val_eval.json": vqa_records("val2014", "okvqa", [2]),
            "okvqa/annotations/answer_list.json": ["surf"],
        },
    ),
    "aok_vqa": (
        {
            **{f"aokvqa_v1p0_{s}.json": [{**AOKVQA, "split": s, **ANSWERED}] for s in ("train", "val")},
            "aokvqa_v1p0_test.json": [{**AOKVQA, "split": "test"}],
            "specialized_vocab_train.csv": 'dog\n\n"surf, board"\n',
        },
        {
            **{
                f"aokvqa/annotations/aokvqa_v1p0_{s}.json": [
                    {**AOKVQA, "split": s, **more, "image": f"{s}2017/000000000005.jpg"}
                ]
                for s, more in (("train", ANSWERED), ("val", ANSWERED), ("test", {}))
            },
            "aokvqa/annotations/specialized_vocab_train_lavis.json": ["dog", "surf, board"],
        },
    ),
    "gqa": (
        {
            f"questions1.2/{split}_balanced_questions.json": {
                "0707": {
                    "question": "Is it?",
                    "imageId": "2405722",
                    "answer": "yes",
                    "fullAnswer": "Yes, it is.",
                    "semantic": [{"operation": "select"}],
                }
            }
            for split in ("train", "val", "testdev")
        },
        {
            f"gqa/annotations/{split}_balanced_questions.json": [
                {
                    "image": "2405722.jpg",
                    "question": "Is it?",
                    "question_id": "0707",
                    "answer": "yes",
                    "fullAnswer": "Yes, it is.",
                }
            ]
            for split in ("train", "val", "testdev")
        },
    ),
    "vg_caption": (
        {
            "region_descriptions.json": [
                {
                    "id": 1,
                    "regions": [{"region_id": 5, "phrase": " a dog "}, {"region_id": 6, "phrase": " "}],
                },
                {"id": 2, "regions": [{"region_id": 7, "phrase": "grass"}]},
            ],
            "image_data.json": GENOME,
        },
        {
            "vg/annotations/vg_caption.json": [
                {"image": "VG_100K_2/1.jpg", "caption": "a dog"},
                {"image": "VG_100K/2.jpg", "caption": "grass"},
            ]
        },
    ),
    "vg_vqa": (
        {
            "question_answers.json": [
                {"id": 2, "qas": [{"qa_id": 8, "question": "Who?", "answer": "A man."}]}
            ],
            "image_data.json": GENOME,
        },
        {
            "vg/annotations/vg_qa.json": [
                {
                    "image": "VG_100K/2.jpg",
                    "question": "Who?",
                    "answer": "A man",
                    "question_id": 8,
                    "dataset": "vg",
                }
            ]
        },
    ),
    "nlvr": (
        {
            "train.json": lines(nlvr("train", directory=29), nlvr("train", directory=3)),
            "dev.json": lines(nlvr("dev")) * 2,
            "test1.json": lines(nlvr("test1")) * 2,
        },
        {
            "nlvr/annotations/train.json": [
                nlvr_record("train", "images/train/29/"),
                nlvr_record("train", "images/train/3/"),
            ],
            "nlvr/annotations/dev.json": [nlvr_record("dev", "dev/")] * 2,
            "nlvr/annotations/test.json": [nlvr_record("test1", "test1/")] * 2,
        },
    ),
    "snli_ve": (
        {
            f"snli_ve_{name}.jsonl": lines(
                *(
                    {"Flickr30K_ID": "12", "sentence1": "x", "sentence2": "A man.", "gold_label": label}
                    for label in ("neutral", "-", "entailment", "contradiction")
                )
            )
            for _, name in SPLIT_NAMES
        },
        {
            f"snli/annotations/ve_{name}.json": [
                {"image": "12.jpg", "sentence": "A man.", "label": label}
                for label in ("neutral", "entailment", "contradiction")
            ]
            for _, name in SPLIT_NAMES
        },
    ),
    "scienceqa": (
        {
            "problems.json": {
                "1": problem(image="image.png", split="train", lecture="L"),
                "2": problem(image=None, split="train"),
                "3": problem(image="image.png", split="val"),
                "4": problem(image="image.png", split="test"),
            },
            "pid_splits.json": {"train": ["1", "2"], "val": ["3"], "test": ["4"], "minitrain": ["1"]},
        },
        {
            f"scienceqa/annotations/problems_{split}.json": [
                {"sample_id": pid, "image": f"{split}/{pid}/image.png", **problem(**more)}
            ]
            for split, pid, more in (("train", "1", {"lecture": "L"}), ("val", "3", {}), ("test", "4", {}))
        },
    ),
    "iconqa": (
        {
            "iconqa_data/problems.json": {str(n): problem(ques_type="choose_txt") for n in (1, 2, 3)},
            "iconqa_data/pid_splits.json": {
                **{f"choose_txt_{s}": [str(n)] for n, s in enumerate(("train", "val", "test"), start=1)},
                "train": ["1", "9"],
            },
        },
        {
            f"iconqa/annotations/{split}.json": [
                {
                    "sample_id": str(n),
                    "image": f"iconqa_data/iconqa/{split}/choose_txt/{n}/image.png",
                    **problem(ques_type="choose_txt"),
                }
            ]
            for n, split in enumerate(("train", "val", "test"), start=1)
        },
    ),
    "ocr_vqa": (
        {
            "dataset.json": {
                f"00{n}": {
                    "imageURL": "http://x/y.jpg",
                    "questions": ["Who?"],
                    "answers": ["Poe"],
                    "split": n,
                }
                for n in (1, 2, 3)
            }
        },
        {
            "ocrvqa/annotations/ocrvqa.json": [
                {
                    "sample_id": f"00{n}.jpg",
                    "imageURL": "http://x/y.jpg",
                    "split": n,
                    "question": "Who?",
                    "answer": "Poe",
                }
                for n in (1, 2, 3)
            ]
        },
    ),
    "msrvtt_qa": (
        {f"{split}_qa.json": [VIDEO] for split in ("train", "val", "test")},
        {
            **{
                f"msrvtt/annotations/qa_{split}.json": [
                    {"video": "video3.mp4", "question": "what is it?", "answer": "dog", "question_id": 7}
                ]
                for split in ("train", "val", "test")
            },
            "msrvtt/annotations/qa_ans2label.json": {"dog": 0},
        },
    ),
    "msvd_qa": (
        {
            **{f"{split}_qa.json": [VIDEO] for split in ("train", "val", "test")},
            "youtube_mapping.txt": "-4wsuPCjDBc_5_15 vid1\nmv89psg6zh4_33_46 vid3\n",
        },
        {
            **{
                f"msvd/annotations/qa_{split}.json": [
                    {
                        "video": "mv89psg6zh4_33_46.avi",
                        "question": "what is it?",
                        "answer": "dog",
                        "question_id": 7,
                    }
                ]
                for split in ("train", "val", "test")
            },
            "msvd/annotations/qa_ans2label.json": {"dog": 0},
        },
    ),
    "ivqa": (
        dict.fromkeys(("train.csv", "val.csv", "test.csv"), IVQA),
        {
            **{f"ivqa/annotations/qa_{split}.json": [IVQA_RECORD] for split in ("train", "val", "test")},
            "ivqa/annotations/qa_ans2label.json": {"pan": 0},
        },
    ),
    "vsr_classification": (
        {
            f"{name}.jsonl": lines(
                {"image": "000000000005.jpg", "image_link": "x", "caption": "A on B.", "label": 1},
                {"image": "000000000006.jpg", "image_link": "x", "caption": "A under B.", "label": 0},
            )
            for _, name in SPLIT_NAMES
        },
        {
            f"vsr/annotations/{name}.jsonl": [
                {"image": "000000000005.jpg", "image_link": "x", "caption": "A on B.", "label": 1},
                {"image": "000000000006.jpg", "image_link": "x", "caption": "A under B.", "label": 0},
            ]
            for _, name in SPLIT_NAMES
        },
    ),
    "vsr_caption": (
        {
            f"{name}.jsonl": lines(
                {"image": "000000000005.jpg", "caption": "A on B.", "label": 1},
                {"image": "000000000006.jpg", "caption": "A under B.", "label": 0},
            )
            for _, name in SPLIT_NAMES
        },
        {
            f"vsr/annotations/{name}.jsonl": [
                {"image": "000000000005.jpg", "caption": "A on B.", "label": 1},
                {"image": "000000000006.jpg", "caption": "A under B.", "label": 0},
            ]
            for _, name in SPLIT_NAMES
        },
    ),
    "text_vqa": (
        {
            **{
                f"TextVQA_0.5.1_{split}.json": {
                    "data": [{"image_id": "0a", "question": "What?", "question_id": 1, "answers": ["x"] * 10}]
                }
                for split in ("train", "val", "test")
            },
            **WORDS,
        },
        {
            f"textvqa/annotations/TextVQA_0.5.1_{split}.json": [
                {"image_id": "0a.jpg", "question": "What?", "question_id": 1, "answers": ["x"] * 10}
            ]
            for split in ("train", "val", "test")
        },
    ),
    "textcaps_caption": (
        {
            **{
                f"TextCaps_0.1_{split}.json": {"data": [{"image_id": "0a", "caption_str": "A sign."}]}
                for split in ("train", "val", "test")
            },
            **WORDS,
        },
        {
            f"TextCaps/annotations/TextCaps_0.1_{split}.json": [
                {"image_id": "0a.jpg", "caption_str": "A sign."}
            ]
            for split in ("train", "val", "test")
        },
    ),
    "visdial": (
        {
            "visdial_1.0_val.json": {
                "version": "1.0",
                "split": "val2018",
                "data": {
                    "questions": ["is it day", "any people"],
                    "answers": ["yes", "no"],
                    "dialogs": [
                        {
                            "image_id": 7,
                            "caption": "a street",
                            "dialog": [
                                {"question": 0, "answer": 0, "answer_options": [1, 0], "gt_index": 1},
                                {"question": 1, "answer": 1, "answer_options": [1, 0], "gt_index": 0},
                            ],
                        }
                    ],
                },
            }
        },
        {
            "visdial/annotations/visdial_1.0_val.json": [
                {
                    "image": "VisualDialog_val2018/VisualDialog_val2018_000000000007.jpg",
                    "image_id": 7,
                    "question_id": f"7#{n}",
                    "question": question,
                    "history": history,
                    "answer": answer,
                    "caption": "a street",
                    "choices": ["no", "yes"],
                    "correct_choice": right,
                }
                for n, (question, history, answer, right) in enumerate(
                    (("is it day", "", "yes", 1), ("any people", "q: is it day a: yes", "no", 0))
                )
            ]
        },
    ),
    "llava_detail": (
        {
            "detail_23k.json": [
                {
                    "id": "5",
                    "image": "000000000005.jpg",
                    "conversations": [
                        {"from": "human", "value": "<image>\nWhat?"},
                        {"from": "gpt", "value": "A dog."},
                    ],
                }
            ]
        },
        {
            "LLaVA-Instruct-150K/annotations/detail_23k.json": [
                {
                    "id": "5",
                    "image": "000000000005.jpg",
                    "conversations": [
                        {"from": "human", "value": "<image>\nWhat?"},
                        {"from": "gpt", "value": "A dog."},
                    ],
                }
            ]
        },
    ),
    "hateful_memes": (
        {
            f"data/{name}.jsonl": lines({"id": 5, "img": "img/5.png", "text": "its", "label": 1})
            for name in ("train", "dev_seen", "test_seen")
        },
        {
            f"hateful_memes/annotations/{name}.jsonl": [
                {"id": 5, "img": "img/5.png", "text": "its", "label": 1}
            ]
            for name in ("train", "dev_seen", "test_seen")
        },
    ),
    "vizwiz_vqa": (
        {
            f"Annotations/{split}.json": [
                {"image": f"VizWiz_{split}_1.jpg", "question": "What?", "answers": [{"answer": "can"}] * 10}
            ]
            for split in ("val", "test")
        },
        {
            f"vizwiz/annotations/{split}.json": [
                {"image": f"VizWiz_{split}_1.jpg", "question": "What?", "answers": [{"answer": "can"}] * 10}
            ]
            for split in ("val", "test")
        },
    ),
}


def put(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def pictures(name: str, root: Path, expected: dict[str, Any]) -> None:
    """A picture for each that the expected records name; a folder of one frame for a video."""
    row = CATALOG[name]
    (root / row.images).mkdir(parents=True, exist_ok=True)
    column = row.columns.get("image", "image")
    for records in expected.values():
        for record in records if isinstance(records, list) else []:
            if isinstance(record, str):
                continue
            video = [str(Path(record["video"]).with_suffix("") / "1.png")] if "video" in record else []
            for place in video or record.get("images") or [record[column]]:
                path = root / row.images / place
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (6, 5), "red").save(path)


def read(path: Path, expected: Any) -> Any:
    if not (isinstance(expected, list) and isinstance(expected[0], dict)):
        return json.loads(path.read_text())
    return list(read_file(path, detect(path)))


@pytest.mark.parametrize("name", CASES)
def test_official_files_become_the_records_that_lavis_has(name: str, root: Path, capsys: Captured) -> None:
    given, expected = CASES[name]
    put(Path("in"), given)
    pictures(name, root, expected)
    assert main(["prepare", name, "--from", "in"]) == 0, capsys.readouterr()
    assert {target: read(root / target, records) for target, records in expected.items()} == expected
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert main(["prepare", name, "--from", "in"]) == 0
    assert main(["prepare", name]) == 0
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert main(["check", name, "--max-bad-ratio", "0"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("name", CASES)
def test_lavis_s_own_files_of_the_same_records_become_the_same_files(name: str, root: Path) -> None:
    given, expected = CASES[name]
    put(Path("in"), given)
    pictures(name, root, expected)
    assert main(["prepare", name, "--from", "in"]) == 0
    other = Path("other").absolute()
    pictures(name, other, expected)
    # Under LAVIS's names, where its files are called otherwise than ours.
    made = {Path(t).name: lines(*r) if t.endswith("l") else r for t, r in expected.items()}
    beside = [*CATALOG[name].official.values(), *CATALOG[name].ocr.values()]
    official = {Path(t).name: json.loads((root / t).read_text()) for t in beside}
    put(Path("lavis"), {**made, **official})
    assert main(["prepare", name, "--from", "lavis", "--data-root", str(other)]) == 0
    assert {t: read(other / t, r) for t, r in expected.items()} == expected


def test_karpathy_s_captions_are_also_written_as_pycocotools_reads_them(root: Path) -> None:
    given, expected = CASES["coco_caption"]
    put(Path("in"), given)
    pictures("coco_caption", root, expected)
    assert main(["prepare", "coco_caption", "--from", "in"]) == 0
    assert json.loads((root / "coco/annotations/coco_karpathy_val_gt.json").read_text()) == {
        "images": [{"id": 3}],
        "annotations": [{"image_id": 3, "id": k - 1, "caption": f"Text 3 {k}."} for k in (1, 2)],
    }


def test_pictures_of_coco_are_found_under_the_names_of_other_releases(root: Path) -> None:
    given, expected = CASES["aok_vqa"]
    put(Path("in"), given)
    for place in ("train2014/COCO_train2014_", "val2014/COCO_val2014_"):
        path = root / f"coco/images/{place}000000000005.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5)).save(path)
    assert main(["prepare", "aok_vqa", "--from", "in"]) == 0
    written = json.loads((root / "aokvqa/annotations/aokvqa_v1p0_val.json").read_text())
    assert written == [
        {
            **expected["aokvqa/annotations/aokvqa_v1p0_val.json"][0],
            "image": "train2014/COCO_train2014_000000000005.jpg",
        }
    ]


def test_an_official_file_in_our_place_is_converted_there(root: Path) -> None:
    given, expected = CASES["gqa"]
    put(root / "gqa/annotations", {Path(name).name: content for name, content in given.items()})
    pictures("gqa", root, expected)
    assert main(["prepare", "gqa"]) == 0
    assert {target: read(root / target, records) for target, records in expected.items()} == expected
    kept = root / "gqa/annotations/val_balanced_questions.json.orig"
    assert json.loads(kept.read_text()) == given["questions1.2/val_balanced_questions.json"]


def test_a_place_that_cannot_be_written_is_told(root: Path, capsys: Captured) -> None:
    put(Path("in"), CASES["vg_caption"][0])
    Path("file").write_text("")
    assert main(["prepare", "vg_caption", "--from", "in", "--data-root", "file"]) == 2
    assert "file/vg/annotations: cannot be read or written (Not a directory)" in capsys.readouterr().err


def test_files_of_two_sets_with_one_name_are_not_taken_for_each_other(root: Path) -> None:
    given, expected = CASES["ok_vqa"]
    own = {"okvqa_answer_list_train.json": ["own"], "okvqa_val_eval.json": vqa_records("val2014", "own", [2])}
    put(Path("in"), {**given, **own, "answer_list.json": ["VQAv2's"], "vqa_val_eval.json": [1]})
    pictures("ok_vqa", root, expected)
    assert main(["prepare", "ok_vqa", "--from", "in"]) == 0
    assert json.loads((root / "okvqa/annotations/answer_list.json").read_text()) == ["own"]
    assert read(root / "okvqa/annotations/vqa_val_eval.json", [{}]) == own["okvqa_val_eval.json"]


WRONG: dict[str, tuple[str, Files, str]] = {
    "another layout": (
        "vg_caption",
        {"region_descriptions.json": [{"id": 1}], "image_data.json": GENOME},
        r"region_descriptions\.json and in/image_data\.json: not the official files that"
        r" vg/annotations/vg_caption\.json is made of.*KeyError: 'regions'",
    ),
    "cut off": ("coco_caption", {"dataset_coco.json": '{"images": ['}, r"dataset_coco\.json: not valid JSON"),
    "no records": ("coco_caption", {"dataset_coco.json": {"images": []}}, r"hold no records"),
    "of several sets": (
        "nlvr",
        {"a/train.json": lines(nlvr("train")), "b/train.json": [1]},
        r"2 files are called train\.json, such as in/a/train\.json and in/b/train\.json; .* one called nlvr",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named_and_nothing_is_written(case: str, root: Path, capsys: Captured) -> None:
    name, given, message = WRONG[case]
    put(Path("in"), given)
    assert main(["prepare", name, "--from", "in"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not [path for path in root.rglob("*") if path.is_file()]


def test_of_several_files_of_a_name_the_one_in_the_set_s_folder_is_taken(root: Path) -> None:
    given, expected = CASES["nlvr"]
    put(Path("in/NLVR2/data"), given)
    put(Path("in/other"), {"train.json": [1], "dev.json": [1]})
    pictures("nlvr", root, expected)
    assert main(["prepare", "nlvr", "--from", "in"]) == 0
    assert {target: read(root / target, records) for target, records in expected.items()} == expected


VIZWIZ = [{"image": "VizWiz_val_0.jpg", "question": "Which?", "answers": [{"answer": "a"}] * 10}]
MEME = {"id": 1, "img": "img/1.png", "text": "Hm.", "label": 0}
STATEMENT = {"image": "1.jpg", "caption": "It is left.", "label": 1}
PAIR = {"images": ["a.png", "b.png"], "sentence": "Two.", "label": "True"}


@pytest.mark.parametrize(
    ("name", "file", "content", "columns"),
    [
        ("flickr30k", "val.json", VIZWIZ, "image, question, answers"),
        ("iconqa", "val.json", VIZWIZ, "image, question, answers"),
        ("vizwiz_vqa", "test.json", [PAIR], "images, sentence, label"),
        ("vsr_classification", "train.jsonl", lines(MEME), "id, img, text, label"),
        ("hateful_memes", "train.jsonl", lines(STATEMENT), "image, caption, label"),
    ],
)
def test_a_file_of_another_set_under_a_common_name_is_left_alone(
    name: str, file: str, content: Any, columns: str, root: Path, capsys: Captured
) -> None:
    put(Path("in"), {file: content})
    assert main(["prepare", name, "--from", "in"]) == 2
    told = f"annotations/{file}: not in/{file}, which is another set's: its records have {columns}\n"
    assert told in capsys.readouterr().out
    assert not [path for path in root.rglob("*") if path.is_file()]


def test_official_files_are_taken_beside_and_over_those_of_another_set(root: Path) -> None:
    given, expected = CASES["flickr30k"]
    put(Path("in"), {**given, "val.json": VIZWIZ})
    put(root, {"flickr30k/annotations/test.json": VIZWIZ})
    pictures("flickr30k", root, expected)
    assert main(["prepare", "flickr30k", "--from", "in"]) == 0
    assert {target: read(root / target, records) for target, records in expected.items()} == expected


def test_a_file_of_one_line_is_one_record(root: Path) -> None:
    given = {"train.json": "train", "dev.json": "dev", "test1.json": "test1"}
    put(Path("in"), {file: lines(nlvr(split)) for file, split in given.items()})
    (root / "nlvr/images").mkdir(parents=True)
    main(["prepare", "nlvr", "--from", "in"])
    assert read(root / "nlvr/annotations/dev.json", [{}]) == [nlvr_record("dev", "dev/")]


@pytest.mark.parametrize("folder", ["", "covers"])
def test_pictures_that_are_named_without_ending_may_be_of_any_kind(
    folder: str, root: Path, capsys: Captured
) -> None:
    books = {
        key: {"questions": ["Who?"], "answers": ["Me"], "split": split}
        for split, key in enumerate(("0A", "0B", "0C"), start=1)
    }
    put(Path("in"), {"dataset.json": books})
    for place in ("0A.jpg", "0B.gif", "0C.png"):
        path = root / "ocrvqa/images" / folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), "red").save(path)
    assert main(["prepare", "ocr_vqa", "--from", "in"]) == 0
    assert main(["check", "ocr_vqa"]) == 0
    assert capsys.readouterr().out.count("pictures read:  1 of 1") == 3


def test_a_split_whose_captions_are_secret_is_read_for_its_pictures(root: Path, capsys: Captured) -> None:
    def notes(split: str, **more: str) -> Any:
        return {"data": [{"image_id": "0a", "image_path": f"{split}/0a.jpg", "set_name": split, **more}]}

    put(
        Path("in"), {f"TextCaps_0.1_{s}.json": notes(s, caption_str="A stop sign.") for s in ("train", "val")}
    )
    put(Path("in"), {"TextCaps_0.1_test.json": notes("test"), **WORDS})
    (root / "TextCaps/images").mkdir(parents=True)
    Image.new("RGB", (6, 5), "red").save(root / "TextCaps/images/0a.jpg")
    assert main(["prepare", "textcaps_caption", "--from", "in"]) == 0
    assert main(["check", "textcaps_caption"]) == 0
    assert "textcaps_caption test: 1 records, 1 pictures, 0 captions" in capsys.readouterr().out
    assert {split: len(data) for split, data in load_dataset("textcaps_caption").items()} == {
        **{"train": 1, "val": 1, "test": 1}
    }


def _official() -> Iterator[tuple[str, Any]]:
    for name, row in CATALOG.items():
        yield from ((name, official) for official in row.takes)


def test_every_official_file_of_the_catalogue_has_a_layout_and_a_place_of_the_row() -> None:
    known = {**FORMATS, **DOCUMENTS}
    assert len(known) == len(FORMATS) + len(DOCUMENTS)
    assert {official.format for _, official in _official()} == {*known, RENAMED}
    for name, official in _official():
        row = CATALOG[name]
        extra = official.makes.endswith("_gt.json") or name.startswith("gqa")
        assert extra or official.makes in [*row.files, *row.others] or name.endswith("_vqg")
