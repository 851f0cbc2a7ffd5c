"""Facts about InstructBLIP: its Q-Former reads the instruction, and candidates are ranked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.errors import ConfigError, UsageError
from blip.formats.load import load_any
from blip.models.blip2_llm import Blip2Llm
from blip.models.instructblip import Blip2LlmInstruct, Blip2T5Instruct, Blip2VicunaInstruct
from blip.weights import save_safetensors
from tests.reference.small_stage2 import ANSWERS, LLMS, QUESTIONS, instructions, pictures, small_stage2

HEADS = ["llama", "t5"]
CANDIDATES = ["red", "two", "a star", "yes", "blue"]
Model = Blip2LlmInstruct


def small(llm: str = "llama", **values: Any) -> Any:
    return small_stage2(llm, "blip2_llm_instruct", **values).eval()


def samples(rows: int = 4, **more: Any) -> dict[str, Any]:
    return {"image": pictures(rows), **more}


def scores(model: Any, batch: dict[str, Any], prompts: list[str], candidates: list[str]) -> Tensor:
    """Sum of log-probabilities of each candidate, one picture and one candidate at a time."""
    tokenizer = model.llm.tokenizer
    found = torch.empty(len(prompts), len(candidates))
    for row, prompt in enumerate(prompts):
        text = model.word_pieces([prompt], model.config.max_txt_len, cut="left")
        prefix = model.soft_tokens({"image": batch["image"][row : row + 1], **text})
        for column, candidate in enumerate(candidates):
            one, real = tokenizer.candidates([candidate])
            ids, mask = tokenizer.prompt([prompt])
            if model.llm.is_encoder_decoder:
                labels = one
            else:
                labels = torch.cat([torch.full_like(ids, -100), one], dim=1)
                ids, mask = torch.cat([ids, one], dim=1), torch.cat([mask, real], dim=1)
            loss = model.llm.loss(prefix, ids, mask, labels, loss_tokens=1.0)
            found[row, column] = -loss
    return found


def test_qformer_and_language_model_read_the_same_instruction() -> None:
    for prompt in ("", "question: {}"):
        model = small(prompt=prompt)
        batch = {**instructions(2), "answer": ["red", "two"], "n_answers": torch.tensor([1, 1])}
        del batch["text_output"]
        texts = model.texts(batch)
        assert texts.read == texts.given
        assert texts.wanted == ["red", "two"]
    texts = small().texts(instructions())
    assert (texts.given, texts.read, texts.wanted) == (QUESTIONS, QUESTIONS, ANSWERS)


def test_the_beginning_of_a_long_instruction_is_cut_off_for_both_readers() -> None:
    model = small(max_txt_len=6)
    long = "blue " * 30 + "what color is the star ?"
    batch = model.prepare(instructions(1, text_input=[long], text_output=["red"]))
    pieces, tokenizer = model.word_pieces, model.llm.tokenizer
    whole = pieces([long])["text_ids"][0].tolist()
    assert batch["text_ids"][0].tolist() == [whole[0], *whole[-5:]]
    read = batch["llm_ids"][0, (batch["llm_labels"] == -100)[0]]
    assert tokenizer.decode(read[None])[0].endswith("color is the star?")
    assert len(read) == 6


@pytest.mark.parametrize("llm", HEADS)
def test_soft_tokens_depend_on_the_instruction_only_if_the_qformer_reads_it(llm: str) -> None:
    for reads in (True, False):
        model = small(llm, qformer_text_input=reads)
        image = pictures(1).expand(2, -1, -1, -1)
        batch = model.prepare({**instructions(2), "image": image})
        first, second = model.soft_tokens(batch)
        assert torch.equal(first, second) != reads


@pytest.mark.parametrize("llm", HEADS)
def test_padding_of_the_instruction_is_not_read(llm: str) -> None:
    model = small(llm)
    together = model.soft_tokens({"image": pictures(2), **model.word_pieces(QUESTIONS[:2])})
    for row in range(2):
        alone = {"image": pictures(2)[row : row + 1], **model.word_pieces([QUESTIONS[row]])}
        torch.testing.assert_close(model.soft_tokens(alone)[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("llm", LLMS)
def test_ranking_is_by_the_sum_of_log_probabilities(llm: str) -> None:
    model = small(llm)
    with torch.no_grad():
        expected = scores(model, samples(), QUESTIONS, CANDIDATES)
    for segments in (1, 2, 5, 9):
        order = model.predict_class(samples(prompt=QUESTIONS), CANDIDATES, n_segments=segments)
        assert torch.equal(order, expected.argsort(dim=1, descending=True))
    assert len({tuple(row) for row in order.tolist()}) > 1


@pytest.mark.parametrize("llm", HEADS)
def test_every_picture_may_have_candidates_of_its_own(llm: str) -> None:
    model = small(llm)
    whole = model.predict_class(samples(), CANDIDATES, prompt=QUESTIONS)
    own = model.predict_class(samples(), [CANDIDATES] * 4, prompt=QUESTIONS)
    assert torch.equal(own, whole)
    unequal = model.predict_class(samples(), [CANDIDATES, *[CANDIDATES[:2]] * 3], prompt=QUESTIONS)
    assert [len(order) for order in unequal] == [5, 2, 2, 2]
    assert torch.equal(unequal[0], whole[0])
    first = [row[row < 2] for row in whole]
    assert all(torch.equal(a, b) for a, b in zip(unequal[1:], first[1:], strict=True))


def test_what_is_known_stands_in_front_of_the_question_as_in_lavis(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    seen: list[list[str]] = []
    asked = model._asked
    monkeypatch.setattr(
        model, "_asked", lambda batch, texts, read: seen.append(texts) or asked(batch, texts, read)
    )
    batch = samples(
        2,
        text_input=["what {} ?", "how many ?"],
        context=["a town", ""],
        history=["q a", "q b"],
        caption=["", "a star"],
    )
    model.predict_class(batch, ["a", "b"], prompt="question: {} answer:")
    model.predict_class(
        samples(2, text_input=[["one", "two {}"], ["three", "four"]]), ["a"], prompt="{} or {} ?"
    )
    model.predict_class(samples(2, text_input="what ?"), ["a"])
    assert seen == [
        [
            "dialog history: q a\ncontext: a town. question: what {} ? answer:",
            'This image has the caption "a star". dialog history: q b\nquestion: how many ? answer:',
        ],
        ["one or two {} ?", "three or four ?"],
        ["what ?", "what ?"],
    ]


@pytest.mark.parametrize("candidates", [[], [["a"], []], [["a"]]])
def test_ranking_without_candidates_is_refused(candidates: Any) -> None:
    with pytest.raises(UsageError, match="give some texts, or some for each of the 2 pictures"):
        small().predict_class(samples(2), candidates, prompt="what ?")
    with pytest.raises(UsageError, match="n_segments: 0 is below 1"):
        small().predict_class(samples(2), ["a"], n_segments=0, prompt="what ?")


def test_its_own_settings_of_generation_are_lavis_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls, longest, penalty in ((Blip2LlmInstruct, 256, 1.5), (Blip2Llm, 30, 1.0)):
        arch = "blip2_llm_instruct" if cls is Blip2LlmInstruct else "blip2_llm"
        model = small_stage2("opt", arch)
        seen: list[dict[str, Any]] = []
        monkeypatch.setattr(model, "_write", lambda *args, seen=seen: seen.append(args[2]) or [""])
        model.generate(samples(1))
        model.generate(samples(1), use_nucleus_sampling=True, max_length=9, repetition_penalty=2.0)
        common = {"min_length": 1, "length_penalty": 1.0, "num_captions": 1}
        assert seen == [
            {**common, "max_length": longest, "repetition_penalty": penalty, "num_beams": 5},
            {
                **common,
                "max_length": 9,
                "repetition_penalty": 2.0,
                "sample": True,
                "top_p": 0.9,
                "top_k": 0,
                "temperature": 1.0,
            },
        ]


def test_a_conversation_goes_on_behind_its_history(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    said: list[str] = []
    monkeypatch.setattr(
        model, "generate", lambda batch, prompt, **how: said.extend(prompt) or [f"reply {len(said)}"]
    )
    _, history = model.chat(samples(1), "what is this ?")
    _, history = model.chat(samples(1), "and that ?", history)
    assert history == [("what is this ?", "reply 1"), ("and that ?", "reply 2")]
    assert said == ["what is this ?", "dialog history: User: what is this ?\nAssistant: reply 1\nand that ?"]


def test_instruction_tuning_starts_from_stage_2(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """BLIP-2's Q-Former has no text side; that starts random, or from a BERT."""
    source = small_stage2("t5")
    save_safetensors(source.state_dict(), tmp_path / "stage2.safetensors")
    model = small("t5")
    load_any(model, tmp_path / "stage2.safetensors")
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in source.state_dict().items())
    assert "which keep the values they start with" in caplog.text
    assert "qformer.* (" in caplog.text


