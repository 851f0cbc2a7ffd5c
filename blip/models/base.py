"""What every model has: its configuration, text encoding, freezing, checkpoint contents and export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from blip.batch import Output
from blip.config.schema import ModelConfig
from blip.errors import ConfigError, hint
from blip.models.tokenizer import DEC, WordPieces
from blip.weights import save_safetensors

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class BlipModel(nn.Module):
    """Networks plus `forward(batch) -> Output`; `forward` reads state, `after_step` changes it.

    A subclass sets `config_class` and `presets`, builds its parts in `__init__` from the typed
    configuration, and reads no file there; `load_parts` fetches what the parts start from.
    """

    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    added_tokens: ClassVar[tuple[str, ...]] = (DEC,)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config: Any = config
        self._word_pieces: WordPieces | None = None

    @classmethod
    def from_preset(cls, model_type: str | None = None, **overrides: Any) -> Self:
        """A model with random weights: the sizes of a preset (the first by default), with overrides.

        What the preset names to start from is read by `load_parts`, if that is called.

        Raises:
            ConfigError: unknown preset, or sizes that cannot be built.
        """
        name = model_type or next(iter(cls.presets))
        if name not in cls.presets:
            raise ConfigError(f"model.model_type: no preset {name!r}{hint(name, cls.presets)}")
        preset = cls.presets[name]
        values = {"model_type": name, **preset, **overrides}
        for part in fields(cls.config_class):
            given = values.get(part.name)
            if isinstance(given, dict) and part.default_factory is not MISSING:
                values[part.name] = part.default_factory(**{**preset.get(part.name, {}), **given})
        return cls(cls.config_class(**values))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def word_pieces(self) -> WordPieces:
        """The tokenizer, read at first use."""
        if self._word_pieces is None:
            self._word_pieces = WordPieces(self.config.tokenizer, self.added_tokens)
        return self._word_pieces

    def tokenize(self, texts: list[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Ids and mask of texts, as the training loss wants them: `text_ids`, `text_mask` (B, T)."""
        return self.word_pieces(texts, max_length or self.config.max_txt_len)

    def with_text(self, batch: dict[str, Any], max_length: int | None = None) -> dict[str, Any]:
        """The batch with `text_ids` and `text_mask` on the model's device; strings are tokenised."""
        if "text_ids" in batch:
            return batch
        texts = batch["text_input"]
        tokens = self.tokenize([texts] if isinstance(texts, str) else list(texts), max_length)
        return {**batch, **{k: v.to(self.device) for k, v in tokens.items()}}

    def load_parts(self, data_root: str | Path | None = None) -> list[str]:
        """Load what the parts start from (pretrained tower, BERT); returns one line of report per part.

        Args:
            data_root: where files that the configuration names may lie; None: the environment variable
                BLIP_DATA, else `data`.
        """
        return []

    def on_step(self, step: int) -> bool:
        """Told before optimizer step `step` (from 0); True if the set of trainable parameters changed."""
        return False

    def idle_parameters(self) -> bool:
        """Whether parameters that train get no gradient at present, so that DDP has to look for them."""
        return False

    def after_step(self, outputs: Sequence[Output]) -> None:
        """Told after a successful optimizer step: momentum twin, queues, temperature."""

    def frozen_parts(self) -> dict[str, str]:
        """Parts that checkpoints leave out: state-dict prefix -> where the weights come from."""
        return {}

    def state_to_save(self) -> dict[str, Tensor]:
        """The state dict without `frozen_parts`."""
        absent = tuple(self.frozen_parts())
        return {k: v for k, v in self.state_dict().items() if not (absent and k.startswith(absent))}

    def blocks(self) -> list[nn.Module]:
        """Repeated blocks that may be recomputed or sharded."""
        return []

    def lr_scale(self, name: str, decay: float) -> float:
        """Factor of the learning rate of parameter `name` under layer-wise decay."""
        return 1.0

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `model.safetensors` and `config.json`, which `blip.from_pretrained` reads back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors(self.state_to_save(), folder / WEIGHTS_FILE)
        description = {"format": "blip", "config": asdict(self.config), "frozen_parts": self.frozen_parts()}
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
        return folder
