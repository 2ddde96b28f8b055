"""Fast exact ops for transformer autoregressive normalizing flows. Importing the package needs only torch."""

from ._core.dispatch import backends
from ._triton.runtime import warmup
from .accelerate.api import accelerate, restore
from .affine_flow.api import affine_flow
from .affine_flow_inverse.api import affine_flow_inverse
from .attention_flow.api import attention_flow
from .bias_gelu.api import bias_gelu
from .block.api import block_forward, block_inverse, block_params
from .block.stack import stack_inverse
from .cached_attention.api import cached_attention
from .causal_attention.api import causal_attention
from .flow_head.api import flow_head
from .linear.api import linear
from .masked_inverse.api import masked_inverse
from .residual_norm.api import residual_norm
from .solve_inverse.api import solve_inverse
from .solver import Inverse, Solver, SolveReport
from .spec import AffineSpec, BlockSpec

__version__ = "0.1.0"

__all__ = [
    "AffineSpec",
    "BlockSpec",
    "Inverse",
    "SolveReport",
    "Solver",
    "__version__",
    "accelerate",
    "affine_flow",
    "affine_flow_inverse",
    "attention_flow",
    "backends",
    "bias_gelu",
    "block_forward",
    "block_inverse",
    "block_params",
    "cached_attention",
    "causal_attention",
    "flow_head",
    "linear",
    "masked_inverse",
    "residual_norm",
    "restore",
    "solve_inverse",
    "stack_inverse",
    "warmup",
]
