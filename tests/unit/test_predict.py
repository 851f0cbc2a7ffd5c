"""`blip predict`: every task with every layout of weights, against what the model's own methods say."""

from __future__ import annotations

import io
import json
import logging
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import blip
from blip import predict
from blip.config.typed import model_overrides
from blip.convert import convert
from blip.models.med import MedConfig
from blip.weights import read_weights
from tests.reference.small_blip import SIZES, small_blip
from tests.reference.small_stage2 import LLMS
from tests.unit.test_convert import small

BLIP_SET = ["vit.heads=2", "med.num_heads=2", "tokenizer=scenes"]
STAGE1_SET = ["vit.heads=2", "qformer.num_heads=2", "tokenizer=scenes"]
LLM_SET = [*STAGE1_SET, "llm_model=null", "llm.tokenizer=scenes", "llm.end=null"]
UNTOLD = {
    "blip_caption": [*BLIP_SET, "prompt="],
    "blip_vqa": BLIP_SET,
    "blip_image_text_matching": BLIP_SET,
    "blip2": STAGE1_SET,
    "blip2_opt": [*LLM_SET, f"llm.sizes={LLMS['opt']}"],
    "blip2_vicuna_instruct": [*LLM_SET, f"llm.sizes={LLMS['llama']}", "max_txt_len=20"],
}
"""Model -> what the tensors of LAVIS's file cannot tell of the small one."""
SHORT = {"num_beams": 2, "max_length": 8, "min_length": 2}
SHORT_FLAGS = ["--num-beams", "2", "--max-length", "8", "--min-length", "2"]
QUESTION, TEXT = "what color is it?", "a red circle"
LAYOUTS = ("blip", "lavis", "hf")
NAMES = ["a.png", "b.jpg", "c.PNG"]

Samples = dict[str, Any]
Expected = Callable[[Any, Samples], list[Any]]
Weights = Callable[..., Path]
Ask = Callable[..., list[dict[str, Any]]]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No published weights on this machine, and the package's logger comes back as it was."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    log = logging.getLogger("blip")  # a command sets it up for a process of its own
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures that look different to any model, and something else."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    Image.new("L", (16, 16), 255).save(folder / "b.jpg")
    Image.new("RGB", (40, 16), (0, 0, 160)).save(folder / "c.PNG", format="PNG")
    (folder / "notes.txt").write_text("nothing to see")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Weights of a small model in one of the three layouts, made once."""
    place = tmp_path_factory.mktemp("weights")

    def of(arch: str, layout: str = "blip") -> Path:
        ours = place / arch
        if not ours.exists():
            _model(arch).save_pretrained(ours)
        there = place / f"{arch}-{layout}{'.pth' if layout == 'lavis' else ''}"
        if layout != "blip" and not there.exists():
            convert(ours, there, layout)  # type: ignore[arg-type]
        return ours if layout == "blip" else there

    return of


def _model(arch: str) -> Any:
    if arch != "blip_caption":
        model = small(arch)
        if hasattr(model, "llm_proj"):  # so that a picture makes a difference to what is written
            model.llm_proj.weight.data *= 10
        return model
    med = MedConfig(**{**SIZES["med"], "max_positions": 40})
    model = small_blip("caption", tokenizer="scenes", vocab_size=None, med=med)
    model.config.arch = arch
    return model.float().eval()


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """What the command finds out, a dictionary a line."""

    def run(task: str, *argv: object) -> list[dict[str, Any]]:
        code = predict.main([task, "--json", "--device", "cpu", *map(str, argv)])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return [json.loads(line) for line in shown.out.splitlines()]

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """The paragraph with which the command ends, with exit code 2 and without a result."""

    def run(task: str, *argv: object) -> str:
        assert predict.main([task, "--device", "cpu", *map(str, argv)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "Traceback" not in shown.err
        [line] = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        return line

    return run


def seen(model: Any, *files: Path) -> Samples:
    """Pictures as the model's own processor makes them."""
    images, _ = blip.load_preprocess(model)
    return {"image": torch.stack([images["eval"](Image.open(file).convert("RGB")) for file in files])}


def flags(name: str, values: list[str]) -> list[str]:
    return [part for value in values for part in (name, value)]


def said(model: Any, samples: Samples, text: str) -> Samples:
    """With a text as the model's own processor makes it, for each picture."""
    _, texts = blip.load_preprocess(model)
    return {**samples, "text_input": [texts["eval"](text)] * len(samples["image"])}


