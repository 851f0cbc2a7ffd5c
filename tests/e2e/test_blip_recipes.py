"""The tiny BLIP recipes through the real commands: pre-train, then start every other model from that run."""

from __future__ import annotations

import json
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import blip
from blip.data.scenes.questions import TYPES
from tests.e2e.runs import Commands, lines

SMALL = [
    "model.image_size=32",
    "model.vit={patch_size: 8, width: 32, depth: 2, heads: 2, mlp_dim: 64, stem_width: 0}",
    "run.max_iters=2",
    "run.batch_size_train=8",
    "run.warmup_steps=1",
    "run.log_freq=1",
]
MED = "width: 32, depth: 2, num_heads: 2, mlp_dim: 64, max_positions: 512"
CAPTION_SCORES = {"Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr", "agg_metrics", "attr_acc", "caption_acc"}
RECALLS = {f"{way}_r{k}" for way in ("txt", "img") for k in (1, 5, 10)}
DOWNSTREAM = {
    "blip_caption": ("scenes", CAPTION_SCORES),
    "blip_retrieval": ("scenes", RECALLS),
    "blip_vqa": ("scenes_vqa", {"overall"}),
    "blip_nlvr": ("scenes_nlvr", {"acc"}),
}


def options(data: str, root: Path, folder: Path) -> list[str]:
    """The recipe's run made small."""
    sizes = [f"datasets.{data}.vis_processor.{stage}.image_size=32" for stage in ("train", "eval")]
    return [*SMALL, *sizes, f"run.data_root={root}", f"run.output_dir={folder}"]


@pytest.fixture(scope="module")
def pretrained(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip") / "pretrained"
    more = [f"model.med={{{MED}, init_from: null}}", "model.queue_size=32"]
    ended = commands("--cfg", "tiny/blip_pretrain.yaml", *options("scenes", data_root, folder), *more)
    assert ended.code == 0, ended.output
    assert lines(folder)[-1].keys() >= RECALLS
    return folder


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_a_downstream_model_starts_from_pre_training_and_is_scored(
    commands: Commands, pretrained: Path, data_root: Path, tmp_path: Path, name: str
) -> None:
    (data, scores), folder = DOWNSTREAM[name], tmp_path / "run"
    more = [f"model.med={{{MED}}}", f"model.init_from={pretrained}"]
    if name == "blip_retrieval":
        more.append("model.queue_size=32")
    ended = commands("--cfg", f"tiny/{name}.yaml", *options(data, data_root, folder), *more)
    assert ended.code == 0, ended.output
    found = lines(folder)[-1]
    assert found["split"] == "test"
    assert found.keys() >= scores
    assert all(found[score] >= 0 for score in scores)
    if name == "blip_vqa":
        assert any(kind in key for kind in TYPES for key in found)
    predictions = json.loads(next((folder / "predictions").glob("test-*.json")).read_text())
    assert {"instance_id", "truth"} <= predictions[0].keys()
    assert "Failures" in (folder / "report.html").read_text()


def test_the_towers_run_trains_it_and_captioning_keeps_what_it_learned(
    commands: Commands, pretrained: Path, data_root: Path, tmp_path: Path
) -> None:
    runs = [pretrained, tmp_path / "tower", tmp_path / "caption"]
    for start, folder in pairwise(runs):
        more = [f"model.med={{{MED}}}", f"model.init_from={start}", "run.test_splits=[]"]
        recipe = f"tiny/blip_{folder.name}.yaml"
        ended = commands("--cfg", recipe, *options("scenes", data_root, folder), *more)
        assert ended.code == 0, ended.output
    before, tower, after = (
        {k: v for k, v in load_file(run / "model" / "model.safetensors").items() if k.startswith("vision.")}
        for run in runs
    )
    assert before.keys() == tower.keys() == after.keys()
    assert any(not torch.equal(tower[name], before[name]) for name in tower)
    assert all(torch.equal(tower[name], after[name]) for name in tower)


def test_the_same_scores_come_from_evaluating_the_run(
    commands: Commands, pretrained: Path, data_root: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / "trained", tmp_path / "evaluated"]
    more = [f"model.med={{{MED}}}", "run.num_beams=2"]
    for folder, start, command in ((runs[0], pretrained, "train"), (runs[1], runs[0], "evaluate")):
        small = options("scenes", data_root, folder)
        begin = f"model.init_from={start}"
        ended = commands("--cfg", "tiny/blip_caption.yaml", *small, *more, begin, module=f"blip.{command}")
        assert ended.code == 0, ended.output
    trained, evaluated = (lines(folder)[-1] for folder in runs)
    assert {k: v for k, v in evaluated.items() if k != "step"} == {
        k: v for k, v in trained.items() if k != "step"
    }


@pytest.mark.parametrize(
    ("name", "task", "monitor", "reason"),
    [
        ("vqa", "vqa", "overal", "the evaluation gives no 'overal'; did you mean 'overall'?"),
        (
            "vqa",
            "vqa",
            "acc",
            "the evaluation gives no 'acc'; choose from answer_type_*, overall, question_t",
        ),
        ("vqa", "gqa", "overall", "the evaluation gives no 'overall'; choose from acc, answer_type_*"),
        ("vqa", "aok_vqa", "mc_ac", "the evaluation gives no 'mc_ac'; did you mean 'mc_acc'?"),
        ("vqa", "aok_vqa", "mc_acc", "the evaluation on scenes_vqa gives no 'mc_acc'"),
        (
            "vqa",
            "vqa",
            "question_type_colour",
            "the evaluation on scenes_vqa gives no 'question_type_colour'; did you mean 'question_type_c",
        ),
        (
            "nlvr",
            "multimodal_classification",
            "overall",
            "the evaluation gives no 'overall'; choose from AUC, acc, type_*",
        ),
        (
            "nlvr",
            "multimodal_classification",
            "type_colour",
            "the evaluation on scenes_nlvr gives no 'type_colour'; did you mean 'type_",
        ),
    ],
)
def test_a_score_that_there_is_not_is_refused_before_training(
    commands: Commands, data_root: Path, tmp_path: Path, name: str, task: str, monitor: str, reason: str
) -> None:
    small = options(f"scenes_{name}", data_root, tmp_path / "run")
    decide = ["run.valid_splits=[val]", "run.test_splits=[]", f"run.task={task}", f"run.monitor={monitor}"]
    start = ["--cfg", f"tiny/blip_{name}.yaml", *small, f"model.med={{{MED}}}", "model.init_from=null"]
    ended = commands(*start, *decide)
    assert f"run.monitor: {reason}" in ended.refusal()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "monitor"), [("vqa", "question_type_count"), ("nlvr", "acc")])
