"""One vision transformer, written once: EVA-CLIP ViT-g, CLIP ViT-L and BLIP's ViT-B/L differ in options only.

Parameter names are those of LAVIS's EVA and BLIP towers (`blocks.3.attn.qkv.weight`), so their weights load
as they are; OpenAI's names for CLIP become ours by `OPENAI_CLIP_NAMES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.errors import CheckpointError

Grid = tuple[int, int]


@dataclass(frozen=True)
class VitConfig:
    """Sizes and variants of a vision transformer; `NAMED` has those of the published towers."""

    name: str
    image_size: int
    """Side of the square input, in pixels."""
    patch_size: int
    width: int
    """D, of the patch states."""
    depth: int
    """Number of blocks."""
    heads: int
    mlp_dim: int
    drop_path_rate: float = 0.0
    """Drop path of the last block; grows linearly from 0 at the first."""
    norm_eps: float = 1e-6
    act: Literal["gelu", "quick_gelu"] = "gelu"
    """`gelu` is the exact (erf) one; `quick_gelu` is x * sigmoid(1.702 x)."""
    qkv_bias: Literal["fused", "q_v"] = "fused"
    """`fused`: one bias for queries, keys and values; `q_v`: no key bias (EVA)."""
    patch_bias: bool = True
    """Bias in the patch embedding."""
    stem_width: int = 0
    """Channels of a convolution, with `act`, before the patches; 0: none, as in all published towers."""
    stem_stride: int = 2
    """Stride of that convolution, in pixels; its kernel is 2 * stride + 1 wide."""
    pre_norm: bool = False
    """LayerNorm before the first block (CLIP's `ln_pre`)."""
    final_norm: bool = True
    """LayerNorm after the last block, on all tokens."""
    align_corners: bool = False
    """How position embeddings are interpolated to another grid."""
    init_std: float = 0.02
    """Standard deviation of initial matrices and of [CLS] and position embeddings."""
    pos_std: float | None = None
    """Standard deviation of initial position embeddings; None: `init_std`."""
    depth_scaled_init: bool = False
    """Divide initial output projections of block k (from 1) by sqrt(2 k), as EVA does."""

    @property
    def grid(self) -> Grid:
        """Patches per column and row."""
        return (self.image_size // self.patch_size,) * 2

    def problems(self) -> list[str]:
        """Sizes that do not fit together, one `key: reason; what to do` each."""
        found = [
            f"{key}: {getattr(self, key)} is below 1"
            for key in ("image_size", "patch_size", "width", "depth", "heads", "mlp_dim")
            if getattr(self, key) < 1
        ]
        if found:
            return found
        if self.width % self.heads:
            found.append(
                f"heads: {self.heads} does not divide the width {self.width} of {self.name};"
                " set heads or width"
            )
        if self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            near = f"{below} or {below + self.patch_size}" if below else str(self.patch_size)
            found.append(
                f"image_size: {self.image_size} is not a multiple of the patch size {self.patch_size} of"
                f" {self.name}; use {near}, or set patch_size"
            )
        if self.stem_width < 0:
            found.append(f"stem_width: {self.stem_width} is below 0")
        if self.stem_width and (self.stem_stride < 1 or self.patch_size % self.stem_stride):
            found.append(
                f"stem_stride: {self.stem_stride} does not divide the patch size {self.patch_size} of"
                f" {self.name}; set stem_stride or patch_size"
            )
        if not 0 <= self.drop_path_rate < 1:
            found.append(f"drop_path_rate: {self.drop_path_rate} is not in [0, 1)")
        return found


NAMED: dict[str, VitConfig] = {
    config.name: config
    for config in (
        # EVA-CLIP's 40th and CLIP's 24th block are absent: BLIP-2 takes the states before the last block.
        VitConfig(
            name="eva_clip_g",
            image_size=224,
            patch_size=14,
            width=1408,
            depth=39,
            heads=16,
            mlp_dim=6144,
            qkv_bias="q_v",
            final_norm=False,
            depth_scaled_init=True,
        ),
        VitConfig(
            name="clip_L",
            image_size=224,
            patch_size=14,
            width=1024,
            depth=23,
            heads=16,
            mlp_dim=4096,
            norm_eps=1e-5,
            act="quick_gelu",
            patch_bias=False,
            pre_norm=True,
            final_norm=False,
            align_corners=True,
        ),
        VitConfig(
            name="vit_base", image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_dim=3072
        ),
        VitConfig(
            name="vit_large", image_size=224, patch_size=16, width=1024, depth=24, heads=16, mlp_dim=4096
        ),
    )
}
"""The published towers: EVA-CLIP ViT-g/14 and CLIP ViT-L/14 as in BLIP-2, ViT-B/16 and L/16 as in BLIP."""

OPENAI_CLIP_NAMES: tuple[tuple[str, str], ...] = (
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("conv1.weight", "patch_embed.proj.weight"),
    ("ln_pre.", "norm_pre."),
    ("transformer.resblocks.", "blocks."),
    (".attn.in_proj_weight", ".attn.qkv.weight"),
    (".attn.in_proj_bias", ".attn.qkv.bias"),
    (".attn.out_proj.", ".attn.proj."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
"""OpenAI's part of a name -> ours, applied one after the other."""


def rename_openai_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's (and LAVIS's) CLIP vision weights under our names; (D,) and (N, D) get our leading ones."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in OPENAI_CLIP_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name in ("cls_token", "pos_embed"):
        if name in renamed:
            renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    return renamed


def resize_pos_embed(
    pos: Tensor, grid: Grid, num_prefix: int = 1, align_corners: bool = False, source_grid: Grid | None = None
) -> Tensor:
    """Position embeddings interpolated to another grid of patches: bicubic, prefix tokens kept.

    Args:
        pos: (1, num_prefix + h*w, D).
        grid: rows and columns wanted.
        num_prefix: leading tokens without a place in the image ([CLS]).
        align_corners: True in CLIP towers, False in EVA's and BLIP's.
        source_grid: rows and columns of `pos`; None means a square.

    Returns:
        (1, num_prefix + grid[0]*grid[1], D), of the dtype of `pos`; `pos` itself if the grid is the same.

    Raises:
        CheckpointError: the patches of `pos` do not fill the source grid.
    """
    count = pos.shape[1] - num_prefix
    side = math.isqrt(max(count, 0))
    rows, columns = source_grid or (side, side)
    if count < 1 or rows * columns != count:
        raise CheckpointError(
            f"pos_embed: {pos.shape[1]} positions, {num_prefix} of them without a place, do not fill a grid"
            f" of {rows} x {columns} patches; are these weights of another tower?"
        )
    if (rows, columns) == tuple(grid):
        return pos
    prefix, patches = pos[:, :num_prefix], pos[:, num_prefix:]
    exact = torch.promote_types(pos.dtype, torch.float32)
    image = patches.to(exact).reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    image = F.interpolate(image, size=tuple(grid), mode="bicubic", align_corners=align_corners)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2).to(pos.dtype)], dim=1)


