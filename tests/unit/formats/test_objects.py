"""Configurations and tokenizers of transformers as arguments: the same model as by names, also when saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import blip
from blip.convert import convert
from blip.errors import ConfigError, UsageError
from blip.formats.objects import as_values
from blip.models.llm_config import LLMConfig
from blip.weights import GIVEN
from tests.reference.small_stage2 import LLMS
from tests.unit.test_convert import STAGE1_SIZES, small

KINDS = {"blip2_opt": "opt", "blip2_t5_instruct": "t5"}
"""Model -> its language model: a decoder, and an encoder-decoder with a Q-Former that reads."""
UNTOLD: dict[str, Any] = {"vit": {"heads": 2}, "qformer": {"num_heads": 2}, "max_txt_len": 20}
NAMED: dict[str, Any] = {"end": None, "activation": None}
"""What the presets say of the language models that are known by their names."""
TEXTS = ["a red circle ?", "two stars"]


@pytest.fixture(scope="module", params=KINDS)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small model, its weights as LAVIS has them, and its parts as objects and as folders."""
    arch, place = request.param, tmp_path_factory.mktemp("parts")
    model = small(arch)
    convert(model.save_pretrained(place / "ours"), place / "x.pth", "lavis")
    config, words = model.llm.model.config, model.llm.tokenizer.as_theirs()
    config.save_pretrained(place / "config")
    words.save_pretrained(place / "words")
    pieces = model.word_pieces.as_theirs()
    (place / "pieces").mkdir()
    pieces.save(str(place / "pieces" / "tokenizer.json"))
    return {"arch": arch, "place": place, "config": config, "words": words, "pieces": pieces}


def load(parts: dict[str, Any], llm: Any, **given: Any) -> Any:
    given = {"tokenizer": "scenes", **UNTOLD, **given}
    return blip.from_pretrained(parts["place"] / "x.pth", arch=parts["arch"], llm=llm, **given)


def by_names(parts: dict[str, Any]) -> Any:
    sizes = {**LLMS[KINDS[parts["arch"]]]}
    return load(parts, {**NAMED, "sizes": sizes, "tokenizer": "scenes"}, llm_model=None)