def test_a_score_of_a_type_decides_the_best_checkpoint(
    commands: Commands, data_root: Path, tmp_path: Path, name: str, monitor: str
) -> None:
    small = options(f"scenes_{name}", data_root, tmp_path / "run")
    decide = ["run.valid_splits=[val]", "run.test_splits=[]", f"run.monitor={monitor}"]
    start = ["--cfg", f"tiny/blip_{name}.yaml", *small, f"model.med={{{MED}}}", "model.init_from=null"]
    ended = commands(*start, *decide)
    assert ended.code == 0, ended.output
    assert monitor in lines(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "checkpoints" / "best").exists()


def test_a_metric_that_the_data_cannot_give_is_refused_before_training(
    commands: Commands, data_root: Path, tmp_path: Path
) -> None:
    more = [f"model.med={{{MED}}}", "run.valid_splits=[val]", "run.test_splits=[]", "run.monitor=attr_acc"]
    small = options("scenes", data_root, tmp_path / "run")
    known = commands("--cfg", "tiny/blip_caption.yaml", *small, *more, "--dry-run")
    assert known.code == 0, known.output  # what is in the embedded pictures is known
    paths = ", ".join(f"{split}: scenes/annotations/{split}.json" for split in ("train", "val"))
    own = [f"datasets.scenes.path={{{paths}}}", "datasets.scenes.images=scenes"]
    ended = commands("--cfg", "tiny/blip_caption.yaml", *small, *more, *own)
    assert ended.code == 2
    assert "run.monitor: the evaluation on scenes gives no 'attr_acc'; choose from Bleu_1" in ended.output
    assert "caption_acc" not in ended.output
    assert not (tmp_path / "run").exists()


