"""Small BLIP models in float64, the same weights every time, and what they are fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip.models.blip_caption import BlipCaption, BlipCaptionConfig
from blip.models.blip_classification import (
    BlipClassification,
    BlipClassificationConfig,
    BlipNlvr,
    BlipNlvrConfig,
)
from blip.models.blip_features import (
    BlipFeatureExtractor,
    BlipFeaturesConfig,
    BlipImageTextMatching,
    BlipMatchingConfig,
)
from blip.models.blip_pretrain import BlipPretrain, BlipPretrainConfig
from blip.models.blip_retrieval import BlipRetrieval, BlipRetrievalConfig
from blip.models.blip_vqa import BlipVqa, BlipVqaConfig
from blip.models.med import Med, MedConfig
from blip.models.vision import VisionConfig
from tests.reference.small_stage1 import IMAGE, VOCAB, global_batch

WIDTH = 16
"""Of the text transformer."""
IMAGE_WIDTH = 12
"""Of the tower."""
PATCHES = 5
"""Tokens of a picture: [CLS] and 2 x 2 patches."""
SIZES: dict[str, Any] = {
    "image_size": IMAGE,
    "vit": {"patch_size": 8, "width": IMAGE_WIDTH, "depth": 2, "heads": 2, "mlp_dim": 20},
    "med": {"width": WIDTH, "depth": 2, "num_heads": 2, "mlp_dim": 24, "max_positions": 16},
    "vocab_size": VOCAB,
    "max_txt_len": 12,
    "dropout": 0.0,
}
MOMENTUM: dict[str, Any] = {"embed_dim": 8, "queue_size": 10, "momentum": 0.9}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "pretrain": (BlipPretrain, BlipPretrainConfig, MOMENTUM),
    "retrieval": (BlipRetrieval, BlipRetrievalConfig, MOMENTUM),
    "caption": (BlipCaption, BlipCaptionConfig, {"prompt": ""}),
    "vqa": (BlipVqa, BlipVqaConfig, {}),
    "classification": (BlipClassification, BlipClassificationConfig, {"momentum": 0.9}),
    "nlvr": (BlipNlvr, BlipNlvrConfig, {}),
    "features": (BlipFeatureExtractor, BlipFeaturesConfig, {"embed_dim": 8}),
    "matching": (BlipImageTextMatching, BlipMatchingConfig, {"embed_dim": 8}),
}


def small_blip(kind: str, data_root: Path | None = None, **values: Any) -> Any:
    """A model in training mode; its momentum twin differs from it. `values` are configuration keys."""
    model_class, config_class, own = MODELS[kind]
    sections = {"vit": VisionConfig(vit_model="vit_base", **SIZES["vit"]), "med": MedConfig(**SIZES["med"])}
    torch.manual_seed(0)
    model = model_class.build(config_class(**{**SIZES, **sections, **own, **values}), data_root).double()
    shake(model)
    return model.train()


def small_med(share: str | None = "all_but_sa", images: int = 1, **values: Any) -> Med:
    """A text transformer by itself."""
    torch.manual_seed(0)
    config = MedConfig(**{**SIZES["med"], **values})
    num_images: Any = images or 1
    med = Med(config, VOCAB, IMAGE_WIDTH if images else None, 0.0, share, num_images).double()
    shake(med)
    return med


def shake(model: nn.Module) -> None:
    """Make all weights far from their initial values, and the same every time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name != "temp":
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
                parameter.add_(0.2 * noise.to(parameter))


def picture_states(count: int, seed: int = 3, patches: int = PATCHES) -> Tensor:
    """What a tower might say, (count, patches, IMAGE_WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, patches, IMAGE_WIDTH, generator=generator, dtype=torch.double)


def texts(rows: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts of different lengths, padded to more than the longest."""
    batch = global_batch(rows, ids=False)
    return batch["text_ids"], batch["text_mask"]


def steps_of(count: int, rows: list[int]) -> list[dict[str, Any]]:
    """Global batches of consecutive steps, `rows[i % len(rows)]` rows in step i; pictures come again."""
    found = []
    for step in range(count):
        batch = global_batch(rows[step % len(rows)], ids=True)
        generator = torch.Generator().manual_seed(100 + step)
        noise = torch.randn(batch["image"].shape, generator=generator, dtype=torch.double)
        shift = int(torch.randint(0, VOCAB - 2, (), generator=generator))
        ids = (batch["text_ids"] + shift - 1) % (VOCAB - 2) + 1
        batch["image"] = batch["image"] + noise
        batch["text_ids"] = ids.masked_fill(~batch["text_mask"], 0)
        batch["image_id"] = batch["image_id"] + step % 2
        found.append(batch | {"step": step, "num_iters_per_epoch": 4})
    return found
