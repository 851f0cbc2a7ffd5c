"""Facts about BLIP-2 with a language model: what is learned, what stays as it is, what it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip
from blip.config.lavis import translate
from blip.config.schema import SectionError
from blip.errors import CheckpointError, ConfigError, DataError, UsageError
from blip.formats.load import load_any
from blip.models.blip2_llm import Blip2LlmConfig
from blip.models.blip2_opt import Blip2Opt, Blip2T5
from blip.models.prompts import split_text
from blip.weights import save_safetensors
from tests.reference.small_stage1 import small_model
from tests.reference.small_stage2 import (
    ANSWERS,
    CAPTIONS,
    LLMS,
    QUESTIONS,
    SIZES,
    captions,
    instructions,
    pictures,
    small_stage2,
)

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"


def spoken(model: Any, ids: Tensor) -> list[str]:
    return model.llm.tokenizer.decode(ids)


def targets(model: Any, labels: Tensor) -> list[str]:
    """What the labels say."""
    return spoken(model, labels.masked_fill(labels == -100, model.llm.tokenizer.pad_id))


def values(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# What is asked for


def test_a_decoder_learns_the_whole_caption_and_its_first_token() -> None:
    model = small_stage2("opt")
    batch = model.prepare(captions())
    assert torch.equal(batch["llm_labels"][batch["llm_mask"]], batch["llm_ids"][batch["llm_mask"]])
    assert targets(model, batch["llm_labels"]) == CAPTIONS
    assert model.count_targets(batch) == int(batch["llm_mask"].sum())
    assert not {"text_ids", "text_mask"} & batch.keys()


def test_a_prompt_is_no_target_of_a_decoder() -> None:
    model = small_stage2("opt", prompt="a ")
    batch = model.prepare(captions(text_input=["a red circle", "a star"]))
    assert targets(model, batch["llm_labels"]) == ["red circle", "star"]
    with pytest.raises(
        DataError, match=r"'two stars' does not begin with 'a '.*text_processor\.train\.prompt"
    ):
        model.prepare(captions(text_input=["a star", "two stars"]))


def test_an_encoder_decoder_gets_a_random_part_and_learns_the_rest() -> None:
    model = small_stage2("t5")
    parts = set()
    for step in range(20):
        batch = model.prepare(captions(step=step))
        given, wanted = spoken(model, batch["llm_ids"]), targets(model, batch["llm_labels"])
        assert [f"{a} {b}".strip() for a, b in zip(given, wanted, strict=True)] == CAPTIONS
        assert all(wanted)
        parts |= {
            len(text.split()) for text, whole in zip(given, CAPTIONS, strict=True) if whole == CAPTIONS[0]
        }
    assert parts == set(range(len(CAPTIONS[0].split())))


def test_the_random_part_belongs_to_seed_step_and_row_of_the_global_batch() -> None:
    model = small_stage2("t5")
    whole = model.texts(captions())
    rows = torch.arange(4)
    half = model.texts(captions(text_input=CAPTIONS[2:], rows=rows[2:]))
    assert half.given == whole.given[2:]
    assert model.texts(captions(rows=rows)) == whole
    assert any(model.texts(captions(seed=seed)) != whole for seed in range(3))
    assert any(model.texts(captions(step=step)) != whole for step in range(3))


def test_an_encoder_decoder_with_a_prompt_gets_that_and_learns_the_caption() -> None:
    model = small_stage2("t5", prompt="a photo of")
    texts = model.texts(captions(text_input=["a photo of a star", "two stars"]))
    assert texts.given == ["a photo of"] * 2
    assert texts.wanted == ["a star", "two stars"]


@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_an_instruction_is_read_and_its_output_learned(llm: str) -> None:
    model = small_stage2(llm)
    batch = model.prepare(instructions())
    assert targets(model, batch["llm_labels"]) == ANSWERS
    read = spoken(model, batch["llm_ids"])
    expected = QUESTIONS if llm == "t5" else [f"{q} {a}" for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    assert read == [text.replace(" ?", "?") for text in expected]


@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_long_outputs_are_cut_at_their_own_length(llm: str) -> None:
    longer = small_stage2(llm, max_output_txt_len=40).prepare(instructions(1, text_output=["star " * 50]))
    same = small_stage2(llm).prepare(instructions(1, text_output=["star " * 50]))
    assert int((longer["llm_labels"] != -100).sum()) == 40
    assert int((same["llm_labels"] != -100).sum()) == SIZES["max_txt_len"]


def test_a_question_is_put_into_the_prompt_and_one_answer_is_drawn_by_weight() -> None:
    model = small_stage2("t5", prompt="question: {} answer:", qformer_text_input=True)
    batch = captions(
        text_input=["what ?", "how many ?"],
        answer=["red", "blue", "green", "two", "one"],
        n_answers=torch.tensor([3, 2]),
        weight=torch.tensor([0.5, 0.0, 0.5, 0.9, 0.1]),
    )
    found: dict[str, int] = {}
    for step in range(400):
        texts = model.texts(batch | {"step": step})
        assert texts.given == ["question: what ? answer:", "question: how many ? answer:"]
        assert texts.read == ["what ?", "how many ?"]  # the paper gives the Q-Former the question alone
        for answer in texts.wanted:
            found[answer] = found.get(answer, 0) + 1
    assert found["red"] + found["green"] == found["two"] + found["one"] == 400
    assert abs(found["red"] - 200) < 50
    assert abs(found["one"] - 40) < 25


@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_the_qformer_never_reads_what_is_to_be_learned(llm: str) -> None:
    model = small_stage2(llm, qformer_text_input=True, prompt="a" if llm == "opt" else "")
    for batch in (captions(text_input=["a star", "a circle"]), instructions(2)):
        texts = model.texts(batch)
        if texts.wanted is None:
            assert texts.read == ["a", "a"]
        else:
            assert texts.read == texts.given


def test_texts_are_split_between_words_and_something_is_left() -> None:
    assert split_text("one two three", 0.0) == ("", "one two three")
    assert split_text("one two three", 0.999) == ("one two", "three")
    assert split_text("one", 0.999) == ("", "one")


# Loss and gradients


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("llm", LLMS)
def test_a_step_trains_all_but_tower_and_language_model(llm: str, reads: bool) -> None:
    model = small_stage2(llm, qformer_text_input=reads)
    before = values(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for batch in (captions(), instructions()):
        optimizer.zero_grad()
        model(batch).loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {name for name in before if name.startswith(("vision.", "llm."))}
    frozen |= {n for n in before if n.startswith("qformer.layers.2.text_ffn.")}  # nobody reads it
    assert changed == before.keys() - frozen
    assert not any(part.training for part in (*model.llm.modules(), *model.vision.modules()))


@pytest.mark.parametrize("llm", LLMS)
def test_counts_that_the_host_knows_change_no_loss(llm: str) -> None:
    model = small_stage2(llm)
    batch = model.prepare(captions())
    count = model.count_targets(batch)
    loss = model(batch).loss
    torch.testing.assert_close(model(batch | {"num_targets": count}).loss, loss)
    torch.testing.assert_close(model(batch | {"loss_tokens": torch.tensor(2.0 * count)}).loss, loss / 2)
    assert model(batch).loss_lm == loss


def test_the_loss_depends_on_the_picture_and_on_what_the_qformer_reads() -> None:
    model = small_stage2("opt", qformer_text_input=True)
    loss = model(instructions()).loss
    assert loss != model(instructions(image=pictures().flip(0))).loss
    batch = model.prepare(instructions())
    assert loss == model(batch).loss
    assert loss != model(batch | {"text_ids": batch["text_ids"].flip(0)}).loss


def test_frames_of_a_video_give_their_soft_tokens_one_after_the_other() -> None:
    model = small_stage2("opt", qformer_text_input=True).eval()
    video = pictures(4).unflatten(0, (2, 2))
    text = model.word_pieces(["what ?", "how many stars ?"])
    found = model.soft_tokens({"image": video, **text})
    assert found.shape == (2, 2 * SIZES["num_query_token"], 16)
    frames = [model.soft_tokens({"image": video[:, i], **text}) for i in range(2)]
    torch.testing.assert_close(found, torch.cat(frames, dim=1))
    states = torch.stack([model.vision(video[:, i]) for i in range(2)], dim=1)
    torch.testing.assert_close(model.soft_tokens({"image_embeds": states, **text}), found)


# Inference


def asked(rows: int = 16) -> tuple[dict[str, Any], list[str]]:
    """Pictures, and questions of different length."""
    return {"image": pictures(rows)}, [QUESTIONS[i % 4] for i in range(rows)]


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("llm", LLMS)
def test_what_is_written_does_not_depend_on_the_batch(llm: str, reads: bool) -> None:
    model = small_stage2(llm, qformer_text_input=reads).eval()
    samples, prompts = asked()
    whole = model.generate(samples, prompt=prompts, num_beams=3, max_length=8)
    single = [
        model.generate({"image": samples["image"][i : i + 1]}, prompt=prompts[i], num_beams=3, max_length=8)[
            0
        ]
        for i in range(16)
    ]
    assert whole == single
    assert len(set(whole)) > 2
    answers = model.predict_answers({**samples, "text_input": prompts}, max_len=5)
    ranked = model.predict_answers(
        {**samples, "text_input": prompts}, inference_method="rank", answer_list=ANSWERS, num_ans_candidates=3
    )
    for i in range(0, 16, 5):
        one = {"image": samples["image"][i : i + 1], "text_input": prompts[i : i + 1]}
        assert model.predict_answers(one, max_len=5) == answers[i : i + 1]
        how: dict[str, Any] = {"inference_method": "rank", "answer_list": ANSWERS}
        assert model.predict_answers(one, **how) == ranked[i : i + 1]


@pytest.mark.parametrize("llm", LLMS)
def test_sampled_texts_belong_to_seed_and_sample(llm: str) -> None:
    model = small_stage2(llm).eval()
    samples, prompts = asked(4)
    how: dict[str, Any] = {"use_nucleus_sampling": True, "top_p": 0.95, "max_length": 6, "seed": 3}
    whole = model.generate(samples, prompt=prompts, num_captions=2, **how)
    index = torch.tensor([2])
    one = model.generate(
        {"image": samples["image"][2:3], "index": index}, prompt=prompts[2], num_captions=2, **how
    )
    assert one == whole[4:6]
    assert model.generate(samples, prompt=prompts, num_captions=2, **how) == whole
    assert model.generate(samples, prompt=prompts, num_captions=2, **how | {"seed": 4}) != whole


def test_prompts_come_from_the_argument_the_samples_or_the_model() -> None:
    model = small_stage2("opt", prompt="a photo of")
    image = {"image": pictures(2)}
    assert model.prompts(image) == ["a photo of"] * 2
    assert model.prompts({**image, "prompt": "what ?"}) == ["what ?"] * 2
    assert model.prompts({**image, "prompt": "what ?"}, ["a", "b"]) == ["a", "b"]
    words = {**image, "ocr_tokens": [["stop"], ["{}"] * 40]}
    expected = ["words: stop . what ?", f"words: {', '.join(['{}'] * 30)} . what ?"]
    assert model.prompts(words, "words: {} . what ?") == expected
    with pytest.raises(UsageError, match="3 prompts for 2 pictures"):
        model.prompts(image, ["a", "b", "c"])
    with pytest.raises(UsageError, match="neither image nor image_embeds"):
        model.generate({"prompt": "a"})


def test_questions_stand_in_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_stage2("opt", prompt="question: {} answer:").eval()
    seen: list[Any] = []
    monkeypatch.setattr(model, "_write", lambda samples, *rest: seen.append(rest) or ["red"])
    samples = {"image": pictures(1), "text_input": ["what ?"]}
    assert model.predict_answers(samples) == ["red"]
    model.predict_answers(samples, prompt="{} short answer:", length_penalty=2.0)
    model.predict_answers({**samples, "choices": [["red", "blue"]]}, prompt="{} options: {} answer:")
    model.predict_answers({**samples, "ocr_tokens": [["stop", "go"]]}, prompt="{} . {}")
    assert [rest[0] for rest in seen] == [
        ["question: what ? answer:"],
        ["what ? short answer:"],
        ["what ? options: (a) red (b) blue answer:"],
        ["stop, go . what ?"],
    ]
    assert all(rest[1] == ["what ?"] for rest in seen)
    assert [rest[2]["length_penalty"] for rest in seen] == [0.0, 2.0, 0.0, 0.0]
    with pytest.raises(UsageError, match="two places, and the samples have neither ocr_tokens nor choices"):
        model.predict_answers(samples, prompt="{} {}")
    with pytest.raises(UsageError, match="did you mean 'rank'"):
        model.predict_answers(samples, inference_method="ranks")
    with pytest.raises(UsageError, match="needs answer_list"):
        model.predict_answers(samples, inference_method="rank")


@pytest.mark.parametrize(("llm", "penalty"), [("opt", 0.0), ("llama", 0.0), ("t5", -1.0)])
def test_short_answers_of_encoder_decoders_are_preferred_as_in_lavis(
    llm: str, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_stage2(llm)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(model, "_write", lambda samples, prompts, read, how: seen.append(how) or ["red"])
    model.predict_answers({"image": pictures(1), "text_input": "what ?"})
    expected = {"num_beams": 5, "max_length": 10, "min_length": 1, "repetition_penalty": 1.0}
    assert seen == [{**expected, "length_penalty": penalty}]


def test_a_conversation_is_put_as_questions_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_stage2("t5")
    replies = iter(["singapore", "it has a statue of a merlion"])
    monkeypatch.setattr(model, "generate", lambda samples, prompt, **how: [next(replies)])
    reply, history = model.chat({"image": pictures(1)}, "which city is this?", num_beams=1)
    assert (reply, history) == ("singapore", [("which city is this?", "singapore")])
    # Of LAVIS's notebook.
    expected = "Question: which city is this? Answer: singapore. Question: why? Answer:"
    assert model.dialog("why?", history) == expected
    assert model.chat({"image": pictures(1)}, "why?", history)[1][1] == (
        "why?",
        "it has a statue of a merlion",
    )


def test_answers_are_lemmatised_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip.models.blip2_llm.lemmatize", lambda answers: [f"{a}!" for a in answers])
    samples = {"image": pictures(1), "text_input": ["what ?"]}
    how: dict[str, Any] = {"inference_method": "rank", "answer_list": ["stars"]}
    assert small_stage2("opt").predict_answers(samples, **how) == ["stars"]
    assert small_stage2("opt", apply_lemmatizer=True).predict_answers(samples, **how) == ["stars!"]
    assert small_stage2("opt").predict_answers({**samples, "apply_lemmatizer": True}, **how) == ["stars!"]


# Weights


@pytest.mark.parametrize("reads", [False, True])
def test_stage_2_starts_from_stage_1(reads: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = small_stage2("opt", qformer_text_input=True).qformer.embedding.word.num_embeddings
    stage1 = small_model(vocab_size=vocabulary, qformer=small_stage2("opt").config.qformer).float()
    save_safetensors(stage1.state_dict(), tmp_path / "stage1.safetensors")
    model = small_stage2("opt", qformer_text_input=reads)
    before = values(model)
    lines = load_any(model, tmp_path / "stage1.safetensors")
    given, after = stage1.state_dict(), model.state_dict()
    for name, value in after.items():
        expected = before[name] if name.startswith(("llm.", "llm_proj.")) else given[name]
        assert torch.equal(value, expected), name
    report = "\n".join(lines)
    objective = "itm_head.* (2), temp, vision_proj.* (2), text_proj.* (2)"
    assert "(stage 1's own; a language model stands in its place)" in report
    assert all(part in report for part in objective.split(", "))
    no_text = "(this Q-Former reads no text; with model.qformer_text_input it does)"
    assert (no_text in report) != reads
    assert "llm_proj.* (2), which keep the values they start with" in caplog.text


def test_a_projection_to_another_language_model_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = small_stage2("opt", llm={"sizes": LLMS["opt"] | {"hidden_size": 24, "word_embed_proj_dim": 24}})
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("llm.")}
    save_safetensors(state, tmp_path / "other.safetensors")
    llm = saved_llm("opt", tmp_path / "llm")
    model = small_stage2("opt", llm_model=str(llm), llm={"sizes": {}, "tokenizer": None})
    lines = load_any(model, tmp_path / "other.safetensors")
    assert any("it speaks to a language model of another width" in line for line in lines)
    assert "llm_proj.* (2), which keep" in caplog.text
    assert torch.equal(model.qformer.query_tokens, source.qformer.query_tokens)


def test_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    state = small_stage2("opt").state_dict()
    for lost in (
        "llm_proj.weight",
        "llm.model.model.decoder.final_layer_norm.weight",
        "qformer.query_tokens",
    ):
        save_safetensors({n: v for n, v in state.items() if n != lost}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=rf"1 missing \({lost}\)"):
            load_any(small_stage2("opt"), tmp_path / "x.safetensors")


def saved_llm(kind: str, folder: Path, seed: int = 3) -> Path:
    """A language model as transformers writes it."""
    torch.manual_seed(seed)
    llm = small_stage2(kind).llm
    llm.model.save_pretrained(folder)
    llm.tokenizer._tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("llm", LLMS)
def test_a_language_model_that_was_loaded_is_no_part_of_what_is_saved(
    llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    saved_llm(llm, root / "models" / "small")
    monkeypatch.setenv("BLIP_DATA", str(root))
    own = {"llm_model": "models/small", "llm": {"sizes": {}, "tokenizer": None}}
    model = small_stage2(llm, **own).eval()
    lines = model.load_parts()
    assert any("tensors from models/small" in line for line in lines)
    assert model.frozen_parts() == {"llm.model.": "models/small"}
    folder = model.save_pretrained(tmp_path / "model")
    back = blip.from_pretrained(folder)
    assert back.config == model.config
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0, msg=name)
    samples, prompts = asked(2)
    assert back.generate(samples, prompt=prompts) == model.generate(samples, prompt=prompts)

    (root / "models").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no language model 'models/small'"):
        blip.from_pretrained(folder)


def test_a_random_language_model_is_saved(tmp_path: Path) -> None:
    model = small_stage2("t5").eval()
    back = blip.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0, msg=name)


def test_random_weights_read_no_language_model() -> None:
    model = small_stage2("opt")
    sizes = {k: v for k, v in SIZES.items() if k not in ("tokenizer", "max_txt_len")}
    made = blip.load_model(
        "blip2_opt",
        "pretrain_opt2.7b",
        pretrained=False,
        **sizes,
        llm={"sizes": LLMS["opt"] | {"vocab_size": 99}},
    )
    assert made.config.load_llm is False
    assert made.llm.hidden_size == model.llm.hidden_size
    assert not made.llm.model.get_input_embeddings().weight.is_meta


# Published models


@pytest.mark.parametrize(
    ("cls", "preset", "width", "depth"),
    [
        (Blip2Opt, "pretrain_opt2.7b", 2560, 32),
        (Blip2Opt, "caption_coco_opt6.7b", 4096, 32),
        (Blip2T5, "pretrain_flant5xl", 2048, 24),
        (Blip2T5, "pretrain_flant5xl_vitL", 2048, 24),
        (Blip2T5, "pretrain_flant5xxl", 4096, 24),
    ],
)
def test_published_sizes_need_no_file(cls: Any, preset: str, width: int, depth: int) -> None:
    with torch.device("meta"):
        model = cls.from_preset(preset)
    assert (model.llm.hidden_size, model.llm.model.config.num_hidden_layers) == (width, depth)
    millions = sum(p.numel() for n, p in model.qformer.named_parameters() if n != "query_tokens") / 1e6
    narrower = 6 * 2 * 768 * (1408 - 1024) / 1e6 if preset.endswith("vitL") else 0
    assert round(millions + narrower, 2) == 105.14  # as counted in the released model
    assert model.llm_proj.weight.shape == (width, 768)
    assert model.config.llm.precision == "auto"
    if cls is Blip2T5:
        assert model.llm.model.config.dense_act_fn == "gelu"


@pytest.mark.parametrize(
    ("cls", "preset", "tuned", "start"),
    [
        (Blip2Opt, "pretrain_opt2.7b", "blip2_pretrained_opt2.7b", "blip2_pretrained_opt2.7b"),
        (Blip2Opt, "caption_coco_opt6.7b", "blip2_caption_opt6.7b", "blip2_pretrained_opt6.7b"),
        (
            Blip2T5,
            "pretrain_flant5xl_vitL",
            "blip2_pretrained_flant5xl_vitL",
            "blip2_pretrained_flant5xl_vitL",
        ),
        (Blip2T5, "caption_coco_flant5xl", "blip2_caption_flant5xl", "blip2_pretrained_flant5xl"),
    ],
)
def test_published_weights_have_lavis_s_names(cls: Any, preset: str, tuned: str, start: str) -> None:
    assert cls.published[preset] == f"{LAVIS}{tuned}.pth"
    assert cls.starts[preset] == f"{LAVIS}{start}.pth"
    assert cls.published.keys() == cls.starts.keys() == cls.presets.keys()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_output_txt_len": 0}, "max_output_txt_len: 0 is below 1"),
        ({"qformer_text_input": True, "max_txt_len": 600}, "max_txt_len: 600 exceeds qformer.max_positions"),
    ],
)
def test_values_that_cannot_be_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(SectionError) as caught:
        Blip2LlmConfig(**given)
    assert any(problem.startswith(expected) for problem in caught.value.problems)
    assert Blip2LlmConfig(max_txt_len=600).max_txt_len == 600  # without text it has no positions


def test_lavis_s_names_of_the_language_model_become_ours() -> None:
    for key in ("opt_model", "t5_model"):
        tree = {"model": {"arch": "blip2_opt", key: "facebook/opt-350m", "few_shot_prob": 0.0}}
        found = translate(tree, (), ())
        assert found.tree["model"] == {"arch": "blip2_opt", "llm_model": "facebook/opt-350m"}
        [note] = found.notes
        assert note.startswith("model.few_shot_prob: 0.0 ignored: no dataset has samples of a few shots")
    both = translate({"model": {"opt_model": "a", "llm_model": "b"}}, (), ())
    assert both.tree["model"] == {"llm_model": "b"}
    assert both.notes == ["model.opt_model: ignored: model.llm_model=b is given too"]


def test_a_model_without_language_model_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match=r"model\.llm_model: nothing says which language model"):
        small_stage2("opt", llm={"sizes": {}})
