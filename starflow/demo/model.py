"""The model behind the web page, which draws what the fields of the page ask for."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import PIL.Image
import torch

from starflow_kernels.spec import GuidanceRule

from ..data.prompts import ASPECT_RATIOS, unknown_words
from ..errors import CheckpointError, ConfigError
from ..inversion.request import Inversion
from ..io.images import image_grid
from ..models.flow import Flow
from ..models.guidance import Guidance
from ..opening import open_image_model
from ..sampling.sample import SampleReport
from ..seeds import generator

MAX_IMAGES = 100
# The largest integer that a browser represents exactly.
MAX_SEED = 2**53 - 1
# Values of `Choices.condition` beside class numbers.
EACH = "each in turn"
NONE = "none"
RULES = get_args(GuidanceRule)
# The default number of images makes parameters x tokens x images about this large, which takes one second on a CPU.
FIRST_WORK = 1e11


class Stopped(Exception):
    """The user pressed Stop or closed the page."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """Unchecked values of the page's fields, None for an empty field.

    Args:
        condition: the prompt, or a class number, EACH or NONE.
        count: number of images.
        seed: seed of all random numbers.
        guidance: guidance weight, 0 for none.
        rule: guidance rule, one of RULES.
        method: method of inversion, see `Inversion`.
        denoise: factor of the score step after sampling, 0 for none.
        aspect: aspect ratio, one of ASPECT_RATIOS.
    """

    condition: str | None = EACH
    count: float | None = 1
    seed: float | None = 0
    guidance: float | None = 0.0
    rule: str = RULES[0]
    method: str = "auto"
    denoise: float | None = 0.0
    aspect: str = ASPECT_RATIOS[0]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Images, and how they were made.

    Args:
        images: uint8 (N, C, H, W), on the CPU.
        columns: images per row of their grid.
        seed: seed of all random numbers.
        report: times, solvers and certificate.
        unknown: words of the prompt that the text encoder does not know.
    """

    images: torch.Tensor
    columns: int
    seed: int
    report: SampleReport
    unknown: tuple[str, ...] = ()

    def grid(self) -> PIL.Image.Image:
        """Return the images as one image."""
        return image_grid(self.images, self.columns)


