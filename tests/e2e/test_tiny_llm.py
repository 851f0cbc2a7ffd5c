"""The script that pre-trains the small language models: what they read, and what it writes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from blip.models.llm import build_llm
from blip.models.llm_config import LLMConfig
from blip.models.llm_tokenizer import LlmTokenizer
from run_scripts import tiny_llm

TOLD = ["a red star", "a big red star on a gray background"]
ASKED = [
    (f"question: {q} short answer:", a) for q, a in (("what color is the star?", "red"), ("how many?", "1"))
]


def test_a_decoder_reads_documents_about_one_picture_whose_texts_all_end() -> None:
    tokenizer = LlmTokenizer.load("scenes", "causal")
    rng = random.Random(0)
    documents = [tiny_llm.document(TOLD, ASKED, rng) for _ in range(50)]
    answers = {f"{prompt} {answer}" for prompt, answer in ASKED}
    assert {len(each) for each in documents} == {3, 4}  # one description or both
    assert all(set(each) <= set(TOLD) | answers for each in documents)
    ids = tiny_llm.read(tokenizer, documents[0])
    assert ids[: len(tokenizer.lead)] == tokenizer.lead
    assert ids.count(tokenizer.end_id) == len(documents[0])
    assert ids[-1] == tokenizer.end_id


def test_an_encoder_decoder_goes_on_behind_a_description_and_answers() -> None:
    rng = random.Random(0)
    kinds = {"behind another": 0, "alone": 0, "answer": 0}
    for _ in range(200):
        given, wanted = tiny_llm.pair(TOLD, ASKED, rng)
        if "question:" in given:
            assert ("question:" + given.split("question:")[1], wanted) in ASKED
            kinds["answer"] += 1
            continue
        whole = f"{given} {wanted}".strip()
        other = {f"{TOLD[0]} {TOLD[1]}", f"{TOLD[1]} {TOLD[0]}"}
        assert whole in TOLD or whole in other
        kinds["alone" if whole in TOLD else "behind another"] += 1
    assert min(kinds["behind another"], kinds["answer"]) > kinds["alone"] > 5


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_model_is_written_once(
    kind: str, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "scenes").symlink_to(data_root / "scenes")
    monkeypatch.setattr(sys, "argv", ["tiny_llm.py", "--data", str(tmp_path), "--steps", "2", "--kind", kind])
    assert tiny_llm.main() == 0
    assert "% of answers about descriptions" in capsys.readouterr().out
    assert [folder.name for folder in (tmp_path / "llm").iterdir()] == [f"scenes-{kind}"]
    llm = build_llm(f"llm/scenes-{kind}", LLMConfig(), tmp_path)
    llm.load_initial(tmp_path)
    assert llm.is_encoder_decoder == (kind == "encoder-decoder")
    written = tmp_path / "llm" / f"scenes-{kind}" / "model.safetensors"
    when = written.stat().st_mtime_ns

    assert tiny_llm.main() == 0
    assert "there already" in capsys.readouterr().out
    # Not its values, which a second training would give again.
    assert written.stat().st_mtime_ns == when


def test_one_that_follows_instructions_begins_as_the_other(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "scenes").symlink_to(data_root / "scenes")
    command = ["tiny_llm.py", "--data", str(tmp_path), "--steps", "1", "--kind", "decoder"]
    for more in ([], ["--instruct"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        assert tiny_llm.main() == 0
    assert "scenes-decoder: there already" in capsys.readouterr().out
    plain, other = (
        load_file(tmp_path / "llm" / name / "model.safetensors")
        for name in ("scenes-decoder", "scenes-decoder-instruct")
    )
    assert plain.keys() == other.keys()
    rate = tiny_llm.RATES["causal"] / tiny_llm.WARMUP
    moved = {name: (other[name] - value).abs().max().item() for name, value in plain.items()}
    assert 0 < max(moved.values()) < rate  # one step away
    prompts = [prompt for _, asked in tiny_llm.scenes(data_root, "val", instruct=True) for prompt, _ in asked]
    questions = [prompt for _, asked in tiny_llm.scenes(data_root, "val") for prompt, _ in asked]
    assert set(questions) < set(prompts)
    assert any(prompt.startswith("pick the right answer.") for prompt in set(prompts) - set(questions))


def test_without_pictures_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["tiny_llm.py", "--data", str(tmp_path)])
    assert tiny_llm.main() == 2
    assert "run python -m blip.data make scenes" in capsys.readouterr().err
