"""What `push_to_hub` uploads, and the card beside it, whose code has to work; the hub is a fake."""

from __future__ import annotations

import inspect
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from PIL import Image

import blip
from blip.errors import UsageError
from blip.formats.source import HUB_FILES
from blip.models.blip2_qformer import Blip2Qformer
from blip.models.card import card
from blip.models.med import MedConfig
from blip.registry import MODELS
from blip.weights import read_weights, save_safetensors
from tests.reference.small_blip import SIZES, small_blip
from tests.unit.test_convert import STAGE1_SIZES, small

REPO = "somebody/some-model"
USES = {
    "blip_pretrain": (),
    "blip_retrieval": (),
    "blip_caption": ("model.generate(",),
    "blip_vqa": ("model.predict_answers(",),
    "blip_nlvr": ("model.predict(",),
    "blip_classification": ("model.predict(",),
    "blip_feature_extractor": ("model.extract_features(",),
    "blip_image_text_matching": ("model(", "model.extract_features("),
    "blip2": ("model.generate(", "model.extract_features("),
    "blip2_image_text_matching": ("model(", "model.generate("),
    "blip2_opt": ("model.generate(", "model.predict_answers("),
    "blip2_t5_instruct": ("model.generate(", "model.predict_answers("),
}
"""Model -> what its card shows."""


