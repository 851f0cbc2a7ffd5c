"""The README of a model on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

_PAPERS = {
    "blip": ("BLIP: Bootstrapping Language-Image Pre-training", "2201.12086"),
    "blip2": ("BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders", "2301.12597"),
    "instruct": ("InstructBLIP: Towards General-purpose Vision-Language Models", "2305.06500"),
}
_TASKS = {
    "blip_caption": "image-to-text",
    "blip_vqa": "visual-question-answering",
    "blip_nlvr": "visual-question-answering",
    "blip_classification": "image-classification",
    "blip2_opt": "image-text-to-text",
    "blip2_t5": "image-text-to-text",
    "blip2_llm": "image-text-to-text",
}
_SAMPLES = '{"image": image, "text_input": [text["eval"]("a dog")]}'
_TWO = '{"image0": image, "image1": image, "text_input": [text["eval"]("both show a dog")]}'


def card(model: Any, arch: str, repo_id: str, frozen: Mapping[str, str]) -> str:
    """A model card in Markdown: what the model is, its sizes, how to use it, what it needs besides.

    Args:
        model: `BlipModel`.
        arch: its registry name.
        repo_id: where it will be.
        frozen: parts that the weights leave out -> where they come from.
    """
    kind = "instruct" if "instruct" in arch else arch.partition("_")[0]
    name = f"`{arch or type(model).__name__}`"
    if kind in _PAPERS:
        title, number = _PAPERS[kind]
        name = f"{name} ([{title}](https://arxiv.org/abs/{number}))"
    size = getattr(model.config, "image_size", None)
    total = sum(parameter.numel() for parameter in model.parameters())
    saved = model.state_to_save()
    given = sum(parameter.numel() for name, parameter in model.named_parameters() if name in saved)
    task = _TASKS.get(arch, "image-text-to-text" if kind == "instruct" else "feature-extraction")
    lines = [
        "---",
        "library_name: blip",
        f"pipeline_tag: {task}",
        "tags:",
        f"- {arch or 'blip'}",
        "---",
        "",
        f"# {repo_id.rpartition('/')[2]}",
        "",
        f"{name}, {total / 1e6:.1f} M parameters, of which these files have {given / 1e6:.1f} M."
        + (f" Pictures of {size} x {size} pixels." if size else ""),
        "",
        "```python",
        "import blip",
        "from PIL import Image",
        "",
        f'model = blip.from_pretrained("{repo_id}")',
        "vis, text = blip.load_preprocess(model)",
        'image = vis["eval"](Image.open("picture.png").convert("RGB"))[None]',
        *_uses(model)[:2],
        "```",
    ]
    if frozen:
        lines += ["", "Frozen parts are not among the weights, but are read from where they came from:", ""]
        lines += [f"- `{part.rstrip('.')}`: {place}" for part, place in frozen.items()]
    return "\n".join([*lines, ""])


def _uses(model: Any) -> list[str]:
    """What can be asked of a model, a line of Python each."""
    known = {
        "generate": 'model.generate({"image": image}, num_beams=3, max_length=30)',
        # Some rank candidates where they are not told to write.
        "predict_answers": 'model.predict_answers({"image": image, "text_input": ["what is this?"]},'
        ' inference_method="generate")',
        "extract_features": 'model.extract_features({"image": image}, mode="image")',
        "predict": f"model.predict({_TWO if getattr(model, 'num_images', 1) == 2 else _SAMPLES})",
    }
    uses = [line for name, line in known.items() if hasattr(model, name)]
    if "match_head" in signature(model.forward).parameters:  # a judge of pairs; other models train
        uses.insert(0, f'model({_SAMPLES}, match_head="itm")')
    return uses
