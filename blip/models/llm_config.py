"""Sizes and switches of a frozen language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from blip.config.schema import Section


@dataclass
class LoraConfig(Section):
    """Trained additions of low rank to the frozen weights (Hu et al., 2021); needs the extra `lora`."""

    section: ClassVar[str] = "model.llm.lora"

    r: int = 0
    """Rank; 0 = no additions."""
    alpha: float = 16.0
    """The additions are multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout of their input, in training."""
    targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get some, such as q_proj; empty: those peft takes for this kind of
    model."""

    def problems(self) -> list[str]:
        """Values that cannot be used."""
        found = self._at_least(0, "r") + self._within(0, 0.9, "dropout")
        if self.alpha <= 0:
            found.append(f"alpha: {self.alpha} is not above 0")
        if not self.r and (self.targets or self.dropout):
            found.append("r: 0 means no additions, so the other keys say nothing; set a rank, such as 8")
        return found


@dataclass
class LLMConfig(Section):
    """What of a language model is not said by its name."""

    section: ClassVar[str] = "model.llm"

    sizes: dict[str, Any] = field(default_factory=dict)
    """A transformers configuration, such as {model_type: opt, hidden_size: 64}. Without `model_type`: changes
    to that of `model.llm_model`. Empty: what that says. With a `vocab_size`, nothing is read to build it."""
    tokenizer: str | None = None
    """A folder, `tokenizer.json` or Hugging Face name; `scenes` = the small embedded word pieces; null: that
    of `model.llm_model`."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Type of the weights and of all that is computed with them, whatever autocast says; `auto`: `half` on a
    GPU, fp32 on a CPU."""
    half: Literal["bf16", "fp16"] = "bf16"
    """Type that `auto` takes on a GPU: that of the released weights, OPT and Llama fp16, T5 bf16."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Weights of the linear layers in 8 or 4 bits; needs the extra `quantize`. Saves memory, not time: on a
    CPU, most of all, it is slower."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Trained additions of low rank."""
    device: str | None = None
    """Where the language model lies if not where the rest does, such as cuda:1."""
    dropout: bool = False
    """Let its dropout act in training, as LAVIS does, which leaves the frozen model in training mode."""
    checkpoint: Literal["none", "torch"] = "none"
    """Recompute its layers' activations in the backward pass, as `model.vit.checkpoint` does of the tower."""
    use_cache: bool = True
    """Keep the past's keys and values in generation; false computes everything again for each token, for
    models that have no cache to be reordered."""
    end: str | None = None
    """Text that ends what is written, one token long, such as "\\n" for OPT; null: the tokenizer's end."""
    bos: Literal["tokenizer", "end", "none"] = "tokenizer"
    """First token of a text: what the tokenizer puts there; the end token, as LAVIS has it for Vicuna v1.1;
    or none."""
    before: str = ""
    """What stands in front of the soft tokens, such as "<|im_start|>", where the language model has only ever
    seen texts that begin so; without it the first soft token is looked at as a beginning is, by everything,
    whatever it tells."""
    image_token: int | None = None
    """Id that stands for a soft token in the texts of transformers' model, for `to_hf`; null: the first row
    without a word, or a new one."""
    activation: str | None = None
    """Activation function instead of the configuration's; LAVIS's FlanT5 models were trained with `gelu`."""

    def problems(self) -> list[str]:
        """Values that contradict each other."""
        found = []
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError:
                found.append(f"device: {self.device!r} is no device; such are cuda:1 and cpu")
        if self.quantization != "none" and self.precision == "fp32":
            found.append("quantization: computes in half precision; set precision to fp16, bf16 or auto")
        found += self._at_least(0, "image_token")
        if self.end == "":
            found.append("end: empty text ends nothing; give a text, or null for the tokenizer's end token")
        return found
