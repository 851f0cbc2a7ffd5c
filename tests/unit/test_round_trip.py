"""What gets lost easily between layouts: temperatures, heads, queues, epsilons, rows of words."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blip
from blip.convert import Conversion, convert, untold
from blip.models.llm_tokenizer import LlmTokenizer
from tests.reference.small_blip import small_blip
from tests.reference.small_stage2 import LLMS, small_stage2
from tests.unit.test_convert import BLIP_KINDS, EVA, STAGE1_SIZES, small
from tests.unit.test_convert import LLMS as KINDS

WORDS = LlmTokenizer.load("scenes", "causal").vocab_size
"""Tokens of the language model's tokenizer."""


def rebuilt(arch: str, **values: Any) -> Any:
    """A small model with some values of its own, which may be of sections."""
    if arch in BLIP_KINDS:
        config = small(arch).config
        given = {
            k: replace(getattr(config, k), **v) if isinstance(v, Mapping) else v for k, v in values.items()
        }
        model = small_blip(BLIP_KINDS[arch], **{"tokenizer": "scenes", "vocab_size": None, **given})
    elif arch in KINDS:
        model = small_stage2(KINDS[arch], arch, **EVA, **values)
    else:
        sizes = {k: {**STAGE1_SIZES[k], **v} if isinstance(v, Mapping) else v for k, v in values.items()}
        model = blip.load_model(arch, pretrained=False, **{**STAGE1_SIZES, **sizes})
    model.config.arch = arch
    return model.float().eval()


def there(model: Any, place: Path, layout: Any) -> tuple[Conversion, Path]:
    """Written in another layout; what was said about it, and where it is."""
    ours = model.save_pretrained(place / "ours")
    target = place / ("there.pth" if layout == "lavis" else "there")
    return convert(ours, target, layout), target


def back(source: Path, model: Any, **overrides: Any) -> Any:
    """Read again, with the sizes that a file of LAVIS does not tell."""
    config = {k: v for k, v in asdict(model.config).items() if k not in ("arch", "model_type")}
    given = {**config, **overrides} if source.suffix == ".pth" else overrides
    convert(source, source.parent / "back", "blip", arch=model.config.arch, **given)
    return blip.from_pretrained(source.parent / "back")


def epsilons(model: nn.Module) -> dict[str, float]:
    """Name of every norm -> its epsilon."""
    found = {}
    for name, part in model.named_modules():
        for key in ("eps", "variance_epsilon"):
            if isinstance(getattr(part, key, None), float):
                found[name] = getattr(part, key)
    return found


def lost(done: Conversion) -> dict[str, str]:
    """Names that the target has no place for -> why."""
    return {key: line.note for line in done.lines if not line.target for key in line.source}


# Epsilons

LLAMA = {"sizes": {**LLMS["llama"], "rms_norm_eps": 0.006}}
ODD: dict[str, dict[str, Any]] = {
    "blip_retrieval": {"vit": {"norm_eps": 0.002}, "med": {"norm_eps": 0.003}},
    "blip_image_text_matching": {"vit": {"norm_eps": 0.002}, "med": {"norm_eps": 0.003}},
    "blip_caption": {"vit": {"norm_eps": 0.002}, "med": {"norm_eps": 0.003}},
    "blip_vqa": {"vit": {"norm_eps": 0.002, "width": 16}, "med": {"norm_eps": 0.003}},
    "blip2_image_text_matching": {
        "vit": {"norm_eps": 0.002},
        "qformer": {"norm_eps": 0.003},
        "ln_vision_eps": 0.004,
    },
    "blip2_opt": {"vit": {"norm_eps": 0.002}, "qformer": {"norm_eps": 0.003}, "ln_vision_eps": 0.004},
    "blip2_t5": {
        "vit": {"norm_eps": 0.002},
        "qformer": {"norm_eps": 0.003},
        "ln_vision_eps": 0.004,
        "llm": {"sizes": {**LLMS["t5"], "layer_norm_epsilon": 0.005}},
    },
    "blip2_vicuna_instruct": {
        "vit": {"norm_eps": 0.002},
        "qformer": {"norm_eps": 0.003},
        "ln_vision_eps": 0.004,
        "llm": LLAMA,
    },
}
"""Epsilons that nobody has."""


