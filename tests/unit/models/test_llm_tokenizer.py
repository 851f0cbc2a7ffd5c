from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from blip.errors import ConfigError, DataError
from blip.models import llm_tokenizer
from blip.models.llm_tokenizer import LlmTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz?:,."


def opt_like(**settings: Any) -> PreTrainedTokenizerFast:
    """Bytes, a space belonging to the word behind it; `</s>` (2) before every text, `<pad>` (1)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)])
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **settings)


def llama_like(kind: str = "<s> $A", **settings: Any) -> PreTrainedTokenizerFast:
    """Letters, every text beginning with a space; `<s>` (1) before it; no padding token."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(kind, special_tokens=specials)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **settings)


def t5_like() -> PreTrainedTokenizerFast:
    return llama_like("$A </s>", pad_token="<unk>")


def words(tokenizer: LlmTokenizer, ids: list[int]) -> list[str]:
    """Tokens by name."""
    return [str(token) for token in tokenizer._tokenizer.convert_ids_to_tokens(ids)]


def test_a_text_for_opt_begins_with_its_end_token_and_ends_with_a_newline() -> None:
    tokenizer = LlmTokenizer(opt_like(), "causal", end="\n")
    batch = tokenizer.text(["a cat", "cat"])
    assert [words(tokenizer, row) for row in batch["llm_ids"].tolist()] == [
        ["</s>", "a", "Ġ", "c", "a", "t", "Ċ"],
        ["</s>", "c", "a", "t", "Ċ", "<pad>", "<pad>"],
    ]
    assert batch["llm_mask"].int().tolist() == [[1] * 7, [1, 1, 1, 1, 1, 0, 0]]
    # Without a prompt the first token is a target as well, as in LAVIS.
    ids = batch["llm_ids"]
    assert torch.equal(batch["llm_labels"], ids.masked_fill(~batch["llm_mask"], -100))


def test_a_prompt_is_no_target_and_a_cut_text_loses_its_end() -> None:
    tokenizer = LlmTokenizer(opt_like(), "causal", end="\n")
    batch = tokenizer.text(["a cat", "a dog or two"], prompt="a", max_length=8)
    assert [words(tokenizer, row) for row in batch["llm_ids"].tolist()] == [
        ["</s>", "a", "Ġ", "c", "a", "t", "Ċ", "<pad>"],
        ["</s>", "a", "Ġ", "d", "o", "g", "Ġ", "o"],
    ]
    learned = [row[row != -100].tolist() for row in batch["llm_labels"]]
    assert [words(tokenizer, row) for row in learned] == [
        ["Ġ", "c", "a", "t", "Ċ"],
        ["Ġ", "d", "o", "g", "Ġ", "o"],
    ]


def test_a_text_that_does_not_begin_with_the_prompt_is_refused() -> None:
    tokenizer = LlmTokenizer(opt_like(), "causal")
    with pytest.raises(DataError, match=r"'the cat' does not begin with 'a'.*model\.prompt"):
        tokenizer.text(["a cat", "the cat"], prompt="a")


def test_a_target_follows_its_prompt_and_all_padding_stands_behind() -> None:
    tokenizer = LlmTokenizer(llama_like(), "causal")
    batch = tokenizer.train(["is it?", ""], ["no", "yes"])
    assert [words(tokenizer, row) for row in batch["llm_ids"].tolist()] == [
        ["<s>", *"▁is▁it?", *"▁no", "</s>"],
        ["<s>", *"▁yes", "</s>", *["[PAD]"] * 6],
    ]
    assert [(row != -100).int().tolist() for row in batch["llm_labels"]] == [
        [0] * 8 + [1] * 4,
        [0] + [1] * 5 + [0] * 6,
    ]
    assert (
        tokenizer.train(["is it?", ""], ["no", "yes"], bos_is_target=True)["llm_labels"][:, 0]
        == torch.tensor([-100, 1])
    ).all()


def test_a_long_prompt_loses_its_beginning_and_a_long_target_its_end() -> None:
    """What a text begins with counts for the target's length, too, as in LAVIS, which drops it afterwards."""
    tokenizer = LlmTokenizer(llama_like(), "causal")
    batch = tokenizer.train(["what is it?"], ["a cat"], max_prompt=5, max_target=5)
    assert words(tokenizer, batch["llm_ids"][0].tolist()) == ["<s>", "▁", "i", "t", "?", "▁", "a", "▁", "c"]
    assert int((batch["llm_labels"] != -100).sum()) == 4
    ids, _ = tokenizer.prompt(["what is it?"], 5)
    assert words(tokenizer, ids[0].tolist()) == ["<s>", "▁", "i", "t", "?"]
    batch = tokenizer.train(["what is it?"], ["a cat"], max_prompt=5, side="right")
    assert words(tokenizer, batch["llm_ids"][0].tolist())[:5] == ["<s>", "▁", "w", "h", "a"]


