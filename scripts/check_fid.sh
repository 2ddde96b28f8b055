#!/usr/bin/env bash
# Compares the scores of images with torch-fidelity and torchmetrics, in a folder of their own: torchvision, which
# torch-fidelity imports, breaks transformers where it was built for another torch than the one installed.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="$PWD/build/fid"
if [ ! -e "$folder/sitecustomize.py" ]; then
    pip install -q --disable-pip-version-check --no-deps --target "$folder" -c constraints.txt \
        torch-fidelity torchmetrics lightning-utilities torchvision
    # Without its compiled ops, torchvision needs their schemas to be imported. No score calls them.
    cat > "$folder/sitecustomize.py" << 'PYTHON'
import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PYTHON
fi
PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" python -m pytest -q tests/evaluation/test_torch_fidelity.py tests/docs/test_recipes.py "$@"
