#!/usr/bin/env bash
# Looks for races of the CUDA kernels in emulation, then builds them for every architecture that setup.py names. Fails if
# a kernel spills or uses a stack, if ptxas warns of a loss of performance, or if the library does not load. Without nvcc
# it builds nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python scripts/check_races.py
command -v nvcc > /dev/null || exit 0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
NVCC_APPEND_FLAGS=-Xptxas=-v STARFLOW_NATIVE=0 STARFLOW_CUDA=1 \
    python setup.py -q build_ext --force --build-lib build/cuda 2> "$log" || { cat "$log"; exit 1; }
# There is one line per kernel and architecture, and every number of bytes in it must be 0.
lines=$(grep "bytes stack frame" "$log") || { cat "$log"; echo "ptxas says nothing"; exit 1; }
if grep -q "[1-9][0-9]* bytes" <<< "$lines"; then
    cat "$log"
    echo "a kernel spills"
    exit 1
fi
if grep "C75[0-9][0-9]" "$log"; then
    echo "ptxas gives up an optimization"
    exit 1
fi
registers=$(grep -o "Used [0-9]* registers" "$log" | grep -o "[0-9]*" | sort -n | tail -1)
echo "CUDA: $(grep -c . <<< "$lines") kernels, no spills, at most $registers registers"
python -c "import torch; torch.ops.load_library('build/cuda/starflow_kernels/_cuda.abi3.so'); torch.ops.starflow_cuda.onchip_plan, torch.ops.starflow_cuda.persistent_schedule"