def test_a_qformer_that_does_not_read_starts_from_no_bert(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAVIS's switch, with which the presets' BERT has no place."""
    monkeypatch.setattr("blip.models.blip2_base.load_bert", None)
    model = small("t5", qformer_text_input=False, qformer={"init_from": "no-such-bert"})
    assert model.load_parts() == []
    with pytest.raises(
        ConfigError, match=r"model\.qformer\.init_from .*a BERT starts a Q-Former that reads text"
    ):
        small_stage2("t5", qformer={"init_from": "no-such-bert"})


def test_the_text_side_starts_from_a_bert_where_stage_2_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_stage2("t5").state_dict()
    save_safetensors(source, tmp_path / "stage2.safetensors")
    read: list[str] = []

    def load(parts: Any, head: Any, name: str, data_root: Any) -> str:
        read.append(name)
        for attention, feed_forward in parts.layers:
            for parameter in (*attention.parameters(), *feed_forward.parameters()):
                parameter.data.fill_(0.5)
        return "loaded"

    monkeypatch.setattr("blip.models.blip2_llm.load_bert", load)
    model = small("t5", qformer={"init_from": "some-bert"})
    load_any(model, tmp_path / "stage2.safetensors")
    assert read == ["some-bert"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in source.items())
    own = [name for name in after if ".text_ffn." in name]
    assert own
    assert all((after[name] == 0.5).all() for name in own)


@pytest.mark.parametrize(
    ("cls", "preset", "width"),
    [
        (Blip2T5Instruct, "flant5xl", 2048),
        (Blip2T5Instruct, "flant5xxl", 4096),
        (Blip2VicunaInstruct, "vicuna7b", 4096),
        (Blip2VicunaInstruct, "vicuna13b", 5120),
    ],
)
def test_published_sizes_need_no_file(cls: Any, preset: str, width: int) -> None:
    with torch.device("meta"):
        model = cls.from_preset(preset, vocab_size=30523)
    assert model.llm_proj.weight.shape == (width, 768)
    count = sum(p.numel() for n, p in model.qformer.named_parameters() if n != "query_tokens")
    assert round(count / 1e6, 2) == 185.66
    assert (model.config.max_txt_len, model.config.max_output_txt_len) == (128, 256)
    rows = model.llm.model.get_input_embeddings().weight.shape[0]
    assert rows == (32001 if cls is Blip2VicunaInstruct else 32128)
    assert cls.published[preset].endswith(f"instruct_blip_{preset.replace('flant5', 'flan')}_trimmed.pth")
    assert cls.starts == cls.published
