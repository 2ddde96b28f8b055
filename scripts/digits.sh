#!/usr/bin/env bash
# The main job: train a class-conditional TarFlow on digits, draw from it, evaluate it.
source "$(dirname "$0")/setup.sh" models
out="${1:-runs/digits}"
starflow train --preset digits --threads 1 --out "$out" --json "$out/train.json"
starflow sample --checkpoint "$out" --out "$out/drawn" --threads 1 --certify --json "$out/sample.json"
starflow eval --checkpoint "$out" --threads 1 --json "$out/eval.json"
