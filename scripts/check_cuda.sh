#!/usr/bin/env bash
# Compiles the CUDA kernels for every architecture that setup.py names; fails where one spills or has a stack.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v nvcc > /dev/null || { echo "nvcc is needed"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for arch in sm_80 sm_90a sm_100; do
    for source in csrc/cuda/*.cu; do
        nvcc -std=c++17 -O3 -fmad=false -arch="$arch" -cubin -Xptxas -v "$source" -o "$folder/out.cubin" 2> "$folder/log" ||
            { cat "$folder/log"; exit 1; }
        # One line a kernel, and no other number than 0 in it.
        lines=$(grep "bytes stack frame" "$folder/log") || { echo "$source: ptxas says nothing"; exit 1; }
        if grep -q "[1-9][0-9]* bytes" <<< "$lines"; then
            echo "$source spills for $arch:"
            grep -v "^$" "$folder/log"
            exit 1
        fi
        registers=$(grep -o "Used [0-9]* registers" "$folder/log" | grep -o "[0-9]*" | paste -sd,)
        echo "$source $arch: $(grep -c . <<< "$lines") kernels, no spills, $registers registers"
    done
done
