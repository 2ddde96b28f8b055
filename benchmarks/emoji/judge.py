"""Images of a text-to-image pipeline of emoji, judged by what was made from real emoji alone.

    python -m benchmarks.emoji.judge --pipeline DIR --judge DIR2 --out results.json

One image is drawn for each held-out emoji that the font draws, and for a random subset of the training emoji, from
the English name. Two judges name its concept and skin tone: the nearest real emoji, and a classifier that `DIR2`
keeps. The real images, encoded and decoded by the pipeline's autoencoder, are judged in the same way: no flow on its
latents can be expected to do better. With `--vae DIR` in place of a pipeline, they alone are judged. `--parts seen`
leaves the held-out emoji alone, while settings are chosen.

"right" counts concepts, tones and genders of the asked emoji, and those of emoji with the same image; "plain" counts
the first alone. Tones and genders count where the asked emoji has one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import PIL.features
import torch

from starflow.data.latents import draw_latents
from starflow.data.prompts import encode_prompts
from starflow.models.autoencoder import decode, load_vae, posterior
from starflow.pipelines import STARFlowPipeline, without_loading_bars
from starflow.seeds import generator, permutation
from starflow.training.flow import bits_per_dim

from ..machine import description
from .classifier import PARTS, Classifier, accuracy, augment, classify, load_or_train, names
from .distances import as_it_is, blurred, features, frechet, lossless_bits, nearest
from .real import SHIFT, RealEmoji, ink, real_emoji

PACKAGES = ("diffusers", "transformers", "Pillow", "emoji")
PARTS_ASKED = ("seen", "held_out", "validation")
BATCH = 32
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LIKELIHOOD_DRAWS = 4
SHOWN_MISTAKES = 20


class Seen(NamedTuple):
    """Concept, skin tone and gender that a judge sees in an image."""

    concept: str
    tone: str
    gender: str


def open_pipeline(folder: Path) -> STARFlowPipeline:
    """Return a pipeline without progress bars."""
    with without_loading_bars():
        pipe = STARFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: STARFlowPipeline, real: RealEmoji, rows: list[int], guidance: float, seed: int) -> torch.Tensor:
    """Return uint8 (len(rows), 3, H, W) images of the names of emoji, each with noise of its own number."""
    images = []
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        prompts = [real.emoji[number].caption for number in part]
        generators = [generator(seed, number) for number in part]
        images.append(pipe(prompts, guidance_scale=guidance, generator=generators, output_type="pt").images)
    return as_pixels(torch.cat(images))


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 values of images on [0, 1]."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def moments(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Return (N, 2, C, h, w) means and standard deviations of the scaled latents of uint8 images."""
    found = [torch.stack(posterior(vae, 1 - 2 * ink(part)), 1) for part in images.split(BATCH)]
    return torch.cat(found) * vae.config.scaling_factor