# Every task, every layout


def captions(model: Any, samples: Samples) -> list[Any]:
    return model.generate(samples, **SHORT)


def answers(model: Any, samples: Samples) -> list[Any]:
    return model.predict_answers(said(model, samples, QUESTION), num_beams=2, inference_method="generate")


def ranked(model: Any, samples: Samples) -> list[Any]:
    given = {"inference_method": "rank", "answer_list": ["red", "two stars"]}
    return model.predict_answers(said(model, samples, QUESTION), **given)


@torch.no_grad()
def matches(model: Any, samples: Samples) -> list[Any]:
    return model(said(model, samples, TEXT), match_head="itm").softmax(dim=1)[:, 1].tolist()


@torch.no_grad()
def cosines(model: Any, samples: Samples) -> list[Any]:
    images = model.extract_features(samples, mode="image").image_embeds_proj
    text = model.extract_features(said(model, samples, TEXT), mode="text").text_embeds_proj[:, 0]
    if model.config.arch.startswith("blip2"):  # the best of the queries
        return torch.einsum("bqe,be->bq", images, text).amax(dim=1).tolist()
    return (images[:, 0] * text).sum(dim=1).tolist()


GENERATE = ["--question", QUESTION, "--num-beams", "2"]
RANK = ["--question", QUESTION, "--answer", "red", "--answer", "two stars"]
MATCH = ["--text", TEXT]
Case = tuple[str, str, str, list[str], str, Expected]
CASES: list[Case] = [
    ("blip_vqa", "blip", "vqa", RANK, "answer", ranked),
    ("blip2_opt", "blip", "vqa", RANK, "answer", ranked),
    ("blip2_opt", "blip", "vqa", GENERATE, "answer", answers),
    ("blip_image_text_matching", "blip", "match", [*MATCH, "--head", "itc"], "score", cosines),
    ("blip2", "blip", "match", [*MATCH, "--head", "itc"], "score", cosines),
]
for kind in LAYOUTS:
    CASES += [
        ("blip_caption", kind, "caption", SHORT_FLAGS, "caption", captions),
        ("blip2_opt", kind, "caption", SHORT_FLAGS, "caption", captions),
        ("blip_vqa", kind, "vqa", GENERATE, "answer", answers),
        ("blip_image_text_matching", kind, "match", MATCH, "score", matches),
        ("blip2", kind, "match", MATCH, "score", matches),
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[-1].__name__}")
def test_a_task_says_what_the_model_says(case: Case, weights: Weights, pictures: Path, ask: Ask) -> None:
    arch, layout, task, argv, key, expected = case
    place, untold = weights(arch, layout), UNTOLD[arch] if layout == "lavis" else []
    found = ask(task, pictures, "--checkpoint", place, *argv, *flags("--set", untold))
    judge = "blip2_image_text_matching" if arch == "blip2" else None
    model = blip.from_pretrained(place, arch=judge, **model_overrides(untold))
    assert [line["image"] for line in found] == [str(pictures / name) for name in NAMES]
    wanted = expected(model, seen(model, *(pictures / name for name in NAMES)))
    assert [line[key] for line in found] == (wanted if key != "score" else pytest.approx(wanted, abs=1e-6))
    assert len(set(wanted)) > 1 or expected is ranked  # not the same, whatever the picture


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chat_goes_on_from_what_was_said(
    layout: str, weights: Weights, pictures: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = "blip2_vicuna_instruct"
    place, untold = weights(arch, layout), UNTOLD[arch] if layout == "lavis" else []
    said = ["what is this?", "and what else?"]
    argv = [pictures / "a.png", "--checkpoint", place, *SHORT_FLAGS, *flags("--set", untold)]
    found = ask("chat", *argv, *flags("--message", said))
    model = blip.from_pretrained(place, **model_overrides(untold))
    samples, history = seen(model, pictures / "a.png"), []
    for message in said:
        _, history = model.chat(samples, message, history, **SHORT)
    assert [(line["message"], line["reply"]) for line in found] == history
    if layout == "blip":  # the same, read line by line
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([said[0], "", said[1]])))
        assert ask("chat", *argv) == found
        alone = ask("chat", *argv, "--message", said[1])
        assert alone[0]["reply"] != found[1]["reply"]  # so that the history is read


