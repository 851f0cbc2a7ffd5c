"""Named vision towers: sizes from a table or timm, weights from files, frozen in their own precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from blip.config.schema import Section
from blip.errors import CheckpointError, ConfigError, UsageError, brief, nearest
from blip.layers.vit import NAMED, Vit, VitConfig, block_number, layer_id, rename_openai_clip, resize_on_load
from blip.meta import on_meta
from blip.models.published import published_towers
from blip.places import data_root, find_file
from blip.weights import read_weights

TIMM = "timm/"
TIMM_MODULES = ("vision_transformer", "deit", "eva", "beit")
"""Modules of timm whose models are plain stacks of blocks over prefix and patch tokens."""
TOWER_PREFIXES = ("visual_encoder.", "vision.vit.", "visual.")
"""Where whole models keep their tower: LAVIS's, ours, OpenAI's."""

_MODEL_KEYS = ("image_size:", "drop_path_rate:")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

RecomputeMode = Literal["none", "torch", "offload"]


@dataclass
class VisionConfig(Section):
    """A vision tower: its name, and what differs from the named one (null = as named)."""

    section: ClassVar[str] = "model.vit"

    vit_model: str = "eva_clip_g"
    """eva_clip_g, clip_L, vit_base, vit_large (BLIP's), or timm/<name of a timm ViT>."""
    image_size: int | None = None
    """Side of the input, in pixels; position embeddings of another size are interpolated when loaded."""
    patch_size: int | None = None
    """Side of a patch, in pixels."""
    width: int | None = None
    """Width of the patch states."""
    depth: int | None = None
    """Number of blocks."""
    heads: int | None = None
    """Attention heads; must divide the width."""
    mlp_dim: int | None = None
    """Width inside the MLP; null: in the named tower's proportion to the width."""
    drop_path_rate: float = 0.0
    """Drop path of the last block; grows linearly from 0. Rests while the tower is frozen."""
    norm_eps: float | None = None
    """Epsilon of the LayerNorms; not for timm towers."""
    init_std: float | None = None
    """Standard deviation of initial matrices and position embeddings; not for timm towers."""
    pos_std: float | None = None
    """Standard deviation of initial position embeddings; null: `init_std`. Not for timm towers."""
    stem_width: int | None = None
    """Channels of a convolution before the patches, which no published tower has; not for timm towers."""
    stem_stride: int | None = None
    """Stride of that convolution, a divisor of `patch_size`; its kernel is 2 * stride + 1 pixels wide."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Linear and convolution weights while the tower is frozen; the rest stays fp32."""
    freeze: bool = False
    """Keep the tower's weights as they are: no gradient, eval mode, `precision`."""
    train_steps: int = 0
    """Optimizer steps for which a tower that is to be frozen is trained first; 0: frozen from the start."""
    init_from: str | None = None
    """A safetensors or .pth file (as given, else below the data root), or `timm` / `timm/<name>` for timm's
    pretrained weights; null = random."""
    checkpoint: RecomputeMode = "none"
    """Recompute the blocks' activations in the backward pass; `offload` keeps their inputs in CPU memory."""
    checkpoint_last: int | None = None
    """Recompute only this many blocks from the end (LAVIS's `vit_ckpt_layer`); null = all."""

    def problems(self) -> list[str]:
        """Values that no tower can have; `size_problems` knows the named one."""
        found = self._at_least(1, "image_size", "patch_size", "width", "depth", "heads", "mlp_dim")
        found += self._at_least(0, "checkpoint_last", "train_steps") + self._within(0, 0.99, "drop_path_rate")
        if self.norm_eps is not None and self.norm_eps <= 0:
            found.append(f"norm_eps: {self.norm_eps} is not above 0")
        for key in ("init_std", "pos_std"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                found.append(f"{key}: {getattr(self, key)} is not above 0")
        if self.train_steps and not self.freeze:
            found.append("train_steps: only for a tower that is frozen afterwards; set freeze: true, or 0")
        return found

    def overruled(self, beside: Mapping[str, str], plain: Self) -> list[str]:
        """What is set here in vain, as problems: keys of the section -> keys of the model that decide.

        Args:
            beside: those keys.
            plain: the section as it is where nobody sets anything.
        """
        return [
            f"vit.{key}: has no effect here, since model.{ours} decides; set that one"
            for key, ours in beside.items()
            if getattr(self, key) != getattr(plain, key)
        ]

    def size_problems(self) -> list[str]:
        """Unknown tower, or sizes that do not fit together, one `key: reason` each; timm checks when built.

        Keys are relative to the model's section, where the tower's name and the image size stand.
        """
        if self.vit_model.startswith(TIMM):
            return []
        if self.vit_model not in NAMED:
            return [f"vit_model: unknown vision tower {self.vit_model!r}{_tower_hint(self.vit_model)}"]
        problems = self._resolved().problems()
        return [p if p.startswith(_MODEL_KEYS) else f"vit.{p}" for p in problems]

    def resolve(self) -> VitConfig:
        """The named tower's sizes with the overrides; not for timm towers.

        Raises:
            ConfigError: as `size_problems`.
        """
        if problems := self.size_problems():
            raise ConfigError("model." + "; model.".join(problems))
        return self._resolved()

    def _resolved(self) -> VitConfig:
        named = NAMED[self.vit_model]
        width = self.width or named.width
        sizes = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "width": width,
            "depth": self.depth,
            "heads": self.heads,
            "mlp_dim": self.mlp_dim or width * named.mlp_dim // named.width,
            "norm_eps": self.norm_eps,
            "init_std": self.init_std,
            "pos_std": self.pos_std,
            "stem_width": self.stem_width,
            "stem_stride": self.stem_stride,
        }
        given: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
        return replace(named, drop_path_rate=self.drop_path_rate, **given)


class VisionTower(nn.Module):
    """Images to patch states, by one of the named transformers or a timm one.

    Building it reads no file and fetches nothing; `load_initial` does, where `init_from` says so. While
    frozen it has no gradient, stays in eval mode whatever `train()` says, and its linear and convolution
    weights are in `config.precision`.

    Shape:
        image: float (B, 3, H, W), normalised, H = W = the configured size.
        returns: (B, P, D): every prefix and patch token; in `precision` while frozen in half, else float32.

    Raises:
        ConfigError: unknown tower, or sizes that do not fit together.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vit: Any
        if config.vit_model.startswith(TIMM):
            self.vit = _build_timm(config)
            self.width = int(self.vit.embed_dim)
            self.num_tokens = int(self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens)
            self.image_size = int(self.vit.patch_embed.img_size[0])
        else:
            self.vit = Vit(config.resolve())
            self.width = self.vit.config.width
            self.num_tokens = self.vit.num_tokens
            self.image_size = self.vit.config.image_size
        self.frozen = False
        self.loaded_from: str | None = None
        """What `load_initial` has loaded, as the configuration names it."""
        if config.freeze and not config.train_steps:
            self.freeze()

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    def blocks(self) -> list[nn.Module]:
        """The blocks in order, for recomputation (`engine.recompute`) and sharding."""
        return list(self.vit.blocks)

    def layer_id(self, name: str) -> int:
        """Layer of a parameter of this module for layer-wise learning-rate decay (`layers.vit.layer_id`)."""
        return layer_id(name.removeprefix("vit."), self.num_layers)

    def forward(self, image: Tensor) -> Tensor:
        self._check(image)
        if not self.frozen:
            return self._states(image)
        with torch.no_grad(), self._own_precision(image.device.type) as dtype:
            return self._states(image).to(dtype)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, unless frozen: then the tower stays in eval mode."""
        return super().train(mode and not self.frozen)

    def freeze(self) -> None:
        """No gradient, eval mode, linear and convolution weights in `config.precision`."""
        self.frozen = True
        self.train(False)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        if self.config.precision != "fp32":  # which leaves everything as it is, float64 too
            self._cast(DTYPES[self.config.precision])

    def load_initial(self, data_root: str | Path | None = None) -> list[str]:
        """Load the weights that `config.init_from` names; returns one line of report, or none.

        Args:
            data_root: where a relative path that does not exist as given is looked for, too (`find_file`).

        Raises:
            ConfigError: timm has no such model or no weights for it.
            CheckpointError: no such file, an unreadable one, a weight missing, of another shape, or without a
                place here.
        """
        source = self.config.init_from
        if source is None:
            return []
        if source == "timm" or source.startswith(TIMM):
            state = _timm_weights(source, self.config.vit_model)
        else:
            state = _tower_part(read_weights(_weights_path(source, data_root)))
        if "class_embedding" in state:
            state = rename_openai_clip(state)
        report = [self._load(state, source)]
        self.loaded_from = source
        return report

    def _states(self, image: Tensor) -> Tensor:
        return self.vit(image) if isinstance(self.vit, Vit) else self.vit.forward_features(image)

    def _check(self, image: Tensor) -> None:
        size = tuple(image.shape[-2:])
        if size != (self.image_size, self.image_size):
            raise ConfigError(
                f"the vision tower {self.config.vit_model} is built for {self.image_size} x {self.image_size}"
                f" pixels and was given {' x '.join(map(str, size))}; set model.image_size and the"
                " processors' image_size to the same value"
            )
        if not image.is_floating_point():
            raise UsageError(
                f"images must be normalised float, not {image.dtype}; blip.batch.to_device does it"
            )

    @contextmanager
    def _own_precision(self, device_type: str) -> Iterator[torch.dtype | None]:
        """Autocast to the frozen weights' half precision; with fp32 weights, whatever surrounds us."""
        if self.config.precision == "fp32":
            yield None
            return
        dtype = DTYPES[self.config.precision]
        with torch.autocast(device_type, dtype=dtype):
            yield dtype

    def _cast(self, dtype: torch.dtype) -> None:
        # As LAVIS: [CLS], positions, LayerNorms and EVA's separate biases keep their type.
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.to(dtype)

    def _load(self, state: dict[str, Tensor], source: str) -> str:
        wanted = self.vit.state_dict()
        unused = sorted(state.keys() - wanted.keys())
        missing = sorted(wanted.keys() - state.keys())
        foreign = [name for name in unused if not self._may_drop(name, state[name])]
        if missing or foreign:
            parts = [
                f"{len(n)} {what} ({_some(n)})"
                for what, n in (("missing", missing), ("unknown", foreign))
                if n
            ]
            raise CheckpointError(
                f"model.vit_init_from: {source} does not fit {self.config.vit_model}: {', '.join(parts)};"
                " give weights of that tower, or set its sizes to the file's"
            )
        try:
            self.vit.load_state_dict({name: state[name] for name in wanted})
        except RuntimeError as error:
            shapes = [n for n in wanted if not _same_shape(n, state[n], wanted[n])]
            first = f"{tuple(state[shapes[0]].shape)}, needed {tuple(wanted[shapes[0]].shape)}"
            raise CheckpointError(
                f"model.vit_init_from: {source} has other shapes than {self.config.vit_model}:"
                f" {_some(shapes)} (first: {first}); set model.vit's sizes to the file's"
            ) from error
        resized = "pos_embed" in wanted and state["pos_embed"].shape != wanted["pos_embed"].shape
        note = f"; not used: {_some(unused)}" if unused else ""
        return (
            f"vision tower: {len(wanted)} tensors from {source}" + "; positions interpolated" * resized + note
        )

    def _may_drop(self, name: str, tensor: Tensor) -> bool:
        """Whether the tower rightly has no place for a weight: what comes after its output, zero biases."""
        number = block_number(name)
        if number is not None:
            # EVA's key bias is zero by construction; timm writes it out.
            zero_bias = name.endswith(".attn.k_bias") and not tensor.any()
            return number >= self.num_layers or zero_bias
        if name.startswith("norm.") and isinstance(self.vit, Vit):
            return not self.vit.config.final_norm
        return name.startswith(
            ("head.", "head_dist.", "fc_norm.", "attn_pool.", "ln_post.", "pre_logits.")
        ) or name in (
            "proj",
            "mask_token",
        )


def _weights_path(source: str, root: str | Path | None) -> Path:
    found = find_file(source, root)
    if found is not None:
        return found
    url = published_towers().get(Path(source).name)
    get = f"LAVIS publishes it at {url}; put it there, or give" if url else "give"
    raise CheckpointError(
        f"model.vit_init_from: no file '{source}', neither as given nor below the data root"
        f" '{data_root(root)}' (run.data_root or BLIP_DATA); {get} another weight file, or null for a"
        " tower that starts at random"
    )


def _tower_hint(name: str) -> str:
    close = nearest(name, NAMED)
    return (
        f"; did you mean {close[0]!r}?"
        if close
        else f"; choose from {', '.join(NAMED)}, or timm/<name of a timm ViT>"
    )


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f", ... {len(names)} in all" if len(names) > count else "")


