"""Registries with small stand-ins, so that these tests need neither torch nor the real models."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from blip.config.schema import ModelConfig, RunConfig, Section
from blip.errors import ConfigError
from blip.registry import MODELS, PROCESSORS, TASKS


@dataclass
class Tower(Section):
    section: ClassVar[str] = "model.vit"

    width: int | None = None
    depth: int | None = None

    def problems(self) -> list[str]:
        return self._at_least(1, "width", "depth")


@dataclass
class Head:
    layers: int = 1

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"layers: {self.layers} is below 1")


@dataclass
class StubModelConfig(ModelConfig):
    vit_model: str = "eva_clip_g"
    image_size: int = 224
    freeze_vit: bool = True
    max_txt_len: int = 32
    dropout: float = 0.1
    scale: tuple[float, float] = (0.5, 1.0)
    vit: Tower = field(default_factory=Tower)
    head: Head | None = None


class StubModel:
    config_class = StubModelConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "pretrain": {},
        "coco": {"image_size": 364, "vit": {"depth": 39}},
    }


@dataclass
class RetrievalRun(RunConfig):
    k_test: int = 128


class Pretrain:
    run_config_class = RunConfig


class Retrieval:
    run_config_class = RetrievalRun


@dataclass
class ImageProcessor:
    image_size: int = 384
    min_scale: float = 0.5
    mean: list[float] | None = None

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigError(f"image_size: {self.image_size} is below 1")


@dataclass
class CaptionProcessor:
    prompt: str = ""
    max_words: int = 50


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    images = (
        "blip_image_train",
        "blip_image_eval",
        "blip2_image_train",
        "clip_image_train",
        "clip_image_eval",
    )
    names: dict[Any, dict[str, type]] = {
        MODELS: dict.fromkeys(("blip2", "blip_caption", "blip2_t5_instruct"), StubModel),
        TASKS: {"image_text_pretrain": Pretrain, "captioning": Pretrain, "retrieval": Retrieval},
        PROCESSORS: dict.fromkeys(images, ImageProcessor) | {"blip_caption": CaptionProcessor},
    }
    for registry, classes in names.items():
        monkeypatch.setattr(registry, "_searched", True)
        monkeypatch.setattr(registry, "_classes", classes)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes YAML text as `recipe.yaml` into an empty working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str) -> str:
        Path("recipe.yaml").write_text(textwrap.dedent(text))
        return "recipe.yaml"

    return write_recipe
