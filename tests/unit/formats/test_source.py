"""Models from weights of others: LAVIS's files, folders of transformers, hub ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip
from blip.errors import CheckpointError, UsageError
from blip.formats.source import local_copy

GOLDEN = Path(__file__).parents[2] / "parity" / "goldens" / "blip2_stage1.pt"
GOLDEN_HEADS: dict[str, Any] = {"vit": {"heads": 5}, "qformer": {"num_heads": 4}}
SMALL: dict[str, Any] = {
    "image_size": 32,
    "vit": {"patch_size": 16, "width": 32, "depth": 1, "heads": 2},
    "qformer": {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "max_positions": 40},
    "tokenizer": "scenes",
}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and empty caches; returns torch's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    return cache


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


def same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ours.keys() == others.keys() and all(
        torch.equal(ours[name], others[name]) and ours[name].dtype == others[name].dtype for name in ours
    )


def without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def only(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


# LAVIS's weights


def test_lavis_s_weights_are_recognised_and_their_sizes_read_off(
    golden: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "lavis.pth"
    torch.save({"model": golden["state_dict"]}, file)
    with pytest.raises(CheckpointError, match=r"do not tell qformer\.num_heads, vit\.heads; give them too"):
        blip.from_pretrained(file)
    model = blip.from_pretrained(file, **GOLDEN_HEADS)
    assert (type(model).__name__, model.config.model_type) == ("Blip2Qformer", "pretrain")
    assert (model.config.image_size, model.config.num_query_token, model.config.embed_dim) == (64, 8, 32)
    assert model.config.qformer.depth == 4
    with torch.no_grad():
        features = model.extract_features({"image": golden["inputs"]["image"]}, mode="image")
    expected = golden["features"]["image"]["image_embeds_proj"]
    torch.testing.assert_close(features.image_embeds_proj, expected, atol=1e-5, rtol=1e-4)


def test_published_weights_are_found_in_torch_s_cache(golden: dict[str, Any], places: Path) -> None:
    state = golden["state_dict"]
    torch.save({"model": without(state, "visual_encoder.")}, places / "blip2_pretrained.pth")
    sizes = {"patch_size": 16, "width": 80, "depth": 2, "heads": 5, "mlp_dim": 240}
    small: dict[str, Any] = {"image_size": 64, "vit": sizes, "qformer": {"num_heads": 4}}
    small["vit_model"] = "eva_clip_g"
    with pytest.raises(CheckpointError, match=r"leaves out vision.*eva_vit_g\.pth.*https://storage"):
        blip.load_model("blip2", "pretrain", **small)
    torch.save(only(state, "visual_encoder."), places / "eva_vit_g.pth")
    model = blip.load_model("blip2", "pretrain", **small)
    with torch.no_grad():
        features = model.eval().extract_features({"image": golden["inputs"]["image"]}, mode="image")
    expected = golden["features"]["image"]["image_embeds_proj"]
    torch.testing.assert_close(features.image_embeds_proj, expected, atol=1e-5, rtol=1e-4)
    assert model.frozen_parts() == {"vision.": "eva_vit_g.pth"}
    assert same(blip.from_pretrained(model.save_pretrained("copy")).state_dict(), model.state_dict())


def test_the_mere_name_of_a_downloaded_file_is_enough(places: Path, tmp_path: Path) -> None:
    """As in model.init_from=model_base_14M.pth; one in the working directory comes first."""
    (places / "model_base_14M.pth").touch()
    assert local_copy("model_base_14M.pth") == places / "model_base_14M.pth"
    below = tmp_path / "big" / "weights" / "other.pth"
    below.parent.mkdir(parents=True)
    below.touch()
    assert local_copy("other.pth", tmp_path / "big") == below
    Path("model_base_14M.pth").touch()
    assert local_copy("model_base_14M.pth") == Path("model_base_14M.pth")


def test_published_weights_that_are_not_here_are_named_with_their_address() -> None:
    with pytest.raises(CheckpointError) as caught:
        blip.load_model_and_preprocess("blip2_feature_extractor", "coco", is_eval=True)
    for part in (
        "https://",
        "blip2_finetune_coco.pth is not on this machine",
        "checkpoint=",
        "pretrained=False",
    ):
        assert part in str(caught.value)


def test_weights_of_another_layout_s_other_model_are_refused(golden: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"model": {**golden["state_dict"], "opt_proj.weight": torch.zeros(2, 2)}}, file)
    with pytest.raises(
        CheckpointError, match=r"other\.pth': LAVIS weights .* no rule for 'opt_proj\.weight'"
    ):
        blip.from_pretrained(file, **GOLDEN_HEADS)


# Hugging Face's weights


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote: tiny, random weights."""
    from transformers import (
        Blip2Config,
        Blip2ForImageTextRetrieval,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    torch.manual_seed(0)
    text = OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=32)
    vision = Blip2VisionConfig(
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-5,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=72,
        max_position_embeddings=20,
        encoder_hidden_size=48,
        use_qformer_text_input=True,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=5,
        image_text_hidden_size=16,
    )
    folder = tmp_path_factory.mktemp("hub") / "retrieval"
    model = Blip2ForImageTextRetrieval(config)
    with torch.no_grad():  # transformers starts vision weights at 1e-10
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("self_attn.qkv.bias"):
                parameter[48:96] = 0
    model.save_pretrained(folder)
    return folder


