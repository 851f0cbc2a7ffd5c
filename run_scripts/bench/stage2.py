"""Speed and memory of our stage-2 training step beside transformers' own, in one run on one machine.

    python run_scripts/bench/stage2.py                     base size on the CPU: ViT-S/16, OPT-125M's shape
    python run_scripts/bench/stage2.py --size base-t5      the same with Flan-T5-small's shape
    python run_scripts/bench/stage2.py --size small        seconds instead of minutes
    python run_scripts/bench/stage2.py --return-memory     peak memory without the allocator's fragments
    python run_scripts/bench/stage2.py --device cuda       ViT-g/14 and OPT-2.7B: samples/s, MFU, memory
    python run_scripts/bench/stage2.py --device cuda --size vicuna7b

Tower and language model are frozen; the Q-Former, its queries, the projection and the norm of the tower's
output are trained, as in LAVIS. The other step is what a user of transformers writes: their class for this,
`Blip2ForConditionalGeneration`, in training mode with `requires_grad` off in what is frozen; pixels, ids,
mask and labels in, loss out, backward, AdamW. It wastes little: its attention is SDPA too, it computes no
gradients of frozen weights, and both are given the same batch, padded to its longest text. Weights are
random. Dropout is off in both, so that losses and gradients can be equal.

Where the difference comes from: logits and their softmax at targets only, not at soft tokens and padding; no
gradient to the tower's output, whose norm is folded into what reads it; no mask where nothing can see
padding; AdamW in one kernel. An encoder-decoder has no logits at soft tokens in any case, so there is less to
be gained. How it is measured: `harness.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from run_scripts.bench import naive_stage1, roofline
from run_scripts.bench.harness import run
from run_scripts.bench.worker import WORDS, Bench

# transformers has one epsilon for the tower's blocks and for the norm behind them, which is 1e-5 here.
EPS = 1e-5
IGNORED = -100


@dataclass(frozen=True)
class Sizes(naive_stage1.Sizes):
    """Tower and Q-Former as in stage 1, and a language model."""

    llm: dict[str, Any] = field(default_factory=dict)
    """A configuration of transformers."""

    @property
    def longest(self) -> int:
        """Tokens of the longest text, with those that begin and end it."""
        return WORDS[1] + 2

    @property
    def seq2seq(self) -> bool:
        return self.llm["model_type"] == "t5"

    @property
    def llm_width(self) -> int:
        return self.llm["d_model" if self.seq2seq else "hidden_size"]

    @property
    def place(self) -> int:
        """Id that stands for a soft token in what transformers is given."""
        return self.llm["vocab_size"] - 1


def opt(width: int, depth: int, heads: int, vocab: int = 50272) -> dict[str, Any]:
    """OPT of some size."""
    return {
        "model_type": "opt",
        "vocab_size": vocab,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }


def t5(width: int, inner: int, depth: int, heads: int, vocab: int = 32128) -> dict[str, Any]:
    """Flan-T5 of some size."""
    return {
        "model_type": "t5",
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": 64,
        "d_ff": inner,
        "num_layers": depth,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32001,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 32000,
}
SMALL: dict[str, Any] = {
    "image_size": 64,
    "vit_width": 64,
    "vit_depth": 2,
    "vit_heads": 2,
    "vit_mlp": 128,
    "width": 64,
    "depth": 3,
    "heads": 2,
    "mlp": 128,
    "queries": 8,
}
BASE: dict[str, Any] = {"vit_width": 384, "vit_heads": 6, "vit_mlp": 1536, "depth": 6}
PAPER: dict[str, Any] = {"patch": 14, "vit_width": 1408, "vit_depth": 39, "vit_heads": 16, "vit_mlp": 6144}
SIZES = {
    "small": Sizes(**SMALL, llm=opt(64, 2, 2, vocab=1000)),
    "small-t5": Sizes(**SMALL, llm=t5(64, 128, 2, 2, vocab=1000)),
    "base": Sizes(**BASE, llm=opt(768, 12, 12)),
    "base-t5": Sizes(**BASE, llm=t5(512, 1024, 8, 6)),
    "opt2.7b": Sizes(**PAPER, llm=opt(2560, 32, 32)),
    "vicuna7b": Sizes(**PAPER, llm=VICUNA_7B),
}


class Transformers(nn.Module):
    """transformers' model as its users train it: called with a batch, it gives the loss."""

    def __init__(self, sizes: Sizes, half: torch.dtype | None) -> None:
        from transformers import Blip2ForConditionalGeneration

        super().__init__()
        if half is not None:  # straight in half precision: a large model may not fit otherwise
            torch.set_default_dtype(half)
        try:
            self.model = Blip2ForConditionalGeneration(their_config(sizes))
        finally:
            torch.set_default_dtype(torch.float32)
        model = self.model
        self.place, self.queries, self.seq2seq = sizes.place, sizes.queries, sizes.seq2seq
        with torch.no_grad():  # zero as they come, which makes all queries the same
            model.query_tokens.normal_(std=0.02)
        model.requires_grad_(False)
        for part in (model.qformer, model.language_projection, model.vision_model.post_layernorm):
            part.float().requires_grad_(True)
        model.query_tokens.data = model.query_tokens.data.float()
        model.query_tokens.requires_grad_(True)
        self.train()

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Soft tokens' places go before the text; they are no targets."""
        places = ids.new_full((len(ids), self.queries), self.place)
        if not self.seq2seq:
            labels = torch.cat([torch.full_like(places, IGNORED), labels], dim=1)
        loss = self.model(
            pixel_values=image,
            input_ids=torch.cat([places, ids], dim=1),
            attention_mask=torch.cat([torch.ones_like(places), mask.long()], dim=1),
            labels=labels,
        ).loss
        return {"loss": loss, "loss_lm": loss}


