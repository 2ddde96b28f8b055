"""Measure how often a pipeline draws the digit in its prompt, by a classifier trained on real digits only.

    python scripts/judge_digits.py --pipeline runs/pipeline --grid digits-text.png

The classifier is a support vector machine of scikit-learn. Real digits are scaled to the size of the pipeline and then
averaged to 8x8 pixels like the drawings. Accuracy on held-out real digits is the upper bound for the drawings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC

from starflow.data.datasets import DataConfig, load
from starflow.io.images import save_grid
from starflow.pipelines import STARFlowPipeline

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ("{}", "a photo of the digit {}")


def features(images: torch.Tensor) -> np.ndarray:
    """Return (N, 64) averages over 8x8 cells.

    Args:
        images: (N, C, H, W) images with values 0 .. 255.
    """
    return F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True) / 16, 8).flatten(1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", required=True, help="folder of the pipeline")
    parser.add_argument("--per-prompt", type=int, default=20, help="drawings per prompt (default 20)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="guidance weights (default 1)")
    parser.add_argument("--denoise", type=float, help="factor of the score step (default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    parser.add_argument("--grid", type=Path, help="PNG of the drawings at the last weight, one column per digit")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    pipeline = STARFlowPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.transformer.config.image_size * pipeline.pixels_per_latent
    (x, y), (real, truth) = (
        (features(torch.stack([image for image, _ in part])), part.labels.numpy())
        for part in load(DataConfig(size=size))
    )
    classifier = SVC(gamma=0.001, C=10.0).fit(x, y)
    results = {"real": classifier.score(real, truth), "per_prompt": args.per_prompt, "drawn": {}}
    for weight in args.guidance:
        accuracy, images = {}, None
        for template in TEMPLATES:
            drawn = pipeline(
                prompt=[template.format(name) for name in NAMES],
                guidance_scale=weight,
                num_images_per_prompt=args.per_prompt,
                generator=torch.Generator().manual_seed(args.seed),
                denoise=args.denoise,
                output_type="pt",
            ).images
            images = (drawn * 255).round().to(torch.uint8).cpu()
            predicted = classifier.predict(features(images))
            accuracy[template] = float((predicted == np.repeat(np.arange(10), args.per_prompt)).mean())
        results["drawn"][str(weight)] = accuracy
        print(f"guidance {weight}: " + ", ".join(f"{t!r} {100 * r:.1f} %" for t, r in accuracy.items()))
    print(f"real held-out digits {100 * results['real']:.1f} %")
    if args.grid:
        rows = images.reshape(10, args.per_prompt, *images.shape[1:])[:, :8].transpose(0, 1)
        save_grid(rows.flatten(0, 1), args.grid, columns=10)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
