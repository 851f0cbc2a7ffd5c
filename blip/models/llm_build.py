"""Language models of transformers: built from sizes or a name, filled with weights, quantised, added to."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip.errors import CheckpointError, ConfigError, brief, hint
from blip.models.llm_config import LLMConfig, LoraConfig
from blip.models.llm_tokenizer import Kind, LlmTokenizer, locate
from blip.models.vision import DTYPES
from blip.stored.files import inside, read_json
from blip.stored.values import check_values
from blip.weights import StoredWeights, some

_ACTIVATIONS = ("dense_act_fn", "hidden_act", "activation_function", "hidden_activation")
"""What configurations call the activation function of the feed-forwards."""
_KNOWN = ("attn_implementation", "tie_word_embeddings", "decoder_start_token_id", "dense_act_fn")
"""Keys that configurations take without listing them."""


def read_config(llm_model: str | None, config: LLMConfig, data_root: str | Path | None) -> Any:
    """The transformers configuration: that of `llm_model`, with `config.sizes` in its place or laid over it.

    Raises:
        ConfigError: neither says what to build, no such model, an unknown kind or size.
        CheckpointError: a folder whose configuration no language model has.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    sizes = dict(config.sizes)
    kind = sizes.pop("model_type", None)
    if kind is not None:
        if kind not in CONFIG_MAPPING:
            raise ConfigError(
                f"model.llm.sizes.model_type: transformers has no {kind!r}{hint(str(kind), CONFIG_MAPPING)}"
            )
        made: Any = _with_sizes({}, sizes, CONFIG_MAPPING[kind])
    elif llm_model is None:
        raise ConfigError(
            "model.llm_model: nothing says which language model; give a folder or a Hugging Face name, or"
            " model.llm.sizes with a model_type"
        )
    else:
        name, options = locate(llm_model, data_root)
        _check_config(Path(name))
        try:
            made = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        except Exception as error:  # the hub client raises errors of many packages
            raise ConfigError(
                f"model.llm_model: no language model {llm_model!r} on disk (as given or below the data root),"
                f" in the Hugging Face cache or on its hub ({brief(error)}); give a folder with its"
                " config.json and weights, or sizes in model.llm.sizes"
            ) from error
        if sizes:
            made = _with_sizes(made.to_diff_dict(), sizes, type(made))
    if config.activation is not None:
        _set_activation(made, config.activation)
    return made


def _check_config(folder: Path) -> None:
    """Raise CheckpointError for a `config.json` that would keep transformers busy."""
    file = folder / "config.json"
    if os.path.isfile(file):
        check_values(read_json(inside(file), "model configuration"), f"'{file}'")


def _with_sizes(base: dict[str, Any], sizes: dict[str, Any], cls: Any) -> Any:
    """A configuration of class `cls`; a size that it does not have is an error, as of our own sections.

    Args:
        base: values that `sizes` are laid over; what is in neither follows from these or is the default.
    """
    plain = cls()
    names = getattr(cls, "attribute_map", {})
    known = {*plain.to_dict(), *names, *_KNOWN}
    for key in sizes:
        # transformers would keep it and never look at it.
        if key not in known and not hasattr(plain, key):
            raise ConfigError(f"model.llm.sizes.{key}: no such key of {cls.model_type}{hint(key, known)}")
    replaced = {names.get(key, key) for key in sizes} | {"architectures", "model_type"}
    if names.get("num_hidden_layers", "num_hidden_layers") in replaced:
        replaced.add("layer_types")  # one for each layer: they follow from the number
    base = {key: value for key, value in base.items() if key not in replaced}
    try:
        return cls(**base, **sizes)
    except Exception as error:  # each class checks in its own way
        raise ConfigError(f"model.llm.sizes: {cls.model_type} cannot have these: {brief(error)}") from error


