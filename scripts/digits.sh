#!/usr/bin/env bash
# The main job: train a class-conditional TarFlow on digits, draw from it, evaluate it.
source "$(dirname "$0")/setup.sh" models
out="${1:-runs/digits}"
starflow train --preset digits --out "$out" --json "$out/train.json"
starflow sample --checkpoint "$out" --out "$out/drawn" --certify --json "$out/sample.json"
starflow eval --checkpoint "$out" --json "$out/eval.json"