@torch.no_grad()
def reconstructed(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return uint8 images of scaled latents."""
    return as_pixels(torch.cat([decode(vae, part) for part in latents.split(BATCH)]) / 2 + 0.5)


def shares(real: RealEmoji, rows: list[int], found: list[Seen], plain: bool = False) -> dict[str, float]:
    """Return the shares of right concepts, tones, genders, and concepts with their tones, where an emoji has them.

    Args:
        real: the emoji.
        rows: numbers of the asked emoji.
        found: what a judge sees in each image.
        plain: whether the asked emoji alone is right, not one with the same image.
    """
    right: dict[str, list[bool]] = {"concept": [], "tone": [], "gender": [], "concept_and_tone": []}
    for number, seen in zip(rows, found):
        one = real.emoji[number]
        accepted = [Seen(*(getattr(each, part) for part in PARTS)) for each in ([one] if plain else real.alike(number))]
        for part in PARTS:
            if getattr(one, part):
                right[part].append(getattr(seen, part) in {getattr(each, part) for each in accepted})
        right["concept_and_tone"].append(seen[:2] in {each[:2] for each in accepted})
    return {name: sum(values) / max(1, len(values)) for name, values in right.items()}


def verdicts(model: Classifier, real: RealEmoji, x: torch.Tensor) -> dict[str, list[Seen]]:
    """Return what each judge sees in each image; white is 0 in `x`."""
    numbers, squares = nearest(x, ink(real.images), real.mirrored(), blurred)
    closest = numbers.gather(1, squares.argmin(1, keepdim=True)).squeeze(1).tolist()
    classes, by_part = classify(model, x).tolist(), names(real)
    return {
        "nearest": [Seen(*(getattr(real.emoji[number], part) for part in PARTS)) for number in closest],
        "classifier": [Seen(*(part[i] for part, i in zip(by_part, row))) for row in classes],
    }


def judged(model: Classifier, real: RealEmoji, rows: list[int], images: torch.Tensor) -> dict[str, Any]:
    """Return the shares of right answers of each judge, and print some of the concepts that both miss."""
    found = verdicts(model, real, ink(images))
    missed = [
        f"{real.emoji[number].name} -> {seen[0]}"
        for number, *seen in zip(rows, *([answer.concept for answer in answers] for answers in found.values()))
        if not {one.concept for one in real.alike(number)} & set(seen)
    ]
    print(f"  both judges miss {len(missed)} concepts: {'; '.join(missed[:SHOWN_MISTAKES])}")
    return {
        judge: {"right": shares(real, rows, answers), "plain": shares(real, rows, answers, plain=True)}
        for judge, answers in found.items()
    }


def spread(values: torch.Tensor) -> dict[str, float]:
    """Return quantiles."""
    points = torch.quantile(values.double(), torch.tensor(QUANTILES, dtype=torch.float64))
    return {f"{quantile:.0%}": value for quantile, value in zip(QUANTILES, points.tolist())}


def memory(images: torch.Tensor, training: torch.Tensor, mirrored: torch.Tensor, errors: torch.Tensor) -> dict:
    """Return how near images are to training images, by pixels without a blur.

    Args:
        images: uint8 (B, 3, H, W) images.
        training: uint8 (N, 3, H, W) training images.
        mirrored: bool (N,) whether a training image counts as its mirror image, too.
        errors: (N,) distances of the training images to their own reconstructions.
    """
    numbers, squares = nearest(ink(images), ink(training), mirrored, as_it_is)
    distances = squares.sqrt()
    near = (distances < errors[numbers]).any(1)
    return {"nearer_than_reconstruction": near.double().mean().item(), "distance": spread(distances.min(1).values)}


@torch.no_grad()
def likelihood(pipe: STARFlowPipeline, found: torch.Tensor, captions: list[str], seed: int) -> dict[str, float]:
    """Return bits per dimension of noisy latents, as in training, and their standard error.

    Args:
        pipe: the pipeline.
        found: (N, 2, C, h, w) moments of the latents.
        captions: caption per image.
        seed: seed of the noise.
    """
    flow, bits = pipe.transformer, []
    for first in range(0, len(found), BATCH):
        part, random = slice(first, first + BATCH), generator(seed, first)
        text = encode_prompts(captions[part], pipe.tokenizer, pipe.text_encoder, flow.config.text_len)
        total = 0
        for _ in range(LIKELIHOOD_DRAWS):
            x = draw_latents(found[part], flow.config.noise_std, random)
            total = total + flow.log_prob(x, None, text)
        nats = -total / LIKELIHOOD_DRAWS / x[0].numel() - 0.5 * math.log(2 * math.pi)
        bits += [bits_per_dim(value, 0) for value in nats.tolist()]
    bits = torch.tensor(bits, dtype=torch.float64)
    return {"bits_per_dim": bits.mean().item(), "standard_error": (bits.std() / math.sqrt(len(bits))).item()}


def asked(real: RealEmoji, seen: int, seed: int) -> dict[str, list[int]]:
    """Return the numbers of emoji by part: a random subset of those for training, all held out, all for validation."""
    validation = [i for i, one in enumerate(real.emoji) if one.for_validation]
    # A model that was trained with data.validation=true has not seen those for validation.
    training = [i for i in real.numbers(held_out=False) if i not in set(validation)]
    order = permutation(len(training), generator(seed))
    chosen = sorted(training[i] for i in order[:seen])
    return {"seen": chosen, "held_out": real.numbers(held_out=True), "validation": validation}


def judge(
    real: RealEmoji,
    model: Classifier,
    vae: Any,
    pipe: STARFlowPipeline | None,
    *,
    parts: dict[str, list[int]],
    guidance: list[float],
    seed: int,
) -> dict[str, Any]:
    """Return all results.

    Args:
        real: the emoji.
        model: the classifier.
        vae: the autoencoder whose reconstructions are judged.
        pipe: the pipeline that draws, or None.
        parts: names of parts and the numbers of their emoji, see `asked`.
        guidance: guidance weights to draw with.
        seed: seed of the noise.
    """
    images, mirrored = real.images, real.mirrored()
    latents = moments(vae, images)
    # A decoder that was tuned to noisy latents is shown such latents.
    noise_std = pipe.transformer.config.noise_std if pipe and not pipe.config.denoise else 0.0
    rebuilt = reconstructed(vae, draw_latents(latents, noise_std, generator(seed, 1)) if noise_std else latents[:, 0])
    errors = (ink(images) - ink(rebuilt)).square().mean((1, 2, 3)).sqrt()
    sources = {
        "augmented": lambda rows: as_pixels(1 - augment(ink(images[rows]), mirrored[rows], generator(seed, 2))),
        "reconstruction": lambda rows: rebuilt[rows],
        **{f"guidance {weight:g}": partial(drawn, pipe, real, guidance=weight, seed=seed) for weight in guidance},
    }

    training, held_out = (real.numbers(held_out=value) for value in (False, True))
    half = permutation(len(training), generator(seed, 3))[: len(training) // 2]
    scale = features(ink(images[training])).std(0)
    distance = partial(frechet, features(ink(images[held_out])), scale=scale)
    distances = {"training images, half": distance(features(ink(images[training][half])))}
    nearness = partial(memory, training=images[training], mirrored=mirrored[training], errors=errors[training])
    rows, near = [], {"held-out images": nearness(images[held_out])}
    for source, make in sources.items():
        for part, numbers in parts.items():
            start = time.perf_counter()
            made = make(numbers)
            print(f"{source}, {part}: {len(made)} images in {time.perf_counter() - start:.0f} s", flush=True)
            for name, found in judged(model, real, numbers, made).items():
                rows.append({"images": source, "part": part, "judge": name, "count": len(made), **found})
                print(f"  {name}: " + ", ".join(f"{key} {value:.1%}" for key, value in found["right"].items()))
            near[f"{source}, {part}"] = nearness(made)
            if part == "held_out":
                distances[source] = distance(features(ink(made)))
    found = {
        "shares": rows,
        "frechet_to_held_out_images": distances,
        "nearest_training_image": {"reconstruction_error": spread(errors[training]), **near},
        "bits_per_pixel_value": lossless(images[held_out]),
    }
    if pipe:
        captions = {"caption": [one.caption for one in real.emoji], "empty prompt": [""] * len(real)}
        found["latent_bits_per_dim"] = {
            f"{part}, {name}": likelihood(pipe, latents[numbers], [texts[i] for i in numbers], seed)
            for part, numbers in parts.items()
            for name, texts in captions.items()
        }
    return found


def lossless(images: torch.Tensor) -> dict[str, float]:
    """Return the bits per pixel value of lossless files."""
    found = {"PNG, optimized": lossless_bits(images, "PNG", optimize=True)}
    if PIL.features.check("webp"):
        found["WebP, lossless"] = lossless_bits(images, "WEBP", lossless=True, quality=100, method=6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--pipeline", type=Path, help="folder of the pipeline")
    models.add_argument("--vae", type=Path, help="folder of an autoencoder, whose reconstructions alone are judged")
    parser.add_argument("--judge", type=Path, required=True, help="folder that keeps the classifier, trained if absent")
    parser.add_argument("--out", type=Path, help="write the results and the machine here")
    parser.add_argument("--seen", type=int, default=400, help="training emoji to draw")
    parser.add_argument("--parts", nargs="+", choices=PARTS_ASKED, default=PARTS_ASKED[:2], help="emoji to draw")
    parser.add_argument("--guidance", type=float, nargs="+", help="guidance weights; by default the pipeline's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--font", default="", help="font file; by default the one that fontconfig finds")
    parser.add_argument("--shift", type=int, default=SHIFT, help="data.shift of the training")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = open_pipeline(args.pipeline) if args.pipeline else None
    vae = pipe.vae if pipe else load_vae(args.vae)
    weights = args.guidance or [pipe.default_guidance.weight] if pipe else []
    size = pipe.transformer.config.image_size * pipe.pixels_per_latent if pipe else vae.config.sample_size
    real = real_emoji(args.font, size, args.shift)
    model = load_or_train(args.judge, real)
    parts = {part: rows for part, rows in asked(real, args.seen, args.seed).items() if part in args.parts}
    results = judge(real, model, vae, pipe, parts=parts, guidance=weights, seed=args.seed)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    results = {
        "machine": {**description(), **versions},
        "emoji": {"size": size, "shift": args.shift, "digest": real.digest(), "seed": args.seed},
        "classifier_on_augmented_real_emoji": accuracy(model, real),
        **results,
    }
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
