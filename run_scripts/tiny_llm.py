"""Pre-trains two small language models on the text of the embedded data, for configs/tiny: minutes each.

    python run_scripts/tiny_llm.py [--data FOLDER] [--steps N] [--kind decoder] [--kind encoder-decoder]
                                   [--instruct]

    DATA/llm/scenes-decoder            Llama's architecture, for recipes with a decoder
    DATA/llm/scenes-encoder-decoder    T5's
    DATA/llm/scenes-...-instruct       the same, further trained to follow instructions (--instruct)

They never see a picture. What they learn is how scenes are described, to say again what a description says,
and to answer questions about it; stage 2 then describes pictures to them, in soft tokens, and they stay as
they are. InstructBLIP's language models, Vicuna and FlanT5, had learned from texts to follow instructions of
all kinds; so have those of --instruct.
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
from torch import Tensor, nn

from blip.data.catalog.table import data_root
from blip.models.llm_tokenizer import LlmTokenizer

KINDS = {"decoder": "causal", "encoder-decoder": "seq2seq"}
ASK = "question: {} short answer:"
BATCH, WARMUP = 48, 50
STEPS = {"causal": 1500, "seq2seq": 1000}
RATES = {"causal": 3e-3, "seq2seq": 1.5e-3}
INSTRUCT = 600
"""Steps of learning to follow instructions, at a third of the rate."""
AT_ONCE = 8
"""Batches that are drawn together and cut by length, since half of a batch of any lengths is padding."""
TEST, LONGEST = 500, 6


def scenes(root: Path, split: str, instruct: bool = False) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """Descriptions of every picture, and prompts with answers: questions, or instructions, too."""
    folder = root / "scenes" / "annotations"
    told: dict[str, list[str]] = defaultdict(list)
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for record in json.loads((folder / f"{split}.json").read_text()):
        captions = record["caption"]
        told[record["image"]] += [captions] if isinstance(captions, str) else captions
    for record in json.loads((folder / f"instruct_{split}.json").read_text()):
        if record["type"] == "detail":
            told[record["image"]].append(record["text_output"])
        if instruct:
            asked[record["image"]].append((record["text_input"], record["text_output"]))
    for record in json.loads((folder / f"vqa_{split}.json").read_text()):
        answer = record["answer"]
        answer = answer if isinstance(answer, str) else answer[0]
        asked[record["image"]].append((ASK.format(record["question"]), answer))
    return [(told[image], asked[image]) for image in told]


def document(told: list[str], asked: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """What a decoder reads in one go: descriptions of a picture, then questions with their answers.

    What is said first tells most of what is said next, so that it pays to look back; a text about nothing but
    itself teaches a small model its words and little more.
    """
    told = rng.sample(told, len(told) if rng.random() < 0.8 else 1)
    asked = rng.sample(asked, min(len(asked), rng.randint(3, 6)))
    return told + [f"{prompt} {answer}" for prompt, answer in asked]


def pair(told: list[str], asked: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """What an encoder reads, and what its decoder writes: an answer, or the rest of a description, mostly
    behind another one of the same picture, as it will stand behind soft tokens.
    """
    told = rng.sample(told, len(told))
    if asked and rng.random() < 0.4:
        prompt, answer = rng.choice(asked)
        given = told if rng.random() < 0.5 else told[:1]
        return [" ".join([*given, prompt]), answer]
    words = told.pop().split()
    cut = rng.randrange(len(words))
    before = told if rng.random() < 0.8 else []
    return [" ".join([*before, *words[:cut]]), " ".join(words[cut:])]


def batches(kind: str, data: list[Any], rng: random.Random) -> Iterator[list[list[str]]]:
    """Batches of texts of about the same length, without end; of an encoder-decoder, as the encoder reads."""
    draw, size = (document, BATCH // 2) if kind == "causal" else (pair, BATCH)

    def length(texts: list[str]) -> int:
        return len(" ".join(texts)) if kind == "causal" else len(texts[0])

    while True:
        drawn = sorted((draw(*rng.choice(data), rng) for _ in range(AT_ONCE * size)), key=length)
        cut = [drawn[start : start + size] for start in range(0, len(drawn), size)]
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
                intermediate_size=256,
                num_hidden_layers=3,
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
            tie_word_embeddings=True,  # apart, its first logits are so large that hundreds of steps are lost
            dropout_rate=0.0,
            decoder_start_token_id=tokenizer.pad_id,
            **ends,
        )
    )


def loss_of(model: Any, tokenizer: LlmTokenizer, texts: list[list[str]]) -> Tensor:
    """Mean loss; a decoder learns all texts of its documents, and that each of them ends."""
    if tokenizer.kind == "seq2seq":
        tokens = tokenizer.train([given for given, _ in texts], [wanted for _, wanted in texts])
        mask = tokens["llm_mask"].long()
        return model(input_ids=tokens["llm_ids"], attention_mask=mask, labels=tokens["llm_labels"]).loss
    rows = [torch.tensor(read(tokenizer, each)) for each in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
    labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return model(input_ids=ids, labels=labels).loss  # what is padded stands behind all that looks


def read(tokenizer: LlmTokenizer, texts: list[str]) -> list[int]:
    """Ids of texts one after the other, each with its end."""
    return [*tokenizer.lead, *(i for ids in tokenizer.raw(texts) for i in [*ids, tokenizer.end_id])]


@torch.no_grad()
def accuracy(model: Any, tokenizer: LlmTokenizer, data: list[Any], rng: random.Random) -> float:
    """Percentage of right short answers about a full description, greedily."""
    right, groups = 0, defaultdict(list)
    short = [(told, [one for one in asked if len(one[1].split()) < LONGEST]) for told, asked in data[:TEST]]
    asked = [(told[-1], *rng.choice(prompts)) for told, prompts in short if prompts]
    for told, prompt, answer in asked:
        if tokenizer.kind == "causal":
            ids = torch.tensor([*read(tokenizer, [told]), *tokenizer.raw([prompt])[0]])
        else:
            ids = tokenizer.prompt([f"{told} {prompt}"])[0][0]
        groups[len(ids)].append((ids, answer))
    for length, group in groups.items():  # of one length each, so that nothing is padded
        found = model.generate(
            torch.stack([ids for ids, _ in group]), max_new_tokens=LONGEST, do_sample=False
        )
        texts = tokenizer.decode(found[:, length:] if tokenizer.kind == "causal" else found[:, 1:])
        right += sum(text == answer for text, (_, answer) in zip(texts, group, strict=True))
    return 100 * right / len(asked)


def pretrain(kind: str, root: Path, folder: Path, steps: int, begun: Path | None = None) -> None:
    """Train one model and write it as transformers does; `begun` is one that is to follow instructions."""
    tokenizer = LlmTokenizer.load("scenes", kind)  # type: ignore[arg-type]
    model, rng, started = build(kind, tokenizer), random.Random(0), time.perf_counter()
    if begun is not None:
        model.load_state_dict(type(model).from_pretrained(begun).state_dict())
    peak = RATES[kind] / (1 if begun is None else 3)
    train, losses = scenes(root, "train", begun is not None), list[float]()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step, texts in zip(range(steps), batches(kind, train, rng), strict=False):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * rate
        loss = loss_of(model, tokenizer, texts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:  # of all since the last line: short texts lose more than long ones
            print(f"{folder.name}: step {step + 1}/{steps}, loss {sum(losses) / len(losses):.3f}", flush=True)
            losses.clear()
    model.eval()
    right = accuracy(model, tokenizer, scenes(root, "val", begun is not None), rng)
    partial = folder.with_name(folder.name + ".partial")  # what a stop leaves is never taken for the whole
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder}: {right:.1f} % of answers about descriptions, {time.perf_counter() - started:.0f} s")


def main() -> int:
    """Write the models, both unless told; what is there already stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="data root; else BLIP_DATA, else data")
    parser.add_argument("--steps", type=int, help=f"of each; else {STEPS}, {INSTRUCT} more to instruct")
    parser.add_argument("--kind", choices=KINDS, action="append", help="which of the two; may be repeated")
    parser.add_argument("--instruct", action="store_true", help="those that follow instructions, too")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    root = data_root(args.data)
    if not (root / "scenes" / "annotations" / "train.json").is_file():
        print(f"error: no scenes in '{root}'; run python -m blip.data make scenes", file=sys.stderr)
        return 2
    for name in args.kind or KINDS:
        kind, plain = KINDS[name], root / "llm" / f"scenes-{name}"
        wanted: list[tuple[Path, int, Path | None]] = [(plain, STEPS[kind], None)]
        if args.instruct:
            wanted.append((plain.with_name(f"{plain.name}-instruct"), INSTRUCT, plain))
        for folder, steps, begun in wanted:
            if (folder / "model.safetensors").is_file():
                print(f"{folder}: there already; remove the folder to train it again")
            else:
                pretrain(kind, root, folder, args.steps or steps, begun)
    return 0


if __name__ == "__main__":
    sys.exit(main())