def assert_same(model: Any, expected: Any) -> None:
    """Weights, sizes, tokens, and what is written."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.llm.model.config.to_diff_dict() == expected.llm.model.config.to_diff_dict()
    for one, other in zip(
        model.llm.tokenizer.prompt(TEXTS), expected.llm.tokenizer.prompt(TEXTS), strict=True
    ):
        assert torch.equal(one, other)
    assert model.llm.tokenizer.end_id == expected.llm.tokenizer.end_id
    if expected.config.qformer_text_input:
        assert torch.equal(*(m.word_pieces(TEXTS)["text_ids"] for m in (model, expected)))
    samples = {
        "image": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        "prompt": TEXTS,
    }
    assert model.generate(samples, max_length=8) == expected.generate(samples, max_length=8)


@pytest.mark.parametrize("how", ["objects", "folders", "section", "of tokenizers"])
def test_parts_are_what_names_and_sizes_are(parts: dict[str, Any], how: str) -> None:
    place, config, words, pieces = (parts[key] for key in ("place", "config", "words", "pieces"))
    if how == "objects":
        model = load(parts, {**NAMED, "tokenizer": words}, llm_model=config, tokenizer=pieces)
    elif how == "folders":
        llm = {**NAMED, "sizes": place / "config", "tokenizer": str(place / "words")}
        model = load(parts, llm, llm_model=None, tokenizer=place / "pieces")
    elif how == "section":
        llm = LLMConfig(sizes=config, tokenizer=words)
        model = load(parts, llm, llm_model=None, tokenizer=words)
    else:
        llm = {**NAMED, "sizes": config, "tokenizer": words.backend_tokenizer}
        model = load(parts, llm, llm_model=None, tokenizer=words.backend_tokenizer)
    assert_same(model, by_names(parts))


def test_a_configuration_alone_builds_a_model(parts: dict[str, Any]) -> None:
    """`llm_model` in place of a name: its sizes, and random weights."""
    given = {**NAMED, "tokenizer": parts["words"]}
    expected = small(parts["arch"])
    sizes = {"image_size": 16, "vit_precision": "fp32", "num_query_token": 3, "max_txt_len": 20}
    sections = {"vit": expected.config.vit, "qformer": expected.config.qformer, "tokenizer": parts["pieces"]}
    made = blip.load_model(
        parts["arch"], pretrained=False, llm_model=parts["config"], llm=given, **sizes, **sections
    )
    assert made.config.llm_model is None
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in expected.state_dict().items()}


def test_nothing_that_was_given_is_changed(parts: dict[str, Any]) -> None:
    llm: dict[str, Any] = {"tokenizer": parts["words"], "sizes": parts["config"], "lora": {"targets": ["q"]}}
    given = {"llm_model": parts["config"], "llm": llm, "vit": {"heads": 2}}
    found = as_values(given)
    assert given["llm_model"] is parts["config"]
    assert (llm["tokenizer"], llm["sizes"]) == (parts["words"], parts["config"])
    assert found["llm_model"] is None
    assert found["llm"]["sizes"]["model_type"] == parts["config"].model_type
    assert found["llm"]["lora"] == {"targets": ["q"]}
    assert json.loads(json.dumps(found)) == found  # plain values
    assert as_values({"llm_model": parts["config"], "llm": {"sizes": {"a": 1}}})["llm"]["sizes"] == {"a": 1}


def test_keys_that_nothing_reads_are_left_out(tmp_path: Path) -> None:
    """Published configurations have some; as sizes that somebody typed they would be mistakes."""
    published = {**LLMS["t5"], "decoder_start_token_id": 0, "n_positions": 512, "output_past": True}
    published |= {"task_specific_params": {"summarization": {"max_length": 200}}, "id2label": {"0": "one"}}
    (tmp_path / "config.json").write_text(json.dumps({**published, "torch_dtype": "bfloat16"}))
    found = as_values({"llm": {"sizes": tmp_path}})["llm"]["sizes"]
    assert (found["d_model"], found["num_layers"], found["decoder_start_token_id"]) == (16, 2, 0)
    unread = ("n_positions", "output_past", "task_specific_params", "id2label", "dtype", "torch_dtype")
    assert not found.keys() & set(unread)
    model = blip.load_model(
        "blip2_llm", pretrained=False, device="meta", llm={"sizes": tmp_path, "tokenizer": "scenes"}
    )
    assert model.llm.model.config.d_model == 16


# What is saved


SAVES = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer
import blip
place, arch, untold, llm = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
llm["tokenizer"] = AutoTokenizer.from_pretrained(place / "words", local_files_only=True)
pieces = Tokenizer.from_file(str(place / "pieces" / "tokenizer.json"))
config = AutoConfig.from_pretrained(place / "config")
given = {"llm_model": config, "llm": llm, "tokenizer": pieces, **untold}
model = blip.from_pretrained(place / "x.pth", arch=arch, **given)
model.save_pretrained(place / "saved")
print(model.config.tokenizer, model.config.llm.tokenizer, sep="\\n")
"""


