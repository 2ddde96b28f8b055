#!/usr/bin/env bash
# Trains a class-conditional TarFlow on digits, draws from it and evaluates it.
source "$(dirname "$0")/setup.sh" models
out="${1:-runs/digits}"
starflow train --preset digits --threads 1 --out "$out" --json "$out/train.json"
starflow sample --checkpoint "$out" --out "$out/drawn" --threads 1 --certify --json "$out/sample.json"
starflow eval --checkpoint "$out" --threads 1 --json "$out/eval.json"