@pytest.mark.parametrize(
    ("arch", "layout", "mode"),
    [
        ("blip_image_text_matching", "blip", "image"),
        ("blip_image_text_matching", "lavis", "multimodal"),
        ("blip_image_text_matching", "hf", "text"),
        ("blip2", "blip", "multimodal"),
        ("blip2", "lavis", "text"),
        ("blip2", "hf", "image"),
    ],
)
def test_features_are_written(
    arch: str, layout: str, mode: str, weights: Weights, pictures: Path, tmp_path: Path, ask: Ask
) -> None:
    place, untold = weights(arch, layout), UNTOLD[arch] if layout == "lavis" else []
    file = tmp_path / "features.safetensors"
    argv = [] if mode == "image" else ["--text", TEXT]
    argv += ["--mode", mode] if mode == "text" else []  # the others are the default
    argv += ["--output", file, "--checkpoint", place, *flags("--set", untold)]
    listed = ask("features", pictures, *argv)
    model = blip.from_pretrained(place, **model_overrides(untold))
    expected: dict[str, Tensor] = {}
    for name in NAMES:
        samples = said(model, seen(model, pictures / name), TEXT)
        for feature, value in model.extract_features(samples, mode=mode).items():
            if value is not None:
                expected[f"{pictures / name}/{feature}"] = value[0]
    written = read_weights(file)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=1e-6)
    shapes = {f"{line['image']}/{line['feature']}": line["shape"] for line in listed}
    assert shapes == {name: list(value.shape) for name, value in expected.items()}
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"mode": mode, "arch": model.config.arch}


# What is particular to a task


def test_captions_by_their_arguments(weights: Weights, pictures: Path, ask: Ask) -> None:
    place = weights("blip_caption")
    model = blip.from_pretrained(place)
    samples = seen(model, *(pictures / name for name in NAMES))
    argv = [pictures, "--checkpoint", place, *SHORT_FLAGS]
    two = ask("caption", *argv, "--num-captions", 2)
    assert [line["image"] for line in two] == [str(pictures / name) for name in NAMES for _ in range(2)]
    assert [line["caption"] for line in two] == model.generate(samples, num_captions=2, **SHORT)
    begun = ask("caption", *argv, "--prompt", "a photo of")
    expected = model.generate({**samples, "prompt": "a photo of"}, **SHORT)
    assert [line["caption"] for line in begun] == expected
    assert expected != model.generate(samples, **SHORT)


@pytest.mark.parametrize("arch", ["blip_caption", "blip2_opt"])
def test_drawn_captions_do_not_depend_on_the_batch(
    arch: str, weights: Weights, pictures: Path, ask: Ask
) -> None:
    argv = [pictures, "--checkpoint", weights(arch), "--max-length", "12", "--top-p", "0.99"]
    first = ask("caption", *argv, "--seed", "1")
    assert ask("caption", *argv, "--seed", "1", "--batch-size", "1") == first
    assert ask("caption", *argv, "--seed", "2") != first
    file = pictures / "a.png"
    twice = ask("caption", file, file, *argv[1:], "--seed", "1", "--batch-size", "1")
    assert twice[0]["caption"] != twice[1]["caption"]  # not the same numbers for each batch


def test_every_question_and_every_text_of_every_picture(weights: Weights, pictures: Path, ask: Ask) -> None:
    files = [str(pictures / name) for name in NAMES]
    asked = flags("--question", [QUESTION, "how many stars are there?"])
    found = ask("vqa", pictures, "--checkpoint", weights("blip_vqa"), *asked)
    pairs = [(line["question"], line["image"]) for line in found]
    assert pairs == [(question, file) for question in asked[1::2] for file in files]
    given = flags("--text", [TEXT, "two stars"])
    place = weights("blip_image_text_matching")
    for head in ("itm", "itc"):
        argv = [pictures, "--checkpoint", place, *given, "--head", head]
        together, apart = ask("match", *argv), ask("match", *argv, "--batch-size", 1)
        pairs = [(line["text"], line["image"]) for line in together]
        assert pairs == [(text, file) for text in given[1::2] for file in files]
        scores = {(line["text"], line["image"]): line["score"] for line in apart}
        assert [line["score"] for line in together] == pytest.approx([scores[p] for p in pairs], abs=1e-6)
        assert len({round(score, 6) for score in scores.values()}) == 6