@pytest.mark.parametrize("parts", ["blip2_t5_instruct"], indirect=True)
def test_tokenizers_go_along_with_what_is_saved(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved by one process, read by another one from another folder, and saved again by that."""
    place, arch = parts["place"], parts["arch"]
    command = [sys.executable, "-c", SAVES, str(place), arch, str(UNTOLD), str(NAMED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    given = [Path(line) for line in done.stdout.splitlines()]
    assert all(folder.name.startswith(GIVEN) and not folder.exists() for folder in given)
    first = (place / "saved").rename(tmp_path / "first")
    expected = by_names(parts)
    monkeypatch.chdir(tmp_path)
    model = blip.from_pretrained("first")
    assert_same(model, expected)
    monkeypatch.chdir("/")
    model.save_pretrained(tmp_path / "second")
    model.save_pretrained(first)  # onto itself
    for folder in (first, tmp_path / "second"):
        said = json.loads((folder / "config.json").read_text())["config"]
        assert (said["tokenizer"], said["llm"]["tokenizer"]) == ("./tokenizer", "./llm_tokenizer")
    assert_same(blip.from_pretrained(first), expected)
    shutil.rmtree(first)
    assert_same(blip.from_pretrained(tmp_path / "second"), expected)


def test_a_tokenizer_that_has_a_name_stays_where_it_is(tmp_path: Path) -> None:
    model = small("blip2")
    model.save_pretrained(tmp_path / "a")
    pieces = blip.from_pretrained(tmp_path / "a").word_pieces.as_theirs()
    (tmp_path / "mine").mkdir()
    pieces.save(str(tmp_path / "mine" / "tokenizer.json"))
    model = blip.from_pretrained(tmp_path / "a", tokenizer=tmp_path / "mine")
    model.save_pretrained(tmp_path / "b")
    said = json.loads((tmp_path / "b" / "config.json").read_text())["config"]
    assert said["tokenizer"] == str(tmp_path / "mine")
    assert {file.name for file in (tmp_path / "b").iterdir()} == {"config.json", "model.safetensors"}


# What is refused


@pytest.mark.parametrize("parts", ["blip2_opt"], indirect=True)
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda parts: {"llm_model": torch.nn.Linear(1, 1)}, "llm_model: a Linear is no language model here"),
        (
            lambda parts: {"llm_model": parts["words"]},
            "is no language model here; give a name, a folder, or a",
        ),
        (lambda parts: {"llm": {"sizes": 3}}, "llm.sizes: a int says no sizes"),
        (
            lambda parts: {"llm": {"sizes": parts["words"]}},
            "says no sizes; give a dictionary, a folder, or a",
        ),
        (lambda parts: {"llm": {"sizes": parts["place"]}}, "is no folder with a config.json"),
        (lambda parts: {"llm": {"sizes": parts["place"] / "no"}}, "no' is no folder with a config.json"),
        (
            lambda parts: {"llm": {"tokenizer": parts["config"]}},
            "Config is no tokenizer; give a name, a folder",
        ),
        (lambda parts: {"llm": {"tokenizer": 3}}, "llm.tokenizer: a int is no tokenizer"),
        (lambda parts: {"tokenizer": torch.nn.Linear(1, 1)}, "tokenizer: a Linear is no tokenizer"),
    ],
)
def test_objects_of_another_kind_are_refused(
    given: Callable[[dict[str, Any]], dict[str, Any]], told: str, parts: dict[str, Any]
) -> None:
    before = set(Path(tempfile.gettempdir()).glob(f"{GIVEN}*"))
    with pytest.raises(UsageError) as caught:
        blip.load_model(parts["arch"], pretrained=False, **given(parts))
    assert told in str(caught.value)
    assert set(Path(tempfile.gettempdir()).glob(f"{GIVEN}*")) == before  # and nothing is left behind


def test_a_folder_without_a_tokenizer_is_refused(parts: dict[str, Any]) -> None:
    """Of a config.json alone transformers makes a tokenizer that knows no word."""
    folder = parts["place"] / "config"
    with pytest.raises(ConfigError, match=r"model\.llm\.tokenizer: no tokenizer .*there is no vocabulary"):
        load(parts, {**NAMED, "tokenizer": folder}, llm_model=parts["config"])
    with pytest.raises(ConfigError, match=r"model\.tokenizer: .*a BERT-like vocabulary is needed"):
        blip.load_model("blip2", pretrained=False, **{**STAGE1_SIZES, "tokenizer": folder})


def test_a_tokenizer_without_bert_s_tokens_is_refused() -> None:
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match=r"has no \[PAD\] token"):
        blip.load_model("blip2", pretrained=False, **{**STAGE1_SIZES, "tokenizer": words})