def resize_on_load(module: nn.Module, grid: Grid, num_prefix: int, align_corners: bool) -> None:
    """Let `module.load_state_dict` take a `pos_embed` of any square grid and interpolate it to `grid`."""
    module.register_load_state_dict_pre_hook(
        partial(_resize_hook, grid=grid, num_prefix=num_prefix, align_corners=align_corners)
    )


def _resize_hook(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    *_: Any,
    grid: Grid,
    num_prefix: int,
    align_corners: bool,
) -> None:
    key, target = f"{prefix}pos_embed", getattr(module, "pos_embed", None)
    loaded = state.get(key)
    # Another width is left for torch to refuse: interpolation cannot mend it.
    if target is None or loaded is None or loaded.ndim != 3 or loaded.shape[-1] != target.shape[-1]:
        return
    if loaded.shape[1] != target.shape[1]:
        state[key] = resize_pos_embed(loaded, grid, num_prefix, align_corners)


def block_number(name: str) -> int | None:
    """k of a parameter named `blocks.k.…`, None for every other parameter."""
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match.group(1)) if match else None


_BEFORE_BLOCKS = (
    "cls_token",
    "reg_token",
    "dist_token",
    "mask_token",
    "pos_embed",
    "patch_embed.",
    "norm_pre.",
)


