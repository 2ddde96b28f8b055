"""block_forward and block_inverse: a flow block in one call. The floor counts its weights once, from memory."""

import pytest
import torch

from starflow_kernels import BlockSpec, backends, block_forward, block_inverse

# benchmarks.gpu times the GPU backends.
BACKENDS = [name for name in backends()["block_inverse"] if name not in ("triton", "cuda", "persistent")]

SHAPES = {
    "digits": (16, BlockSpec(token_dim=4, channels=64, layers=2, heads=4, head_dim=16, kv_heads=4, mlp_dim=256)),
    "32x32": (256, BlockSpec(token_dim=12, channels=128, layers=4, heads=2, head_dim=64, kv_heads=2, mlp_dim=512)),
}


def random_weights(spec: BlockSpec) -> dict[str, torch.Tensor]:
    """Return weights of a block whose tokens neither grow nor shrink much."""
    weights = {}
    for name, shape in spec.weight_shapes.items():
        scale = shape[1] ** -0.5 if len(shape) == 2 and name != "pos_embed" else 0.2
        weights[name] = torch.randn(shape) * scale * (0.1 if name == "proj_out.weight" else 1)
    return weights


@pytest.mark.parametrize("batch", [1, 16], ids="batch {}".format)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", [block_forward, block_inverse], ids=["forward", "inverse"])
def bench_block(run, backend, shape, batch, timed):
    torch.manual_seed(0)
    T, spec = SHAPES[shape]
    weights, x = random_weights(spec), torch.randn(batch, T, spec.token_dim)

    def outputs(x, weights, backend):
        found = run(x, weights, spec, backend=backend)
        return found if isinstance(found, tuple) else (found.x,)

    matrices = sum(w.numel() for name, w in weights.items() if w.dim() == 2 and name != "pos_embed")
    timed(
        lambda: outputs(x, weights, backend),
        outputs(x.double(), {name: w.double() for name, w in weights.items()}, "reference"),
        outputs(x, weights, "reference"),
        bytes=4 * (matrices + 2 * x.numel()),
        flops=2 * batch * T * (matrices + spec.layers * spec.heads * spec.head_dim * T),
        own=backend != "reference",
    )
