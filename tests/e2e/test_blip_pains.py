"""What users of BLIP report elsewhere is shown not to be so here.

`blip_pains.SHOWN` maps it to the tests that show it: those of this file and many others.
"""

from __future__ import annotations

import csv
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import BertWordPieceTokenizer

from blip.models.med import MedConfig
from blip.models.vision import VisionConfig
from tests.e2e.blip_pains import CONCERNS, ELSEWHERE, SHOWN
from tests.e2e.runs import ROOT, Commands, functions_in, lines, train_lines
from tests.e2e.test_blip_recipes import MED, options
from tests.reference.small_blip import MODELS, SIZES, small_blip
from tests.reference.small_stage1 import global_batch

THREAD = re.compile(r"\b(?:BLIP|LAVIS|HF)#\d+")
PAINS = range(1, 23)


@pytest.mark.parametrize("pain", SHOWN)
def test_every_pain_has_tests_that_are_there(pain: str) -> None:
    assert SHOWN[pain]
    for test in SHOWN[pain]:
        path, _, name = test.partition("::")
        assert name in functions_in(ROOT / "tests" / path), f"{test} is gone; name the one that shows it now"


def test_every_pain_is_shown_or_belongs_elsewhere() -> None:
    shown: dict[int, set[str]] = {}
    for pain in SHOWN:
        shown.setdefault(int(pain.split(":")[0]), set()).update(THREAD.findall(pain))
    assert shown == {number: set(threads.split()) for number, threads in CONCERNS.items()}
    assert sorted([*CONCERNS, *ELSEWHERE]) == list(PAINS)


# Own data


def small(recipe: str, data: str, folder: Path) -> list[str]:
    """Arguments of a tiny recipe made small."""
    fresh = [f"model.med={{{MED}}}", "model.init_from=null", "run.test_splits=[test]", "run.valid_splits=[]"]
    return ["--cfg", f"tiny/{recipe}.yaml", *options(data, folder / "nowhere", folder / "run"), *fresh]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of ten JPEG files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (40 + number, 30), (20 * number, 90, 10)).save(folder / f"{number}.jpg")
    return folder


def test_own_pictures_with_captions_train_and_are_scored_without_code(
    commands: Commands, photos: Path, tmp_path: Path
) -> None:
    table = tmp_path / "mine.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "what it shows"])
        rows.writerows([[f"{number}.jpg", f"a field, number {number}"] for number in range(10)])
    own = [
        f"datasets.scenes.path={{train: {table}, test: {table}}}",
        f"datasets.scenes.images={photos}",
        "datasets.scenes.columns={image: file_name, caption: what it shows}",
    ]
    ended = commands(*small("blip_caption", "scenes", tmp_path), *own, "run.max_len=12")
    assert ended.code == 0, ended.output
    assert len(train_lines(tmp_path / "run")) == 2
    assert {"CIDEr", "Bleu_4"} <= lines(tmp_path / "run")[-1].keys()
    [said] = (tmp_path / "run" / "predictions").glob("test-*.json")
    assert json.loads(said.read_text())[3]["truth"] == ["a field, number 3"]


def test_own_questions_train_and_are_scored_without_code(
    commands: Commands, photos: Path, tmp_path: Path
) -> None:
    table, answers = tmp_path / "asked.jsonl", tmp_path / "answers.json"
    table.write_text(
        "".join(
            json.dumps({"picture": f"{n}.jpg", "q": "which number is this?", "a": str(n % 3)}) + "\n"
            for n in range(10)
        )
    )
    answers.write_text(json.dumps(["0", "1", "2"]))
    own = [
        f"datasets.scenes_vqa.path={{train: {table}, test: {table}}}",
        f"datasets.scenes_vqa.images={photos}",
        "datasets.scenes_vqa.columns={image: picture, question: q, answer: a}",
        f"datasets.scenes_vqa.answer_list={answers}",
    ]
    ended = commands(*small("blip_vqa", "scenes_vqa", tmp_path), *own)
    assert ended.code == 0, ended.output
    assert 0 <= lines(tmp_path / "run")[-1]["overall"] <= 100
    [said] = (tmp_path / "run" / "predictions").glob("test-*.json")
    assert {p["answer"] for p in json.loads(said.read_text())} <= {"0", "1", "2"}


def test_captions_are_written_before_they_are_scored(
    commands: Commands, data_root: Path, tmp_path: Path
) -> None:
    start = small("blip_caption", "scenes", tmp_path)
    root, once = f"run.data_root={data_root}", "run.max_len=12"
    killed = [["die_at", "blip.tasks.captioning.Captioning._metrics", 1, "before"]]
    ended = commands(*start, root, once, traps=killed)
    assert ended.codes == [-signal.SIGKILL], ended.output
    [said] = (tmp_path / "run" / "predictions").glob("test-*.json")
    assert all(p["caption"] is not None for p in json.loads(said.read_text()))
    assert all(line["split"] == "train" for line in lines(tmp_path / "run"))


