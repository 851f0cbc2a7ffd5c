"""The table for Hugging Face's weights; `tests/parity/test_blip2_stage1_hf.py` has the real model."""

from __future__ import annotations

import pytest
import torch

from blip.errors import CheckpointError
from blip.formats import hf

BIAS = "vision_model.encoder.layers.3.self_attn.qkv.bias"


def test_the_fused_bias_of_the_tower_is_split_and_joined() -> None:
    fused = torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0, 4.0])
    ours = hf.table("blip2").to_ours({BIAS: fused}).state
    assert {name: tensor.tolist() for name, tensor in ours.items()} == {
        "vision.vit.blocks.3.attn.q_bias": [1.0, 2.0],
        "vision.vit.blocks.3.attn.v_bias": [3.0, 4.0],
    }
    assert hf.table("blip2").to_theirs(ours).state[BIAS].tolist() == fused.tolist()


def test_a_trained_key_bias_is_refused_with_the_remedy() -> None:
    with pytest.raises(CheckpointError, match="set that third of it to zero"):
        hf.table("blip2").to_ours({BIAS: torch.ones(6)})


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="did you mean 'blip2'"):
        hf.table("blip22")
