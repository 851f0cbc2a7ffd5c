"""A model starts from weights of its family, in any layout, with an account of what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.errors import CheckpointError
from blip.formats import hf, lavis
from blip.formats.load import load_any
from blip.weights import save_safetensors
from tests.reference.small_blip import small_blip

ARCH = {
    "pretrain": "blip_pretrain",
    "retrieval": "blip_retrieval",
    "caption": "blip_caption",
    "vqa": "blip_vqa",
}
QUERY = "text.layers.1.self_attn.query.weight"


def weights(kind: str, layout: str, folder: Path, **values: Any) -> tuple[Path, dict[str, Tensor]]:
    """A file of weights, and what they are by our names."""
    ours = small_blip(kind, **values).state_dict()
    file = folder / f"{kind}.pth"
    if layout == "ours":
        file = folder / f"{kind}.safetensors"
        save_safetensors(ours, file)
    else:
        table = (lavis if layout == "LAVIS" else hf).table(ARCH[kind])
        theirs = table.to_theirs(ours).state
        torch.save({"model": {f"module.{name}": tensor for name, tensor in theirs.items()}, "epoch": 3}, file)
    return file, ours


def blank(kind: str, **values: Any) -> Any:
    """A model in which every parameter is 0."""
    model = small_blip(kind, **values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("layout", ["ours", "LAVIS"])
def test_a_captioner_starts_from_pre_training(layout: str, tmp_path: Path) -> None:
    file, source = weights("pretrain", layout, tmp_path)
    model = blank("caption")
    lines = load_any(model, file)
    decoder = QUERY.replace("self_attn", "decode.self_attn")
    assert torch.equal(model.state_dict()[QUERY], source[decoder])
    assert torch.equal(model.lm_head.bias, source["lm_head.bias"])
    report = "\n".join(lines)
    assert report.startswith(f"{len(model.state_dict())} tensors loaded from '{file}'")
    reasons = {line.rpartition(" (")[2]: line for line in lines[1:]}
    heads = reasons["a head that this model has not)"]
    assert all(part in heads for part in ("itm_head.* (2)", "vision_proj.* (2)", "text_proj.* (2)", " temp"))
    for part in ("twin.* (", "queue.* (", "text.* (20) (it belongs to the one of encoder and decoder"):
        assert part in report


@pytest.mark.parametrize("layout", ["ours", "LAVIS", "Hugging Face"])
def test_what_starts_anew_is_told(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, source = weights("caption", layout, tmp_path)
    model = blank("retrieval")
    lines = load_any(model, file)
    assert torch.equal(model.state_dict()[QUERY], source[QUERY])
    assert not model.itm_head.weight.any()
    heads = (
        "has no temp, vision_proj.* (2), text_proj.* (2), itm_head.* (2), which keep the values they start"
    )
    assert heads in caplog.text
    assert not any("twin." in record.getMessage() for record in caplog.records)  # it is not left as it was:
    own = dict(model.named_parameters())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.twin.named_parameters())
    assert any(line.startswith("momentum twin: ") for line in lines)
    assert "queue: starts with random features" in lines


@pytest.mark.parametrize("kind", ["retrieval", "vqa", "pretrain"])
@pytest.mark.parametrize("layout", ["ours", "LAVIS"])
def test_a_model_s_own_weights_are_all_loaded(
    kind: str, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, source = weights(kind, layout, tmp_path)
    model = blank(kind)
    assert load_any(model, file) == [f"{len(source)} tensors loaded from '{file}'"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, source[name], rtol=0, atol=0, msg=name)
    assert not caplog.records


def test_weights_of_another_depth_are_refused(tmp_path: Path) -> None:
    file, _ = weights("pretrain", "LAVIS", tmp_path)
    model = blank("caption")
    del model.text.layers[1]
    with pytest.raises(CheckpointError, match="unexpected"):
        load_any(model, file)


def test_a_damaged_layer_is_refused(tmp_path: Path) -> None:
    file, source = weights("retrieval", "ours", tmp_path)
    save_safetensors({n: t for n, t in source.items() if n != QUERY}, file)
    with pytest.raises(CheckpointError, match=f"1 missing \\({QUERY}\\)"):
        load_any(blank("retrieval"), file)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    save_safetensors(
        {"qformer.query_tokens": torch.zeros(1, 2, 4), "ln_vision.weight": torch.zeros(4)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"unexpected \(ln_vision\.weight, qformer\.query_tokens\)"):
        load_any(blank("caption"), tmp_path / "x.safetensors")