@pytest.mark.parametrize("arch", ODD)
def test_epsilons_come_back_from_transformers(arch: str, tmp_path: Path) -> None:
    model = rebuilt(arch, **ODD[arch])
    before = epsilons(model)
    assert {0.002, 0.003} <= set(before.values())
    done, place = there(model, tmp_path, "hf")
    found = back(place, model)
    wanted = {name: eps for name, eps in before.items() if not name.startswith("twin.")}
    assert {name: eps for name, eps in epsilons(found).items() if not name.startswith("twin.")} == wanted
    theirs = blip.to_hf(model)
    own = set(epsilons(theirs).values())
    assert own == set(wanted.values()) - {0.004}
    assert any("0.004, stands in config.json for the way back" in note for note in done.notes) == (
        "ln_vision_eps" in ODD[arch]
    )


@pytest.mark.parametrize("arch", ODD)
def test_a_file_of_lavis_has_no_epsilons_and_that_is_said(arch: str, tmp_path: Path) -> None:
    model = rebuilt(arch, **ODD[arch])
    done, place = there(model, tmp_path, "lavis")
    said = next(note for note in done.notes if "does not say" in note)
    for key in ("vit.norm_eps=0.002", "vit.heads=2"):
        assert key in said
    for section in ("med", "qformer"):
        assert (f"{section}.norm_eps=0.003" in said) == (section in ODD[arch])
    assert ("ln_vision_eps=0.004" in said) == ("ln_vision_eps" in ODD[arch])
    assert ("llm.sizes=" in said) == arch.startswith("blip2_") & (arch != "blip2_image_text_matching")
    assert epsilons(back(place, model)) == epsilons(model)


def test_without_being_told_a_file_of_lavis_has_lavis_s_epsilons(tmp_path: Path) -> None:
    model = rebuilt("blip2_image_text_matching", **ODD["blip2_image_text_matching"])
    _, place = there(model, tmp_path, "lavis")
    heads: dict[str, Any] = {"vit": {"heads": 2}, "qformer": {"num_heads": 2}, "tokenizer": "scenes"}
    found = epsilons(blip.from_pretrained(place, **heads))
    assert found["ln_vision"] == 1e-5
    assert {eps for name, eps in found.items() if name.startswith("vision.")} == {1e-6}
    assert {eps for name, eps in found.items() if name.startswith(("qformer.", "lm_head."))} == {1e-12}


@pytest.mark.parametrize("arch", ["blip_caption", "blip2", "blip2_opt", "blip2_t5_instruct"])
def test_a_file_of_the_published_sizes_needs_no_word(arch: str) -> None:
    assert untold(blip.load_model(arch, pretrained=False, device="meta")) == []


def test_the_norm_behind_the_tower_computes_as_transformers_does(tmp_path: Path) -> None:
    """Also with their epsilon: a folder of theirs has no other."""
    model = rebuilt("blip2_image_text_matching", vit={"norm_eps": 0.5}, ln_vision_eps=0.5)
    theirs = blip.to_hf(model)
    theirs.save_pretrained(tmp_path / "theirs")
    assert "ln_vision_eps" not in (tmp_path / "theirs" / "config.json").read_text()
    ours = blip.from_pretrained(tmp_path / "theirs")
    assert ours.config.ln_vision_eps == 0.5
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.vision_model(image).last_hidden_state
        torch.testing.assert_close(ours.normed(ours.vision(image)), expected, atol=1e-5, rtol=1e-5)


# Temperatures and heads

HEADS = ("temp", "itm_head.", "cls_head.", "logit_scale", "vision_proj.", "text_proj.", "pooler.")


@pytest.mark.parametrize(
    ("arch", "layout", "kept", "gone"),
    [
        ("blip_pretrain", "lavis", {"temp", "itm_head"}, {"queue.ids"}),
        ("blip_retrieval", "lavis", {"temp", "itm_head"}, set()),
        ("blip_feature_extractor", "lavis", {"temp", "vision_proj"}, set()),
        ("blip_image_text_matching", "lavis", {"itm_head"}, set()),
        ("blip_nlvr", "lavis", {"cls_head"}, set()),
        ("blip_classification", "lavis", {"cls_head"}, set()),
        ("blip2", "lavis", {"temp", "itm_head", "text_proj"}, set()),
        ("blip_image_text_matching", "hf", {"itm_head", "text_proj"}, set()),
        ("blip_retrieval", "hf", {"itm_head", "text_proj"}, {"temp", "queue.image", "queue.pointer"}),
        ("blip2", "hf", {"itm_head", "text_proj"}, {"temp", "lm_head.bias"}),
    ],
)
def test_temperatures_and_heads(
    arch: str, layout: str, kept: set[str], gone: set[str], tmp_path: Path
) -> None:
    """They come back to the bit; of what the target has no place for, a line says so and why."""
    model = small(arch)
    with torch.no_grad():
        if hasattr(model, "temp"):
            model.temp.fill_(0.0321)
    done, place = there(model, tmp_path, layout)
    assert gone <= lost(done).keys()
    assert all("no training objective" in why or "keeps no numbers" in why for why in lost(done).values())
    before, after = model.state_dict(), back(place, model).state_dict()
    same = {name for name in before if name.startswith(HEADS) and name not in lost(done)}
    assert kept <= {name.split(".")[0] for name in same}
    for name in same:
        assert torch.equal(after[name], before[name]), name
    if "temp" in gone:
        assert after["temp"] == pytest.approx(0.07)  # as in a new model


