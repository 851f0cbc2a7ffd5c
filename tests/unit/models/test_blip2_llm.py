"""Facts about BLIP-2 with a language model: what is learned, what stays as it is, what it answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip.build import build_model
from blip.config.typed import typed_section
from blip.errors import DataError, UsageError
from blip.formats.load import load_any
from blip.models.prompts import split_text, without
from blip.registry import MODELS
from blip.weights import save_safetensors
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
    assert without("a", "apple") == "apple"


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
    lead = len(small_stage2(llm).llm.tokenizer.lead) if llm == "opt" else 0  # counted, as in LAVIS
    assert int((longer["llm_labels"] != -100).sum()) == 40 - lead
    assert int((same["llm_labels"] != -100).sum()) == SIZES["max_txt_len"] - lead


def test_flan_t5_reads_the_beginning_of_a_long_text_and_others_its_end() -> None:
    """As LAVIS's tokenizers are set; a decoder is asked at the end of its prompt."""
    text = "red " + "star " * 60 + "blue"
    for model, end in (
        (small_stage2("t5"), "red"),
        (small_stage2("opt"), "blue"),
        (small_stage2("t5", "blip2_llm_instruct"), "blue"),
    ):
        batch = model.prepare(instructions(1, text_input=[text], text_output=["star"]))
        given = batch["llm_ids"][batch["llm_mask"]]
        read = model.llm.tokenizer.decode(given[None])[0]
        assert ("red" in read, "blue" in read) == (end == "red", end == "blue"), (read, end)


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


@pytest.mark.parametrize("llm", LLMS)
def test_half_precision_of_the_language_model_and_autocast_change_little(llm: str) -> None:
    exact = small_stage2(llm, qformer_text_input=True)
    expected = exact(instructions()).loss
    half = small_stage2(llm, qformer_text_input=True, llm={"precision": "bf16"})
    for autocast in (False, True):
        half.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = half(instructions()).loss
        loss.backward()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, atol=0.3, rtol=0.1)
        assert all(p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)
    assert half.llm.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert half.llm_proj.weight.dtype == torch.float32


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
    torch.testing.assert_close(model.soft_tokens({"image": video.transpose(1, 2), **text}), found)  # LAVIS's


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
    monkeypatch.setattr(model, "_asked", lambda samples, *texts: seen.append([*texts]))
    monkeypatch.setattr(model, "_write", lambda samples, asked, how, *_: seen[-1].append(how) or ["red"])
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
    monkeypatch.setattr(model, "_write", lambda samples, asked, how, *_: seen.append(how) or ["red"])
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


@pytest.mark.parametrize("kind", LLMS)
def test_layers_of_the_language_model_are_recomputed_where_asked(kind: str) -> None:
    """Also of one that gets its values only when it is moved; gradients stay the same."""

    def step(how: str) -> tuple[int, dict[str, Tensor]]:
        llm = {"sizes": {**LLMS[kind], "vocab_size": 400}, "tokenizer": "scenes", "checkpoint": how}
        own = {**SIZES, "arch": "blip2_llm", "llm_model": "named", "load_llm": False, "llm": llm}
        config: Any = SimpleNamespace(
            model=typed_section(MODELS.get("blip2_llm").config_class, {"test": own}),
            run=SimpleNamespace(seed=0, data_root=None),
            datasets={},
        )
        model = build_model(config, torch.device("cpu")).train()
        runs: list[int] = []
        layer = next(part for part in model.llm.blocks()[0].modules() if isinstance(part, nn.Linear))
        layer.register_forward_hook(lambda *_: runs.append(1))
        model(captions()).loss.backward()
        return len(runs), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (once, plain), (twice, again) = step("none"), step("torch")
    assert (once, twice) == (1, 2)
    assert "llm_proj.weight" in plain
    assert plain.keys() == again.keys()
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())


@pytest.mark.parametrize("kind", LLMS)
def test_soft_tokens_may_begin_as_large_as_words(kind: str, tmp_path: Path) -> None:
    """Where the projection is new: in a new model, and in one that starts from stage 1, not from stage 2."""

    def size(model: Any) -> float:
        return float(model.eval().soft_tokens({"image": pictures()}).square().mean().sqrt())

    def start(scale: str, source: Path | None = None) -> Any:
        model = small_stage2(kind, soft_tokens=scale)
        with torch.no_grad():  # words of another size than what torch gives a linear layer
            model.llm.model.get_input_embeddings().weight.mul_(0.05)
        if source is None:
            model.load_parts()
        else:
            load_any(model, source)
        return model

    with torch.no_grad():
        plain, fitted = start("linear"), start("words")
        words = float(fitted.llm.model.get_input_embeddings().weight.square().mean().sqrt())
        assert size(fitted) == pytest.approx(words, rel=0.3)
        assert size(plain) > 2 * words
        stage1 = {n: t for n, t in plain.state_dict().items() if not n.startswith(("llm_proj.", "llm."))}
        stage1["temp"] = torch.tensor(0.07)
        save_safetensors(stage1, tmp_path / "stage1.safetensors")
        assert size(start("words", tmp_path / "stage1.safetensors")) == pytest.approx(words, rel=0.3)
        save_safetensors(plain.state_dict(), tmp_path / "stage2.safetensors")
        assert size(start("words", tmp_path / "stage2.safetensors")) == pytest.approx(size(plain), rel=1e-5)
