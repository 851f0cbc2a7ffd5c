"""BLIP against transformers' own classes with the same random weights, and their configurations and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipTextConfig,
    BlipVisionConfig,
)

import blip
from blip.config.typed import typed_section
from blip.errors import CheckpointError, UsageError
from blip.formats import hf
from blip.formats.hf_config import read_folder, to_model
from blip.registry import MODELS
from blip.weights import load_into, read_weights

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
IMAGE, VOCAB, WIDTH, POSITIONS, EMBED = 40, 60, 32, 24, 16
DEC, ENC, SEP, CLS = VOCAB - 2, VOCAB - 1, 3, 2
SMOOTHING = 0.1
RETRIEVAL, CAPTION, VQA = (BlipForImageTextRetrieval, BlipForConditionalGeneration, BlipForQuestionAnswering)


def make(their_class: Any, tower_width: int = 48) -> Any:
    """Their model with weights at which nothing is negligible."""
    vision = BlipVisionConfig(
        hidden_size=tower_width,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=DEC,
        sep_token_id=SEP,
        label_smoothing=SMOOTHING,
    )
    model = their_class(
        BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=EMBED, projection_dim=EMBED)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else noise * (0.2 if parameter.ndim > 1 else 0.1))
    return model


def convert(theirs: Any, folder: Path) -> Any:
    """Our model, by way of the folder that they write; every key is accounted for."""
    theirs.save_pretrained(folder)
    arch, values = read_folder(folder, [type(theirs).__name__])
    cls = MODELS.get(arch)
    model = cls(typed_section(cls.config_class, {"config.json": values | {"arch": arch}}))
    weights = hf.table(arch).to_ours(read_weights(folder)).state
    report = load_into(model, weights, source="transformers")
    assert (report.missing, report.unexpected, report.reshaped) == ([], [], [])
    return model.eval()


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    theirs = make(RETRIEVAL)
    return theirs, convert(theirs, tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="module")
def caption(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    theirs = make(CAPTION)
    return theirs, convert(theirs, tmp_path_factory.mktemp("caption"))


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    theirs = make(VQA, tower_width=WIDTH)  # transformers knows one width of what is looked at
    return theirs, convert(theirs, tmp_path_factory.mktemp("vqa"))


def texts(first: int, lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random texts that begin with `first` and end with [SEP], padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, VOCAB - 2, mask.shape, generator=generator)
    ids[:, 0] = first
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = SEP
    return ids.masked_fill(~mask, 0), mask


def images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))


# Retrieval


@torch.no_grad()
def test_matching_logits_are_those_of_transformers(retrieval: tuple[Any, Any]) -> None:
    theirs, ours = retrieval
    ids, mask = texts(ENC, [7, 3, 5])
    inputs = {"pixel_values": images(), "input_ids": ids, "attention_mask": mask.long()}
    expected = theirs(**inputs, use_itm_head=True)
    batch = {"image": images(), "text_ids": ids, "text_mask": mask}
    torch.testing.assert_close(ours.image_states(batch), expected.last_hidden_state, **CLOSE)
    grounded = ours.text.grounded(ids, mask, [(ours.text.image_keys(expected.last_hidden_state), 1)])
    torch.testing.assert_close(grounded[mask], expected.question_embeds[mask], **CLOSE)
    assert ours.config.itm_token == "cls"  # as transformers' processor leaves it
    ours.config.itm_token = "enc"
    torch.testing.assert_close(ours(batch, match_head="itm"), expected.itm_score, **CLOSE)
    scores = ours.compute_itm(expected.last_hidden_state, ids, mask)
    torch.testing.assert_close(scores, expected.itm_score[:, 1], **CLOSE)
    ours.config.itm_token = "cls"


@torch.no_grad()
def test_cosines_are_those_of_transformers(retrieval: tuple[Any, Any]) -> None:
    theirs, ours = retrieval
    ids, mask = texts(2, [4, 7])
    expected = theirs(
        pixel_values=images(), input_ids=ids, attention_mask=mask.long(), use_itm_head=False
    ).itm_score
    found = ours({"image": images(), "text_ids": ids, "text_mask": mask}, match_head="itc")
    torch.testing.assert_close(found, expected, **CLOSE)


# The dual encoder


def test_the_contrast_of_a_dual_encoder_is_that_of_transformers(tmp_path: Path) -> None:
    theirs = make(BlipModel)
    ours = convert(theirs, tmp_path)
    assert ours.config.arch == "blip_dual_encoder"
    ids, mask = texts(2, [7, 3, 5])
    inputs = {"pixel_values": images(), "input_ids": ids, "attention_mask": mask.long()}
    expected = theirs(**inputs, return_loss=True)
    batch = {"image": images(), "text_ids": ids, "text_mask": mask}
    found = ours(batch)
    for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    expected.loss.backward()
    found.loss.backward()
    given = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    rows = hf.table("blip_dual_encoder").to_theirs(
        {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    )
    assert rows.state.keys() == given.keys()
    for name, grad in given.items():
        torch.testing.assert_close(rows.state[name], grad, atol=1e-5, rtol=1e-4, msg=name)
    with torch.no_grad():
        image = theirs.get_image_features(images()).pooler_output
        text = theirs.get_text_features(ids, mask.long()).pooler_output
        both = theirs.get_multimodal_features(ids, images(), mask.long())
    torch.testing.assert_close(ours.image_feats(batch), image, **CLOSE)
    torch.testing.assert_close(ours.text_feats(batch), text, **CLOSE)
    found = ours.extract_features(batch, mode="multimodal")
    torch.testing.assert_close(found.multimodal_embeds[:, 0], both, **CLOSE)
    back = to_model("blip_dual_encoder", ours).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())


# Captioning


def test_the_caption_loss_and_its_gradients_are_those_of_transformers(caption: tuple[Any, Any]) -> None:
    theirs, ours = caption
    ids, mask = texts(DEC, [6, 9, 4])
    labels = ids.masked_fill(~mask, -100)
    expected = theirs(pixel_values=images(), input_ids=ids, attention_mask=mask.long(), labels=labels)
    found = ours({"image": images(), "text_ids": ids, "text_mask": mask})
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    keys = ours.text.image_keys(expected.image_embeds)
    logits = ours.lm_head(ours.text.decode(ids, mask, [(keys, 1)]), ours.text.embedding.word.weight)
    asked = mask[:, 1:]
    torch.testing.assert_close(logits[asked], expected.logits[:, :-1][asked], **CLOSE)
    assert_same_gradients(theirs, expected.loss, ours, found.loss)


def assert_same_gradients(theirs: Any, their_loss: Tensor, ours: Any, our_loss: Tensor) -> None:
    for model, loss in ((theirs, their_loss), (ours, our_loss)):
        model.zero_grad()
        loss.backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    # The second names of tied tensors have no gradient of their own.
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    renamed = hf.table(ours.config.arch).to_ours(wanted).state
    assert renamed.keys() == gradients.keys()
    for name, value in renamed.items():
        torch.testing.assert_close(gradients[name], value, **CLOSE, msg=name)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_captions_are_those_of_transformers(caption: tuple[Any, Any], num_beams: int) -> None:
    theirs, ours = caption
    prompt = torch.tensor([[2, 7, 9]]).repeat(3, 1)  # [CLS] becomes [DEC]
    rules = {"num_beams": num_beams, "max_length": 12, "min_length": 5}
    wanted = theirs.generate(
        pixel_values=images(), input_ids=torch.cat([prompt, prompt[:, :1]], dim=1), do_sample=False, **rules
    )
    found = ours.generate({"image": images(), "prompt_ids": prompt}, return_ids=True, **rules)
    assert _cut(found) == _cut(wanted[:, 3:])


def test_their_special_ids_may_be_any(tmp_path: Path) -> None:
    theirs = make(CAPTION)
    theirs.config.text_config.bos_token_id = theirs.text_decoder.config.bos_token_id = 11
    theirs.config.text_config.sep_token_id = theirs.text_decoder.config.sep_token_id = 4
    theirs.save_pretrained(tmp_path)
    ours = blip.from_pretrained(tmp_path)
    assert ours.config.special_ids == {"dec": 11, "sep": 4}
    prompt, rules = torch.tensor([[2, 7]]).repeat(3, 1), {"num_beams": 1, "max_length": 20}
    wanted = theirs.generate(
        pixel_values=images(), input_ids=torch.cat([prompt, prompt[:, :1]], dim=1), do_sample=False, **rules
    )
    found = ours.generate({"image": images(), "prompt_ids": prompt}, min_length=1, return_ids=True, **rules)
    assert _cut(found, 4) == _cut(wanted[:, 2:], 4)
    text = blip.to_hf(ours).config.text_config
    assert (text.bos_token_id, text.sep_token_id) == (11, 4)


def _cut(ids: Tensor, end: int = SEP) -> list[list[int]]:
    """New tokens of each row up to its end."""
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


# Question answering


def answers() -> tuple[Tensor, Tensor]:
    return texts(DEC, [3, 5, 4], seed=3)


QUESTIONS = [7, 3, 5]
"""Lengths: two of the three are padded."""


def their_answers(theirs: Any, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Loss of some rows' answers, and the decoder's logits, which the model keeps to itself.

    A row by itself has no padding.
    """
    kept: list[Tensor] = []
    head = theirs.text_decoder.cls.register_forward_hook(lambda *call: kept.append(call[2]))
    try:
        (ids, mask), (answer_ids, answer_mask) = (
            _real(*(part[rows] for part in both)) for both in (texts(CLS, QUESTIONS), answers())
        )
        found = theirs(
            pixel_values=images()[rows],
            input_ids=ids,
            attention_mask=mask.long(),
            decoder_input_ids=answer_ids,
            decoder_attention_mask=answer_mask.long(),
            labels=answer_ids.masked_fill(~answer_mask, -100),
        )
    finally:
        head.remove()
    return found.loss, kept[0][:, :-1]


