"""Renaming rules: every key is accounted for, in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip.errors import CheckpointError
from blip.formats.rules import Copy, Drop, Omit, Rename, Table, Transform, expand


def split_bias(fused: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = fused.chunk(3)
    if key.any():
        raise ValueError("the key bias is not zero")
    return query, value


def join_bias(query: Tensor, value: Tensor) -> tuple[Tensor]:
    return (torch.cat([query, torch.zeros_like(query), value]),)


TABLE = Table(
    "toy weights",
    [
        *expand([Rename("block.{i}.fc.{part}", "blocks.{i}.linear.{part}")], part=("weight", "bias")),
        Transform(("block.{i}.qkv.bias",), ("blocks.{i}.q_bias", "blocks.{i}.v_bias"), split_bias, join_bias),
        Rename("words.weight", "word.weight"),
        Copy("head.weight", "words.weight", "tied to the words"),
        Drop("counter", "a training statistic"),
        Omit("temp", "only training needs it"),
    ],
)


def theirs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    words = torch.randn(5, 2)
    return {
        "block.0.fc.weight": torch.randn(2, 2),
        "block.11.fc.bias": torch.randn(2),
        "block.0.qkv.bias": torch.cat([torch.randn(2), torch.zeros(2), torch.randn(2)]),
        "words.weight": words,
        "head.weight": words.clone(),
    }


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


def test_names_numbers_and_fused_parts_go_over_and_back() -> None:
    state = theirs()
    ours = TABLE.to_ours(state).state
    expected = [
        "blocks.0.linear.weight",
        "blocks.11.linear.bias",
        "blocks.0.q_bias",
        "blocks.0.v_bias",
        "word.weight",
    ]
    assert list(ours) == expected
    assert_equal(TABLE.to_theirs(ours).state, state)


def test_the_report_has_every_key_once_with_what_happened_to_it() -> None:
    state = {**theirs(), "counter": torch.tensor(3)}
    report = TABLE.to_ours(state).report
    assert sorted(key for line in report for key in line.source) == sorted(state)
    assert [str(line) for line in report if line.note != "renamed"] == [
        "block.0.qkv.bias -> blocks.0.q_bias, blocks.0.v_bias (transformed)",
        "head.weight -> - (tied to the words)",
        "counter -> - (a training statistic)",
    ]


def test_what_the_other_side_has_no_place_for_is_left_out_and_reported() -> None:
    state, report = TABLE.to_theirs({"temp": torch.tensor(0.07)})
    assert state == {}
    assert [str(line) for line in report] == ["temp -> - (only training needs it)"]


def test_a_key_without_a_rule_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(CheckpointError) as caught:
        TABLE.to_ours({**theirs(), "block.3.fd.weight": torch.zeros(1)})
    assert "no rule for 'block.3.fd.weight' (nearest: block.{i}.fc.weight)" in str(caught.value)


def test_our_key_without_a_rule_is_an_error_too() -> None:
    with pytest.raises(CheckpointError, match=r"no rule for 'momentum\.weight'"):
        TABLE.to_theirs({"momentum.weight": torch.zeros(1)})


def test_many_unknown_keys_are_counted_not_listed() -> None:
    with pytest.raises(CheckpointError, match="and 15 more"):
        TABLE.to_ours({f"other{n}": torch.zeros(1) for n in range(20)})


def test_a_number_field_takes_no_name_and_a_dot_is_a_dot() -> None:
    for name in ("block.x.fc.weight", "block.0.fc.gain", "blockx0.fc.weight", "words.weight.more"):
        with pytest.raises(CheckpointError, match="no rule for"):
            TABLE.to_ours({name: torch.zeros(1)})


def test_half_of_a_group_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.0\.v_bias is missing"):
        TABLE.to_theirs({"blocks.0.q_bias": torch.zeros(2)})


def test_a_value_that_the_other_side_cannot_hold_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="key bias is not zero"):
        TABLE.to_ours({"block.0.qkv.bias": torch.ones(6)})


def test_a_dropped_tensor_must_be_what_the_rule_says() -> None:
    state = theirs()
    state["head.weight"] += 1
    with pytest.raises(CheckpointError, match=r"head\.weight would be dropped"):
        TABLE.to_ours(state)


def test_a_dropped_tensor_whose_origin_is_absent_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"head\.weight would be dropped"):
        TABLE.to_ours({"head.weight": torch.zeros(2)})


def test_second_names_go_with_the_numbers_of_the_first() -> None:
    unread = Copy("old.{i}.w", "a.{i}.w", "never read", exact=False)
    table = Table("toy weights", [Rename("a.{i}.w", "x.{i}.w"), Copy("b.{i}.w", "a.{i}.w", "shared"), unread])
    first, second = torch.ones(2), torch.zeros(2)
    state = {"a.0.w": first, "b.0.w": first.clone(), "a.12.w": second, "b.12.w": second, "old.12.w": first}
    ours, report = table.to_ours(state)
    assert_equal(ours, {"x.0.w": first, "x.12.w": second})
    assert [str(line) for line in report if not line.target] == [
        "b.0.w -> - (shared)",
        "b.12.w -> - (shared)",
        "old.12.w -> - (never read)",
    ]
    assert_equal(table.to_theirs(ours).state, {**state, "old.0.w": first, "old.12.w": second})
    with pytest.raises(CheckpointError, match=r"b\.0\.w would be dropped \(shared\)"):
        table.to_ours({**state, "b.0.w": second})


def test_a_table_knows_weights_that_lack_what_it_needs() -> None:
    table = Table("toy weights", [Rename("a.{i}", "x.{i}")], needs=["a.", "head."])
    assert table.is_about(["a.1", "head.weight"])
    assert not table.is_about(["a.1"])


def test_two_keys_for_one_place_are_an_error() -> None:
    table = Table("toy weights", [Rename("a", "x"), Rename("b", "x")])
    with pytest.raises(CheckpointError, match="two keys of the file become x"):
        table.to_ours({"a": torch.zeros(1), "b": torch.zeros(1)})


def test_a_rest_spans_dots() -> None:
    table = Table("toy", [Drop("lm.counter.{i}", "a statistic"), Rename("lm.{rest}", "llm.model.{rest}")])
    theirs = {"lm.layers.0.fc.weight": torch.ones(1), "lm.head": torch.ones(2), "lm.counter.3": torch.ones(1)}
    ours = table.to_ours(theirs).state
    assert list(ours) == ["llm.model.layers.0.fc.weight", "llm.model.head"]
    assert list(table.to_theirs(ours).state) == ["lm.layers.0.fc.weight", "lm.head"]
    with pytest.raises(CheckpointError, match="no rule for 'lm'"):
        table.to_ours({"lm": torch.ones(1)})


def test_a_table_knows_the_names_that_it_has_rules_for() -> None:
    assert TABLE.knows(theirs())
    assert TABLE.knows(["counter"])
    assert not TABLE.knows([*theirs(), "block.0.fc.scale"])
    assert not TABLE.knows(["temp"])  # ours only