# Losses and batches


def test_losses_of_pre_training_fall_below_chance() -> None:
    """A model whose matching never leaves 0.6365, the entropy of one in three, has learned nothing."""
    model, batch = small_blip("pretrain", queue_size=8), global_batch(8, ids=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found = []
    for step in range(55):
        output = model(batch | {"step": step})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.after_step([output])
        found.append([output[name].item() for name in ("loss_itc", "loss_itm", "loss_lm", "itm_acc")])
    first, last = np.mean(found[:5], axis=0), np.mean(found[-5:], axis=0)
    assert last[1] < 0.4
    assert last[3] > 0.8  # 2 of 3 are no pairs
    assert last[0] < first[0] - 0.5
    assert last[2] < first[2] - 0.5


def single(kind: str) -> dict[str, Any]:
    """A batch of one for a small model of this kind."""
    batch = global_batch(1, ids=False) | {"label": torch.zeros(1, dtype=torch.int64)}
    if kind == "nlvr":
        batch["image0"], batch["image1"] = batch["image"], batch.pop("image") + 1
    if kind == "vqa":
        batch |= {"answer_ids": batch["text_ids"][:, :4], "answer_mask": batch["text_mask"][:, :4]}
    return batch


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_of_one_trains_and_is_answered(kind: str) -> None:
    model, batch = small_blip(kind), single(kind)
    if kind not in ("features", "matching"):
        output = model(batch)
        assert output.loss.isfinite()
        output.loss.backward()
        model.after_step([output])
    model.eval()
    with torch.no_grad():
        if kind in ("classification", "nlvr"):
            assert model.predict(batch)["predictions"].shape == (1, model.config.num_classes)
        elif kind == "features":
            assert model.extract_features(batch).multimodal_embeds.shape[0] == 1
        elif kind == "matching":
            assert model(batch).shape == (1, 2)
            assert model(batch, match_head="itc").shape == (1, 1)


@torch.no_grad()
def test_one_text_is_matched_with_several_pictures_at_once() -> None:
    model, batch = small_blip("matching").eval(), global_batch(5, ids=False)
    ids, mask = (batch[name][:1].expand(5, -1) for name in ("text_ids", "text_mask"))
    together = model({"image": batch["image"], "text_ids": ids, "text_mask": mask})
    for row in range(5):
        alone = model({"image": batch["image"][row : row + 1], "text_ids": ids[:1], "text_mask": mask[:1]})
        torch.testing.assert_close(together[row], alone[0])


# Other parts, other languages


@pytest.mark.parametrize("kind", ["pretrain", "retrieval", "caption", "vqa", "classification"])
def test_any_timm_tower_will_do(kind: str) -> None:
    sizes = {"patch_size": 8, "width": 24, "depth": 2, "heads": 3}
    tower = {"vit_type": "timm/vit_tiny_patch16_224", "vit": VisionConfig(vit_model="vit_base", **sizes)}
    model, batch = small_blip(kind, **tower), global_batch(3, ids=False)
    if kind == "vqa":
        batch |= {"answer_ids": batch["text_ids"][:, :4], "answer_mask": batch["text_mask"][:, :4]}
    batch["label"] = torch.zeros(3, dtype=torch.int64)
    model(batch).loss.backward()
    assert model.vision.width == 24
    assert all(p.grad is not None for p in model.vision.parameters() if p.requires_grad)


@pytest.mark.parametrize("texts", [["红 色 的 圆", "方 块"], ["Ein großer Käse", "kein Kreis"]])
def test_another_language_is_learned_and_written(tmp_path: Path, texts: list[str]) -> None:
    """A list of word pieces is that of an uncased BERT; a `tokenizer.json` keeps its own rules."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(texts).split()]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    if "Ein" in words:
        cased = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=False, strip_accents=False)
        cased.save(str(tmp_path / "tokenizer.json"))
    med = MedConfig(**{**SIZES["med"], "max_positions": 16})
    model = small_blip("caption", tokenizer=str(tmp_path), vocab_size=None, med=med)
    assert words.index("[UNK]") not in model.tokenize(texts)["text_ids"]
    batch = {"image": global_batch(2, ids=False)["image"], "text_input": texts}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    model.eval()
    assert model.generate({"image": batch["image"]}, num_beams=1, max_length=8, min_length=1) == texts