def test_a_target_gets_a_space_where_the_tokenizer_makes_none() -> None:
    tokenizer = LlmTokenizer(opt_like(), "causal")
    for prompt, target, together in (
        ("is it?", "no", "is it? no"),
        ("is it? ", "no", "is it? no"),
        ("is it?\n", "no", "is it?\nno"),
        ("is it?", " no", "is it? no"),
        ("", "no", "no"),
    ):
        ids = tokenizer.train([prompt], [target])["llm_ids"]
        assert words(tokenizer, ids[0].tolist()) == words(tokenizer, [2, *tokenizer.raw([together])[0], 2])
    ids, mask = tokenizer.candidates(["no", "yes"])
    assert [words(tokenizer, i[m].tolist()) for i, m in zip(ids, mask, strict=True)] == [
        ["Ġ", *"no"],
        ["Ġ", *"yes"],
    ]


@pytest.mark.parametrize(
    ("make", "kind"), [(opt_like, "causal"), (llama_like, "causal"), (t5_like, "seq2seq")]
)
def test_data_that_names_a_control_token_is_letters_and_a_prompt_may_have_one(make: Any, kind: Any) -> None:
    tokenizer = LlmTokenizer(make(), kind)
    end = tokenizer.end_id
    prompts, targets = ["a</s>b", "a"], ["c</s>d", "c"]
    batch = tokenizer.train(prompts, targets)
    learned = [[token for token in row if token != -100] for row in batch["llm_labels"].tolist()]
    assert [row.index(end) for row in learned] == [len(row) - 1 for row in learned]  # at the end alone
    assert len(learned[0]) >= 1 + len("c</s>d")
    read = batch["llm_ids"][0, : int(batch["llm_labels"][0].eq(-100).sum())].tolist()
    if kind == "causal":
        assert end in read[1:]
        whole = tokenizer.text(["c</s>d"])["llm_ids"][0].tolist()
        assert whole[len(tokenizer.lead) :].count(end) == 1
        assert whole[-1] == end