class DemoModel:
    """A model that draws `Choices`, one drawing at a time, in the order of the calls.

    Args:
        checkpoint: folder of a flow or of a pipeline, or the name of a bundled checkpoint.
        device: where the model runs.

    Raises:
        CheckpointError: there is no checkpoint, or it is a flow that draws only as part of a pipeline.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu"):
        self.name = Path(checkpoint).resolve().name
        model = open_image_model(checkpoint, device)
        self.pipe = None if isinstance(model, Flow) else model
        self.flow = model if isinstance(model, Flow) else model.transformer
        if self.pipe:
            self.pipe.set_progress_bar_config(disable=True)
        self.config = self.flow.config
        self.text = bool(self.config.text_dim)
        if not self.pipe and (self.text or self.config.image_channels not in (1, 3)):
            raise CheckpointError(f"{checkpoint}: a flow on text or latents needs the folder of its pipeline")
        self.parameters = sum(parameter.numel() for parameter in self.flow.parameters())
        self._tickets: deque[object] = deque()

    @property
    def defaults(self) -> Choices:
        """Return the choices that the page shows at first."""
        work = self.parameters * math.prod(self.config.grid)
        guidance = self.pipe.default_guidance if self.pipe else Guidance()
        return Choices(
            condition="" if self.text else EACH if self.config.num_classes else NONE,
            count=min(MAX_IMAGES, max(4, int(FIRST_WORK / work))),
            guidance=guidance.weight,
            rule=guidance.rule,
            denoise=self.pipe.denoise_factor(None) if self.pipe else 0.0,
        )

    def draw(
        self,
        choices: Choices,
        progress: Callable[[int, int], None] = lambda done, total: None,
        waiting: Callable[[int], None] = lambda others: None,
        stop: threading.Event | None = None,
    ) -> Drawing:
        """Check the choices, wait for earlier drawings, and draw.

        The images equal those of `starflow sample` with the same seed.

        Args:
            choices: what to draw.
            progress: called as progress(done, total), in token steps.
            waiting: called with the number of earlier drawings that are not finished.
            stop: ends the call once it is set.

        Raises:
            ConfigError: a choice is out of range; the message is meant for the user.
            Stopped: `stop` was set. The call may end in the middle of a flow block.
        """
        count = _number("Images", choices.count, 1, MAX_IMAGES, whole=True)
        seed = _number("Seed", choices.seed, 0, MAX_SEED, whole=True)
        guidance = Guidance(_number("Guidance weight", choices.guidance, 0), choices.rule)
        inversion, denoise = Inversion(choices.method), _number("Denoising", choices.denoise, 0)
        condition = self._prompt(choices) if self.text else self._labels(choices, count)
        if guidance.weight and condition is None:
            raise ConfigError("Guidance weight: there is no class to guide towards, set the weight to 0")
        stop = stop or threading.Event()

        def watch(done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped
            progress(done, total)

        columns, classes = math.ceil(math.sqrt(count)), self.config.num_classes
        if choices.condition == EACH and classes <= 20:
            columns = min(count, classes)
        with self._queue(stop, waiting):
            if not self.pipe:
                labels = None if condition is None else torch.tensor(condition, dtype=torch.int64, device="cpu")
                images, report = self.flow.sample(
                    count, labels, seed=seed, batch_size=count, guidance=guidance, inversion=inversion, denoise=denoise,
                    certify=True, progress=watch,
                )  # fmt: skip
            else:
                options = self._noise_and_condition(condition, count, seed)
                if self.text and self.config.rotary != "none":
                    options["aspect_ratio"] = choices.aspect
                found, report = self.pipe(
                    **options, guidance_scale=guidance.weight, guidance_rule=guidance.rule, method=choices.method,
                    denoise=denoise, certify=True, progress=watch, output_type="pt", return_dict=False,
                )  # fmt: skip
                images = (found * 255).round().to("cpu", torch.uint8)
        unknown = unknown_words([condition], self.pipe.tokenizer) if self.text else []
        return Drawing(images, columns, seed, report, tuple(unknown))

    def _prompt(self, choices: Choices) -> str:
        """Return the prompt without surrounding spaces."""
        if not (prompt := (choices.condition or "").strip()):
            raise ConfigError("Prompt: say what to draw")
        return prompt

    def _labels(self, choices: Choices, count: int) -> list[int] | None:
        """Return a class per image, None without a condition."""
        classes, chosen = self.config.num_classes, str(choices.condition or "").strip()
        if chosen == EACH and classes:
            return [i % classes for i in range(count)]
        if chosen == NONE:
            return None
        if not re.fullmatch(r"\d{1,9}", chosen) or int(chosen) >= classes:
            expected = f"expected 0 to {classes - 1}, {EACH!r} or {NONE!r}" if classes else "the model has no classes"
            raise ConfigError(f"Class {chosen!r}: {expected}")
        return [int(chosen)] * count

    def _noise_and_condition(self, condition: str | list[int] | None, count: int, seed: int) -> dict[str, Any]:
        """Return the arguments of a pipeline's call that give noise and condition."""
        numbers = condition if isinstance(condition, list) else [0] * count
        noise = [generator(seed, n, numbers[:i].count(n)) for i, n in enumerate(numbers)]
        if isinstance(condition, list):
            return {"class_labels": condition, "generator": noise}
        prompt = {"prompt": condition} if self.text else {}
        return {**prompt, "num_images_per_prompt": count, "generator": noise}

    @contextlib.contextmanager
    def _queue(self, stop: threading.Event, waiting: Callable[[int], None]) -> Iterator[None]:
        """Wait for earlier calls, then hold the model exclusively."""
        ticket = object()
        self._tickets.append(ticket)
        try:
            while others := self._tickets.index(ticket):
                waiting(others)
                if stop.wait(0.1):
                    raise Stopped
            yield
        finally:
            self._tickets.remove(ticket)


def _number(name: str, value: float | None, low: int, high: float = math.inf, whole: bool = False) -> float:
    """Return a number that is in range, or raise a ConfigError that names the field."""
    kind = "a whole number" if whole else "a number"
    expected = f"{kind} of at least {low}" if high == math.inf else f"{kind} from {low} to {high}"
    wrong = value is None or not math.isfinite(value) or (whole and value != int(value)) or not low <= value <= high
    if wrong:
        raise ConfigError(f"{name}: expected {expected}, got {'nothing' if value is None else f'{value:g}'}")
    return int(value) if whole else float(value)
