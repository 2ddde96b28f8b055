#!/usr/bin/env bash
# Checks the Triton kernels without a GPU: runs them in the interpreter, then compiles them for GPUs by the newest
# version and by an older one. GPU machines have the older one, with an older torch: the programs that run there, and the
# compiled CPU kernels, run with both here.
set -euo pipefail
cd "$(dirname "$0")/.."
newest=build/triton-3.9.0 older=build/torch-2.11.0
[ -d "$newest" ] || pip install -q --no-deps --target "$newest" triton==3.9.0
# It brings Triton 3.6, whose interpreter needs an older numpy.
[ -d "$older" ] || pip install -q --target "$older" torch==2.11.0 'numpy<2.4'
export PYTHONPATH="$PWD/$newest"
TRITON_INTERPRET=1 python -m pytest -q -n 2 tests/*/test_*_triton.py
TRITON_INTERPRET=1 python -m pytest -q -n 2 tests/kernels/test_attention_flow.py \
    -k "triton and (error_contract or one_output or sum_exp or no_rows or bits or narrow)"
python -m benchmarks.gpu smoke --dry
python -m benchmarks.gpu --dry
python -m benchmarks.gpu.triton_resources --check
export PYTHONPATH="$PWD/$older"
python -m benchmarks.gpu.triton_resources --check --targets sm_90
# Every launch of a small program, specialised as on a GPU.
python -m benchmarks.gpu.ahead smoke
python -m benchmarks.gpu smoke --dry
python -c "from starflow_kernels._core import compiled; assert compiled.native_unavailable() is None"
python -m pytest -q -n 2 tests/kernels -k opcheck
