"""A frozen language model in 8 or 4 bits; these tests need the extra `quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.layers.decoding import Decoding
from blip.models.llm import LanguageModel, LLMConfig, LoraConfig, build_llm

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 2,
}
PROMPTS = ["how many ?", "what color is the star ?"]
STORED = {"int8": torch.int8, "nf4": torch.uint8}


@pytest.fixture(params=[LLAMA, T5], ids=["decoder", "encoder-decoder"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model as transformers writes it."""
    torch.manual_seed(0)
    llm = build_llm(None, LLMConfig(sizes=request.param, tokenizer="scenes"))
    llm.to("cpu")
    llm.model.save_pretrained(tmp_path)
    llm.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **config: Any) -> LanguageModel:
    llm = build_llm(str(folder), LLMConfig(device="cpu", **config))  # also where there is a GPU
    llm.load_initial()
    return llm.to("cpu")


def batch(llm: LanguageModel) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens = llm.tokenizer.train(PROMPTS, ["two", "red"])
    given = {key.removeprefix("llm_"): value for key, value in tokens.items()}
    return {"prefix": torch.randn(2, 3, 64, requires_grad=True), **given}


def size(llm: LanguageModel) -> int:
    """Bytes of the linear layers."""
    some = [part.weight for part in llm.model.modules() if isinstance(part, torch.nn.Linear)]
    own = llm.model.get_output_embeddings().weight
    return sum(weight.numel() * weight.element_size() for weight in some if weight is not own)


@pytest.mark.parametrize(("how", "least"), [("int8", 0.99), ("nf4", 0.9)])
def test_few_bits_give_about_the_same_loss_and_gradients(folder: Path, how: str, least: float) -> None:
    plain, few = load(folder), load(folder, quantization=how)
    assert STORED[how] in {p.dtype for p in few.model.parameters()}
    assert not any(p.requires_grad for p in few.model.parameters())
    assert size(few) <= size(plain) / (3 if how == "int8" else 5)  # some layers of T5 stay as they are
    wanted, found = batch(plain), batch(few)
    exact, rounded = plain.loss(**wanted), few.loss(**found)
    (exact + rounded).backward()
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert rounded.item() != exact.item()
    alike = torch.cosine_similarity(wanted["prefix"].grad.flatten(), found["prefix"].grad.flatten(), dim=0)
    assert alike > least


@pytest.mark.parametrize("how", STORED)
def test_its_texts_do_not_depend_on_the_batch(folder: Path, how: str) -> None:
    llm = load(folder, quantization=how)
    rules = Decoding(llm.tokenizer.end_id, llm.tokenizer.pad_id, max_length=6)
    prefix = batch(llm)["prefix"].detach()
    ids, mask = llm.tokenizer.prompt(PROMPTS)
    both = llm.generate(prefix, ids, mask, rules).ids
    for row in range(2):
        alone = llm.generate(prefix[row : row + 1], *llm.tokenizer.prompt([PROMPTS[row]]), rules).ids
        assert both[row, : alone.shape[1]].equal(alone[0])


@pytest.mark.parametrize("how", STORED)
def test_gradients_pass_after_an_evaluation_as_before(folder: Path, how: str) -> None:
    llm = load(folder, quantization=how)
    before, after = batch(llm), batch(llm)
    llm.loss(**before).backward()
    rules = Decoding(llm.tokenizer.end_id, llm.tokenizer.pad_id, max_length=6)
    llm.generate(before["prefix"].detach(), *llm.tokenizer.prompt(PROMPTS), rules)
    llm.loss(**after).backward()
    assert after["prefix"].grad.equal(before["prefix"].grad)


@pytest.mark.parametrize("how", STORED)
def test_additions_learn_while_the_few_bits_stay(folder: Path, how: str) -> None:
    pytest.importorskip("peft")
    names = ["q_proj", "v_proj"] if "llama" in (folder / "config.json").read_text() else ["q", "v"]
    llm = load(folder, quantization=how, lora=LoraConfig(r=2, targets=names))
    frozen = {name: p.clone() for name, p in llm.model.named_parameters() if not p.requires_grad}
    trained = [p for p in llm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = llm.loss(**batch(llm))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    now = dict(llm.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
