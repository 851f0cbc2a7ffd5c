"""One implementation of the stage-1 step in a process of its own; `stage1.py` starts it and says when."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from run_scripts.bench.naive_stage1 import NaiveStage1, Sizes

SIZES = {
    "small": Sizes(
        image_size=64,
        vit_width=128,
        vit_depth=2,
        vit_heads=4,
        vit_mlp=256,
        width=128,
        depth=4,
        heads=4,
        mlp=256,
        positions=64,
        queries=8,
        embed_dim=32,
        vocab=1000,
    ),
    "base": Sizes(),
    "paper": Sizes(patch=14, vit_width=1408, vit_depth=39, vit_heads=16, vit_mlp=6144, eva=True),
}
WORDS = (8, 20)
LOSSES = ("loss_itc", "loss_itm", "loss_lm", "loss")


def batch_of(sizes: Sizes, rows: int, step: int) -> dict[str, Tensor]:
    """One step's image, text_ids and text_mask, padded to `text_length`; the same in every process."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(rows, 3, sizes.image_size, sizes.image_size, generator=generator)
    length = torch.randint(WORDS[0], WORDS[1] + 1, (rows, 1), generator=generator) + 2  # [CLS], [SEP]
    mask = torch.arange(sizes.text_length) < length
    ids = torch.randint(1, sizes.vocab - 1, mask.shape, generator=generator)
    return {"image": image, "text_ids": ids.masked_fill(~mask, 0), "text_mask": mask}


def library_config(sizes: Sizes, vit_precision: str = "fp32") -> Any:
    """`Sizes` as our model's configuration."""
    from blip.models.blip2_qformer import Blip2QformerConfig
    from blip.models.qformer import QFormerConfig
    from blip.models.vision import VisionConfig

    vit = VisionConfig(
        patch_size=sizes.patch,
        width=sizes.vit_width,
        depth=sizes.vit_depth,
        heads=sizes.vit_heads,
        mlp_dim=sizes.vit_mlp,
    )
    qformer = QFormerConfig(
        width=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        mlp_dim=sizes.mlp,
        max_positions=sizes.positions,
    )
    return Blip2QformerConfig(
        vit_model="eva_clip_g" if sizes.eva else "vit_base",
        image_size=sizes.image_size,
        vit_precision=vit_precision,
        vit=vit,
        num_query_token=sizes.queries,
        cross_attention_freq=sizes.cross_every,
        qformer=qformer,
        embed_dim=sizes.embed_dim,
        max_txt_len=sizes.text_length,
        vocab_size=sizes.vocab,
        dropout=0.0,
        label_smoothing=sizes.smoothing,
    )


class NaiveStep:
    """The straightforward step; AdamW as torch makes it by default."""

    def __init__(self, sizes: Sizes, device: torch.device, half: torch.dtype | None) -> None:
        torch.manual_seed(0)
        self.model = NaiveStage1(sizes).to(device)
        if half is not None and device.type == "cuda":  # LAVIS keeps the frozen tower in half precision
            for part in self.model.visual_encoder.modules():
                if isinstance(part, nn.Linear | nn.Conv2d):
                    part.to(half)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1]
        rest = [p for p in trained if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05)

    def losses(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The losses of one batch."""
        return self.model(*(batch[key].to(device) for key in ("image", "text_ids", "text_mask")))


class LibraryStep:
    """The library's step, with the optimizer of its trainer."""

    def __init__(self, sizes: Sizes, device: torch.device, half: torch.dtype | None, weights: str) -> None:
        from blip.config.schema import RunConfig
        from blip.engine.optim import build_optimizer
        from blip.formats import lavis
        from blip.losses import argmax_sampler
        from blip.models.blip2_qformer import Blip2Qformer
        from blip.weights import load_into, read_weights

        precision = "bf16" if half is not None and device.type == "cuda" else "fp32"
        config = library_config(sizes, precision)
        self.model = Blip2Qformer(config)
        if weights:
            state = lavis.table("blip2", config.vit_model).to_ours(read_weights(weights)).state
            load_into(self.model, state, source=weights)
        self.model = self.model.to(device).train()
        self.model.negative_sampler = argmax_sampler
        self.optimizer = build_optimizer(self.model, RunConfig(init_lr=1e-4, weight_decay=0.05, max_iters=1))

    def losses(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The losses of one batch, with texts padded to the longest, as the loader does it."""
        mask = batch["text_mask"]
        longest, num_targets = int(mask.sum(dim=1).max()), int(mask.sum()) - len(mask)
        text = {key: batch[key][:, :longest].to(device) for key in ("text_ids", "text_mask")}
        return self.model({"image": batch["image"].to(device), **text, "num_targets": num_targets})


def work(args: argparse.Namespace) -> None:
    """Build, then read step numbers from standard input and answer each with time, losses and peak memory."""
    sizes, device = SIZES[args.size], torch.device(args.device)
    runtime = peak_gb(device)
    half = torch.bfloat16 if args.precision == "bf16" else None
    step: Any
    if args.role == "naive":
        step = NaiveStep(sizes, device, half)
        if args.weights:
            torch.save(step.model.state_dict(), args.weights)
    else:
        step = LibraryStep(sizes, device, half, args.weights)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    answer({"gb": peak_gb(device), "device": name})
    for line in sys.stdin:
        try:
            result = timed_step(step, batch_of(sizes, args.batch, int(line)), device, half)
        except torch.OutOfMemoryError:
            answer({"out_of_memory": True})
            return
        answer(result | {"gb": peak_gb(device), "fixed_gb": runtime + states_gb(step)})


def timed_step(
    step: Any, batch: dict[str, Tensor], device: torch.device, half: torch.dtype | None
) -> dict[str, Any]:
    """One optimizer step: wall and processor seconds, losses."""
    synchronize(device)
    start, cpu = time.perf_counter(), time.process_time()
    with torch.autocast(device.type, dtype=half, enabled=half is not None):
        losses = step.losses(batch, device)
    losses["loss"].backward()
    step.optimizer.step()
    step.optimizer.zero_grad()
    synchronize(device)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, **{name: float(losses[name].detach()) for name in LOSSES}}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gb(device: torch.device) -> float:
    """Peak of the allocator on a GPU, of the resident process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def states_gb(step: Any) -> float:
    """Weights and the optimizer's moments, which are the same however a step is computed."""
    moments = [value for state in step.optimizer.state.values() for value in state.values()]
    return sum(t.numel() * t.element_size() for t in [*step.model.parameters(), *moments]) / 1e9


def answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["naive", "blip"])
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument(
        "--weights", default="", help="file that `naive` writes its weights to and `blip` reads"
    )
    work(parser.parse_args())


if __name__ == "__main__":
    main()