def test_a_temperature_that_is_not_in_the_file_is_reported_when_it_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, place = there(small("blip2"), tmp_path, "hf")
    with caplog.at_level(logging.WARNING):
        found = blip.from_pretrained(place, arch="blip2", temp=0.05)
    assert any("has no" in r.getMessage() and "temp" in r.getMessage() for r in caplog.records)
    assert found.temp.item() == pytest.approx(0.05)  # the configuration's stands in for it


# Queues


def filled(arch: str) -> Any:
    """A model whose queue is somewhere in the middle."""
    model = small(arch)
    generator = torch.Generator().manual_seed(3)
    feats = [torch.randn(17, 8, generator=generator) for _ in range(2)]
    model.queue.enqueue(*feats, torch.arange(100, 117))
    assert int(model.queue.pointer) == 7
    return model


def queue(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("queue.")}


@pytest.mark.parametrize("arch", ["blip_retrieval", "blip_pretrain"])
@pytest.mark.parametrize("pointer", ["queue_ptr", "ptr_queue"])
def test_queues_come_back_from_lavis(arch: str, pointer: str, tmp_path: Path) -> None:
    """`ptr_queue` is the original code's word."""
    model = filled(arch)
    done, place = there(model, tmp_path, "lavis")
    content = torch.load(place, weights_only=True)["model"]
    assert content["image_queue"].shape == (8, 10)
    assert content["queue_ptr"].tolist() == [7]
    content[pointer] = content.pop("queue_ptr")
    torch.save({"model": content}, place)
    before, after = queue(model.state_dict()), queue(back(place, model).state_dict())
    if arch == "blip_pretrain":  # whose pictures have no numbers
        assert lost(done).keys() == {"queue.ids"}
        assert "idx_queue" not in content
        assert after.pop("queue.ids").tolist() == [-100] * 10
        del before["queue.ids"]
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].dtype == tensor.dtype


def test_transformers_have_no_queue_and_that_is_said(tmp_path: Path) -> None:
    model = filled("blip_retrieval")
    done, place = there(model, tmp_path, "hf")
    assert queue(model.state_dict()).keys() <= lost(done).keys()
    after = queue(back(place, model).state_dict())
    assert int(after["queue.pointer"]) == 0
    assert not (after["queue.ids"] >= 0).any()


# Rows of words


def with_rows(arch: str, rows: int) -> Any:
    model = rebuilt(arch, llm={"sizes": {**LLMS[KINDS[arch]], "vocab_size": rows}})
    assert model.llm.model.get_input_embeddings().weight.shape[0] == rows
    return model


@pytest.mark.parametrize("layout", ["lavis", "hf"])
@pytest.mark.parametrize("more", [0, 1, 7])
@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5", "blip2_vicuna_instruct"])
def test_rows_of_words_come_back(arch: str, more: int, layout: str, tmp_path: Path) -> None:
    """Vicuna has a word for each of its 32001 rows, OPT 50265 words and 50272 rows; transformers want a row
    without a word, for soft tokens."""
    model = with_rows(arch, WORDS + more)
    _, place = there(model, tmp_path, layout)
    if layout == "hf":
        theirs = blip.to_hf(model)
        assert theirs.config.image_token_index == WORDS
        rows = theirs.get_input_embeddings().weight.shape[0]
        assert rows == (WORDS + more if more else (WORDS // 64 + 1) * 64)
    found = back(place, model)
    assert found.config.llm.sizes["vocab_size"] == WORDS + more
    before, after = model.state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_rows_of_words_are_the_weights_whatever_a_configuration_says(tmp_path: Path) -> None:
    model = with_rows("blip2_vicuna_instruct", WORDS + 1)
    _, place = there(model, tmp_path, "lavis")
    wrong = {**asdict(model.config)["llm"], "sizes": {**model.config.llm.sizes, "vocab_size": WORDS + 3}}
    found = back(place, model, llm=wrong).llm.model.get_input_embeddings().weight
    assert torch.equal(found, model.llm.model.get_input_embeddings().weight)
