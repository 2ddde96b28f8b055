#!/usr/bin/env bash
# Runs the tests of the native kernels, and of the CUDA kernels in emulation, with sanitizers, and the threads of a team
# in a race detector. Leaves that build in place.
set -euo pipefail
cd "$(dirname "$0")/.."
check=$(mktemp)
g++ -std=c++20 -O1 -g -fsanitize=thread -Wall csrc/emulation/team.cpp csrc/cpu/team.cpp -o "$check" -pthread
"$check"
rm "$check"
export STARFLOW_NATIVE=1 STARFLOW_SANITIZE=address,undefined
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1
python setup.py -q build_ext --inplace --force
libraries="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
LD_PRELOAD="$libraries" python -m pytest -q tests/kernels/test_block_cuda.py \
    -k "guided or bits or fill_the_memory or (error_contract and 2 and True)"
LD_PRELOAD="$libraries" python -m pytest -q tests/kernels/test_block_persistent.py -k "guided or splits or ring"
unset STARFLOW_SANITIZE
LD_PRELOAD="$libraries" python -m pytest -q -n 2 tests/kernels/test_block_{native,jacobi}.py \
    tests/kernels/test_{causal,cached}_attention.py tests/kernels/test_affine_flow{,_inverse}.py \
    tests/kernels/test_{flow_head,instruction_sets,linear,masked_inverse,transposed_solve,team}.py \
    -k "(test_block_native or test_instruction_sets or test_transposed or test_team or native) and not interrupt"
LD_PRELOAD="$libraries" python -m pytest -q -n 2 \
    tests/kernels/test_{block_layer,bfloat16_products,stack_inverse,weight_changes,all_finite}.py \
    -k "not interrupt and not compile and not graph and not opcheck"
