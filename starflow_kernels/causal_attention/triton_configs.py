"""Block sizes of the Triton kernels, chosen so that none spills registers on its chip.

chip -> bytes of a value -> padded head size -> kernel -> (queries, keys of a block, warps, stages).
"""

_SMALL = {"forward": (64, 32, 4, 2), "keys": (32, 64, 4, 2), "queries": (64, 32, 4, 2)}
_WIDE = {"forward": (64, 32, 8, 2), "keys": (32, 32, 8, 2), "queries": (32, 32, 8, 2)}

_ANY = {2: {32: _SMALL, 64: _SMALL, 128: _WIDE, 256: _WIDE}, 4: {32: _SMALL, 64: _SMALL, 128: _WIDE, 256: _WIDE}}

CONFIGS = {"sm_80": _ANY, "sm_90": _ANY, "sm_100": _ANY, "default": _ANY}
