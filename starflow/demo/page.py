"""A local web page that draws: prompt or class, guidance, seed, progress, a grid, how exact it is."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from ..data.datasets import generator
from ..data.prompts import ASPECT_RATIOS
from ..errors import CheckpointError, ConfigError, StarflowError
from ..inversion.solvers import METHODS, Inversion
from ..models.checkpoint import PIPELINE_INDEX
from ..models.flow import Flow, Guidance
from ..sampling.sample import image_grid, sample

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ConfigError(f"the web page needs {error.name}: pip install starflow-kernels[demo]") from None

if TYPE_CHECKING:
    from ..pipelines import FlowPipeline

MAX_IMAGES = 100
# The largest integer that a browser keeps exact.
MAX_SEED = 2**53 - 1
EACH, NONE = "each in turn", "none"
RULES = ("tarflow", "starflow")
# Parameters times tokens of all the images that the page asks for at first: about a second on a CPU.
FIRST_WORK = 1e11


class Stopped(Exception):
    """The user pressed Stop, or left."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the page asks for, unchecked; an empty field of the page is None.

    condition: the prompt, or a class number, EACH or NONE. The rest as in the calls of the pipelines.
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
    """Images uint8 (N, C, H, W), how many to a row of their grid, and how they were made: the seconds of each stage,
    network passes, and the largest and mean error of the certificate, None where it cannot be had."""

    images: torch.Tensor
    columns: int
    seed: int
    method: str
    stages: dict[str, float]
    steps: int
    certificate: float | None
    certificate_mean: float | None

    def grid(self) -> PIL.Image.Image:
        """The images as one."""
        return image_grid(self.images, self.columns)


class Artist:
    """A model that draws what `Choices` ask for, one drawing at a time, in the order of the calls.

    checkpoint: folder of a flow or of a pipeline, or the name of a bundled checkpoint. Raises CheckpointError where
    there is none, or one that needs a pipeline around it.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu"):
        self.name = Path(checkpoint).resolve().name
        self.pipe = _pipeline(checkpoint, device) if (Path(checkpoint) / PIPELINE_INDEX).exists() else None
        self.flow = self.pipe.transformer if self.pipe else Flow.from_pretrained(checkpoint, device)
        self.config = self.flow.config
        self.text = bool(self.config.text_dim)
        if not self.pipe and (self.text or self.config.image_channels not in (1, 3)):
            raise CheckpointError(f"{checkpoint}: a flow of text or of latents draws as the folder of a pipeline only")
        self.parameters = sum(parameter.numel() for parameter in self.flow.parameters())
        self._line: deque[object] = deque()

    @property
    def defaults(self) -> Choices:
        """What the page shows at first."""
        work = self.parameters * math.prod(self.config.grid)
        return Choices(
            condition="" if self.text else EACH if self.config.num_classes else NONE,
            count=min(MAX_IMAGES, max(4, int(FIRST_WORK / work))),
            guidance=3.6 if self.text else 0.0,
            rule="starflow" if self.text else "tarflow",
            denoise=self.pipe.denoise_factor(None) if self.pipe else 0.0,
        )

    def draw(
        self,
        choices: Choices,
        progress: Callable[[int, int], None] = lambda done, total: None,
        waiting: Callable[[int], None] = lambda others: None,
        stop: threading.Event | None = None,
    ) -> Drawing:
        """Check the choices, wait for the drawings before this one, draw.

        The images are those of `starflow sample` with the same seed. progress: called as progress(done, total) with
        token steps. waiting: called with the number of drawings before this one. Once `stop` is set the call ends with
        Stopped, in the middle of a flow block too. Raises ConfigError with a message for the user where a choice is out
        of range.
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
        with self._turn(stop, waiting):
            if not self.pipe:
                labels = None if condition is None else torch.tensor(condition)
                images, report = sample(
                    self.flow, count, labels, guidance, seed, count, denoise, True, watch, inversion
                )
                stages = {"all": report.seconds}
            else:
                options = self._noise_and_condition(condition, count, seed)
                if self.text and self.config.rotary != "none":
                    options["aspect_ratio"] = choices.aspect
                found, report = self.pipe(
                    **options, guidance_scale=guidance.weight, guidance_rule=guidance.rule, method=choices.method,
                    denoise=denoise, certify=True, progress=watch, output_type="pt", return_dict=False,
                )  # fmt: skip
                images, stages = (found * 255).round().to("cpu", torch.uint8), report.seconds
        exact = report.certificate, report.certificate_mean
        return Drawing(images, columns, seed, report.method, stages, report.steps, *exact)

    def _prompt(self, choices: Choices) -> str:
        if not (prompt := (choices.condition or "").strip()):
            raise ConfigError("Prompt: say what to draw")
        return prompt

    def _labels(self, choices: Choices, count: int) -> list[int] | None:
        """A class for each image, None for none."""
        classes, chosen = self.config.num_classes, str(choices.condition or "").strip()
        if chosen == EACH and classes:
            return [i % classes for i in range(count)]
        if chosen == NONE:
            return None
        if not chosen.isdecimal() or int(chosen) >= classes:
            expected = f"expected 0 to {classes - 1}, {EACH!r} or {NONE!r}" if classes else "the model has no classes"
            raise ConfigError(f"Class {chosen!r}: {expected}")
        return [int(chosen)] * count

    def _noise_and_condition(self, condition: str | list[int] | None, count: int, seed: int) -> dict[str, Any]:
        """Arguments of a pipeline's call."""
        numbers = condition if isinstance(condition, list) else [0] * count
        noise = [generator(seed, n, numbers[:i].count(n)) for i, n in enumerate(numbers)]
        if isinstance(condition, list):
            return {"class_labels": condition, "generator": noise}
        prompt = {"prompt": condition} if self.text else {}
        return {**prompt, "num_images_per_prompt": count, "generator": noise}

    @contextlib.contextmanager
    def _turn(self, stop: threading.Event, waiting: Callable[[int], None]) -> Iterator[None]:
        ticket = object()
        self._line.append(ticket)
        try:
            while others := self._line.index(ticket):
                waiting(others)
                if stop.wait(0.1):
                    raise Stopped
            yield
        finally:
            self._line.remove(ticket)


