"""Pre-trains two small language models on the text of the embedded data, for configs/tiny: minutes each.

    python run_scripts/tiny_llm.py [--data FOLDER] [--steps N]

    DATA/llm/scenes-decoder            Llama's architecture, for recipes with a decoder
    DATA/llm/scenes-encoder-decoder    T5's

They never see a picture. What they learn is how scenes are described, and to answer questions about a
description; stage 2 then describes pictures to them, in soft tokens, and they stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from blip.data.catalog import data_root
from blip.models.llm_tokenizer import LlmTokenizer

ASK = "question: {} short answer:"
BATCH, RATE, WARMUP = 64, 3e-3, 20
AT_ONCE = 8
"""Batches that are drawn together and cut by length, since half of a batch of any lengths is padding."""
TEST = 500


def scenes(root: Path, split: str) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """Descriptions of every picture, and questions about it with their answers."""
    folder = root / "scenes" / "annotations"
    told: dict[str, list[str]] = defaultdict(list)
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for record in json.loads((folder / f"{split}.json").read_text()):
        captions = record["caption"]
        told[record["image"]] += [captions] if isinstance(captions, str) else captions
    for record in json.loads((folder / f"instruct_{split}.json").read_text()):
        if record["type"] == "detail":
            told[record["image"]].append(record["text_output"])
    for record in json.loads((folder / f"vqa_{split}.json").read_text()):
        answer = record["answer"]
        asked[record["image"]].append((record["question"], answer if isinstance(answer, str) else answer[0]))
    return [(told[image], asked[image]) for image in told]


def draw(data: list[Any], rng: random.Random) -> tuple[str, str]:
    """What is given, and what is to be written: the rest of a description, or an answer."""
    told, asked = rng.choice(data)
    words = rng.choice(told).split()
    if asked and rng.random() < 0.6:
        question, answer = rng.choice(asked)
        return f"{' '.join(words)} {ASK.format(question)}", answer
    cut = rng.randrange(len(words))
    return " ".join(words[:cut]), " ".join(words[cut:])


def batches(kind: str, data: list[Any], rng: random.Random) -> Iterator[list[tuple[str, str]]]:
    """Batches of texts of about the same length, without end; of an encoder-decoder, as the encoder reads."""

    def length(pair: tuple[str, str]) -> int:
        return len(pair[0]) + (len(pair[1]) if kind == "causal" else 0)

    while True:
        drawn = sorted((draw(data, rng) for _ in range(AT_ONCE * BATCH)), key=length)
        cut = [drawn[start : start + BATCH] for start in range(0, len(drawn), BATCH)]
        rng.shuffle(cut)
        yield from cut


def build(kind: str, tokenizer: LlmTokenizer) -> Any:
    """A model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.end_id}
    if kind == "causal":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                initializer_range=0.08,
                bos_token_id=tokenizer.lead[0],
                **ends,
            )
        )
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=tokenizer.vocab_size,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
            decoder_start_token_id=tokenizer.pad_id,
            **ends,
        )
    )


def loss_of(model: Any, tokenizer: LlmTokenizer, pairs: list[tuple[str, str]]) -> Tensor:
    """Mean loss; a decoder also learns what is given."""
    if tokenizer.kind == "causal":
        tokens = tokenizer.text([f"{given} {wanted}".strip() for given, wanted in pairs])
    else:
        tokens = tokenizer.train([given for given, _ in pairs], [wanted for _, wanted in pairs])
    return model(
        input_ids=tokens["llm_ids"], attention_mask=tokens["llm_mask"].long(), labels=tokens["llm_labels"]
    ).loss


@torch.no_grad()
def accuracy(model: Any, tokenizer: LlmTokenizer, data: list[Any], rng: random.Random) -> float:
    """Percentage of right answers to questions about a description, greedily."""
    right, groups = 0, defaultdict(list)
    asked = [(rng.choice(told), *rng.choice(questions)) for told, questions in data[:TEST] if questions]
    for told, question, answer in asked:
        ids, _ = tokenizer.prompt([f"{told} {ASK.format(question)}"])
        groups[ids.shape[1]].append((ids[0], answer))
    for length, group in groups.items():  # of one length each, so that nothing is padded
        found = model.generate(torch.stack([ids for ids, _ in group]), max_new_tokens=6, do_sample=False)
        texts = tokenizer.decode(found[:, length:] if tokenizer.kind == "causal" else found[:, 1:])
        right += sum(text == answer for text, (_, answer) in zip(texts, group, strict=True))
    return 100 * right / len(asked)


def pretrain(kind: str, root: Path, folder: Path, steps: int) -> None:
    """Train one model and write it as transformers does."""
    tokenizer = LlmTokenizer.load("scenes", kind)  # type: ignore[arg-type]
    model, rng, started = build(kind, tokenizer), random.Random(0), time.perf_counter()
    train = scenes(root, "train")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step, pairs in zip(range(steps), batches(kind, train, rng), strict=False):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * rate
        loss = loss_of(model, tokenizer, pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            print(f"{folder.name}: step {step + 1}/{steps}, loss {float(loss.detach()):.3f}", flush=True)
    model.eval()
    right = accuracy(model, tokenizer, scenes(root, "val"), rng)
    partial = folder.with_name(folder.name + ".partial")  # what a stop leaves is never taken for the whole
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder}: {right:.1f} % of answers about descriptions, {time.perf_counter() - started:.0f} s")


def main() -> int:
    """Write both models; what is there already stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="data root; else BLIP_DATA, else data")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    root = data_root(args.data)
    if not (root / "scenes" / "annotations" / "train.json").is_file():
        print(f"error: no scenes in '{root}'; run python -m blip.data make scenes", file=sys.stderr)
        return 2
    for kind, name in (("causal", "scenes-decoder"), ("seq2seq", "scenes-encoder-decoder")):
        folder = root / "llm" / name
        if (folder / "model.safetensors").is_file():
            print(f"{folder}: there already; remove the folder to train it again")
        else:
            pretrain(kind, root, folder, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
