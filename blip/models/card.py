"""The README of a model on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
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
_USES = {
    "generate": 'model.generate({"image": image}, num_beams=3, max_length=30)',
    "predict_answers": 'model.predict_answers({"image": image, "text_input": ["what is this?"]})',
    "compute_itm": 'model({"image": image, "text_input": [text["eval"]("a dog")]}, match_head="itm")',
    "extract_features": 'model.extract_features({"image": image}, mode="image")',
}


def card(model: Any, arch: str, repo_id: str, frozen: Mapping[str, str]) -> str:
    """A model card in Markdown: what the model is, its sizes, how to use it, what it needs besides.

    Args:
        model: `BlipModel`.
        arch: its registry name.
        repo_id: where it will be.
        frozen: parts that the weights leave out -> where they come from.
    """
    size = model.config.image_size
    kind = "instruct" if "instruct" in arch else arch.partition("_")[0]
    title, number = _PAPERS[kind]
    total = sum(parameter.numel() for parameter in model.parameters())
    given = sum(tensor.numel() for tensor in model.state_to_save().values())
    task = _TASKS.get(arch, "image-text-to-text" if kind == "instruct" else "feature-extraction")
    uses = [line for name, line in _USES.items() if hasattr(model, name)]
    lines = [
        "---",
        "library_name: blip",
        f"pipeline_tag: {task}",
        "tags:",
        f"- {arch}",
        "---",
        "",
        f"# {repo_id.rpartition('/')[2]}",
        "",
        f"`{arch}` ([{title}](https://arxiv.org/abs/{number})), {total / 1e6:.1f} M parameters, of which"
        f" these files have {given / 1e6:.1f} M. Pictures of {size} x {size} pixels.",
        "",
        "```python",
        "import blip",
        "from PIL import Image",
        "",
        f'model = blip.from_pretrained("{repo_id}")',
        "vis, text = blip.load_preprocess(model)",
        'image = vis["eval"](Image.open("picture.png").convert("RGB"))[None]',
        *uses[:2],
        "```",
    ]
    if frozen:
        lines += ["", "Frozen parts are not among the weights, but are read from where they came from:", ""]
        lines += [f"- `{part.rstrip('.')}`: {place}" for part, place in frozen.items()]
    return "\n".join([*lines, ""])
