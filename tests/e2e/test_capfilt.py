"""CapFilt through the real command: interrupted anywhere, shared by processes, on data of every kind."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from blip.config.files import config_roots
from blip.config.load import load_config
from blip.data.catalog.table import names
from blip.data.scenes.make import make_scenes
from blip.models.llm import LLMConfig, build_llm
from blip.processors.image import BlipImageEval
from blip.zoo import load_model
from tests.e2e.runs import Commands, Ended, lines
from tests.e2e.test_blip_recipes import MED, SMALL
from tests.e2e.test_instruct_recipes import QFORMER
from tests.e2e.test_instruct_recipes import SMALL as BLIP2
from tests.reference.small_stage2 import LLMS
from tests.shard_server import serving

CAPFILT = "blip.capfilt.__main__"
WEB = 72
SIZES = [
    *SMALL,
    f"model.med={{{MED}}}",
    *[f"datasets.scenes.vis_processor.{stage}.image_size=32" for stage in ("train", "eval")],
]
PRETRAIN = [option for option in SIZES if not option.startswith("model.med")]
RETRIEVAL = [*SIZES, "model.queue_size=32", "run.k_test=10"]
CONFIG: dict[str, Any] = {
    "datasets": {"scenes_web": {}, "scenes_web_shards": {}, "scenes": {}},
    "run": {
        "task": "capfilt",
        "human": ["scenes"],
        "captioner": {"recipe": "tiny/blip_tower.yaml", "options": SIZES},
        "filter": {"recipe": "tiny/blip_retrieval.yaml", "options": RETRIEVAL},
        "pretrain": {
            "recipe": "tiny/blip_pretrain.yaml",
            "options": [
                *PRETRAIN,
                f"model.med={{{MED}, init_from: null}}",
                "model.queue_size=32",
                "run.k_test=10",
            ],
        },
        "captions": {"num": 2, "max_length": 16},
        "keep": {"itm": None, "itm_quantile": 0.3},
        "batch_size_eval": 8,
        "part_size": 20,
        "num_workers": 0,
        "device": "cpu",
    },
}


class Workshop:
    """Starts CapFilt on a little noisy data."""

    def __init__(self, commands: Commands, folder: Path) -> None:
        self.commands, self.folder = commands, folder
        self.root = folder / "data"
        make_scenes(self.root, size=32, train=32, val=0, test=16, web=WEB, workers=0)
        self.recipe = folder / "capfilt.yaml"
        self.recipe.write_text(yaml.safe_dump(CONFIG, sort_keys=False))

    def start(self, place: Path, *more: str, recipe: Path | None = None, **how: Any) -> Ended:
        """Start, or go on."""
        places = [f"run.output_dir={place}", f"run.data_root={self.root}"]
        return self.commands("--cfg", recipe or self.recipe, *places, *more, module=CAPFILT, **how)

    def done(self, place: Path, *more: str, **how: Any) -> Path:
        """A run that ends well; its first round."""
        ended = self.start(place, *more, **how)
        assert ended.code == 0, ended.output
        return place / "round-1"


@pytest.fixture(scope="module")
def workshop(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(commands, tmp_path_factory.mktemp("capfilt"))


@pytest.fixture(scope="module")
def straight(workshop: Workshop) -> Path:
    """The first round of an uninterrupted run."""
    return workshop.done(workshop.folder / "straight")


@pytest.fixture(scope="module")
def experts(straight: Path) -> list[str]:
    """Overrides that take the models of that run."""
    return [
        "run.captioner={checkpoint: %s}" % (straight / "captioner"),
        "run.filter={checkpoint: %s}" % (straight / "filter"),
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def texts(folder: Path) -> list[tuple[str, str, str]]:
    """(picture, text, origin) of all that is kept, sorted."""
    found = []
    for record in json.loads((folder / "scenes_web" / "web.json").read_text()):
        found.append((record["image"], record["caption"], record["provenance"]["origin"]))
    for shard in sorted((folder / "scenes_web_shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    note = json.loads(tar.extractfile(info).read())  # type: ignore[union-attr]
                    several = note["caption"] if isinstance(note["caption"], list) else [note["caption"]]
                    for text, told in zip(several, note["provenance"], strict=True):
                        found.append((info.name, text, told["origin"]))
    return sorted(found)


def scored(folder: Path) -> dict[str, dict[str, Any]]:
    """Picture -> line of the journals."""
    found = {}
    for path in (folder / "scored").rglob("*.jsonl"):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            if "picture" in line:
                assert line["picture"] not in found
                found[line["picture"]] = line
    return found


def test_what_is_kept_is_what_the_rules_say_and_nothing_else(straight: Path) -> None:
    journal = scored(straight)
    assert len(journal) == 2 * WEB
    summary = json.loads((straight / "summary.json").read_text())
    kept = texts(straight / "dataset")
    for name in ("scenes_web", "scenes_web_shards"):
        own = [line for picture, line in journal.items() if (".tar/" in picture) == ("shards" in name)]
        told = summary["datasets"][name]
        assert told["pictures"] == WEB
        for origin, count in (("web", WEB), ("synthetic", 2 * WEB)):
            scores = sorted(t["itm"] for line in own for t in line["texts"] if t["origin"] == origin)
            lost = told["not_judged"].get(f"duplicate_{origin}", 0)
            assert len(scores) == told["texts"][origin] == count - lost
            least = summary["thresholds"][origin]["itm"]
            assert told["kept"][origin] == sum(score >= least for score in scores)
            shown = [one for one in kept if (".json" in one[0]) == ("shards" in name) and one[2] == origin]
            assert len(shown) == told["kept"][origin]
        removed = 1 - sum(told["kept"].values()) / sum(told["texts"].values())
        assert removed == pytest.approx(0.3, abs=0.05)
        assert told["truth"]["kinds"].keys() >= {"clean", "wrong", "swapped"}
        assert 0 < told["truth"]["AUROC by itm"] < 1
    assert kept == texts(straight / "dataset")


def test_pictures_of_shards_stay_as_they_are(straight: Path, workshop: Workshop) -> None:
    before: dict[str, bytes] = {}
    for shard in (workshop.root / "scenes" / "shards").glob("web-*.tar"):
        with tarfile.open(shard) as tar:
            before |= {i.name: tar.extractfile(i).read() for i in tar if i.name.endswith(".png")}  # type: ignore[union-attr]
    place = straight / "dataset" / "scenes_web_shards"
    sizes = json.loads((place / "sizes.json").read_text())
    total = 0
    for shard in place.glob("*.tar"):
        with tarfile.open(shard) as tar:
            pictures = {i.name: tar.extractfile(i).read() for i in tar if i.name.endswith(".png")}  # type: ignore[union-attr]
        assert sizes[shard.name] == len(pictures)
        total += len(pictures)
        assert all(before[name] == content for name, content in pictures.items())
    assert 0 < total <= WEB


@pytest.mark.parametrize("name", ["scenes_web", "scenes_web_shards"])
def test_the_recipe_that_is_left_trains_on_it(
    straight: Path, workshop: Workshop, commands: Commands, tmp_path: Path, name: str
) -> None:
    recipe = straight / "train.yaml"
    assert set(load_config(str(recipe)).datasets) == {"scenes_web", "scenes_web_shards", "scenes"}
    other = ({"scenes_web", "scenes_web_shards"} - {name}).pop()
    ended = commands("--cfg", recipe, f"datasets.{other}=null", f"run.output_dir={tmp_path}")
    assert ended.code == 0, ended.output
    assert lines(tmp_path)[-1]["split"] == "test"


# Interrupted

Moment = tuple[str, int, tuple[str, ...]]
"""What is called, how often at most, and whether to be killed before or after it."""
MOMENTS: list[Moment] = [
    ("torch.optim.AdamW.step", 4, ("before", "after")),  # both fine-tunings, two steps each
    ("blip.models.base.BlipModel.save_pretrained", 2, ("before", "after")),
    ("blip.engine.runner.write_report", 2, ("before", "after")),
    ("blip.capfilt.bootstrap.Bootstrap.__call__", 12, ("before", "after")),
    ("blip.capfilt.journal.Journal.add", 12, ("after",)),
    ("blip.capfilt.journal.Journal.end", 6, ("before", "after")),
    ("blip.capfilt.dataset.write_shard", 8, ("before", "after")),
    ("blip.capfilt.dataset.write_records", 1, ("before", "after")),
    ("blip.capfilt.output._Writer.put", 60, ("before",)),
    ("shutil.rmtree", 6, ("before", "after")),
    ("blip.capfilt.rounds.write_report", 1, ("before", "after")),
    ("os.replace", 40, ("before", "after")),
]


@pytest.mark.parametrize("part", range(4))
def test_killed_at_random_moments_it_writes_the_same_bytes(
    workshop: Workshop, straight: Path, tmp_path: Path, part: int
) -> None:
    """Ten and more moments over all parts."""
    rng = random.Random(part)
    place, killed = tmp_path / "run", 0
    for target, calls, moments in MOMENTS[part::4]:
        trap = ["die_at", target, rng.randint(1, calls), rng.choice(moments)]
        ended = workshop.start(place, "run.resume=auto", traps=[trap])
        killed += ended.code == -signal.SIGKILL
        assert ended.code in (0, -signal.SIGKILL), ended.output
    half = next((place / "round-1").rglob("scored/*/*.jsonl"), None)
    if half is not None:  # as a kernel leaves what was being written
        half.write_bytes(half.read_bytes()[:-40])
    found = workshop.done(place, "run.resume=auto")
    assert killed >= 2
    assert files(found / "dataset") == files(straight / "dataset")
    assert files(found / "scored") == files(straight / "scored")
    assert (found / "summary.json").read_bytes() == (straight / "summary.json").read_bytes()
    assert list(place.rglob(".partial-*")) == []


TUNING: list[Moment] = [
    ("torch.optim.AdamW.step", 2, ("before", "after")),
    ("blip.models.base.BlipModel.save_pretrained", 1, ("before", "after")),
    ("blip.engine.runner.write_report", 1, ("before", "after")),
    ("os.replace", 6, ("before", "after")),
]
PHASES: dict[str, tuple[tuple[str, ...], list[Moment]]] = {
    "captioner": ((), TUNING),
    "filter": (("captioner",), TUNING),
    "score": (
        ("captioner", "filter"),
        [
            ("blip.capfilt.bootstrap.Bootstrap.__call__", 4, ("before", "after")),
            ("blip.capfilt.journal.Journal.add", 20, ("before", "after")),
            ("blip.capfilt.journal.Journal.end", 2, ("before", "after")),
        ],
    ),
    "write": (
        ("captioner", "filter", "scored"),
        [
            ("blip.capfilt.dataset.write_shard", 8, ("before", "after")),
            ("blip.capfilt.dataset.write_records", 1, ("before", "after")),
            ("blip.capfilt.output._Writer.put", 60, ("before", "after")),
            ("shutil.rmtree", 4, ("before", "after")),
            ("blip.capfilt.rounds.write_report", 1, ("before", "after")),
            ("os.replace", 8, ("before", "after")),
        ],
    ),
}
"""Part of a round -> folders of the parts before it, and moments within it."""


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_ten_times_within_each_part_it_writes_the_same_bytes(
    workshop: Workshop, straight: Path, tmp_path: Path, phase: str
) -> None:
    before, moments = PHASES[phase]
    rng, killed, place = random.Random(phase), 0, tmp_path / "run"

    def begin() -> None:
        """Everything before this part is done."""
        shutil.rmtree(place, ignore_errors=True)
        for name in before:
            shutil.copytree(straight / name, place / "round-1" / name)
        for name in ("config.yaml", "env.json") if before else ():
            shutil.copy(straight.parent / name, place / name)

    begin()
    while killed < 10:
        target, calls, when = rng.choice(moments)
        trap = ["die_at", target, rng.randint(1, calls), rng.choice(when)]
        ended = workshop.start(place, "run.resume=auto", traps=[trap])
        assert ended.code in (0, -signal.SIGKILL), ended.output
        killed += ended.code == -signal.SIGKILL
        if ended.code == 0:
            assert files(place / "round-1" / "dataset") == files(straight / "dataset")
            begin()
    found = workshop.done(place, "run.resume=auto")
    assert files(found / "dataset") == files(straight / "dataset")
    assert files(found / "scored") == files(straight / "scored")
    assert (found / "summary.json").read_bytes() == (straight / "summary.json").read_bytes()
    assert list(place.rglob(".partial-*")) == []


def test_a_stop_signal_ends_with_code_3_and_loses_nothing(
    workshop: Workshop, straight: Path, experts: list[str], tmp_path: Path
) -> None:
    target, number = "blip.capfilt.bootstrap.Bootstrap.__call__", signal.SIGTERM.value
    trap = ["signal_at", target, 5, "after", number]
    ended = workshop.start(tmp_path / "run", *experts, traps=[trap])
    assert ended.code == 3, ended.output
    assert "stopped by SIGTERM; continue with run.resume=auto" in ended.output
    assert len(scored(tmp_path / "run" / "round-1")) == 40 - 4  # five batches, of units of 20
    found = workshop.done(tmp_path / "run", "run.resume=auto", *experts)
    assert files(found / "dataset") == files(straight / "dataset")


@pytest.mark.multi
def test_two_processes_find_what_one_finds(
    workshop: Workshop, straight: Path, experts: list[str], tmp_path: Path
) -> None:
    found = workshop.done(tmp_path / "run", *experts, world=2)
    assert texts(found / "dataset") == texts(straight / "dataset")
    one, two = scored(straight), scored(found)
    assert one.keys() == two.keys()
    for picture, line in one.items():
        for before, after in zip(line["texts"], two[picture]["texts"], strict=True):
            assert before["caption"] == after["caption"]
            assert before["itm"] == pytest.approx(after["itm"], abs=1e-5)


@pytest.mark.multi
def test_two_processes_killed_at_once_lose_nothing(
    workshop: Workshop, straight: Path, experts: list[str], tmp_path: Path
) -> None:
    trap = ["die_at", "blip.capfilt.journal.Journal.add", 4, "after"]
    ended = workshop.start(tmp_path / "run", *experts, traps=[trap], trapped=1, world=2)
    assert -signal.SIGKILL in ended.codes
    found = workshop.done(tmp_path / "run", "run.resume=auto", *experts, world=2)
    assert texts(found / "dataset") == texts(straight / "dataset")


def test_other_thresholds_are_applied_to_the_same_scores(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(straight.parent, tmp_path / "run", symlinks=True))
    before = files(place / "round-1" / "scored")
    trap = ["die_at", "blip.capfilt.bootstrap.Bootstrap.__call__", 1, "before"]  # nothing is judged again
    found = workshop.done(place, "run.resume=auto", "run.keep.itm_quantile=0.8", traps=[trap])
    assert files(found / "scored") == before
    assert 0 < len(texts(found / "dataset")) < 0.4 * len(texts(straight / "dataset"))
    ended = workshop.start(place, "run.resume=auto", "run.captions.top_p=0.5")
    assert "was begun with another captions" in ended.refusal()
    assert "already holds a run" in workshop.start(place).refusal()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("run.captioner.options=" + json.dumps([*SIZES, "run.weight_decay=0.1"]), "run.weight_decay"),
        ("run.filter.options=" + json.dumps([*RETRIEVAL, "model.alpha=0.1"]), "model.alpha"),
        ("model.init_from=elsewhere", "model.init_from"),
    ],
)
def test_models_of_other_recipes_are_not_taken_for_these(
    workshop: Workshop, straight: Path, tmp_path: Path, change: str, key: str
) -> None:
    place = Path(shutil.copytree(straight.parent, tmp_path / "run", symlinks=True))
    refusal = workshop.start(place, "run.resume=auto", change).refusal()
    assert f"was trained with another {key}" in refusal


def test_what_changes_nothing_of_the_models_may_change_and_so_may_the_place(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(straight.parent, tmp_path / "run", symlinks=True))
    options = [*SIZES, "run.log_freq=7", "datasets.scenes.cache_gb=1"]
    free = ["run.captioner.options=" + json.dumps(options), "run.num_workers=1"]
    trap = ["die_at", "blip.capfilt.tuning.train", 1, "before"]  # nothing is trained again
    workshop.done(place, "run.resume=auto", *free, traps=[trap])


# Data of all kinds


def test_a_folder_of_own_pictures_gets_synthetic_texts(
    workshop: Workshop, experts: list[str], tmp_path: Path
) -> None:
    own = tmp_path / "own pictures"
    shutil.copytree(workshop.root / "scenes" / "images" / "web", own / "a")
    (own / "a" / "broken.png").write_bytes((own / "a" / "000000.png").read_bytes()[:200])
    (own / "b").mkdir()
    Image.new("CMYK", (40, 50), (10, 200, 30, 0)).save(own / "b" / "ink.jpg")
    recipe = tmp_path / "own.yaml"
    run = {"task": "capfilt", "batch_size_eval": 16, "num_workers": 2, "keep": {"itm": 0.0}}
    recipe.write_text(yaml.safe_dump({"datasets": {"mine": {"path": str(own)}}, "run": run}))
    found = workshop.done(tmp_path / "run", *experts, recipe=recipe)
    records = [json.loads(t) for t in (found / "dataset/mine/own pictures.jsonl").read_text().splitlines()]
    assert len({record["image"] for record in records}) == WEB + 1
    assert {record["provenance"]["origin"] for record in records} == {"synthetic"}
    assert all((own / record["image"]).is_file() for record in records)
    [skipped] = (found / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["cause"] == "truncated_image"
    assert not (found / "train.yaml").exists()


def test_blip2_writes_and_judges(workshop: Workshop, tmp_path: Path) -> None:
    """A language model behind a Q-Former, and the matching head of stage 1, on a folder of pictures."""
    torch.manual_seed(3)
    llm = build_llm(None, LLMConfig(sizes=LLMS["opt"], tokenizer="scenes"))
    for part in (llm.model, llm.tokenizer._tokenizer):
        part.save_pretrained(tmp_path / "llm")
    eyes = [f"datasets.scenes.vis_processor.{stage}.image_size=32" for stage in ("train", "eval")]
    small = [*BLIP2, *eyes, f"run.data_root={workshop.root}", "run.test_splits=[]", "run.batch_size_train=8"]
    sizes = f"model.qformer={{{QFORMER}, init_from: null}}"
    stages = {
        "stage1": ["tiny/pretrain_stage1.yaml", sizes, "model.vit_train_steps=1", "run.max_iters=2"],
        "stage2": ["tiny/pretrain_stage2.yaml", sizes, f"model.llm_model={tmp_path / 'llm'}"],
    }
    for name, (recipe, *more) in stages.items():
        start = [f"model.init_from={tmp_path / 'stage1'}"] if name == "stage2" else []
        ended = workshop.commands(
            *("--cfg", recipe, *small, *more, *start, f"run.output_dir={tmp_path / name}")
        )
        assert ended.code == 0, ended.output
    recipe = tmp_path / "own.yaml"
    run = {
        "task": "capfilt",
        "captioner": {"checkpoint": str(tmp_path / "stage2")},
        "filter": {"checkpoint": str(tmp_path / "stage1")},
        "captions": {"use_nucleus_sampling": False, "num_beams": 2, "max_length": 6, "min_length": 1},
        "keep": {"itm": 0.0},
        "batch_size_eval": 16,
        "num_workers": 0,
        "device": "cpu",
    }
    own = workshop.root / "scenes" / "images" / "test"
    recipe.write_text(yaml.safe_dump({"datasets": {"mine": {"path": str(own)}}, "run": run}))
    found = workshop.done(tmp_path / "run", recipe=recipe)
    journal = scored(found)
    assert len(journal) == 16
    model = load_model("blip2_llm", checkpoint=str(tmp_path / "stage2"), is_eval=True)
    eye = BlipImageEval(image_size=32)
    files_of_own = sorted(own.iterdir())
    for name, line in journal.items():
        with Image.open(files_of_own[int(Path(name).name)]) as image:
            pixels = eye(image.convert("RGB"))[None]
        wanted = model.generate({"image": pixels}, num_beams=2, max_length=6, min_length=1)
        assert [text["caption"] for text in line["texts"]] == [w for w in wanted if re.search(r"\w", w)]
        assert all(0 < text["itm"] < 1 for text in line["texts"])
    assert any(line["texts"] for line in journal.values())


def test_half_precision_judges_nearly_the_same(
    workshop: Workshop, straight: Path, experts: list[str], tmp_path: Path
) -> None:
    only = [experts[1], "run.captioner=null", "run.captions.num=0", "datasets.scenes_web_shards=null"]
    found = workshop.done(tmp_path / "run", *only, "run.precision=bf16")
    before, differs = scored(straight), 0
    for picture, line in scored(found).items():
        [half] = line["texts"]
        full = next(text for text in before[picture]["texts"] if text["origin"] == "web")
        assert half["itm"] == pytest.approx(full["itm"], abs=0.05)
        differs += half["itm"] != full["itm"]
    assert differs > WEB // 2


def test_captions_only_and_filter_only(workshop: Workshop, experts: list[str], tmp_path: Path) -> None:
    none = "run.keep={itm: null, itm_quantile: null}"
    written = workshop.done(tmp_path / "c", experts[0], "run.filter=null", none, "run.captions.num=1")
    told = json.loads((written / "summary.json").read_text())["datasets"]["scenes_web"]
    assert told["kept"] == told["texts"] == {"web": WEB, "synthetic": WEB}
    filtered = workshop.done(tmp_path / "f", experts[1], "run.captioner=null", "run.captions.num=0")
    told = json.loads((filtered / "summary.json").read_text())["datasets"]["scenes_web"]
    assert told["texts"] == {"web": WEB}
    assert told["kept"]["web"] < WEB


def test_a_second_round_trains_anew_on_what_the_first_has_kept(workshop: Workshop, tmp_path: Path) -> None:
    root = Path(shutil.copytree(workshop.root, tmp_path / "data"))
    shard = root / "scenes" / "shards" / "web-00003.tar"
    whole = shard.read_bytes()
    shard.write_bytes(b"no tar" * 200)
    options = ["datasets.scenes_web=null", "run.rounds=2", "run.captions.num=1", "run.max_bad_ratio=0.1"]
    options.append(f"run.data_root={root}")
    found = workshop.done(tmp_path / "run", *options)
    again = tmp_path / "run" / "round-2"
    assert lines(again / "pretrain")[-1]["split"] == "test"
    start = yaml.safe_load((again / "captioner" / "config.yaml").read_text())["model"]["init_from"]
    assert start == str(again / "pretrain")
    one, two = (json.loads((r / "summary.json").read_text()) for r in (found, again))
    assert one["captioner"] != two["captioner"]
    assert two["round"] == 2
    assert len(list((again / "dataset" / "scenes_web_shards").glob("*.tar"))) > 10
    shard.write_bytes(whole)  # it was learned from what there was: that stays
    before = files(found / "dataset")
    workshop.done(tmp_path / "run", *options, "run.resume=auto")
    assert files(found / "dataset") == before
    other = workshop.start(tmp_path / "run", *options, "run.resume=auto", "run.keep.itm_quantile=0.6")
    assert f"run.keep: '{again}' was begun with what other rules have kept of round 1" in other.refusal()


def test_too_much_that_cannot_be_read_stops_it(
    workshop: Workshop, experts: list[str], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(workshop.root, tmp_path / "data"))
    for number in range(0, WEB, 4):
        (root / f"scenes/images/web/{number:06d}.png").write_bytes(b"")
    more = [*experts, f"run.data_root={root}", "datasets.scenes_web_shards=null"]
    refused = workshop.start(tmp_path / "run", *more).refusal()
    assert "18 of 72 pictures cannot be read (scenes_web: 18 empty_image)" in refused
    found = workshop.done(tmp_path / "run", "run.resume=auto", "run.max_bad_ratio=0.3", *more)
    assert len((found / "skipped.jsonl").read_text().splitlines()) == 18
    assert json.loads((found / "summary.json").read_text())["datasets"]["scenes_web"]["unreadable"] == {
        "empty_image": 18
    }


def test_too_many_shards_that_cannot_be_read_stop_it(
    workshop: Workshop, experts: list[str], tmp_path: Path
) -> None:
    """As training would: their pictures are not there to be counted."""
    root = Path(shutil.copytree(workshop.root, tmp_path / "data"))
    shards = sorted((root / "scenes" / "shards").glob("web-*.tar"))
    for path in shards[::2]:
        path.write_bytes(b"no tar" * 200)
    more = [*experts, f"run.data_root={root}", "datasets.scenes_web=null", "run.max_bad_ratio=0.3"]
    refused = workshop.start(tmp_path / "run", *more).refusal()
    assert f"{len(shards[::2])} of {len(shards)} shards cannot be read" in refused


def test_shards_that_could_not_be_fetched_are_tried_again(
    workshop: Workshop, experts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(workshop.root / "scenes" / "shards", folder, ignore=shutil.ignore_patterns("*.json"))
    for path in folder.glob("*.tar"):
        if not path.name.startswith("web-"):
            path.unlink()
    paths = sorted(folder.glob("*.tar"))
    lost = paths[1].rename(tmp_path / "elsewhere.tar")
    run = tmp_path / "run"
    with serving(folder) as server:
        urls = [f"{server.url}/{path.name}" for path in paths]
        cache = f"cache_dir: {tmp_path / 'cache'}"
        section = f"path: [{', '.join(urls)}], remote: true, {cache}, num_samples: {WEB}"
        only = ["datasets.scenes_web=null", "datasets.scenes_web_shards=null"]
        more = [*experts, f"datasets.mine={{{section}}}", *only]
        some = "run.max_bad_ratio=0.5"
        refused = workshop.start(run, *more).refusal()
        assert f"1 of {len(paths)} shards cannot be read" in refused
        assert "run.resume=auto, which tries lost shards again" in refused
        found = workshop.done(run, *more, some, "run.resume=auto")
        assert (found / "skipped.jsonl").read_text().count("unreadable_shard") == 1
        assert json.loads((found / "dataset" / "settings.json").read_text())["lost"] == ["mine-00001"]
        assert not (found / "dataset" / "mine" / paths[1].name).exists()
        journals = {path: path.stat().st_mtime_ns for path in (found / "scored").rglob("*.jsonl")}
        lost.rename(paths[1])
        ended = workshop.start(run, *more, some, "run.resume=auto")
        assert ended.code == 0, ended.output
        made_anew = {path.name for path, when in journals.items() if path.stat().st_mtime_ns != when}
        assert made_anew == {"00001.jsonl"}
        assert not (found / "skipped.jsonl").exists()
        whole = workshop.done(tmp_path / "whole", *more)
        assert files(whole / "dataset") == files(found / "dataset")
        assert files(whole / "scored") == files(found / "scored")


def test_a_dry_run_leaves_nothing_behind(workshop: Workshop, experts: list[str], tmp_path: Path) -> None:
    ended = workshop.start(tmp_path / "run", "--dry-run")
    assert ended.code == 0, ended.output
    assert "captioner: tiny/blip_tower.yaml would make it" in ended.output
    ended = workshop.start(tmp_path / "run", "--dry-run", *experts)
    assert ended.code == 0, ended.output
    assert '"origin": "synthetic"' in ended.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["run.human=[scene]"], "run.human: no dataset 'scene'; did you mean 'scenes'?"),
        (["run.captioner=null"], "run.captioner.checkpoint"),
        (["run.filter={recipe: null}"], "they change a recipe, and there is none"),
        (["run.rounds=2", "run.pretrain=null"], "run.pretrain.recipe"),
        (["run.human=[scenes,scenes_web,scenes_web_shards]"], "nothing to clean"),
        (["model.arch=blip_caption"], "model.arch (command line): no such key"),
        (["run.train_splits=[test]"], "run.train_splits"),
        (["run.captioner.recipe=tiny/nothing"], "tiny/nothing"),
        (["datasets.scenes_web.path=nothing.json"], "nothing.json"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    workshop: Workshop, tmp_path: Path, options: list[str], reason: str
) -> None:
    refused = workshop.start(tmp_path / "run", *options)
    assert refused.code == 2
    assert reason in refused.output
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_at_its_start_is_in_nobodys_way(
    workshop: Workshop, experts: list[str], tmp_path: Path
) -> None:
    absent = "run.filter.checkpoint=nowhere"
    refused = workshop.start(tmp_path / "run", experts[0], absent).refusal()
    assert "no weights at 'nowhere'" in refused
    assert not (tmp_path / "run").exists()


def test_weights_that_cannot_do_it_are_told_before_the_others_are_trained(
    workshop: Workshop, straight: Path, tmp_path: Path
) -> None:
    wrong = "run.filter={checkpoint: %s}" % (straight / "captioner")
    refused = workshop.start(tmp_path / "run", wrong).refusal()
    assert "run.filter.checkpoint: match: blip_caption cannot do that; give weights (run.filter" in refused
    assert "run.filter.arch" in refused
    assert "--" not in refused
    assert not (tmp_path / "run").exists()
    assert "no weights at 'nowhere'" in workshop.start(tmp_path, "run.filter={checkpoint: nowhere}").refusal()
    assert not (tmp_path / "round-1").exists()


PAPERS: dict[str, tuple[int, dict[str, Any], set[str], str | None]] = {
    # captions per picture, what is kept, human datasets, recipe of pre-training
    "blip/capfilt": (1, {"itm": 0.5}, {"coco_caption", "vg_caption"}, "blip/pretrain.yaml"),
    "blip/capfilt_published": (1, {"itm": 0.5}, set(), None),
    "blip2/capfilt": (
        10,
        {"best": 2, "best_by": "itc"},
        {"coco_caption", "vg_caption"},
        "blip2/pretrain_stage1.yaml",
    ),
    "tiny/capfilt": (1, {"itm": 0.5}, {"scenes"}, "tiny/blip_pretrain.yaml"),
}


def test_every_recipe_has_its_values_here() -> None:
    [root, *_] = config_roots()
    found = {path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/capfilt*.yaml")}
    assert found == PAPERS.keys()


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_have_the_papers_values(name: str) -> None:
    num, keep, human, pretrain = PAPERS[name]
    config = load_config(f"{name}.yaml", known_datasets=names())
    run = config.run
    how = run.captions
    assert (how.num, how.use_nucleus_sampling, how.top_p) == (num, True, 0.9)
    rules = {"itm": None, "itc": None, "itm_quantile": None, "itc_quantile": None, "best": None}
    assert asdict(run.keep) == {**rules, "best_by": "itm", **keep}
    assert set(run.human) == human
    assert run.pretrain.recipe == pretrain
    assert run.rounds == 1
    for expert in (run.captioner, run.filter, run.pretrain):
        if expert.recipe is not None:
            load_config(expert.recipe, known_datasets=names())
    if pretrain is not None and name != "tiny/capfilt":  # that one is of other data
        known = load_config(pretrain, known_datasets=names()).datasets
        assert set(config.datasets) == set(known)


def test_other_commands_say_whose_task_it_is(workshop: Workshop, commands: Commands) -> None:
    assert "'blip capfilt --cfg ...' carries out" in commands("--cfg", workshop.recipe).refusal()
    ended = commands("--cfg", "tiny/blip_tower.yaml", module=CAPFILT)
    assert "run.task: capfilt" in ended.refusal()
