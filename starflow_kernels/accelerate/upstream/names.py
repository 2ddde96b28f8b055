"""Names of the weights of a flow block in the TarFlow and STARFlow code that Apple released."""

from __future__ import annotations

from ...spec import Mlp

_BLOCK = {"proj_text.weight": "proj_txt.weight", "proj_text.bias": "proj_txt.bias", "start": "sos_embed"}
_LAYER = {
    "attn_norm": "attention.norm",
    "qkv": "attention.qkv",
    "q_norm": "attention.query_norm",
    "k_norm": "attention.key_norm",
    "proj": "attention.proj",
    "attn_post_norm": "attention.post_norm",
    "mlp_norm": "mlp.norm",
    "mlp_post_norm": "mlp.post_norm",
    "gate": "mlp.gate_proj",
}
_LINEAR = {"gelu": {"up": "mlp.main.0", "down": "mlp.main.2"}, "swiglu": {"up": "mlp.up_proj", "down": "mlp.down_proj"}}


def upstream_name(name: str, mlp: Mlp) -> str:
    """Return the upstream name of a weight, in which "attn_blocks" is the list of layers.

    Args:
        name: name in `BlockSpec.weight_shapes`.
        mlp: as in `BlockSpec`.
    """
    if not name.startswith("layers."):
        return _BLOCK.get(name, name)
    _, layer, module, leaf = name.split(".")
    return f"attn_blocks.{layer}.{(_LAYER | _LINEAR[mlp])[module]}.{leaf}"