def test_a_question_may_have_a_prompt(weights: Weights, pictures: Path, ask: Ask) -> None:
    place = weights("blip2_opt")
    model = blip.from_pretrained(place)
    prompt = "Question: {} Answer:"
    argv = [pictures, "--checkpoint", place, "--question", QUESTION]
    found = [line["answer"] for line in ask("vqa", *argv, "--prompt", prompt)]
    samples = said(model, seen(model, *(pictures / name for name in NAMES)), QUESTION)
    assert found == model.predict_answers(samples, prompt=prompt)
    assert found != model.predict_answers(samples)


def test_features_of_a_text_for_each_picture(
    weights: Weights, pictures: Path, tmp_path: Path, ask: Ask
) -> None:
    place, texts = weights("blip2"), ["a star", "two red circles", "a square"]
    argv = ["--checkpoint", place, "--output", tmp_path / "x.safetensors", "--mode", "text"]
    ask("features", pictures, *argv, *flags("--text", texts))
    model = blip.from_pretrained(place)
    written = read_weights(tmp_path / "x.safetensors")
    for name, text in zip(NAMES, texts, strict=True):
        expected = model.extract_features({"text_input": [text]}, mode="text").text_embeds[0]
        torch.testing.assert_close(written[f"{pictures / name}/text_embeds"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("arch", "task"), predict.RELATIVES)
def test_weights_of_a_relative_do_it_with_nothing_left_to_chance(
    arch: str, task: str, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    """From our own folder, whose configuration has keys that the other model has not."""
    model = predict.model_for(task, checkpoint=str(weights(arch)), device="cpu")
    assert (model.config.arch, model.training) == (predict.RELATIVES[arch, task], False)
    assert "keep the values they start with" not in caplog.text
    theirs = blip.from_pretrained(weights(arch))
    assert model.config.image_size == theirs.config.image_size
    assert torch.equal(model.vision.vit.pos_embed, theirs.vision.vit.pos_embed)


# Pictures


def test_lines_without_json(
    weights: Weights, pictures: Path, capsys: pytest.CaptureFixture[str], ask: Ask
) -> None:
    argv = [str(pictures / "a.png"), "--checkpoint", str(weights("blip2")), "--text", TEXT]
    [line] = ask("match", *argv)
    assert predict.main(["match", *argv, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{pictures / 'a.png'}\t{TEXT}\t{line['score']:.4f}\n"


def test_what_cannot_be_read_is_named_counted_and_skipped(
    weights: Weights, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:700])
    (tmp_path / "none.jpg").write_text("no picture")
    (tmp_path / "good.png").write_bytes((pictures / "a.png").read_bytes())
    argv = ["match", "--checkpoint", str(weights("blip2")), "--text", TEXT, "--device", "cpu"]
    assert predict.main([*argv, str(tmp_path), str(pictures / "c.PNG"), "--batch-size", "2"]) == 0
    shown = capsys.readouterr()
    named = [line.partition("\t")[0] for line in shown.out.splitlines()]
    assert named == [str(tmp_path / "good.png"), str(pictures / "c.PNG")]
    for name in ("broken.png", "none.jpg"):
        assert f"'{tmp_path / name}' is skipped: " in shown.err
    assert "2 of 4 pictures could not be read" in shown.err
    (tmp_path / "good.png").unlink()
    assert predict.main([*argv, str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "error: none of the pictures could be read" in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_pictures_are_read_as_training_reads_them(weights: Weights, tmp_path: Path, ask: Ask) -> None:
    """Sixteen bits a pixel: Pillow alone would make all of them white."""
    deep, plain = tmp_path / "deep.png", tmp_path / "plain.png"
    grey = np.random.default_rng(1).integers(0, 256, (16, 16))
    Image.fromarray((grey * 256).astype(np.uint16)).save(deep)
    Image.fromarray(grey.astype(np.uint8)).save(plain)
    assert Image.open(deep).mode.startswith("I")
    found = ask("match", deep, plain, "--checkpoint", weights("blip2"), "--text", TEXT)
    assert found[0]["score"] == pytest.approx(found[1]["score"], abs=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("task", "argv", "told"),
    [
        ("caption", ["PICTURES/x.png"], "'PICTURES/x.png': no such file or folder"),
        ("caption", ["EMPTY"], "'EMPTY': no pictures in this folder"),
        ("caption", ["PICTURES"], "blip_coco_caption_base.pth is not on this machine"),
        ("caption", ["PICTURES", "--checkpoint", "EMPTY/no"], "EMPTY/no"),
        ("caption", ["PICTURES", "--model", "blip_captoin"], "did you mean 'blip_caption'?"),
        ("caption", ["PICTURES", "--model", "blip_caption", "--model-type", "x"], "no model type 'x'"),
        ("caption", ["PICTURES", "--import", "no_such_module_x"], "--import no_such_module_x: it fails"),
        ("caption", ["PICTURES", "--batch-size", "0"], "--batch-size: 0 is below 1"),
        ("caption", ["PICTURES", "--set", "vit.heads"], "'vit.heads' is no override"),
        ("caption", ["PICTURES", "--set", "arch=blip_vqa"], "the command has an argument for it"),
        ("caption", ["PICTURES", "--set", "device=cpu"], "the command has an argument for it"),
        ("chat", ["PICTURES"], "chat: one picture, not 3"),
        (
            "features",
            ["PICTURES", "--output", "o", "--text", "a", "--text", "b"],
            "2 texts; give one, or one for",
        ),
        ("features", ["PICTURES", "--output", "o", "--mode", "text"], "--mode text needs --text"),
        ("features", ["PICTURES/a.png", "PICTURES/a.png", "--output", "o"], "is given twice"),
        ("features", ["PICTURES", "--output", "EMPTY/no/o"], "there is no such folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_weights_are_read(
    task: str, argv: list[str], told: str, pictures: Path, tmp_path: Path, refused: Refused
) -> None:
    places = {"PICTURES": str(pictures), "EMPTY": str(tmp_path)}

    def filled(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    assert filled(told) in refused(task, *map(filled, argv))


@pytest.mark.parametrize(
    ("arch", "task", "argv", "told"),
    [
        ("blip_vqa", "caption", [], "caption: blip_vqa cannot do that; give weights (--checkpoint)"),
        ("blip_caption", "vqa", ["--question", "?"], "one that can: blip2_llm, "),
        ("blip2_opt", "match", ["--text", TEXT], "match: blip2_opt cannot do that"),
        ("blip_vqa", "features", ["--output", "x"], "features: blip_vqa cannot do that"),
        ("blip2", "chat", ["--message", "hello"], "chat: blip2 cannot do that"),
        ("blip_caption", "caption", ["--num-beams", "0"], "num_beams is 0, but must be at least 1"),
        ("blip_caption", "caption", ["--num-captions", "9"], "num_captions is 9, but num_beams 3"),
        ("blip_caption", "caption", ["--num-captions", "0"], "num_captions is 0, but must be at least 1"),
        ("blip_caption", "caption", ["--top-p", "2"], "top_p is 2.0"),
        ("blip_vqa", "vqa", ["--question", "?", "--num-beams", "0"], "num_beams is 0"),
        ("blip_caption", "caption", ["--set", "med.heads=2"], "model.med.heads (argument): no such key"),
        ("blip_caption", "caption", ["--device", "cdua"], "device 'cdua' cannot be used"),
    ],
)
def test_what_a_model_cannot_do_is_one_paragraph(
    arch: str, task: str, argv: list[str], told: str, weights: Weights, pictures: Path, refused: Refused
) -> None:
    assert told in refused(task, pictures / "a.png", *argv, "--checkpoint", weights(arch))


def test_lavis_s_file_asks_for_what_it_does_not_tell(
    weights: Weights, pictures: Path, refused: Refused
) -> None:
    told = refused("caption", pictures, "--checkpoint", weights("blip_caption", "lavis"))
    assert "its tensors do not tell" in told
    assert "med.num_heads" in told


# As a program


def test_by_command(weights: Weights, pictures: Path) -> None:
    place = str(weights("blip_image_text_matching", "lavis"))
    command = [sys.executable, "-m", "blip", "predict", "match", str(pictures), *MATCH, "--device", "cpu"]
    argv = ["--checkpoint", place, *flags("--set", BLIP_SET)]
    done = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fields = [line.split("\t") for line in done.stdout.splitlines()]
    assert [field[:2] for field in fields] == [[str(pictures / name), TEXT] for name in NAMES]
    assert all(0 < float(field[2]) < 1 for field in fields)


def test_the_exit_code_of_the_module(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "blip.predict")  # as in a new process
    monkeypatch.setattr(sys, "argv", ["blip predict", "caption", str(pictures / "x.png")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("blip.predict", run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: '{pictures / 'x.png'}': no such file or folder\n"