def _set_activation(hf_config: Any, name: str) -> None:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"model.llm.activation: transformers has no {name!r}{hint(name, ACT2FN)}")
    key = next((key for key in _ACTIVATIONS if hasattr(hf_config, key)), None)
    if key is None:
        raise ConfigError(
            f"model.llm.activation: {hf_config.model_type} has no activation function to choose; leave it out"
        )
    setattr(hf_config, key, name)


def read_tokenizer(
    llm_model: str | None, config: LLMConfig, seq2seq: bool, data_root: str | Path | None
) -> LlmTokenizer:
    """The tokenizer that `config` names, else that of `llm_model`.

    Raises:
        ConfigError: nothing names one, or it cannot be read or used.
    """
    name = config.tokenizer or llm_model
    if name is None:
        raise ConfigError(
            "model.llm.tokenizer: model.llm.sizes says nothing of words; give a folder, a tokenizer.json or a"
            " Hugging Face name, or 'scenes' for the embedded word pieces"
        )
    kind: Kind = "seq2seq" if seq2seq else "causal"
    return LlmTokenizer.load(name, kind, config.end, config.bos, data_root)


def suit_vocabulary(hf_config: Any, tokenizer: LlmTokenizer, sizes: dict[str, Any]) -> None:
    """Sizes that say nothing of the vocabulary and of special tokens get the tokenizer's."""
    hf_config.vocab_size = max(sizes.get("vocab_size", 0), tokenizer.vocab_size)
    begin = tokenizer.lead[0] if tokenizer.lead else tokenizer.end_id
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": begin, "eos_token_id": tokenizer.end_id}
    if tokenizer.kind == "seq2seq":
        ids["decoder_start_token_id"] = tokenizer.pad_id
    for key, value in ids.items():
        if key not in sizes:
            setattr(hf_config, key, value)