def test_a_default_score_that_the_data_cannot_give_is_refused_before_training(
    commands: Commands, data_root: Path, tmp_path: Path
) -> None:
    """Choices without direct answers have `mc_acc` alone, which has to be asked for."""
    asked = json.loads((data_root / "scenes" / "annotations" / "vqa_val.json").read_text())[:4]
    chosen = [
        {
            "image": one["image"],
            "question": one["question"],
            "choices": ["red", "two"],
            "correct_choice_idx": 1,
        }
        for one in asked
    ]
    (tmp_path / "val.json").write_text(json.dumps(chosen))
    paths = f"{{train: scenes/annotations/vqa_train.json, val: '{tmp_path / 'val.json'}'}}"
    own = [f"datasets.scenes_vqa.path={paths}", "datasets.scenes_vqa.images=scenes"]
    small = [*options("scenes_vqa", data_root, tmp_path / "run"), *own]
    decide = ["run.valid_splits=[val]", "run.test_splits=[]", "run.task=aok_vqa"]
    start = ["--cfg", "tiny/blip_vqa.yaml", *small, f"model.med={{{MED}}}", "model.init_from=null", *decide]
    ended = commands(*start)
    assert "run.monitor: the evaluation on scenes_vqa gives no 'acc', by which" in ended.refusal()
    assert "did you mean 'mc_acc'?" in ended.output
    ended = commands(*start, "run.monitor=mc_acc")
    assert ended.code == 0, ended.output
    assert "mc_acc" in lines(tmp_path / "run")[-1]


def test_sentences_of_people_about_drawings_are_scored(
    commands: Commands, pretrained: Path, data_root: Path, tmp_path: Path
) -> None:
    """NLVR's development split: one drawing of three boxes each, cut into the first and the others."""
    run, root, scored = tmp_path / "nlvr", tmp_path / "data", tmp_path / "scored"
    more = [f"model.med={{{MED}}}"]
    small = options("scenes_nlvr", data_root, run)
    ended = commands("--cfg", "tiny/blip_nlvr.yaml", *small, *more, f"model.init_from={pretrained}")
    assert ended.code == 0, ended.output
    (root / "nlvr-dev" / "images").mkdir(parents=True)
    records = []
    for number in range(5):
        file = f"images/dev-{number}-0.png"
        Image.new("RGB", (90, 30), (40 * number, 90, 200)).save(root / "nlvr-dev" / file)
        records.append({"image": file, "sentence": f"There are {number} towers.", "label": number % 2 == 0})
    (root / "nlvr-dev" / "dev.json").write_text(json.dumps(records))
    sizes = [*SMALL[:2], *more, "datasets.nlvr_dev.vis_processor.eval.image_size=32"]
    where = [f"model.init_from={run}", f"run.data_root={root}", f"run.output_dir={scored}"]
    ended = commands("--cfg", "tiny/nlvr_dev_eval.yaml", *sizes, *where, module="blip.evaluate")
    assert ended.code == 0, ended.output
    found = json.loads(next((scored / "predictions").glob("test-*.json")).read_text())
    assert [p["truth"] for p in found] == ["True", "False"] * 2 + ["True"]
    assert lines(scored)[-1]["acc"] == pytest.approx(20 * sum(p["right"] for p in found))


def test_a_vocabulary_below_the_data_root_of_a_run_is_found_again_with_its_model(
    commands: Commands, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP_DATA", str(tmp_path))  # is not asked
    (data_root / "words").mkdir()
    embedded = resources.files("blip") / "models" / "scenes_vocab.txt"
    (data_root / "words" / "vocab.txt").write_text(embedded.read_text())
    small = options("scenes", data_root, tmp_path / "run")
    own = [f"model.med={{{MED}}}", "model.init_from=null", "model.tokenizer=words/vocab.txt"]
    brief = ["run.valid_splits=[]", "run.test_splits=[]"]
    ended = commands("--cfg", "tiny/blip_caption.yaml", *small, *own, *brief)
    assert ended.code == 0, ended.output
    monkeypatch.chdir(tmp_path)
    model = blip.from_pretrained(tmp_path / "run")
    assert model.word_pieces.decode(model.tokenize(["a red circle"])["text_ids"]) == ["a red circle"]