def layer_id(name: str, num_layers: int) -> int:
    """Layer of a parameter for layer-wise learning-rate decay, as LAVIS counts (EVA).

    Returns:
        0 for everything before the blocks, k + 1 for block k, `num_layers` for everything after.
    """
    block = block_number(name)
    if block is not None:
        return block + 1
    return 0 if name.startswith(_BEFORE_BLOCKS) else num_layers


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """The residual branch (B, P, D), left out for a share `rate` of the samples, scaled up for the others."""
    if rate == 0.0 or not training:
        return branch
    kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - rate)
    return branch * (kept / (1 - rate))


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes half-precision input in float32 and gives back the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(exact), self.bias.to(exact)
        return F.layer_norm(x.to(exact), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected: (B, 3, H, W) -> (B, h*w, D).

    With `stem_width`, patches are cut from the output of one overlapping convolution. That helps a small
    tower that starts from nothing to learn in few steps (Xiao et al. 2021, Early Convolutions Help
    Transformers See Better).
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        channels, size, stride = config.stem_width or 3, config.patch_size, config.stem_stride
        self.stem: nn.Conv2d | None = None
        if config.stem_width:
            size //= stride
            self.stem = nn.Conv2d(3, channels, kernel_size=2 * stride + 1, stride=stride, padding=stride)
        self.act = _ACTIVATIONS[config.act]
        self.proj = nn.Conv2d(channels, config.width, kernel_size=size, stride=size, bias=config.patch_bias)

    def forward(self, image: Tensor) -> Tensor:
        hidden = image if self.stem is None else self.act(self.stem(image))
        return self.proj(hidden).flatten(2).transpose(1, 2)


class VitAttention(nn.Module):
    """Self-attention with a fused projection, every token to every token. (B, P, D) -> same.

    In the `q_v` variant the key bias is zero and no parameter: a bias of the keys shifts all scores of a
    query alike, so softmax does not see it.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.heads
        fused = config.qkv_bias == "fused"
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=fused)
        self.q_bias = None if fused else nn.Parameter(torch.zeros(config.width))
        self.v_bias = None if fused else nn.Parameter(torch.zeros(config.width))
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(
                self.qkv.weight.dtype
            )
        qkv = F.linear(hidden, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))  # (B, P, 3, H, D/H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value)
        return self.proj(context.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Expand, activate, contract. (B, P, D) -> same."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)
        self.act = _ACTIVATIONS[config.act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class VitBlock(nn.Module):
    """Pre-norm block: attention, then MLP, each with drop path on its branch. (B, P, D) -> same."""

    def __init__(self, config: VitConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps=config.norm_eps)
        self.attn = VitAttention(config)
        self.norm2 = LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + drop_path(self.attn(self.norm1(hidden)), self.drop_path_rate, self.training)
        return hidden + drop_path(self.mlp(self.norm2(hidden)), self.drop_path_rate, self.training)


class Vit(nn.Module):
    """A vision transformer without pooling or classifier.

    Weights whose position embeddings belong to another (square) grid are interpolated when they are loaded.

    Shape:
        image: float (B, 3, H, W), H = W = `config.image_size`.
        returns: (B, P, D), P = 1 + patches; token 0 is [CLS]. float32 under autocast, since [CLS] and the
            position embeddings, and with them the residual stream, are float32.
    """

    num_prefix = 1

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix + math.prod(config.grid), config.width))
        self.norm_pre = LayerNorm(config.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        last = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(
            VitBlock(config, config.drop_path_rate * k / last) for k in range(config.depth)
        )
        self.norm = LayerNorm(config.width, eps=config.norm_eps) if config.final_norm else nn.Identity()
        resize_on_load(self, config.grid, self.num_prefix, config.align_corners)
        self._init_weights()

    @property
    def num_tokens(self) -> int:
        """P, length of the output."""
        return self.pos_embed.shape[1]

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image)
        hidden = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1) + self.pos_embed
        hidden = self.norm_pre(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    @torch.no_grad()
    def _init_weights(self) -> None:
        # The patch embedding keeps torch's initial values, in BLIP as in EVA.
        nn.init.trunc_normal_(self.cls_token, std=self.config.init_std)
        nn.init.trunc_normal_(self.pos_embed, std=self.config.pos_std or self.config.init_std)
        for k, block in enumerate(self.blocks, start=1):
            for part in block.modules():
                if isinstance(part, nn.Linear):
                    nn.init.trunc_normal_(part.weight, std=self.config.init_std)
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)
            if self.config.depth_scaled_init:
                for name in ("attn.proj.weight", "mlp.fc2.weight"):
                    block.get_parameter(name).div_(math.sqrt(2 * k))