def random_model(hf_config: Any, dtype: torch.dtype) -> Any:
    """A model with random weights, on the default device.

    Raises:
        ConfigError: transformers cannot build it.
    """
    hf_config = copy.deepcopy(hf_config)
    try:
        return _auto_class(hf_config).from_config(hf_config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # each class checks in its own way
        raise ConfigError(
            f"model.llm: transformers cannot build a {hf_config.model_type} that writes: {brief(error)};"
            " give sizes that fit each other, of a causal or an encoder-decoder language model"
        ) from error


def pretrained_model(source: str, config: LLMConfig, data_root: str | Path | None) -> tuple[Any, str]:
    """A model with the weights that `source` names, on the CPU unless quantised; and a line of report.

    Files are read as safetensors or with `weights_only`. Its configuration is the source's own, with
    `config.sizes` laid over it, but for the rows of the vocabulary.

    Raises:
        CheckpointError: no such weights, or they do not fit.
        ConfigError: no such model, other sizes, or quantisation without its packages.
    """
    sizes = {key: value for key, value in config.sizes.items() if key != "vocab_size"}
    kind = sizes.pop("model_type", None)
    hf_config = read_config(source, replace(config, sizes={}), data_root)
    if kind not in (None, hf_config.model_type):
        raise CheckpointError(
            f"model.llm.sizes.model_type: {kind}, but {source!r} is a {hf_config.model_type}; change one"
        )
    if sizes:
        hf_config = read_config(source, replace(config, sizes=sizes), data_root)
    name, options = locate(source, data_root)
    given: dict[str, Any] = {**options, **_quantised(config)}
    given.setdefault("dtype", DTYPES.get(config.precision, "auto"))
    try:
        if not options and os.path.isdir(name):
            StoredWeights(name).release()  # transformers would let torch read pickles without a look
        model, info = _auto_class(hf_config).from_pretrained(
            name,
            config=hf_config,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
            **given,
        )
    except Exception as error:  # the hub client and the quantisers raise errors of many packages
        raise CheckpointError(
            f"model.llm_model: no weights could be read from {source!r} ({brief(error)}); give a folder with"
            " safetensors of this model, or a Hugging Face name that can be reached"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"model.llm_model: {source!r} lacks {len(missing)} tensors ({some(missing)}), which would be"
            " random; is it the weights of a language model with its head?"
        )
    _keep_as_stored(model)
    extra = sorted(info["unexpected_keys"])
    parts = [f"llm: {len(model.state_dict())} tensors from {source}"]
    parts += [f"quantised to {config.quantization}"] if config.quantization != "none" else []
    parts += [f"not used: {some(extra)}"] if extra else []
    return model, "; ".join([*parts, "frozen"])


def _quantised(config: LLMConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    if config.quantization == "none":
        return {}
    key = f"model.llm.quantization: {config.quantization}"
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{key} needs the packages bitsandbytes and accelerate; install the extra with"
            " `pip install 'blip[quantize]'`, or set it to none"
        ) from error
    # It tells what it casts at every product, hundreds of times a step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = own_dtype(config, device)
    how: Any
    if config.quantization == "int8":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    place: int | str = device.type
    if device.type == "cuda":
        place = torch.cuda.current_device() if device.index is None else device.index
    return {"quantization_config": how, "device_map": {"": place}, "dtype": dtype}


def _keep_as_stored(model: Any) -> None:
    """Leave weights of 4 bits as they are on CPUs that have AVX512-BF16.

    There bitsandbytes repacks a layer for good the first time it sees an input without gradients, so that no
    gradient passes the layer any more: none would reach the Q-Former after the first evaluation.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def own_dtype(config: LLMConfig, device: torch.device) -> torch.dtype:
    """What the model computes in on a device.

    Additions (`lora`) have gradients inside the model, which fp16 would lose unless they are scaled: left to
    itself, a model with them computes in bf16.
    """
    if config.precision != "auto":
        return DTYPES[config.precision]
    if device.type != "cuda":
        return torch.float32 if config.quantization == "none" else torch.bfloat16
    return torch.bfloat16 if config.lora.r else DTYPES[config.half]


def place(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model and give its frozen weights a type; what is trained, and buffers, keep theirs."""
    kept = {id(parameter) for parameter in _kept_in_float32(model)} if dtype == torch.float16 else set()

    def move(tensor: Tensor) -> Tensor:
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if not frozen or not tensor.is_floating_point():
            return tensor.to(device)
        return tensor.to(device, torch.float32 if id(tensor) in kept else dtype)

    model._apply(move)


def _kept_in_float32(model: Any) -> Iterator[nn.Parameter]:
    """Weights that would overflow in fp16, as the class of the model names them (T5's `wo`)."""
    names = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if names.intersection(name.split(".")):
            yield parameter


def grow_vocabulary(model: Any, rows: int) -> None:
    """Word embeddings of at least `rows` rows; new ones are the mean of the others, so that no token is new.

    LAVIS adds a row for Vicuna's padding, with random values.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if old >= rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = part.weight
            weight[old:] = weight[:old].float().mean(dim=0).to(weight)


def add_lora(model: Any, config: LoraConfig) -> dict[str, nn.Parameter]:
    """Put trained additions into a frozen model, in place; returns them by name, in float32.

    Raises:
        ConfigError: peft is not installed, or knows no such layers.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "model.llm.lora: needs the package peft; install the extra with `pip install 'blip[lora]'`, or"
            " set model.llm.lora.r to 0"
        ) from error
    how = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # fractions work too
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or None,
    )
    try:
        peft.inject_adapter_in_model(how, model)
    except ValueError as error:
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise ConfigError(
            f"model.llm.lora.targets: {brief(error)}; this model's linear layers are called"
            f" {', '.join(sorted(linear))}"
        ) from error
    for name, part in model.named_modules():
        if ".lora_" in name and isinstance(part, nn.Linear) and part.weight.is_meta:
            # Additions to a sketch have values, so that saved ones can take their place.
            part.to_empty(device="cpu")
            part.reset_parameters()
            if ".lora_B." in f"{name}.":
                nn.init.zeros_(part.weight)
    added = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in added.values():
        parameter.data = parameter.data.float()
    return added


def _auto_class(hf_config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if hf_config.is_encoder_decoder else AutoModelForCausalLM
