"""Questions, instructions, pairs and web captions: every answer is worked out again, from the words."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from blip import keyed
from blip.data.scenes.claims import (
    RELATION_WORDS,
    SIZE_WORDS,
    TEXTURE_WORDS,
    matches,
    normal,
    parse,
    score_caption,
)
from blip.data.scenes.instruct import TYPES as TASK_TYPES
from blip.data.scenes.instruct import task, tasks
from blip.data.scenes.pairs import NUMBERS, Pair, pairs
from blip.data.scenes.questions import TYPES as QUESTION_TYPES
from blip.data.scenes.questions import answers as all_answers
from blip.data.scenes.questions import questions
from blip.data.scenes.text import place_name
from blip.data.scenes.web import RATES, web_text
from blip.data.scenes.world import COLORS, HELD_OUT, SHAPES, Scene, Thing, related, scenes

TRAIN = scenes("train", 0, 800)
TEST = scenes("test", 0, 300)
WEB = scenes("web", 0, 800)
SAYS = {shape: ("shape", shape) for shape in SHAPES} | {color: ("color", color) for color in COLORS}
SAYS |= {word: ("size", size) for size, words in SIZE_WORDS.items() for word in words}
SAYS |= {word: ("texture", texture) for texture, words in TEXTURE_WORDS.items() for word in words}
SAYS |= {f"{shape}{'es' if shape == 'cross' else 's'}": ("shape", shape) for shape in SHAPES}
LINKS = {words: name for name, several in RELATION_WORDS.items() for words in several}
LINK = "|".join(sorted(LINKS, key=len, reverse=True))
PLACE = (
    r"(?:at|in|on|near) the (?:(?:top|upper|bottom|lower)(?: (?:left|right|center))?(?: corner)?"
    r"|(?:left|right)(?: (?:side|edge))?|center|middle)\b(?! of)"
)
REFERENCE = re.compile(rf"the (?:(?:{'|'.join(SAYS)}) )*(?:{'|'.join(SHAPES)}|object)\b(?: {PLACE})?")


def rng(*parts: int | str) -> np.random.Generator:
    return keyed.generator("test", *parts)


def fitting(phrase: str, scene: Scene) -> list[Thing]:
    """The things that a phrase such as "small red objects" or "the object at the top" fits."""
    place = re.search(PLACE, phrase)
    if place:
        where = parse(f"star {place[0]}").things[0].place
        return [t for t in scene.things if t.place == where]
    said = [SAYS[word] for word in phrase.split() if word in SAYS]
    return [t for t in scene.things if all(getattr(t, name) == value for name, value in said)]


def one(phrase: str, scene: Scene) -> Thing:
    (thing,) = fitting(phrase, scene)
    return thing


def answer(kind: str, question: str, scene: Scene) -> str:
    """The right answer to a question of the dataset, worked out from its words and the scene's record."""
    text = question.rstrip("?")
    if kind == "exist":
        return "yes" if fitting(re.search(r"\ban? (\w+ \w+)", text)[1], scene) else "no"
    if kind == "count":
        return str(len(fitting(re.match(r"how many (.+?) (?:are|do)\b", text)[1], scene)))
    things = [one(phrase, scene) for phrase in REFERENCE.findall(text)]
    if kind in ("color", "shape", "size", "texture"):
        return getattr(things[0], kind)
    if kind == "position":
        return place_name(things[0].place)
    a, b = things
    if kind == "relation":
        return "yes" if related(a, LINKS[re.search(LINK, text)[0]], b) else "no"
    if kind == "side":
        a, b = (b, a) if text.startswith("on which") else (a, b)
        return "left" if a.column < b.column else "right"
    if kind == "larger":
        return (
            "yes"
            if (a.size, b.size) == (("large", "small") if "larger" in text else ("small", "large"))
            else "no"
        )
    name = {"pattern": "texture"}.get(text.split()[-1], text.split()[-1])
    return "yes" if getattr(a, name) == getattr(b, name) else "no"


ASKED = [(s, *q) for s in TEST for q in questions(s, rng(s.index), len(QUESTION_TYPES))]
TRAIN_ASKED = [(s, *q) for s in TRAIN for q in questions(s, rng(s.index), 4)]


@pytest.mark.parametrize("kind", QUESTION_TYPES)
def test_every_answer_is_right(kind: str):
    some = [(s, question, said) for s, k, question, said in ASKED + TRAIN_ASKED if k == kind]
    assert len(some) > 100
    for s, question, said in some:
        assert answer(kind, question, s) == said, (question, s.things)


def test_every_answer_is_listed():
    assert sorted({said for *_, said in ASKED + TRAIN_ASKED}) == all_answers()


def test_guessing_without_the_picture_does_not_pay():
    """The most common answer, per type and first words of the question."""
    groups: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    types: dict[str, Counter[str]] = defaultdict(Counter)
    for _, kind, question, said in TRAIN_ASKED + ASKED:
        last = question.split()[-1] if kind == "compare" else " ".join(question.split()[:2])
        groups[kind, last][said] += 1
        types[kind][said] += 1
    top = {kind: answers.most_common(1)[0][1] / answers.total() for kind, answers in types.items()}
    for kind in ("exist", "relation", "side", "larger", "compare", "size"):
        assert top[kind] < 0.6, (kind, top[kind])
    for kind, limit in (
        ("color", 0.2),
        ("shape", 0.2),
        ("position", 0.2),
        ("count", 0.45),
        ("texture", 0.48),
    ):
        assert top[kind] < limit, (kind, top[kind])
    guessed = sum(answers.most_common(1)[0][1] for answers in groups.values())
    assert guessed / sum(answers.total() for answers in groups.values()) < 0.45


