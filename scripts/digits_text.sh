#!/usr/bin/env bash
# Trains a text-conditional latent flow on digits from scratch: autoencoder, latents, flow, pipeline. Then draws digits
# and measures how often a classifier recognizes them.
source "$(dirname "$0")/setup.sh" models
out="${1:-runs/digits-text}"
starflow train-autoencoder --preset digits --threads 1 --out "$out/autoencoder" --json "$out/autoencoder.json"
python scripts/tiny_text_encoder.py "$out/text" --words zero one two three four five six seven eight nine \
    a photo of the digit
starflow encode --vae "$out/autoencoder" --text "$out/text" --length 8 --out "$out/latents" --json "$out/encode.json"
starflow train --preset digits-text --threads 1 --set data.path="$out/latents" --out "$out/flow" --json "$out/flow.json"
python scripts/assemble.py --flow "$out/flow" --vae "$out/autoencoder" --text "$out/text" --out "$out/pipeline"
python scripts/judge_digits.py --pipeline "$out/pipeline" --guidance 0 1 --grid "$out/drawn.png" --json "$out/judge.json"
