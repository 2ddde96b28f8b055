"""AffineSpec and BlockSpec: validation, JSON form, weights."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

import pytest

from starflow_kernels import AffineSpec, BlockSpec

SIZES = {"token_dim": 3, "channels": 8, "layers": 2, "heads": 4, "head_dim": 6, "kv_heads": 2, "mlp_dim": 12}
FULL = BlockSpec(
    **SIZES,
    affine=AffineSpec("softplus", 4.0),
    mlp="swiglu",
    norm="rms_norm",
    rotary="half",
    positions=5,
    text_dim=7,
    start=True,
    flip=True,
    bias=False,
    qk_norm=True,
    post_norm=True,
    final_norm=True,
)


def test_params_dim():
    assert [AffineSpec(scale).params_dim(3) for scale in ("exp", "softplus", "unit")] == [6, 6, 3]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"scale": "sigmoid"}, "scale='sigmoid': expected one of 'exp', 'softplus', 'unit'"),
        ({"scale": None}, "scale=None"),
        ({"soft_clip": -1.0}, "soft_clip=-1.0: expected a finite number >= 0"),
        ({"soft_clip": math.nan}, "soft_clip=nan"),
        ({"soft_clip": math.inf}, "soft_clip=inf"),
        ({"soft_clip": 10**400}, "soft_clip=10000"),
    ],
)
def test_affine_spec_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        AffineSpec(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        *[({name: 0}, f"{name}=0: expected at least 1") for name in SIZES],
        ({"mlp": "relu"}, "mlp='relu': expected one of 'gelu', 'swiglu'"),
        ({"norm": "batch_norm"}, "norm='batch_norm'"),
        ({"rotary": "yarn"}, "rotary='yarn'"),
        ({"qk_norm": True, "qk_layer_norm": True}, "qk_norm, qk_layer_norm: queries and keys have one norm"),
        ({"adaptive": True, "text_dim": 3}, "text_dim=3: an adaptive block takes no text"),
        ({"transition_dim": 8}, "transition_dim=8: expected 0, or a width in an adaptive block"),
        ({"adaptive": True, "transition_dim": -1}, "transition_dim=-1"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"kv_heads": 8}, "kv_heads=8 does not divide heads=4"),
        ({"head_dim": 5, "rotary": "half"}, "head_dim=5: rotary positions need an even head size"),
    ],
)
def test_block_spec_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockSpec(**{**SIZES, **fields})


def test_specs_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.flip = False
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.affine.scale = "exp"
    assert len({FULL, dataclasses.replace(FULL), BlockSpec(**SIZES)}) == 2


@pytest.mark.parametrize("spec", [BlockSpec(**SIZES), FULL], ids=["defaults", "full"])
def test_json_round_trips(spec):
    back = BlockSpec.from_json(spec.to_json())
    assert back == spec and back.weight_shapes == spec.weight_shapes
    assert json.loads(spec.to_json()).keys() == {field.name for field in dataclasses.fields(spec)}
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_replaced_spec_has_its_own_json_and_weights():
    wider = dataclasses.replace(FULL, token_dim=4)
    assert json.loads(wider.to_json())["token_dim"] == 4
    assert wider.weight_shapes["proj_in.weight"] == (8, 4) and FULL.weight_shapes["proj_in.weight"] == (8, 3)


def test_weights_of_the_default_block():
    shapes = BlockSpec(**{**SIZES, "layers": 1}).weight_shapes
    assert list(shapes.items()) == [
        ("proj_in.weight", (8, 3)),
        ("proj_in.bias", (8,)),
        ("layers.0.attn_norm.weight", (8,)),
        ("layers.0.attn_norm.bias", (8,)),
        ("layers.0.qkv.weight", ((4 + 2 * 2) * 6, 8)),
        ("layers.0.qkv.bias", ((4 + 2 * 2) * 6,)),
        ("layers.0.proj.weight", (8, 24)),
        ("layers.0.proj.bias", (8,)),
        ("layers.0.mlp_norm.weight", (8,)),
        ("layers.0.mlp_norm.bias", (8,)),
        ("layers.0.up.weight", (12, 8)),
        ("layers.0.up.bias", (12,)),
        ("layers.0.down.weight", (8, 12)),
        ("layers.0.down.bias", (8,)),
        ("proj_out.weight", (6, 8)),
        ("proj_out.bias", (6,)),
    ]


def test_weights_of_the_full_block():
    shapes = FULL.weight_shapes
    outside = {n: s for n, s in shapes.items() if not n.startswith("layers.")}
    assert outside == {
        "proj_in.weight": (8, 3),
        "proj_in.bias": (8,),
        "pos_embed": (5, 8),
        "start": (3,),
        "proj_text.weight": (8, 7),
        "proj_text.bias": (8,),
        "final_norm.weight": (8,),
        "proj_out.weight": (6, 8),
        "proj_out.bias": (6,),
    }
    layer = {n.removeprefix("layers.1."): s for n, s in shapes.items() if n.startswith("layers.1.")}
    assert layer == {
        "attn_norm.weight": (8,),
        "qkv.weight": (48, 8),
        "q_norm.weight": (6,),
        "k_norm.weight": (6,),
        "proj.weight": (8, 24),
        "attn_post_norm.weight": (8,),
        "mlp_norm.weight": (8,),
        "gate.weight": (12, 8),
        "up.weight": (12, 8),
        "down.weight": (8, 12),
        "mlp_post_norm.weight": (8,),
    }


def test_unit_scale_and_no_norm_have_fewer_weights():
    shapes = BlockSpec(**SIZES, affine=AffineSpec("unit"), norm="none").weight_shapes
    assert shapes["proj_out.weight"] == (3, 8) and not [n for n in shapes if "norm" in n]