def their_config(sizes: Sizes) -> Any:
    """`Sizes` as transformers' configuration."""
    from transformers import AutoConfig, Blip2Config, Blip2QFormerConfig, Blip2VisionConfig

    llm = dict(sizes.llm)
    vision = Blip2VisionConfig(
        hidden_size=sizes.vit_width,
        intermediate_size=sizes.vit_mlp,
        num_hidden_layers=sizes.vit_depth,
        num_attention_heads=sizes.vit_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch,
        layer_norm_eps=EPS,
        initializer_range=0.02,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp,
        cross_attention_frequency=sizes.cross_every,
        encoder_hidden_size=sizes.vit_width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=AutoConfig.for_model(llm.pop("model_type"), **llm),
        num_query_tokens=sizes.queries,
        image_token_index=sizes.place,
    )


def library(sizes: Sizes, half: torch.dtype | None) -> nn.Module:
    """Our model."""
    from blip.models.blip2_llm import Blip2Llm, Blip2LlmConfig
    from blip.models.llm import LLMConfig
    from blip.models.qformer import QFormerConfig
    from blip.models.vision import VisionConfig

    vit = VisionConfig(
        patch_size=sizes.patch,
        width=sizes.vit_width,
        depth=sizes.vit_depth,
        heads=sizes.vit_heads,
        mlp_dim=sizes.vit_mlp,
        norm_eps=EPS,
    )
    config = Blip2LlmConfig(
        vit_model="eva_clip_g",
        image_size=sizes.image_size,
        vit_precision="fp32" if half is None else "bf16",
        vit=vit,
        num_query_token=sizes.queries,
        cross_attention_freq=sizes.cross_every,
        qformer=QFormerConfig(width=sizes.width, depth=sizes.depth, num_heads=sizes.heads, mlp_dim=sizes.mlp),
        # The batch brings tokens, so the tokenizer is not asked for any.
        llm=LLMConfig(sizes=sizes.llm, tokenizer="scenes", precision="fp32" if half is None else "bf16"),
        dropout=0.0,
    )
    return Blip2Llm(config)


def to_ours(sizes: Sizes, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """transformers' weights by our names."""
    from blip.formats import hf

    theirs = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return hf.table("blip2_t5" if sizes.seq2seq else "blip2_opt").to_ours(theirs).state


def batch_of(sizes: Sizes, rows: int, step: int) -> dict[str, Tensor]:
    """One step's image, llm_ids, llm_mask and llm_labels, padded to the longest text.

    A decoder writes all of a text; an encoder-decoder is given its first half and writes the other.
    """
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(rows, 3, sizes.image_size, sizes.image_size, generator=generator)
    length = torch.randint(WORDS[0], WORDS[1] + 1, (rows, 1), generator=generator) + 2  # begin and end
    ids = torch.randint(4, sizes.place, (rows, sizes.longest), generator=generator)
    given, wanted = (length // 2, length - length // 2) if sizes.seq2seq else (length, length)

    def cut(lengths: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(lengths.max())
        return source[:, :longest], torch.arange(longest) < lengths

    shown, mask = cut(given, ids)
    written, targets = cut(wanted, ids.flip(1) if sizes.seq2seq else ids)
    return {
        "image": image,
        "llm_ids": shown.masked_fill(~mask, sizes.llm["pad_token_id"]),
        "llm_mask": mask,
        "llm_labels": written.masked_fill(~targets, IGNORED),
    }


def for_ours(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The same, and the number of targets, which our trainer counts before a batch moves to the GPU."""
    return {**batch, "num_targets": int((batch["llm_labels"] != IGNORED).sum())}


BENCH = Bench(
    name="stage2",
    title="stage 2",
    sizes=SIZES,
    gpu_size="opt2.7b",
    gpu_batches=(32, 64, 128),
    naive=Transformers,
    library=library,
    to_ours=to_ours,
    flops=roofline.stage2,
    other="transformers",
    losses=("loss_lm", "loss"),
    batch=batch_of,
    for_ours=for_ours,
)

if __name__ == "__main__":
    sys.exit(run(BENCH, __doc__ or ""))
