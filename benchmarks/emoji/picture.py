"""Picture of prompts and the images that a pipeline of emoji draws, with the held-out combinations marked.

    python -m benchmarks.emoji.picture --pipeline DIR --out docs/img/emoji.png

The image of a prompt is determined by the seed and the prompt's number in the list.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from starflow.data.emoji import catalogue
from starflow.pipelines import STARFlowPipeline
from starflow.seeds import generator

from .judge import open_pipeline

SEEN = (
    "red heart", "rocket", "octopus", "pizza", "sunflower", "snowman", "cat face", "birthday cake", "penguin",
    "hot beverage", "rainbow", "guitar", "mushroom", "robot", "red apple", "alarm clock",
)  # fmt: skip
HELD_OUT = (
    "woman firefighter", "astronaut medium-dark skin tone", "thumbs up medium-light skin tone", "man cook",
    "elf dark skin tone", "woman farmer medium-dark skin tone", "Santa Claus dark skin tone", "princess",
    "waving hand medium skin tone", "mermaid", "woman scientist dark skin tone", "superhero light skin tone",
)  # fmt: skip
COLUMNS, SCALE, GAP = 7, 2, 14
FONT_SIZE, LINE, LINES, LETTERS = 13, 15, 2, 19
DOT, FOOT = 6, 30
INK, GRAY, MARK = "#1f2933", "#b8c2cc", "#ea580c"
LEGEND = {False: "name of an emoji in the training set", True: "held out: no image of this combination was seen"}


def check_prompts(seen: tuple[str, ...], held_out: tuple[str, ...]) -> None:
    """Raise ValueError unless the prompts are names of emoji for training, and of held-out ones."""
    split = {one.name: one.held_out for one in catalogue()}
    for names, expected in ((seen, False), (held_out, True)):
        if wrong := [name for name in names if split.get(name) != expected]:
            raise ValueError(f"no names of emoji {'held out' if expected else 'for training'}: {', '.join(wrong)}")


def compose(images: list[Image.Image], prompts: list[str], marked: list[bool]) -> Image.Image:
    """Return images in a grid with their prompts, dots of two colors, and a legend.

    Args:
        images: images of one size.
        prompts: prompt per image.
        marked: whether an emoji is held out.
    """
    side = images[0].width * SCALE
    across, down = side + GAP, side + LINE * LINES + GAP + 4
    rows = -(-len(images) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * across + GAP, rows * down + GAP + FOOT), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_SIZE)

    def caption(left: int, top: int, lines: list[str], held_out: bool) -> None:
        middle = top + LINE // 2 + 1
        dot = (left, middle - DOT // 2, left + DOT, middle + DOT // 2)
        pen.ellipse(dot, fill=MARK if held_out else GRAY)
        for number, line in enumerate(lines):
            pen.text((left + DOT + 4, top + LINE * number), line, INK, font)

    for number, (image, prompt, held_out) in enumerate(zip(images, prompts, marked)):
        row, column = divmod(number, COLUMNS)
        left, top = GAP + column * across, GAP + row * down
        canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        caption(left, top + side + 4, textwrap.wrap(prompt, LETTERS)[:LINES], held_out)
    for number, (held_out, words) in enumerate(LEGEND.items()):
        caption(GAP + number * canvas.width // 2, rows * down + GAP, [words], held_out)
    return canvas


def picture(pipe: STARFlowPipeline, seed: int, **options) -> Image.Image:
    """Return the picture.

    Args:
        pipe: the pipeline.
        seed: seed of the noise.
        options: further arguments of the pipeline.
    """
    check_prompts(SEEN, HELD_OUT)
    prompts = [*SEEN, *HELD_OUT]
    images = [pipe(prompt, generator=generator(seed, i), **options).images[0] for i, prompt in enumerate(prompts)]
    return compose(images, prompts, [False] * len(SEEN) + [True] * len(HELD_OUT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--guidance", type=float, help="guidance weight; by default the pipeline's own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = open_pipeline(args.pipeline)
    options = {} if args.guidance is None else {"guidance_scale": args.guidance}
    picture(pipe, args.seed, **options).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
