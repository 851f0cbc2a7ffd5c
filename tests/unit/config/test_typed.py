"""What a command line says of the section `model`, as the functions of Python take it."""

from __future__ import annotations

import pytest

from blip.config.typed import model_overrides
from blip.errors import ConfigError


def test_keys_become_nested_sections_with_or_without_the_name_of_theirs() -> None:
    given = ["vit.heads=2", "model.vit.depth=4", "tokenizer=scenes", "prompt=", "llm_model=null"]
    expected = {"vit": {"heads": 2, "depth": 4}, "tokenizer": "scenes", "prompt": "", "llm_model": None}
    assert model_overrides(given) == expected
    assert model_overrides([]) == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["vit={heads: 2}", "vit.depth=4"], {"vit": {"heads": 2, "depth": 4}}),
        (["vit.depth=4", "vit={heads: 2}"], {"vit": {"depth": 4, "heads": 2}}),
        (["vit=large", "vit.depth=4"], {"vit": {"depth": 4}}),
        (["vit.depth=4", "vit=large"], {"vit": "large"}),
        (["vit.depth=4", "vit.depth=5"], {"vit": {"depth": 5}}),
    ],
)
def test_sections_are_laid_over_each_other_and_the_last_value_wins(
    given: list[str], expected: dict[str, object]
) -> None:
    assert model_overrides(given) == expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("vit.heads", "'vit.heads' is no override; write key=value"),
        ("vit..heads=2", "is no override"),
        ("arch=blip_vqa", "'arch' is no key to override here; the command has an argument for it"),
        ("model.arch=blip_vqa", "'arch' is no key to override here"),
    ],
)
def test_what_is_no_override_is_refused(given: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_overrides([given], taken=["arch"])
    assert told in str(caught.value)
