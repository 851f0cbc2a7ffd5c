"""Facts about the tokenizer of caption scores; tests/parity compares it with Stanford's."""

from __future__ import annotations

import pytest

from blip.metrics import ptb


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's hat isn't red.", "a man 's hat is n't red"),
        ("Two dogs, and a cat; they're here!", "two dogs and a cat they 're here"),
        ('a "stop" sign (red)', "a stop sign -lrb- red -rrb-"),
        ("You cannot see the U.S. Army at 5:30 p.m.", "you can not see the u.s. army at 5:30 p.m."),
        ("a black-and-white half-eaten t-shirt", "a black-and-white half-eaten t-shirt"),
        ("Mr. Smith on No. 5 and no. x", "mr. smith on no. 5 and no x"),
        ("caf\u00e9 \u2014 na\u00efve \u65e5\u672c \U0001f600 ok", "caf\u00e9 na\u00efve \u65e5\u672c ok"),
        ("what?! wow", "what ?! wow"),
        ("$5 and \u00a33, 50% of 1 1/2", "$ 5 and # 3 50 % of 1\xa01/2"),
        ("jalape&ntilde;o &ccedil;a caf&EACUTE;", "jalape & ntilde o & ccedil a caf&eacute;"),
        ("&quot;A&AMP;B&quot; &QUOT; x &Apos;", "a&b &quot; x &apos;"),
        ("no. \u0665 and fig. \uff11", "no. \u0665 and fig. \uff11"),
        ("www.a.co.uk/b:c.de/f or a.com/b.org/c", "www.a.co.uk/b:c.de/f or a.com/b.org/c"),
        ("", ""),
        (" \t ", ""),
        (".", ""),
        ("...!,;", ""),
    ],
)
def test_captions_are_cut_as_pycocoevalcap_does(caption: str, tokens: str) -> None:
    assert ptb.tokenize([caption, "the end"])[0] == tokens


def test_the_next_caption_tells_whether_a_period_ends_a_sentence() -> None:
    assert ptb.tokenize(["the letter t.", "A dog"])[0] == "the letter t"
    assert ptb.tokenize(["the letter t.", "Zoo"])[0] == "the letter t."
    assert ptb.tokenize(["see no.", "5 dogs"])[0] == "see no."
    assert ptb.tokenize(["see no.", "five dogs"])[0] == "see no"


def test_a_line_break_within_a_caption_is_a_blank() -> None:
    captions = [f"a{sign}dog" for sign in "\n\r\v\f\u2028\u2029"]
    assert ptb.tokenize(captions) == ["a dog"] * 6


def test_a_caption_is_tokenised_alike_among_others_and_when_it_is_seen_again() -> None:
    captions = ["A dog's tail, 3.5 ft. long", "a dog 's tail", "the dogs' tails"]
    once = ptb.tokenize(captions)
    assert ptb.tokenize(captions * 3) == once * 3


def test_any_text_is_tokenised() -> None:
    """Lone surrogates, controls, private characters and 20,000 signs without a blank."""
    captions = ["\ud83d dog \x00\x1f\x7f \ue000", "a" * 20_000, "." * 5_000, "-'" * 2_000, "<" * 2_000]
    assert ptb.tokenize(captions)[0] == "dog"
    assert ptb.tokenize(captions)[1] == "a" * 20_000


def test_no_caption_gives_no_tokens() -> None:
    assert ptb.tokenize([]) == []
