#!/usr/bin/env bash
# Checks the Triton kernels without a GPU: runs them in the interpreter, then compiles them for GPUs by the newest
# version and by an older one.
set -euo pipefail
cd "$(dirname "$0")/.."
for version in 3.9.0 3.6.0; do
    [ -d "build/triton-$version" ] || pip install -q --no-deps --target "build/triton-$version" "triton==$version"
done
export PYTHONPATH="$PWD/build/triton-3.9.0"
TRITON_INTERPRET=1 python -m pytest -q -n 2 tests/*/test_*_triton.py
TRITON_INTERPRET=1 python -m pytest -q -n 2 tests/kernels/test_attention_flow.py \
    -k "triton and (error_contract or one_output or sum_exp or no_rows or bits or narrow)"
python -m benchmarks.gpu smoke --dry
python -m benchmarks.gpu --dry
python -m benchmarks.gpu.triton_resources --check
PYTHONPATH="$PWD/build/triton-3.6.0" python -m benchmarks.gpu.triton_resources --check --targets sm_90
# Every launch of a small program, specialised as on a GPU.
PYTHONPATH="$PWD/build/triton-3.6.0" python -m benchmarks.gpu.ahead smoke
