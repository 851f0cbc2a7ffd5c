"""Published figures: recipes, the zoo and the table agree, and a run's scores are shown beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from blip.build import start_of
from blip.config.published import Published
from blip.expected import expected
from blip.models.published import Score, model_zoo
from blip.registry import MODELS, TASKS
from tests import recipe_table
from tests.e2e.runs import Commands
from tests.recipe_table import CONFIGS, load

ROWS = list(recipe_table.rows())
RECIPES = sorted({row.recipe for row in ROWS})
DATA = {
    "COCO test": "coco_retrieval/test",
    "Flickr30k test": "flickr30k/test",
    "Flickr30k": "flickr30k_caption/test",
    "NoCaps": "nocaps/val",
    "NoCaps val": "nocaps/val",
    "VQAv2 val": "coco_vqa/val",
    "VQAv2 test-dev": "coco_vqa/test",
    "VQAv2 test-std": "coco_vqa/test",
    "OK-VQA": "ok_vqa/test",
    "OK-VQA test": "ok_vqa/test",
    "A-OKVQA val": "aok_vqa/val",
    "A-OKVQA test": "aok_vqa/test",
    "NLVR2 dev": "nlvr/val",
    "NLVR2 test-P": "nlvr/test",
    "GQA": "gqa/test",
    "GQA test-dev": "gqa/test",
    "VSR": "vsr_classification/test",
    "IconQA": "iconqa/test",
    "TextVQA": "text_vqa/val",
    "VisDial": "visdial/val",
    "HatefulMemes": "hateful_memes/val",
    "VizWiz": "vizwiz_vqa/test",
    "ScienceQA": "scienceqa/test",
    "MSVD-QA": "msvd_qa/test",
    "MSRVTT-QA": "msrvtt_qa/test",
    "iVQA": "ivqa/test",
}
"""What the zoo calls data -> what recipes do."""
PAPERS = {"P1": "BLIP", "P2": "BLIP-2", "P3": "InstructBLIP"}


def as_recipes_say(arch: str, score: Score) -> tuple[str, str, str, float]:
    """Source up to the table, data, metric and value of a figure of the zoo."""
    paper, _, rest = score.source.partition(", ")
    source = ", ".join(filter(None, [PAPERS.get(paper, paper), rest.partition(",")[0]]))
    label = score.dataset.partition(",")[0]
    data = DATA[label]
    metric = re.sub(r"IR@", "img_r", re.sub(r"TR@", "txt_r", score.metric)).replace("BLEU-4", "Bleu_4")
    if label == "COCO test" and metric in ("CIDEr", "Bleu_4", "SPICE"):
        data = "coco_caption/test"
    return source, data, metric, score.value


def test_the_zoo_has_the_figures_of_the_recipes() -> None:
    """The same figure stands in both places, and nothing else."""
    known = {
        (", ".join(row.source.split(", ")[:2]), row.data, metric, value)
        for _, row, _, _ in ROWS
        for name, value in row.scores.items()
        for metric in {name, "accuracy" if name in ("acc", "overall") else name}
    }
    scores = [
        (arch, score) for arch, kinds in model_zoo for kind in kinds for score in model_zoo[arch, kind].score
    ]
    assert len(scores) > 150
    assert [s for arch, s in scores if as_recipes_say(arch, s) not in known] == []


def test_the_table_of_recipes_is_up_to_date() -> None:
    """Else: python -m tests.recipe_table > configs/README.md"""
    assert (CONFIGS / "README.md").read_text() == recipe_table.table()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_override_of_a_row_takes_its_weights_and_shows_its_figures(recipe: str) -> None:
    groups: dict[tuple[str, ...], list[Published]] = {}
    for row in [row for row in ROWS if row.recipe == recipe]:
        groups.setdefault((*row.override, *([] if row.released else ["-"])), []).append(row.row)
    for key, rows in groups.items():
        config = load(str(CONFIGS / recipe), *(part for part in key if part != "-"))
        task, start = TASKS.get(config.run.task)(config.run), start_of(config)
        assert start
        trained, notes = not config.run.evaluate, set[str]()
        if "-" in key:
            start, trained, notes = "output/mine", False, {"published for weights that were never released"}
        shown = expected(config, task, start, trained).rows
        for row in rows:
            assert [set(e.notes) for e in shown if e.row == row] == [notes], row


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_the_top_of_a_recipe_expects_is_what_it_is_compared_with(recipe: str) -> None:
    head = (CONFIGS / recipe).read_text().partition("\nmodel:")[0]
    head = " ".join(line.removeprefix("#").strip() for line in head.splitlines())
    said = {float(text) for text in re.findall(r"(?<![\w.@-])\d{2,3}\.\d+(?!\w)", head)}
    known = {value for row in ROWS if row.recipe == recipe for value in row.row.scores.values()}
    assert said <= known


@pytest.mark.parametrize(
    ("recipe", "arch", "model_type", "millions"),
    [
        ("blip2/gqa_zeroshot_opt_eval", "blip2_opt", "pretrain_opt6.7b", 108),
        ("blip2/gqa_zeroshot_flant5xl_eval", "blip2_t5", "pretrain_flant5xxl", 108),
        ("blip2/gqa_zeroshot_flant5xl_eval", "blip2_t5", "pretrain_flant5xl_vitL", 103),
        ("blip/nocaps_eval", "blip_caption", "large_coco", 446),
        ("instructblip/zeroshot_nocaps", "blip2_vicuna_instruct", "vicuna13b", 188),
        ("instructblip/scienceqa_ft", "blip2_vicuna_instruct", "vicuna7b", 188),
        ("instructblip/okvqa_ft", "blip2_t5_instruct", "flant5xxl", 188),
    ],
)
def test_what_an_override_takes_is_built_with_the_papers_count_of_trained_parameters(
    recipe: str, arch: str, model_type: str, millions: int
) -> None:
    more = [f"model.arch={arch}", f"model.model_type={model_type}"]
    config = load(str(CONFIGS / f"{recipe}.yaml"), *more, "model.vocab_size=30523")
    with torch.device("meta"):
        model = MODELS.get(arch)(config.model)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert abs(found - millions) < 5


# A run


TINY = ["run.num_beams=1", "run.max_len=8", "run.min_len=1"]
BOUND = {"source": "a paper, table 1", "data": "scenes/test", "scores": {"CIDEr": 133.3, "SPICE": 20.0}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    MODELS.get("blip_caption").from_preset("base_coco", **SIZES).save_pretrained(folder)
    return folder


SIZES: dict[str, Any] = {
    "image_size": 32,
    "vit": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64, "stem_width": 0},
    "med": {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "max_positions": 64},
    "tokenizer": "scenes",
}


def evaluate(commands: Commands, root: Path, weights: Path, folder: Path, rows: list[Any], *more: str) -> Any:
    sizes = [f"model.{key}={json.dumps(value)}" for key, value in SIZES.items()]
    sizes += ["datasets.scenes.vis_processor.eval.image_size=32", f"run.published={json.dumps(rows)}"]
    sizes += [f"model.init_from={weights}", f"run.data_root={root}", f"run.output_dir={folder}"]
    return commands("--cfg", "tiny/blip_caption.yaml", *sizes, *TINY, *more, module="blip.evaluate")


def test_a_run_shows_its_scores_beside_the_published_ones(
    commands: Commands, data_root: Path, weights: Path, tmp_path: Path
) -> None:
    other = {**BOUND, "model_type": "large_coco", "scores": {"CIDEr": 200.0}}
    server = {**BOUND, "server": "test-dev", "scores": {"Bleu_4": 40.4}, "source": "a server"}
    absent = {**BOUND, "data": "scenes/val"}  # not evaluated by this run
    rows = [BOUND, other, server, absent]
    ended = evaluate(commands, data_root, weights, tmp_path / "run", rows, "datasets.scenes.max_samples=8")
    assert ended.code == 0, ended.output
    [line] = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    cider = round(100 * line["CIDEr"], 4)
    found = json.loads((tmp_path / "run" / "published.json").read_text())
    wanted = ("dataset", "split", "metric", "score", "published", "difference", "source", "scale")
    assert [[row[key] for key in wanted] for row in found] == [
        ["scenes", "test", "CIDEr", cider, 133.3, round(cider - 133.3, 4), "a paper, table 1", 100.0],
        ["scenes", "test", "SPICE", None, 20.0, None, "a paper, table 1", 100.0],
        ["scenes", "test", "Bleu_4", None, 40.4, None, "a server", 100.0],
    ]
    notes = found[0]["notes"]
    assert notes[0] == "a subset: datasets.scenes.max_samples=8"
    assert notes[1].startswith("other sizes than those of blip_caption/base_coco: model.vit, model.med")
    assert "model.image_size" in notes[1]
    assert found[2]["notes"][0] == "of test-dev: the server scores the file in submissions/"
    shown = ended.output.partition("beside what is published:\n")[2]
    assert re.search(
        rf"scenes +test +CIDEr \(x100\) +{cider:.2f} +133\.30 +-\d+\.\d\d +a paper, table 1", shown
    )
    assert "a subset: datasets.scenes.max_samples=8" in shown
    assert "133.30" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"scores": {"CIDErr": 133.3}},
            r"run\.published\.0\.scores: run\.task captioning gives no 'CIDErr'; did you mean 'CIDEr'",
        ),
        (
            {"data": "scene/test"},
            r"run\.published\.0\.data: the run has no dataset 'scene'; did you mean 'scenes'",
        ),
        ({"scores": {"CIDEr": "high"}}, r"run\.published\.0\.scores\.CIDEr .*'high' is not a number"),
    ],
)
def test_figures_that_a_run_cannot_have_are_refused_before_anything_is_read(
    commands: Commands, data_root: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    ended = evaluate(commands, data_root, tmp_path / "none", tmp_path / "run", [{**BOUND, **row}])
    assert re.search(message, ended.refusal())
    assert not (tmp_path / "run").exists()


def test_what_is_published_of_a_dataset_goes_with_it() -> None:
    recipe = str(CONFIGS / "blip" / "caption_coco_ft.yaml")
    own = ["datasets.coco_caption=null", "datasets.mine.path=a.json"]
    assert {row["data"] for row in load(recipe).run.published} == {"coco_caption/test"}
    assert load(recipe, *own).run.published == []
    rows = "[{source: x, data: coco_caption/test, scores: {CIDEr: 1}}]"
    assert len(load(recipe, *own, f"run.published={rows}").run.published) == 1  # refused later


def test_the_word_published_stands_for_the_weights_of_the_model_type() -> None:
    recipe = str(CONFIGS / "instructblip" / "zeroshot_gqa.yaml")
    for more, file in (
        ([], "instruct_blip_flanxl_trimmed"),
        (["model.model_type=flant5xxl"], "instruct_blip_flanxxl_trimmed"),
        (
            ["model.arch=blip2_vicuna_instruct", "model.model_type=vicuna13b"],
            "instruct_blip_vicuna13b_trimmed",
        ),
        (["model.arch=blip2_t5", "model.model_type=pretrain_flant5xxl"], "blip2_pretrained_flant5xxl"),
    ):
        assert str(start_of(load(recipe, *more))).endswith(f"/{file}.pth")


def test_a_model_type_without_published_weights_says_so(commands: Commands) -> None:
    recipe = ("--cfg", "blip/snli_ve_eval.yaml", "model.finetuned=published")
    refused = commands(*recipe, module="blip.evaluate").refusal()
    assert (
        "model.finetuned (command line): no such weights of blip_classification/base are published" in refused
    )