def test_an_end_that_only_the_tokenizer_knows_as_a_control_token_is_one_token(tmp_path: Path) -> None:
    inner = opt_like()._tokenizer
    inner.add_special_tokens(["<|turn|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = LlmTokenizer.load(str(tmp_path / "tokenizer.json"), "causal", end="<|turn|>")
    assert "<|turn|>" not in tokenizer._tokenizer.all_special_tokens
    [row] = tokenizer.text(["a cat"])["llm_labels"].tolist()
    assert row[-1] == tokenizer.end_id == inner.token_to_id("<|turn|>")
    # A prompt of a chat model is read with its control tokens, in training as in generation.
    said = tokenizer.text(["<|turn|>a cat"], prompt="<|turn|>a")["llm_ids"][0].tolist()
    asked = tokenizer.prompt(["<|turn|>a"])[0][0].tolist()
    assert said[: len(asked)] == asked


def test_an_encoder_reads_the_prompt_with_its_end_and_a_decoder_learns_the_target() -> None:
    tokenizer = LlmTokenizer(t5_like(), "seq2seq")
    batch = tokenizer.train(["is it?", ""], ["no", "yes"], max_prompt=5, max_target=3)
    assert [words(tokenizer, row) for row in batch["llm_ids"].tolist()] == [
        [*"▁it?", "</s>"],
        ["</s>", "<unk>", "<unk>", "<unk>", "<unk>"],
    ]
    assert batch["llm_mask"].int().tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert [words(tokenizer, row) for row in batch["llm_labels"].tolist()] == [
        [*"▁n", "</s>"],  # unlike a decoder's, a cut target keeps its end
        [*"▁y", "</s>"],
    ]
    short = tokenizer.train(["", ""], ["a", "ab"])["llm_labels"]
    assert short.tolist()[0][-1] == -100
    ids, mask = tokenizer.candidates(["no"])
    assert words(tokenizer, ids[0].tolist()) == [*"▁no", "</s>"]
    assert mask.all()


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_tokenizers_own_padding_and_cutting_make_no_difference(kind: Any) -> None:
    plain = LlmTokenizer(llama_like(), kind)
    own = llama_like(padding_side="left", truncation_side="left", model_max_length=4)
    own.backend_tokenizer.enable_padding(direction="left", length=30)
    own.backend_tokenizer.enable_truncation(3)
    other = LlmTokenizer(own, kind)
    for method, arguments in (
        ("prompt", (["is it?", "a"], 5)),
        ("candidates", (["is it?", "a"],)),
        ("encode", (["is it?", "a"], 5, "right")),
    ):
        for ours, theirs in zip(
            getattr(plain, method)(*arguments), getattr(other, method)(*arguments), strict=True
        ):
            assert torch.equal(ours, theirs)
    one, two = (t.train(["is it?", ""], ["a", "not it"]) for t in (plain, other))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_vicuna_gets_a_padding_token_and_begins_with_its_end_token() -> None:
    before = len(llama_like())
    tokenizer = LlmTokenizer(llama_like(), "causal", bos="end")
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (before + 1, before)
    assert (tokenizer.lead, tokenizer.end_id) == ([2], 2)
    assert tokenizer.prompt(["a"])[0].tolist() == [[2, 3, 4]]
    assert LlmTokenizer(llama_like(), "causal", bos="none").prompt(["a"])[0].tolist() == [[3, 4]]


def test_a_text_of_ids_ends_where_its_end_is_and_has_no_special_tokens() -> None:
    tokenizer = LlmTokenizer(opt_like(), "causal", end="\n")
    ids = tokenizer.encode([" a cat\nand more", "no end"], bos=True)[0]
    assert tokenizer.decode(ids) == ["a cat", "no end"]
    vicuna = LlmTokenizer(llama_like(), "causal", bos="end")
    # LAVIS reads Vicuna's id 0 as the end token, which is not shown either.
    assert vicuna.decode(torch.tensor([[3, 4, 0, 3, 5, 2, 4], [1, 3, 4, vicuna.pad_id, 2, 2, 2]])) == [
        "a b",
        "a",
    ]


def test_no_texts_are_no_rows() -> None:
    tokenizer = LlmTokenizer(opt_like(), "causal")
    for ids in (*tokenizer.prompt([]), *tokenizer.train([], []).values(), *tokenizer.text([]).values()):
        assert ids.shape == (0, 0)
    assert tokenizer.decode(torch.zeros(0, 3, dtype=torch.int64)) == []


def test_a_tokenizer_survives_pickling() -> None:
    for made in (opt_like(), llama_like(), LlmTokenizer.load("scenes", "causal")._tokenizer):
        tokenizer = LlmTokenizer(made, "causal", bos="end")
        other = pickle.loads(pickle.dumps(tokenizer))
        one, two = (t.train(["is it?"], ["no"]) for t in (tokenizer, other))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_end_that_is_not_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.llm\.end: 'ab' is not one token .* \[\d+, \d+\]"):
        LlmTokenizer(opt_like(), "causal", end="ab")
    without = llama_like()
    without.eos_token = None
    with pytest.raises(ConfigError, match=r"no end token; give a text"):
        LlmTokenizer(without, "causal")
    assert LlmTokenizer(without, "causal", end="?").end_id == without.convert_tokens_to_ids("?")


def test_a_folder_and_a_bare_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt_like().save_pretrained(tmp_path / "folder")
    (tmp_path / "bare").mkdir()
    llama_like().backend_tokenizer.save(str(tmp_path / "bare" / "tokenizer.json"))
    monkeypatch.setenv("BLIP_DATA", str(tmp_path))
    folder = LlmTokenizer.load("folder", "causal", end="\n")
    assert torch.equal(folder.prompt(["a cat"])[0], LlmTokenizer(opt_like(), "causal").prompt(["a cat"])[0])
    for source in ("bare/tokenizer.json", "bare"):  # also a folder with nothing else
        bare = LlmTokenizer.load(source, "causal", data_root=tmp_path)
        assert (bare.lead, bare.end_id, bare.decode(bare.prompt(["a cat"])[0])) == ([1], 2, ["a cat"])


def test_the_embedded_word_pieces_make_texts_for_both_kinds() -> None:
    causal, seq2seq = (LlmTokenizer.load("scenes", kind) for kind in ("causal", "seq2seq"))
    ids = causal.train(["a red circle"], ["is left"])["llm_ids"]
    assert causal.decode(ids) == ["a red circle is left"]
    assert causal.lead == seq2seq.lead
    assert seq2seq.decode(seq2seq.prompt(["A red circle"])[0]) == ["a red circle"]


def test_a_source_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.llm\.tokenizer: no tokenizer 'no/such'.*'scenes'"):
        LlmTokenizer.load("no/such", "causal", data_root=tmp_path)


def test_a_sentencepiece_file_alone_asks_for_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setattr(llm_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tokenizer\.model alone is read by sentencepiece.*blip\[llm\]"):
        LlmTokenizer.load(str(tmp_path), "causal")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        LlmTokenizer.load(str(tmp_path), "causal")
    assert "is read by" not in str(error.value)