class Hub:
    """The calls that `push_to_hub` makes, by the signatures of the real client."""

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, bytes]] = {}
        self.calls: dict[str, dict[str, Any]] = {}
        self.fails: str | None = None

    def __call__(self, token: str | None = None) -> Hub:
        self.calls["HfApi"] = {"token": token}
        return self

    def _called(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = inspect.signature(getattr(HfApi, name)).bind(self, *args, **kwargs)
        self.calls[name] = dict(list(given.arguments.items())[1:])
        if name == self.fails:
            raise RuntimeError("401 Client Error:\n  you are nobody")
        return self.calls[name]

    def create_repo(self, *args: Any, **kwargs: Any) -> RepoUrl:
        given = self._called("create_repo", *args, **kwargs)
        name = given["repo_id"] if "/" in given["repo_id"] else f"me/{given['repo_id']}"
        self.folders.setdefault(name, {})
        return RepoUrl(f"https://huggingface.co/{name}")

    def file_exists(self, *args: Any, **kwargs: Any) -> bool:
        given = self._called("file_exists", *args, **kwargs)
        return given["filename"] in self.folders[given["repo_id"]]

    def upload_folder(self, *args: Any, **kwargs: Any) -> CommitInfo:
        given = self._called("upload_folder", *args, **kwargs)
        folder, name = Path(given["folder_path"]), given["repo_id"]
        files = [file for file in folder.rglob("*") if file.is_file()]
        self.folders[name] |= {str(file.relative_to(folder)): file.read_bytes() for file in files}
        url = f"https://huggingface.co/{name}/commit/0123"
        return CommitInfo(url, given["commit_message"], "", "0123")

    def fetch(self, name: str, folder: Path) -> Path:
        """What `from_pretrained` would have of a repository."""
        for file, content in self.folders[name].items():
            if any(fnmatch(file, pattern) for pattern in HUB_FILES):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


@pytest.fixture(scope="module")
def judge() -> Any:
    return small("blip2_image_text_matching")


def model_of(arch: str) -> Any:
    if arch != "blip_caption":
        return small(arch)
    med = MedConfig(**{**SIZES["med"], "max_positions": 40})  # room for a text of the length in the card
    model = small_blip("caption", tokenizer="scenes", vocab_size=None, med=med)
    model.config.arch = arch
    return model.float().eval()


def front_matter(text: str) -> dict[str, Any]:
    empty, matter, _ = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(matter)


def code(text: str) -> str:
    [block] = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return block


# The card


@pytest.mark.parametrize("arch", USES)
def test_what_a_card_says_is_so(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(arch)
    folder = model.save_pretrained(tmp_path / "model")
    text = card(model, arch, REPO, {})
    matter = front_matter(text)
    assert matter.keys() == {"library_name", "pipeline_tag", "tags"}
    assert (matter["library_name"], matter["tags"]) == ("blip", [arch])
    paper = "2305.06500" if "instruct" in arch else "2301.12597" if "blip2" in arch else "2201.12086"
    assert f"\n# some-model\n\n`{arch}` ([" in text
    assert f"](https://arxiv.org/abs/{paper})), " in text
    assert "Frozen parts" not in text
    lines = code(text)
    assert f'from_pretrained("{REPO}")' in lines
    used = [line for line in lines.splitlines() if line.startswith("model")][1:]
    assert tuple(re.match(r"model[.\w]*\(", line)[0] for line in used) == USES[arch]
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    exec(lines.replace(REPO, str(folder)), given)
    assert given["image"].shape == (1, 3, model.config.image_size, model.config.image_size)


def test_a_card_of_a_model_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its name nor its configuration says which paper it is from."""

    class Mine(Blip2Qformer):
        pass

    MODELS.names()
    monkeypatch.setattr(MODELS, "_classes", {**MODELS._classes, "mine": Mine})
    model = blip.load_model("mine", pretrained=False, **STAGE1_SIZES)
    text = card(model, "mine", REPO, {})
    assert (front_matter(text)["tags"], "`mine`, 0.0 M parameters" in text) == (["mine"], True)
    assert "arxiv" not in text
    model.config.arch = ""
    assert front_matter(card(model, "", REPO, {}))["tags"] == ["blip"]


# What is uploaded


def test_weights_configuration_and_card_are_uploaded(judge: Any, hub: Hub, tmp_path: Path) -> None:
    address = judge.push_to_hub(REPO, private=True, token="secret", commit_message="Here it is")
    assert address == f"https://huggingface.co/{REPO}/commit/0123"
    assert type(address) is str
    assert hub.folders.keys() == {REPO}
    assert hub.folders[REPO].keys() == {"model.safetensors", "config.json", "README.md"}
    assert hub.calls["HfApi"] == {"token": "secret"}
    assert hub.calls["create_repo"] == {"repo_id": REPO, "private": True, "exist_ok": True}
    assert hub.calls["upload_folder"]["commit_message"] == "Here it is"
    assert not Path(hub.calls["upload_folder"]["folder_path"]).exists()
    assert hub.folders[REPO]["README.md"].decode() == card(judge, "blip2_image_text_matching", REPO, {})
    back = blip.from_pretrained(hub.fetch(REPO, tmp_path))
    ours, theirs = judge.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_card_has_the_name_that_the_hub_completes(judge: Any, hub: Hub) -> None:
    judge.push_to_hub("some-model")
    assert 'from_pretrained("me/some-model")' in hub.folders["me/some-model"]["README.md"].decode()
    assert hub.calls["HfApi"] == {"token": None}
    assert hub.calls["create_repo"]["private"] is None


def test_a_readme_that_is_there_stays(judge: Any, hub: Hub) -> None:
    hub.folders[REPO] = {"README.md": b"mine", "config.json": b"{}"}
    judge.push_to_hub(REPO)
    assert hub.folders[REPO]["README.md"] == b"mine"
    assert hub.folders[REPO].keys() == {"model.safetensors", "config.json", "README.md"}
    assert json.loads(hub.folders[REPO]["config.json"])["format"] == "blip"


def test_a_tokenizer_that_was_given_goes_along(judge: Any, hub: Hub, tmp_path: Path) -> None:
    ours = judge.save_pretrained(tmp_path / "ours")
    blip.from_pretrained(ours, tokenizer=judge.word_pieces.as_theirs()).push_to_hub(REPO)
    back = blip.from_pretrained(hub.fetch(REPO, tmp_path / "back"))
    assert back.config.tokenizer == str(tmp_path / "back" / "tokenizer")
    texts = ["a red circle", "two stars"]
    assert torch.equal(back.word_pieces(texts)["text_ids"], judge.word_pieces(texts)["text_ids"])


def test_frozen_parts_are_named_and_not_uploaded(hub: Hub, tmp_path: Path) -> None:
    first = small("blip2_llm")
    tower, llm = tmp_path / "tower.safetensors", tmp_path / "llm"
    save_safetensors(first.vision.vit.state_dict(), tower)
    first.llm.model.save_pretrained(llm)
    first.llm.tokenizer.save_pretrained(llm)
    sizes = {key: getattr(first.config, key) for key in ("vit_model", "image_size", "vit", "qformer")}
    more = {"vit_precision": "fp32", "num_query_token": 3, "max_txt_len": 20}
    parts = {"vit_init_from": str(tower), "llm_model": str(llm)}
    model = blip.load_model("blip2_llm", pretrained=False, **sizes, **more, **parts)
    model.push_to_hub(REPO)
    text = hub.folders[REPO]["README.md"].decode()
    places = model.frozen_parts()
    assert places == {"vision.": str(tower), "llm.model.": str(llm)}
    assert f"- `vision`: {tower}\n- `llm.model`: {llm}\n" in text
    back = hub.fetch(REPO, tmp_path / "back")
    stored = read_weights(back)
    assert not [name for name in stored if name.startswith(tuple(places))]
    assert json.loads((back / "config.json").read_text())["frozen_parts"] == places
    again = blip.from_pretrained(back).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_the_card_counts_parameters_and_no_queues() -> None:
    model = small_blip("retrieval", tokenizer="scenes", vocab_size=None, queue_size=100_000)
    given = sum(tensor.numel() for tensor in model.state_to_save().values())
    own = sum(parameter.numel() for parameter in model.parameters())
    assert given > 1e6 > 10 * own
    assert f", {own / 1e6:.1f} M parameters, of which these files have {own / 1e6:.1f} M." in card(
        model, "blip_retrieval", REPO, {}
    )


@pytest.mark.parametrize("call", ["create_repo", "file_exists", "upload_folder"])
def test_a_hub_that_refuses_is_one_paragraph(call: str, judge: Any, hub: Hub) -> None:
    hub.fails = call
    with pytest.raises(UsageError) as caught:
        judge.push_to_hub(REPO)
    told = str(caught.value)
    assert told.startswith(f"push_to_hub: '{REPO}' cannot be written (401 Client Error: you are nobody); ")
    assert "hf auth login" in told
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not hub.folders.get(REPO)