def _same_shape(name: str, given: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor fits; positions of another grid do, since they are interpolated."""
    return given.shape == wanted.shape or (name == "pos_embed" and given.shape[-1] == wanted.shape[-1])


def _tower_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's tensors of a file that may hold a whole model."""
    for prefix in TOWER_PREFIXES:
        part = {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
        }
        if part:
            return part
    return state


def _check_timm_name(name: str) -> None:
    """Raise ConfigError unless timm has a plain vision transformer called `name`."""
    import timm
    from timm.models import is_model_in_modules

    if timm.is_model(name) and is_model_in_modules(name, TIMM_MODULES):
        return
    architecture = name.split(".")[0]
    vits = [model for module in TIMM_MODULES for model in timm.list_models(module=module)]
    close = nearest(architecture, vits, count=3)
    kind = "is not a plain vision transformer" if timm.is_model(name) else "does not exist in timm"
    near = (
        f"; nearest: {', '.join(TIMM + model for model in close)}"
        if close
        else "; e.g. timm/vit_small_patch16_224"
    )
    raise ConfigError(f"model.vit_model: {TIMM}{name} {kind}{near}")


def _build_timm(config: VisionConfig) -> Any:
    """A timm ViT with random weights and nothing behind its last norm."""
    import timm

    name = config.vit_model.removeprefix(TIMM)
    _check_timm_name(name)
    for key in ("norm_eps", "init_std", "pos_std", "stem_width", "stem_stride"):
        if getattr(config, key) is not None:
            raise ConfigError(f"model.vit.{key}: cannot be set for {config.vit_model}; leave it out")
    sizes: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    given = {key: value for key, value in sizes.items() if value is not None}
    try:
        if config.mlp_dim:
            with on_meta():
                sketch: Any = timm.create_model(name, **given)
            width = sketch.embed_dim
            given["mlp_ratio"] = (config.mlp_dim + 0.5) / width  # timm truncates width * ratio
        vit: Any = timm.create_model(name, num_classes=0, drop_path_rate=config.drop_path_rate, **given)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"model.vit: timm cannot build {name} with {given}: {brief(error)}; take back what"
            " differs from the named tower"
        ) from error
    # Pooling and its norm would be parameters that no loss reaches.
    vit.reset_classifier(0, "")
    vit.fc_norm = nn.Identity()
    prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
    resize_on_load(vit, vit.patch_embed.grid_size, prefix, align_corners=False)
    return vit


def _timm_weights(source: str, vit_model: str) -> dict[str, Tensor]:
    """State dict of a pretrained timm model, at the size it was trained for."""
    import timm

    name = source.removeprefix(TIMM) if source != "timm" else vit_model.removeprefix(TIMM)
    if source == "timm" and not vit_model.startswith(TIMM):
        raise ConfigError(
            f"model.vit_init_from: 'timm' does not say which weights {vit_model} should start from;"
            " give timm/<name>"
        )
    _check_timm_name(name)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub client raises errors of many packages
        raise ConfigError(
            f"model.vit_init_from: timm could not give pretrained weights of {name} ({type(error).__name__}:"
            f" {brief(error)}); is the network or the Hugging Face cache reachable? A file of weights or"
            " null also works"
        ) from error
    return dict(model.state_dict())