def test_training_texts_name_no_held_out_pair():
    texts = [f"{q} {a}" for _, _, q, a in TRAIN_ASKED]
    texts += [f"{t} {a}" for s in TRAIN for _, t, a in tasks(s, rng(s.index), 9)]
    texts += [pair.sentence for pair in pairs(TRAIN[:300], rng("pairs"), 2)]
    texts += [text for s in WEB for text in (web_text(s, 0, 800).text, web_text(s, 0, 800).clean)]
    for text in texts:
        assert not any(f"{color} {shape}" in text for shape, color in HELD_OUT), text
    assert any(f"{color} {shape}" in q for _, _, q, _ in ASKED for shape, color in HELD_OUT)


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_every_instruction_is_answered_rightly(kind: str):
    made = [(s, task(s, kind, rng(s.index, kind))) for s in TEST]
    made = [(s, *pair) for s, pair in made if pair is not None]
    assert len(made) > 60
    assert len({text for _, text, _ in made}) >= 3
    for s, text, output in made:
        assert check(kind, text, output, s), (text, output, s.things)


def check(kind: str, text: str, output: str, s: Scene) -> bool:
    if kind == "caption":
        return matches(parse(output), s)
    if kind == "detail":
        score = score_caption(output, s)
        return score.whole and score.stated == 5 * len(s.things) and s.background.tone in output.split()
    if kind == "locate":
        return place_name(one(REFERENCE.search(text)[0], s).place) == output
    if kind == "refer":
        return fitting(output, s) == fitting(text, s)
    if kind == "choice":
        options = re.search(r"(?:options: |from: |\? )([a-z]+(?:, [a-z]+)+)[.?]", text)[1].split(", ")
        return output in options and len(set(options)) == len(options) >= 3
    if kind == "verify":
        return output == ("yes" if holds(re.search(r"[?:] ?(.+?)\.", text)[1].strip(), s) else "no")
    if kind == "count":
        return output == answer("count", re.search(r"how many .*\?", text)[0], s)
    return output in SAYS or output in ("yes", "no")


def holds(statement: str, s: Scene) -> bool:
    things = [one(phrase, s) for phrase in REFERENCE.findall(statement)]
    if not things:
        return bool(fitting(re.search(r"\ban? (.+)", statement)[1], s))
    if len(things) == 2:
        return related(things[0], LINKS[re.search(LINK, statement)[0]], things[1])
    return things[0].place == parse(f"star {re.search(PLACE, statement)[0]}").things[0].place


def judge(pair: Pair) -> bool:
    """Whether a pair's sentence is true, worked out from its words."""
    text, counts = pair.sentence, [len(pair.left.things), len(pair.right.things)]
    if "objects" in text:
        if "more" in text or "fewer" in text:
            return counts[0] > counts[1] if "more" in text else counts[0] < counts[1]
        words = re.sub(r"the two images", "", text).split()
        return next(NUMBERS.index(word) for word in words if word in NUMBERS) == sum(counts)
    noun = re.search(r"\b(?:an?|no) ((?:\w+ )?(?:object|" + "|".join(SHAPES) + r"))\b", text)[1]
    here, there = (bool(fitting(noun, s)) for s in (pair.left, pair.right))
    if "neither" in text or " no " in text:
        return not here and not there
    if "both" in text or "each" in text:
        return here and there
    if "exactly one" in text or "only one" in text:
        return here != there
    return here if "left" in text else there


def test_pair_sentences_are_labelled_rightly_and_evenly():
    made = [*pairs(TRAIN, rng("train pairs"), 2), *pairs(TEST, rng("test pairs"), 2)]
    assert len(made) > 1.9 * (len(TRAIN) + len(TEST))
    for pair in made:
        assert pair.label == judge(pair), pair.sentence
        assert pair.left is not pair.right
    tally = Counter((pair.form, pair.label) for pair in made)
    for form in {form for form, _ in tally}:
        assert 0.4 < tally[form, True] / (tally[form, True] + tally[form, False]) < 0.6, form
    # Nor does the number in a sentence about the total tell.
    total = Counter(
        (pair.sentence.replace("the two images", ""), pair.label) for pair in made if pair.form == "total"
    )
    guessed = sum(max(total[text, True], total[text, False]) for text in {text for text, _ in total})
    assert guessed / total.total() < 0.62


def test_web_captions_are_what_the_truth_says():
    made = [(s, web_text(s, 0, 800)) for s in WEB]
    shares = Counter(web.kind for _, web in made)
    for kind, rate in RATES.items():
        assert shares[kind] / len(made) == pytest.approx(rate, abs=0.05)
    for s, web in made:
        assert matches(parse(web.clean), s)
        claims = parse(web.text)
        if web.kind == "clean":
            assert web.text == web.clean
        elif web.kind == "wrong":
            assert claims.things
            assert not matches(claims, s, whole=False)
        elif web.kind == "swapped":
            changed = [
                (a, b)
                for a, b in zip(normal(web.clean).split(), normal(web.text).split(), strict=True)
                if a != b
            ]
            assert not matches(claims, s)
            assert {a for a, _ in changed} | {b for _, b in changed} <= {*COLORS, *SHAPES, "a", "an"}
        elif web.kind == "partial":
            assert len(web.text.split()) <= 5
            assert not matches(claims, s) or len(s.things) == 1
        else:
            assert not claims.things


def test_a_web_caption_depends_on_its_index_only():
    assert web_text(WEB[5], 0, 800) == web_text(scenes("web", 5, 6)[0], 0, 800)
    assert len({web_text(s, 0, 800).text for s in WEB}) > 600
