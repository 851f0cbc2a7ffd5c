"""Captions and scores in batches are those of one picture and one pair at a time in float32."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from blip.capfilt.bootstrap import Bootstrap, Expert, Loaded, Text, load_batches
from blip.capfilt.units import RecordUnit, number_of, open_pool
from blip.config.schema import DatasetConfig
from blip.data.scenes.make import make_scenes
from blip.errors import TrainingError
from blip.models.med import MedConfig
from blip.tasks.capfilt import CaptionsConfig
from tests.reference.small_blip import SIZES, small_blip
from tests.reference.small_stage1 import IMAGE

NUM = 3


def small(kind: str, size: int = IMAGE, **values: Any) -> Any:
    med = MedConfig(**{**SIZES["med"], "max_positions": 40})
    values = {"tokenizer": "scenes", "vocab_size": None, "max_txt_len": 35, "med": med, **values}
    return small_blip(kind, **values, image_size=size).eval().float()


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> RecordUnit:
    """Eleven pictures, of which one is no picture, with two texts each."""
    root = tmp_path_factory.mktemp("data")
    make_scenes(root, size=32, train=11, val=0, test=0, web=0, workers=0)
    (root / "scenes/images/train/000004.png").write_bytes(b"no picture")
    section = DatasetConfig(path=str(root / "scenes/annotations/train.json"), images=str(root / "scenes"))
    [found] = open_pool("mine", section, "train", 100).units()
    assert isinstance(found, RecordUnit)
    return found


def bootstrap(captioner: Any, judge: Any, batch_size: int = 4, **captions: Any) -> Bootstrap:
    how = CaptionsConfig(num=NUM, max_length=14, min_length=3, **captions)
    experts = [None if model is None else Expert(model, "model") for model in (captioner, judge)]
    return Bootstrap(*experts, how, torch.device("cpu"), nullcontext, 3, batch_size)


def run(strap: Bootstrap, unit: RecordUnit, batch_size: int = 4, start: int = 0) -> list[dict[str, Any]]:
    batches = load_batches(unit, strap.views, batch_size, start, 0)
    return [line for pictures in batches for line in strap(pictures, "mine/1")]


def pixels(expert: Expert, unit: RecordUnit, number: int) -> dict[str, Any]:
    with Image.open(unit.entry(number).picture) as image:  # type: ignore[arg-type]
        one = expert.picture(image.convert("RGB"))[None]
    return {"image": one}


@pytest.mark.parametrize("captions", [{"use_nucleus_sampling": True}, {"use_nucleus_sampling": False}])
@pytest.mark.parametrize("size", [IMAGE, 2 * IMAGE], ids=["same-view", "two-views"])
def test_captions_and_scores_are_those_of_one_at_a_time(
    unit: RecordUnit, captions: dict[str, Any], size: int
) -> None:
    captioner, judge = small("caption"), small("matching", size)
    lines = run(bootstrap(captioner, judge, **captions), unit)
    assert [line["picture"] for line in lines] == [unit.name(number) for number in range(len(unit))]
    assert lines[4]["cause"] == "unreadable_image"
    writer, filtering = Expert(captioner, ""), Expert(judge, "")
    how = CaptionsConfig(num=NUM, max_length=14, min_length=3, **captions).generation(3)
    for number, line in enumerate(lines):
        if number == 4:
            continue
        own = {"index": torch.tensor([number_of(line["picture"])]), "source": "mine/1"}
        written = captioner.generate({**pixels(writer, unit, number), **own}, **how)
        web = [text.caption for text in unit.entry(number).texts]
        found = [text["caption"] for text in line["texts"]]
        assert found == list(dict.fromkeys([*web, *(text.strip() for text in written)]))
        assert [text["origin"] for text in line["texts"]].count("web") == len(web)
        pair = pixels(filtering, unit, number)
        for text in line["texts"]:
            samples = {**pair, "text_input": [filtering.text(text["caption"])]}
            with torch.no_grad():
                itm = judge(samples, match_head="itm").softmax(dim=1)[0, 1].item()
                itc = judge(samples, match_head="itc")[0, 0].item()
            assert text["itm"] == pytest.approx(itm, abs=5e-6)
            assert text["itc"] == pytest.approx(itc, abs=5e-6)


def test_a_shared_tower_looks_once_and_finds_the_same(unit: RecordUnit, monkeypatch: Any) -> None:
    captioner, judge = small("caption"), small("matching")
    judge.vision.load_state_dict(captioner.vision.state_dict())
    shared = bootstrap(captioner, judge)
    assert shared.shares_tower
    calls = []
    forward = type(captioner.vision).forward
    monkeypatch.setattr(
        type(captioner.vision), "forward", lambda self, *args: calls.append(1) or forward(self, *args)
    )
    lines = run(shared, unit)
    assert len(calls) == 3  # batches
    apart = bootstrap(captioner, judge)
    apart.shares_tower = False
    assert run(apart, unit) == lines
    assert len(calls) == 3 + 6
    other = small("matching")
    other.vision.load_state_dict({k: v + 1e-3 for k, v in captioner.vision.state_dict().items()})
    assert not bootstrap(captioner, other).shares_tower


def test_a_batch_does_not_depend_on_where_work_began(unit: RecordUnit) -> None:
    captioner, judge = small("caption"), small("matching")
    whole = run(bootstrap(captioner, judge), unit)
    assert run(bootstrap(captioner, judge), unit, start=8) == whole[8:]
    for one, other in zip(run(bootstrap(captioner, judge, 2), unit, 3), whole, strict=True):
        assert [t["caption"] for t in one.get("texts", ())] == [t["caption"] for t in other.get("texts", ())]


def test_one_model_alone(unit: RecordUnit) -> None:
    written = run(bootstrap(small("caption"), None), unit)
    assert all("itm" not in text for line in written for text in line.get("texts", ()))
    judged = run(bootstrap(None, small("matching")), unit)
    assert {text["origin"] for line in judged for text in line.get("texts", ())} == {"web"}
    assert all("itm" in text for line in judged for text in line.get("texts", ()))


def test_scores_that_are_no_numbers_stop_it(unit: RecordUnit) -> None:
    judge = small("matching")
    with torch.no_grad():
        judge.itm_head.weight.fill_(float("nan"))
    with pytest.raises(
        TrainingError, match=r"run\.filter: its scores are no numbers, as of '.*run\.precision"
    ):
        run(bootstrap(None, judge), unit)


def test_texts_that_cannot_be_used_are_counted_by_cause(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    captions = ["A star!", "a star", "", "...", 7, None, "\udcff"]
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "caption": captions}]))
    [unit] = open_pool("mine", DatasetConfig(path=str(tmp_path / "a.json")), "train", 10).units()
    assert isinstance(unit, RecordUnit)
    [line] = run(bootstrap(None, small("matching")), unit)
    assert [text["caption"] for text in line["texts"]] == ["A star!"]
    assert line["dropped"] == [
        "duplicate_web",
        "no_caption",
        "no_caption",
        "bad_text",
        "no_caption",
        "bad_text",
    ]


def test_an_empty_or_repeated_synthetic_text_is_dropped(unit: RecordUnit, monkeypatch: Any) -> None:
    captioner = small("caption")
    monkeypatch.setattr(captioner, "generate", lambda samples, **how: ["", "A star.", "a star"])
    strap = bootstrap(captioner, None)
    picture = Loaded("mine/0", (torch.zeros(3, IMAGE, IMAGE, dtype=torch.uint8),))
    picture.texts.append(Text("star a", "web", 0, "star a"))
    [line] = strap([picture], "mine/1")
    assert [text["caption"] for text in line["texts"]] == ["star a", "A star."]
    assert line["dropped"] == ["empty_synthetic", "duplicate_synthetic"]


def test_an_id_names_the_weights(unit: RecordUnit) -> None:
    model = small("caption")
    before = Expert(model, "").id
    assert before == Expert(small("caption"), "").id
    with torch.no_grad():
        model.lm_head.bias.add_(1)
    assert Expert(model, "").id != before