def _real(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Without columns that are padding in all rows."""
    longest = int(mask.sum(dim=1).max())
    return ids[:, :longest], mask[:, :longest]


def our_logits(ours: Any, attend_padding: bool = False) -> Tensor:
    """Of the three padded questions' padded answers, (3, T - 1, V)."""
    (ids, mask), (answer_ids, answer_mask) = texts(CLS, QUESTIONS), answers()
    keys = ours.question_keys({"image": images(), "text_ids": ids, "text_mask": mask})
    if attend_padding:
        keys = keys._replace(mask=None)
    hidden = ours.answer_decoder.decode(answer_ids, answer_mask, [(keys, 1)])
    return ours.lm_head(hidden, ours.answer_decoder.embedding.word.weight)


def test_loss_gradients_and_logits_of_answers_are_those_of_transformers(vqa: tuple[Any, Any]) -> None:
    """Ours of a padded batch are theirs of each question by itself.

    Padded, theirs are not what training means: in transformers 5 cross-attention drops the mask that it is
    given, so answers look at the padding of questions.
    """
    theirs, ours = vqa
    (ids, mask), (answer_ids, answer_mask) = texts(CLS, QUESTIONS), answers()
    tokens, logits = answer_mask[:, 1:].sum(dim=1), our_logits(ours)
    total = torch.zeros(())
    for row, count in enumerate(tokens.tolist()):
        loss, expected = their_answers(theirs, slice(row, row + 1))
        assert expected.shape[1] == count
        torch.testing.assert_close(logits[row, :count], expected[0], **CLOSE)
        total = total + loss * count
    batch = {
        "image": images(),
        "text_ids": ids,
        "text_mask": mask,
        "answer_ids": answer_ids,
        "answer_mask": answer_mask,
        "n_answers": torch.ones(3, dtype=torch.int64),
        "weight": torch.ones(3),
    }
    # Theirs is a mean over tokens, ours BLIP's: a sum over tokens, a mean over questions.
    found = ours(batch).loss
    torch.testing.assert_close(found, total / 3, **CLOSE)
    assert_same_gradients(theirs, total / 3, ours, found)


@torch.no_grad()
def test_logits_of_a_padded_batch_are_those_of_transformers_where_padding_is_seen(
    vqa: tuple[Any, Any],
) -> None:
    theirs, ours = vqa
    real = answers()[1][:, 1:]
    _, expected = their_answers(theirs)
    torch.testing.assert_close(our_logits(ours, attend_padding=True)[real], expected[real], **CLOSE)
    assert not torch.allclose(our_logits(ours)[real], expected[real], atol=1e-2)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_answers_are_those_of_transformers(vqa: tuple[Any, Any], num_beams: int) -> None:
    theirs, ours = vqa
    ids, mask = texts(CLS, QUESTIONS)
    rules = {"num_beams": num_beams, "max_length": 8, "min_length": 1}
    wanted = theirs.generate(
        pixel_values=images(), input_ids=ids, attention_mask=mask.long(), do_sample=False, **rules
    )
    lengths = {"max_len": rules["max_length"], "min_len": rules["min_length"], "num_beams": num_beams}
    samples = {"image": images(), "text_ids": ids, "text_mask": mask}
    found = ours.predict_answers(samples, inference_method="generate", return_ids=True, **lengths)
    assert ours.config.generate_attends_padding
    assert _cut(found) == _cut(wanted[:, 1:])


# Configurations and back


@pytest.mark.parametrize("kind", ["retrieval", "caption", "vqa"])
def test_what_transformers_gets_of_a_model_is_that_model(kind: str, request: pytest.FixtureRequest) -> None:
    theirs, ours = request.getfixturevalue(kind)
    exported = to_model(ours.config.arch, ours)
    assert type(exported) is type(theirs)
    expected = theirs.state_dict()
    assert exported.state_dict().keys() == expected.keys()
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    for section in ("vision_config", "text_config"):
        given, back = (getattr(m.config, section).to_dict() for m in (theirs, exported))
        free = {"initializer_range", "projection_dim"}
        differing = {k for k in given if given[k] != back.get(k)} - free
        # Of no meaning where there is no decoder.
        assert differing <= ({"label_smoothing"} if kind == "retrieval" else set())
    assert exported.config.image_text_hidden_size == (EMBED if kind == "retrieval" else 256)


def test_values_read_from_a_folder_are_explicit(retrieval: tuple[Any, Any]) -> None:
    config = retrieval[1].config
    assert (config.image_size, config.vocab_size, config.embed_dim, config.dropout) == (
        IMAGE,
        VOCAB,
        EMBED,
        0,
    )
    assert (config.vit.heads, config.vit.norm_eps, config.vit.mlp_dim) == (4, 1e-6, 100)
    assert asdict(config.med) | {"init_std": 0, "init_from": None} == {
        "width": WIDTH,
        "depth": 3,
        "num_heads": 4,
        "mlp_dim": 72,
        "max_positions": POSITIONS,
        "norm_eps": 1e-12,
        "init_std": 0,
        "init_from": None,
    }


@pytest.mark.parametrize("key", ["text_config.num_attention_heads", "vision_config.layer_norm_eps"])
def test_a_configuration_that_leaves_a_wrong_default_in_force_is_refused(tmp_path: Path, key: str) -> None:
    theirs = make(CAPTION)
    theirs.config.save_pretrained(tmp_path)
    section, _, field = key.partition(".")
    config = json.loads((tmp_path / "config.json").read_text())
    del config[section][field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"does not say {key}"):
        read_folder(tmp_path, ["BlipForConditionalGeneration"])


def test_eight_heads_of_base_width_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BlipConfig(text_config=BlipTextConfig(), vision_config=BlipVisionConfig()).save_pretrained(tmp_path)
    _, values = read_folder(tmp_path, ["BlipForQuestionAnswering"])
    assert values["med"]["num_heads"] == 8
    assert "give med={'num_heads': 12}" in caplog.text


def test_an_activation_that_blip_has_not_is_refused(tmp_path: Path) -> None:
    config = BlipConfig(text_config=BlipTextConfig(hidden_act="relu"), vision_config=BlipVisionConfig())
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"text_config\.hidden_act is 'relu'; BLIP has 'gelu'"):
        read_folder(tmp_path, ["BlipForQuestionAnswering"])


@pytest.mark.parametrize(
    ("vit", "reason"),
    [
        ({"width": 48}, "as wide as its text transformer; here they are 48 and 32"),
        ({"stem_width": 4}, r"model\.vit\.stem_width: transformers' towers have no convolution"),
    ],
)
def test_what_question_answering_has_not_in_transformers_is_refused(
    vqa: tuple[Any, Any], vit: dict[str, int], reason: str
) -> None:
    config = vqa[1].config
    cls = MODELS.get("blip_vqa")
    values = asdict(config) | {"vit": asdict(config.vit) | vit}
    with pytest.raises(UsageError, match=reason):
        to_model("blip_vqa", cls(typed_section(cls.config_class, {"test": values})))