def _pipeline(folder: str | Path, device: str) -> FlowPipeline:
    from ..pipelines import FlowPipeline, STARFlowPipeline, hide_loading_bars

    hide_loading_bars()
    pipe = FlowPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    if isinstance(pipe, STARFlowPipeline):
        # An image at a time, which bounds the memory.
        pipe.vae.enable_slicing()
    return pipe


def _number(name: str, value: float | None, low: int, high: float = math.inf, whole: bool = False) -> float:
    kind = "a whole number" if whole else "a number"
    expected = f"{kind} of at least {low}" if high == math.inf else f"{kind} from {low} to {high}"
    wrong = value is None or not math.isfinite(value) or (whole and value != int(value)) or not low <= value <= high
    if wrong:
        raise ConfigError(f"{name}: expected {expected}, got {'nothing' if value is None else f'{value:g}'}")
    return int(value) if whole else float(value)


class Page:
    """The page of an artist: its layout, and what its buttons do."""

    def __init__(self, artist: Artist):
        self.artist = artist
        self._stops: dict[str, threading.Event] = {}
        with gr.Blocks(title=f"starflow · {artist.name}", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            self._lay_out()
        self.blocks = blocks

    def launch(self, host: str, port: int, open_browser: bool = False) -> str:
        """Serve the page from a thread of its own; its address."""
        _, address, _ = self.blocks.launch(
            server_name=host, server_port=port, inbrowser=open_browser, share=False, quiet=True, show_error=True,
            prevent_thread_lock=True, footer_links=[], run_history=False, ssr_mode=False, css=CSS,
            theme=gr.themes.Default(
                primary_hue="blue", neutral_hue="slate", font=("system-ui", "sans-serif"),
                font_mono=("ui-monospace", "monospace"),
            ),
        )  # fmt: skip
        return address

    def _lay_out(self) -> None:
        artist, first = self.artist, self.artist.defaults
        config = artist.config
        rows, columns = config.grid
        gr.HTML(
            f"<h1>{html.escape(artist.name)}</h1><p>{artist.parameters:,} parameters in {len(config.layers)} flow "
            f"blocks, {rows * columns} tokens of {config.token_dim} values</p>",
            elem_id="title",
        )
        conditional = artist.text or config.num_classes
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                if artist.text:
                    condition = gr.Textbox("", label="Prompt", lines=3, placeholder="a cat playing piano")
                else:
                    named = ([EACH] if config.num_classes else []) + [str(n) for n in range(config.num_classes)]
                    condition = gr.Dropdown(
                        [*named, NONE], value=first.condition, label="Class", allow_custom_value=True,
                        visible=bool(config.num_classes), elem_id="class",
                    )  # fmt: skip
                aspect = gr.Dropdown(
                    list(ASPECT_RATIOS), label="Aspect ratio", visible=artist.text and config.rotary != "none"
                )
                with gr.Row():
                    count = gr.Number(first.count, label="Images", min_width=100, elem_id="count")
                    seed = gr.Number(first.seed, label="Seed", min_width=100, elem_id="seed")
                with gr.Row(visible=bool(conditional)):
                    guidance = gr.Number(first.guidance, label="Guidance weight", step=0.1, min_width=100)
                    rule = gr.Dropdown(list(RULES), value=first.rule, label="Guidance rule", min_width=100)
                with gr.Row():
                    method = gr.Dropdown(["auto", *METHODS], value=first.method, label="Method", min_width=100)
                    denoise = gr.Number(
                        first.denoise, label="Denoising", step=0.1, min_width=100, visible=config.noise_std > 0
                    )
                with gr.Row():
                    other = gr.Button("New seed", min_width=100, elem_id="other")
                    stop = gr.Button("Stop", interactive=False, min_width=100, elem_id="stop")
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                message = gr.HTML(elem_id="message")
            with gr.Column(scale=5, min_width=320):
                image = gr.Image(
                    format="png", label="Images", show_label=False, interactive=False, elem_id="grid",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                figures = gr.HTML(elem_id="figures")
        choices = [condition, count, seed, guidance, rule, method, denoise, aspect]
        options = {"api_visibility": "private"}
        other.click(lambda: random.randrange(1_000_000), None, seed, queue=False, **options)
        triggers = [draw.click, condition.submit] if artist.text else [draw.click]
        started = gr.on(triggers, self.begin, None, [draw, stop, message], queue=False, **options)
        drawn = started.then(
            self.draw, choices, [image, figures, message], show_progress_on=image, concurrency_limit=None, **options
        )
        drawn.then(self.end, None, [draw, stop], queue=False, **options)
        stop.click(self.stop, None, [stop], queue=False, **options)
        gr.context.Context.root_block.unload(self.leave)

    def begin(self, request: gr.Request) -> tuple:
        """The buttons while a drawing is made."""
        self._stops[request.session_hash] = threading.Event()
        return gr.Button(interactive=False), gr.Button(interactive=True), ""

    def draw(
        self, condition, count, seed, guidance, rule, method, denoise, aspect, request: gr.Request, show=gr.Progress()
    ) -> tuple:
        """Grid, figures and message of what was chosen, and progress on the way."""
        choices = Choices(condition, count, seed, guidance, rule, method, denoise, aspect)

        def steps(done: int, total: int) -> None:
            show((done, total), desc="Drawing", unit="tokens")

        def waiting(others: int) -> None:
            show(None, desc=f"Waiting for {others} other drawing{'s' if others > 1 else ''}")

        try:
            drawing = self.artist.draw(choices, steps, waiting, self._stops[request.session_hash])
        except StarflowError as error:
            return gr.skip(), gr.skip(), f'<p class="problem" role="alert">{html.escape(str(error))}</p>'
        except Stopped:
            return gr.skip(), gr.skip(), "<p>Stopped.</p>"
        return drawing.grid(), figures_of(drawing), ""

    def end(self) -> tuple:
        """The buttons between drawings."""
        return gr.Button(interactive=True), gr.Button(interactive=False)

    def stop(self, request: gr.Request) -> dict:
        """End the drawing of this page."""
        if event := self._stops.get(request.session_hash):
            event.set()
        return gr.Button(interactive=False)

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        if event := self._stops.pop(request.session_hash, None):
            event.set()


def figures_of(drawing: Drawing) -> str:
    """Certificate, time and the rest as HTML."""
    exact, mean = "not to be had", ""
    if drawing.certificate is not None:
        exact, mean = f"{drawing.certificate:.1e}", f", mean {drawing.certificate_mean:.1e}"
    seconds = sum(drawing.stages.values())
    stages = ", ".join(f"{name} {part:.2f}" for name, part in drawing.stages.items() if part >= 0.005)
    shown = [
        ("certificate", exact, f"max |flow(x) − z|{mean}"),
        (
            "time",
            f"{seconds:.2f} s",
            stages if len(drawing.stages) > 1 else f"{len(drawing.images) / seconds:.0f} images a second",
        ),
        ("images", str(len(drawing.images)), f"seed {drawing.seed}"),
        ("method", drawing.method, f"{drawing.steps:,} passes"),
    ]
    parts = (
        f'<div><dt>{name}</dt><dd id="{name}">{html.escape(value)}</dd><small>{html.escape(note)}</small></div>'
        for name, value, note in shown
    )
    return f"<dl>{''.join(parts)}</dl>"


CSS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: 0 auto; }
#title h1 { font-size: 1.5rem; margin: 0.5rem 0 0; }
#title p, #figures small { color: var(--body-text-color-subdued); margin: 0; }
#grid { min-height: 500px; }
#grid img { width: 100%; height: 100%; max-height: 70vh; min-height: 490px; object-fit: contain;
  image-rendering: pixelated; }
#message p { margin: 0; }
#message .problem { border-left: 3px solid #b91c1c; padding: 0.25rem 0.75rem; }
#figures dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: 1rem; margin: 0; }
#figures dt { color: var(--body-text-color-subdued); font-size: 0.85rem; text-transform: capitalize; }
#figures dd { font-size: 1.25rem; margin: 0; font-variant-numeric: tabular-nums; }
"""
