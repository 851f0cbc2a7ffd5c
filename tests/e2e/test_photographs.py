"""The papers' COCO recipes on photographs of COCO: prepared, checked, trained on and scored, at small sizes.

The twelve photographs that the tests carry are enough to find wrong assumptions about real JPEGs, sizes and
captions. BLIP_COCO_MINI may name a folder with more: `train.json` and `val.json`, lists of
`{image, caption: [...], image_id}`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import Commands, lines
from tests.reference.small_stage2 import LLMS
from tests.torture import PHOTOGRAPHS, photographs

SMALL = [
    "model.image_size=64",
    "run.num_workers=0",
    "run.batch_size_train=8",
    "run.batch_size_eval=8",
    "run.max_iters=3",
    "run.log_freq=1",
]
VIT = "model.vit={patch_size: 16, width: 32, depth: 2, heads: 2, mlp_dim: 64}"
TEXT = "width: 32, depth: 2, num_heads: 2, mlp_dim: 64, max_positions: 512, init_from: null"
BLIP = [VIT, f"model.med={{{TEXT}}}"]
BLIP2 = [
    VIT,
    "model.vit_model=vit_base",
    "model.vit_init_from=null",
    "model.vit_precision=fp32",
    f"model.qformer={{{TEXT}}}",
    "model.num_query_token=4",
    "run.precision=fp32",
    "run.warmup_steps=1",
]
LLM = {"sizes": LLMS["opt"], "tokenizer": "scenes", "end": None}
WITH_LLM = ["model.llm_model=null", f"model.llm={json.dumps(LLM)}", "run.num_beams=2", "run.max_len=12"]
CAPTIONED = {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "agg_metrics"}
RECALLS = {f"{way}_r{k}" for way in ("txt", "img") for k in (1, 5, 10)} | {"r_mean"}
RECIPES: dict[str, tuple[str, list[str], set[str]]] = {
    "blip/caption_coco_ft": ("coco_caption", [*BLIP, "run.java_metrics=[]"], CAPTIONED),
    "blip/retrieval_coco_ft": ("coco_retrieval", [*BLIP, "model.queue_size=16"], RECALLS),
    "blip2/retrieval_coco_ft": ("coco_retrieval", [*BLIP2, "model.embed_dim=16"], RECALLS),
    "blip2/caption_coco_ft": ("coco_caption", [*BLIP2, *WITH_LLM, "run.java_metrics=[]"], CAPTIONED),
}
"""Recipe -> its dataset, what makes it small, its scores."""


def given() -> dict[str, list[dict[str, Any]]]:
    """Records by split; images by absolute path."""
    more = os.environ.get("BLIP_COCO_MINI")
    if more is None:
        found, folder = photographs(), PHOTOGRAPHS / "images"
        parts = {"train": found[:6], "val": found[6:9], "test": found[9:]}
    else:
        folder = Path(more)
        train, val = (json.loads((folder / f"{split}.json").read_text()) for split in ("train", "val"))
        parts = {"train": train, "val": val[::2], "test": val[1::2]}
    return {s: [{**r, "image": str(folder / r["image"])} for r in some] for s, some in parts.items()}


@pytest.fixture(scope="module")
def coco(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with COCO as `blip data prepare` lays it out, of files as LAVIS distributes them."""
    root, downloads = tmp_path_factory.mktemp("coco"), tmp_path_factory.mktemp("downloads")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for split, records in given().items():
        listed = []
        for number, record in enumerate(records):
            place = f"val2014/COCO_val2014_{record['image_id']:012d}.jpg"
            (root / "coco/images" / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(record["image"], root / "coco/images" / place)
            captions = record["caption"]
            words += re.findall(r"[a-z]+|[^a-z\s]", " ".join(captions).lower())
            if split == "train":
                listed += [{"image": place, "caption": c, "image_id": f"coco_{number}"} for c in captions]
            else:
                listed.append({"image": place, "caption": captions})
        (downloads / f"coco_karpathy_{split}.json").write_text(json.dumps(listed))
    (root / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    argv = ["prepare", "coco_caption", "coco_retrieval", "--data-root", root, "--from", downloads]
    ended = commands(*argv, module="blip.data.__main__")
    assert ended.code == 0, ended.output
    return root


def test_all_photographs_are_sound(commands: Commands, coco: Path) -> None:
    ended = commands("check", "coco_caption", "--data-root", coco, module="blip.data.__main__")
    assert ended.code == 0, ended.output
    assert ended.output.count("unusable:       none") == 3
    found = {split: len(records) for split, records in given().items()}
    for split, number in found.items():
        records = 5 * number if split == "train" else number
        told = f"coco_caption {split}: {records} records, {number} pictures, {5 * number} captions"
        assert told in ended.output


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_coco_recipe_trains_on_photographs_and_is_scored(
    commands: Commands, coco: Path, tmp_path: Path, recipe: str
) -> None:
    data, small, scores = RECIPES[recipe]
    eyes = [f"datasets.{data}.vis_processor.{stage}.image_size=64" for stage in ("train", "eval")]
    places = [f"run.data_root={coco}", "model.tokenizer=vocab.txt", "model.pretrained=null"]
    folder = tmp_path / "run"
    argv = ["--cfg", recipe, *SMALL, *small, *eyes, *places, f"run.output_dir={folder}"]
    ended = commands(*argv)
    assert ended.code == 0, ended.output
    *steps, last = lines(folder)
    losses = [line["loss"] for line in steps if line["split"] == "train"]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert last["split"] == "test"
    assert last.keys() >= scores
    assert not (folder / "skipped.jsonl").exists()
    predictions = json.loads(next((folder / "predictions").glob("test-*.json")).read_text())
    assert len(predictions) == len(given()["test"])
    # What was trained is scored alike by the other command.
    again = tmp_path / "again"
    start = [f"model.init_from={folder}", f"run.output_dir={again}"]
    ended = commands(*argv[:-1], *start, module="blip.evaluate")
    assert ended.code == 0, ended.output
    scored = lines(again)[-1]
    assert {name: scored[name] for name in scores} == {name: last[name] for name in scores}
