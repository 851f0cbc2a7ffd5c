"""What every model has: its configuration, text encoding, freezing, checkpoint contents and export."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, asdict, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from blip import atomic
from blip.batch import Output
from blip.config.schema import ModelConfig
from blip.errors import CheckpointError, ConfigError, UsageError, brief, hint
from blip.models.card import card
from blip.models.tokenizer import BERT_ENDS, DEC, Ends, WordPieces, known_rows
from blip.models.vision import RecomputeMode, VisionTower
from blip.registry import MODELS
from blip.weights import GIVEN, save_safetensors

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
FORMAT = "blip"
"""What `format` of our `config.json` says."""


class Sizes(NamedTuple):
    """What tensors tell of a configuration."""

    values: dict[str, Any]
    """Configuration values, sections as dictionaries."""
    unknown: list[str]
    """Dotted keys that these tensors do not tell and that no published size suggests."""


class Adopted(NamedTuple):
    """Weights that a model takes over."""

    tensors: dict[str, Tensor]
    left_out: dict[str, str]
    """Name of a tensor that has no place in the model -> why."""
    kept: list[str]
    """Names of the model's tensors that the weights say nothing of: they keep their values."""


class BlipModel(nn.Module):
    """Networks plus `forward(batch) -> Output`; `forward` reads state, `after_step` changes it.

    A subclass sets `config_class` and `presets`, builds its parts in `__init__` from the typed
    configuration, and reads no file there; `load_parts` fetches what the parts start from.
    """

    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    added_tokens: ClassVar[tuple[str, ...]] = (DEC,)
    published: ClassVar[dict[str, str]] = {}
    """Preset -> address of the weights that LAVIS publishes for it."""
    starts: ClassVar[dict[str, str]] = {}
    """Preset -> address of what training starts from: `pretrained` of LAVIS's model configuration."""
    freezable: ClassVar[tuple[str, ...]] = ()
    """State-dict prefixes of parts that weight files may leave out; `load_frozen` fetches them."""
    replaceable: ClassVar[tuple[str, ...]] = ()
    """State-dict prefixes of state that weight files may lack; `replace` makes it from the rest."""
    on_cpu: ClassVar[dict[str, Any]] = {}
    """Configuration values with which foreign weights compute in float32, as LAVIS does on a CPU."""
    default_processors: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "vis_processor": {"train": {"name": "blip_image_train"}, "eval": {"name": "blip_image_eval"}},
        "text_processor": {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption"}},
    }
    """Processors as LAVIS's model configurations name them; pictures get the model's `image_size`."""

    vision: VisionTower

    def __init__(self, config: ModelConfig, data_root: str | Path | None = None) -> None:
        super().__init__()
        self.config: Any = config
        self._data_root = data_root
        self._word_pieces: WordPieces | None = None
        self.processors = deepcopy(self.default_processors)
        """What turns pictures and texts into this model's input; `config.json` keeps it."""
        self.load_report: list[str] = []
        """What became of the names of the weights that were loaded: a line for each part."""
        self.unknown: list[str] = []
        """Names of which the weights that were loaded say nothing: those of another model of the family."""

    def __call__(self, samples: dict[str, Any] | None = None, /, *args: Any, **more: Any) -> Any:
        """`forward`. What is named and no argument of it joins the samples: `model(image=x, text_ids=y)`."""
        known = signature(type(self).forward).parameters
        joined = {key: more.pop(key) for key in list(more) if key not in known}
        if samples is None and not joined:
            return super().__call__(*args, **more)
        return super().__call__({**(samples or {}), **joined} if joined else samples, *args, **more)

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor]) -> Sizes:
        """What weights by our names tell of the configuration; they may lack what is `freezable`."""
        return Sizes({}, [])

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
                made: Any = part.default_factory()
                given = {**preset.get(part.name, {}), **given}
                values[part.name] = {**made, **given} if isinstance(made, dict) else replace(made, **given)
        return cls(cls.config_class(**values))

    @classmethod
    def build(cls, config: Any, data_root: str | Path | None = None) -> Self:
        """A model with random weights, for a command; ours look for files that the configuration names.

        Args:
            config: of `config_class`.
            data_root: where they may lie; None: the environment variable BLIP_DATA, else `data`.
        """
        return cls(config)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def word_pieces(self) -> WordPieces:
        """The tokenizer, read at first use."""
        if self._word_pieces is None:
            self._word_pieces = WordPieces(self.config.tokenizer, self.added_tokens, self._data_root)
            rows, needed = getattr(self.config, "vocab_size", None), self._word_pieces.vocab_size
            if rows is not None and rows < needed:
                raise ConfigError(
                    f"model.vocab_size: {rows} rows of word embeddings are too few for the {needed} pieces of"
                    f" the tokenizer {self.config.tokenizer!r}; set it to {needed} or more, or to null"
                )
            for token, number in self.config.special_ids.items():
                setattr(self._word_pieces, f"{token}_id", number)
            self.take_ids(self._word_pieces)
        return self._word_pieces

    @property
    def text_ends(self) -> Ends:
        """Ids that end and pad texts; BERT's, where no tokenizer can be read, since texts are given as ids.

        Raises:
            ConfigError: nothing says them, and the vocabulary is too small to be BERT's.
        """
        given = self.config.special_ids
        if "sep" in given:
            return Ends(given["sep"], given.get("pad", BERT_ENDS.pad_id))
        try:
            return Ends(self.word_pieces.sep_id, self.word_pieces.pad_id)
        except ConfigError as error:
            if (self.config.vocab_size or 0) <= BERT_ENDS.end_id:
                raise ConfigError(
                    f"{error}; for texts as ids, model.special_ids.sep says what ends them"
                ) from error
            return BERT_ENDS

    @property
    def word_rows(self) -> int:
        """Rows of the word embeddings: `vocab_size`, else the tokenizer's, by its name if that tells."""
        config = self.config
        known = config.vocab_size or known_rows(config.tokenizer, self.added_tokens, self._data_root)
        return known or self.word_pieces.vocab_size

    def take_ids(self, word_pieces: WordPieces) -> None:
        """Told of the tokenizer when it is read: its added tokens may stand before other rows."""

    def tokenize(self, texts: list[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Ids and mask of texts, as the training loss wants them: `text_ids`, `text_mask` (B, T)."""
        return self.word_pieces(texts, max_length or self.config.max_txt_len)

    def text_columns(self) -> dict[str, int | None]:
        """Texts of a batch that training tokenises -> the longest, in tokens; None = not cut."""
        return {"text_input": self.config.max_txt_len}

    @property
    def pad_id(self) -> int:
        """What the loader pads tokens with; masks say what is padding."""
        return self.word_pieces.pad_id

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Told of each training batch before it goes to the device, with `step` and `seed`.

        Here a model makes tokens that depend on both, or on several columns.
        """
        return batch

    def num_contrasted(self, batch: int) -> int:
        """What ITC chooses from, in a global batch of `batch` rows."""
        return batch

    def count_targets(self, batch: dict[str, Any]) -> int:
        """Tokens of a batch that the language-modelling loss is a mean over."""
        return int(batch["text_mask"][:, 1:].sum()) if "text_mask" in batch else 0

    def with_text(self, batch: dict[str, Any], max_length: int | None = None) -> dict[str, Any]:
        """The batch with `text_ids` and `text_mask`; strings are tokenised, to the model's device.

        Ids without a mask are not padded; a mask may be of integers, as transformers' are.
        """
        if "text_ids" in batch:
            mask = batch.get("text_mask")
            mask = torch.ones_like(batch["text_ids"], dtype=torch.bool) if mask is None else mask.bool()
            return {**batch, "text_mask": mask}
        if "text_input" not in batch:
            raise UsageError("text_input: no texts; give them, or text_ids and text_mask")
        texts = batch["text_input"]
        tokens = self.tokenize([texts] if isinstance(texts, str) else list(texts), max_length)
        return {**batch, **{k: v.to(self.device) for k, v in tokens.items()}}

    def image_states(self, batch: dict[str, Any], tower: nn.Module | None = None) -> Tensor:
        """The tower's states (B, P, D_image), or the batch's `image_embeds` in their place.

        Frames of videos, `image` (B, F, 3, H, W), give the states of all frames one after the other,
        (B, F * P, D_image), as BLIP reads videos. LAVIS's order, (B, 3, F, H, W), is taken too, but for three
        frames.

        Args:
            batch: with `image` or `image_embeds`.
            tower: another one than the model's own, such as that of its twin.
        """
        if "image_embeds" in batch:
            return batch["image_embeds"]
        tower = self.vision if tower is None else tower
        image = batch["image"]
        if image.ndim == 5:
            if image.shape[1] == 3 != image.shape[2]:
                image = image.transpose(1, 2)
            return tower(image.flatten(0, 1)).unflatten(0, image.shape[:2]).flatten(1, 2)
        return tower(image)

    def load_parts(self, data_root: str | Path | None = None) -> list[str]:
        """Load what the parts start from (pretrained tower, BERT); returns one line of report per part.

        Args:
            data_root: where files that the configuration names may lie; None: the environment variable
                BLIP_DATA, else `data`.
        """
        return []

    def load_frozen(self, prefixes: Collection[str], data_root: str | Path | None = None) -> list[str]:
        """Load those of the `freezable` parts that a weight file has left out; else as `load_parts`."""
        return []

    def adopt(self, tensors: dict[str, Tensor]) -> Adopted:
        """Weights by our names, of this model or of a relative, as far as this model has a place for them."""
        return Adopted(tensors, {}, [])

    def replace(self, names: Collection[str]) -> list[str]:
        """Make those of the `replaceable` tensors that a weight file lacks; a line of report per kind."""
        return []

    def on_step(self, step: int) -> bool:
        """Told before optimizer step `step` (from 0); True if the set of trainable parameters changed.

        Freezes the tower, and a twin's, once it has been trained for as long as its configuration says.
        """
        tower = self.vision.config
        if not tower.freeze or step < tower.train_steps or self.vision.frozen:
            return False
        for part in self.modules():
            if isinstance(part, VisionTower):
                part.freeze()
                if part is not self.vision and tower.precision != "fp32":
                    # Rounding would swallow the small steps by which a twin follows.
                    part.load_state_dict(self.vision.state_dict())
        return True

    def idle_parameters(self) -> bool:
        """Whether parameters that train get no gradient at present, so that DDP has to look for them."""
        return False

    def after_step(self, outputs: Sequence[Output]) -> None:
        """Told after a successful optimizer step: momentum twin, queues, temperature."""

    def begin_anew(self, names: Collection[str]) -> None:
        """Told which tensors keep the values they start with, when all others were loaded."""

    def begin(self) -> None:
        """Told when a run starts from weights of another one, not when it is continued."""

    def frozen_parts(self) -> dict[str, str]:
        """Parts that checkpoints leave out: state-dict prefix -> where the weights come from."""
        return {}

    def state_to_save(self) -> dict[str, Tensor]:
        """The state dict without `frozen_parts`."""
        absent = tuple(self.frozen_parts())
        return {k: v for k, v in self.state_dict().items() if not (absent and k.startswith(absent))}

    def recompute(self) -> list[tuple[list[nn.Module], RecomputeMode, int | None]]:
        """Blocks that recompute their activations (`engine.recompute`), how, and the last how many."""
        return [(self.vision.blocks(), *self.config.recompute())]

    def lr_scale(self, name: str, decay: float) -> float:
        """Factor of the learning rate of parameter `name` under layer-wise decay.

        Block k of the tower's L gets decay^(L + 1 - k), everything else 1.
        """
        if not name.startswith("vision."):
            return 1.0
        return decay ** (self.vision.num_layers + 1 - self.vision.layer_id(name.removeprefix("vision.")))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `model.safetensors` and `config.json`, which `blip.from_pretrained` reads back.

        Weights of `frozen_parts` are left out; `config.json` says where they come from.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write to '{folder}': {error.strerror or error}") from error
        save_safetensors(self.state_to_save(), folder / WEIGHTS_FILE)
        self.describe(folder, self.frozen_parts())
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Upload what `save_pretrained` writes, with a model card, to the Hugging Face hub.

        Args:
            repo_id: `user/name`; made where it is not there. Its README, if it has one, stays.
            private: whether a new repository is.
            token: None: the one that `hf auth login` has stored.
            commit_message: of the upload.

        Returns:
            The address of the upload.

        Raises:
            UsageError: the hub refuses, or cannot be reached.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if not api.file_exists(repo, CARD_FILE):
                    text = card(self, self._arch(), repo, self.frozen_parts())
                    (Path(folder) / CARD_FILE).write_text(text, encoding="utf-8")
                return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message))
            except Exception as error:  # the hub client raises errors of many packages
                raise UsageError(
                    f"push_to_hub: '{repo_id}' cannot be written ({brief(error)}); look at the name, the"
                    " connection and the token (hf auth login)"
                ) from error

    def _arch(self) -> str:
        named = (name for name in MODELS.names() if MODELS.get(name) is type(self))
        return str(self.config.arch or next(named, ""))

    def describe(self, folder: Path, frozen: Mapping[str, str], absent: Collection[str] = ()) -> None:
        """Write the `config.json` that belongs to a folder of weights.

        Args:
            folder: must exist.
            frozen: parts that the weights leave out: state-dict prefix -> where they come from.
            absent: names that the weights lack since the layout they came from has no place for them; they
                begin as in a new model.
        """
        config = {**asdict(self.config), "arch": self._arch()}
        for section, name in ((config, "tokenizer"), (config.get("llm") or {}, "llm_tokenizer")):
            if (place := _carried(section.get("tokenizer"), name)) is not None:
                if place.resolve() != (folder / name).resolve():
                    shutil.copytree(place, folder / name, dirs_exist_ok=True)
                section["tokenizer"] = f"./{name}"
        description = {
            "format": FORMAT,
            "config": config,
            "frozen_parts": dict(frozen),
            **({"absent": sorted(absent)} if absent else {}),
            "processors": self.processors,
        }
        atomic.write_text(folder / CONFIG_FILE, json.dumps(description, indent=2) + "\n")


def _carried(tokenizer: str | None, name: str) -> Path | None:
    """The folder of a tokenizer that goes along with the weights, which would not find it otherwise.

    It was given as an object, and goes when this process ends; or it came along with other weights.
    """
    place = Path(tokenizer or "")
    beside = place.name == name and (place.parent / CONFIG_FILE).is_file()
    return place if place.name.startswith(GIVEN) or beside else None