def tokens(size: int = 32) -> dict[str, Tensor]:
    ids = torch.tensor([[1, 7, 8, 9, 2], [1, 5, 2, 0, 0]])
    return {
        "image": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)),
        "text_ids": ids,
        "text_mask": ids > 0,
    }


def test_a_hugging_face_folder_computes_what_transformers_computes(retrieval: Path) -> None:
    from transformers import Blip2ForImageTextRetrieval

    theirs = Blip2ForImageTextRetrieval.from_pretrained(retrieval).eval()
    ours = blip.from_pretrained(retrieval)
    assert type(ours).__name__ == "Blip2ImageTextMatching"
    batch = tokens()
    with torch.no_grad():
        expected = theirs(
            pixel_values=batch["image"],
            input_ids=batch["text_ids"],
            attention_mask=batch["text_mask"].long(),
            use_image_text_matching_head=True,
        ).logits_per_image
        torch.testing.assert_close(ours(batch), expected, atol=1e-5, rtol=1e-5)
    assert blip.from_pretrained(retrieval, arch="blip2").config.arch == "blip2"


def test_what_transformers_gets_of_a_model_is_that_model(retrieval: Path, tmp_path: Path) -> None:
    from transformers import Blip2ForImageTextRetrieval

    ours = blip.from_pretrained(retrieval)
    theirs = blip.to_hf(ours)
    assert same(theirs.state_dict(), Blip2ForImageTextRetrieval.from_pretrained(retrieval).state_dict())
    theirs.save_pretrained(tmp_path / "exported")
    back = blip.from_pretrained(tmp_path / "exported")
    trained = [name for name in ours.state_dict() if name == "temp" or name.startswith("lm_head.")]
    kept = {name: t for name, t in ours.state_dict().items() if name not in trained}
    assert same({name: back.state_dict()[name] for name in kept}, kept)


def test_a_tower_that_transformers_has_not_is_not_exported() -> None:
    with pytest.raises(UsageError, match=r"an EVA tower \(eva_clip_g\), not vit_base"):
        blip.to_hf(blip.load_model("blip2", pretrained=False, vit_model="vit_base", **SMALL))
    vit = {**SMALL["vit"], "stem_width": 4}
    with pytest.raises(UsageError, match=r"model\.vit\.stem_width: transformers' towers have no convolution"):
        blip.to_hf(blip.load_model("blip2", pretrained=False, **{**SMALL, "vit": vit}))


def test_a_hub_id_means_what_the_cache_holds(retrieval: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--someone--retrieval"
    shutil.copytree(retrieval, cached / "snapshots" / "0123456789012345678901234567890123456789")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123456789012345678901234567890123456789")
    found = blip.from_pretrained("someone/retrieval")
    assert same(found.vision.state_dict(), blip.from_pretrained(retrieval).vision.state_dict())


def test_sizes_of_transformers_that_no_model_here_has_are_refused(retrieval: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(retrieval, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vision_config\.hidden_act is 'relu'; BLIP-2 has 'gelu'"):
        blip.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "is none of a Blip2ForImageTextRetrieval"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}},
            "is none of a Blip2ForImageTextRetrieval",
        ),
        ({"architectures": ["BertModel"]}, "holds a BertModel, which has no counterpart here"),
    ],
)
def test_a_folder_of_another_kind_is_refused_and_runs_no_code(
    retrieval: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(retrieval, tmp_path / "copy")
    (folder / "code.py").write_text("raise SystemExit('this ran')\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        blip.from_pretrained(folder)
