"""A local web page that draws: prompt or class, guidance, seed, progress, a grid, how exact it is."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL.Image
import torch

from .data import generator
from .errors import CheckpointError, ConfigError
from .flow import Flow
from .sampling import image_grid

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ConfigError(f"the web page needs {error.name}: pip install starflow-kernels[demo]") from None

from .pipelines import METHODS, FlowModel, FlowPipeline, PipelineReport, STARFlowPipeline, TarFlowPipeline
from .text import ASPECT_RATIOS

INDEX = "model_index.json"
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
    method: str = METHODS[0]
    denoise: float | None = 0.0
    aspect: str = ASPECT_RATIOS[0]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A grid of `count` images, how they were made, and seconds in all."""

    grid: PIL.Image.Image
    count: int
    seed: int
    seconds: float
    report: PipelineReport


class Artist:
    """A model that draws what `Choices` ask for, one drawing at a time, in the order of the calls.

    checkpoint: folder of a flow or of a pipeline, or the name of a bundled checkpoint. Raises CheckpointError where
    there is none, or one that needs a pipeline around it.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu"):
        self.name = Path(checkpoint).resolve().name
        self.from_pipeline = (Path(checkpoint) / INDEX).exists()
        if self.from_pipeline:
            self.pipe = FlowPipeline.from_pretrained(checkpoint).to(device)
        else:
            flow = Flow.from_pretrained(checkpoint, device)
            if flow.config.text_dim or flow.config.image_channels not in (1, 3):
                raise CheckpointError(f"{checkpoint}: a flow of text or latents draws as the folder of a pipeline only")
            self.pipe = TarFlowPipeline(FlowModel.from_flow(flow))
        self.pipe.set_progress_bar_config(disable=True)
        self.config = self.pipe.transformer.config
        self.parameters = sum(parameter.numel() for parameter in self.pipe.transformer.parameters())
        self.text = isinstance(self.pipe, STARFlowPipeline)
        if self.text:
            # An image at a time, which bounds the memory.
            self.pipe.vae.enable_slicing()
        self._line: deque[object] = deque()

    @property
    def defaults(self) -> Choices:
        """What the page shows at first."""
        tokens = math.prod(self.config.grid)
        return Choices(
            condition="" if self.text else EACH if self.config.num_classes else NONE,
            count=min(MAX_IMAGES, max(4, int(FIRST_WORK / (self.parameters * tokens)))),
            guidance=3.6 if self.text else 0.0,
            rule="starflow" if self.config.scale == "softplus" else "tarflow",
            denoise=self.pipe.denoise_factor(None) if self.from_pipeline else 0.0,
        )

    def draw(
        self,
        choices: Choices,
        progress: Callable[[int, int], None] = lambda done, total: None,
        waiting: Callable[[int], None] = lambda others: None,
        stop: threading.Event | None = None,
    ) -> Drawing:
        """Check the choices, wait for the drawings before this one, draw.

        progress: called as progress(done, total) with token steps. waiting: called with the number of drawings before
        this one. Once `stop` is set the call ends with Stopped, in the middle of a flow block too. Raises ConfigError
        with a message for the user where a choice is out of range.
        """
        count = _number("Number of images", choices.count, 1, MAX_IMAGES, whole=True)
        seed = _number("Seed", choices.seed, 0, MAX_SEED, whole=True)
        options = {
            **self._condition(choices, count, seed),
            "guidance_scale": _number("Guidance weight", choices.guidance, 0),
            "guidance_rule": choices.rule,
            "method": choices.method,
            "denoise": _number("Denoising", choices.denoise, 0),
        }
        if options["guidance_scale"] and not self.text and choices.condition == NONE:
            raise ConfigError("Guidance weight: there is no class to guide towards, set the weight to 0")
        stop = stop or threading.Event()

        def watch(done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped
            progress(done, total)

        with self._turn(stop, waiting):
            start = time.perf_counter()
            images, report = self.pipe(**options, output_type="pt", certify=True, progress=watch, return_dict=False)
            seconds = time.perf_counter() - start
        classes = self.config.num_classes
        columns = classes if choices.condition == EACH and classes <= 20 else math.ceil(math.sqrt(count))
        pixels = (images * 255).round().to("cpu", torch.uint8)
        return Drawing(image_grid(pixels, min(columns, count)), count, seed, seconds, report)

    def _condition(self, choices: Choices, count: int, seed: int) -> dict:
        """Prompt or classes of a call, and its noise: that which `starflow sample` draws from the same seed."""
        if self.text:
            if not (prompt := (choices.condition or "").strip()):
                raise ConfigError("Prompt: say what to draw")
            noise = [generator(seed, 0, copy) for copy in range(count)]
            chosen = {"prompt": prompt, "num_images_per_prompt": count, "generator": noise}
            return chosen if self.config.rotary == "none" else {**chosen, "aspect_ratio": choices.aspect}
        classes = self.config.num_classes
        condition = str(choices.condition or "").strip()
        if condition == EACH and classes:
            labels = [i % classes for i in range(count)]
        elif condition == NONE:
            labels = None
        elif condition.isdecimal() and int(condition) < classes:
            labels = [int(condition)] * count
        else:
            expected = f"expected 0 to {classes - 1}, {EACH!r} or {NONE!r}" if classes else "the model has no classes"
            raise ConfigError(f"Class {condition!r}: {expected}")
        noise = generator(seed)
        if self.from_pipeline:
            numbers = labels or [0] * count
            noise = [generator(seed, n, numbers[:i].count(n)) for i, n in enumerate(numbers)]
        return {"class_labels": labels, "num_images_per_prompt": count if labels is None else 1, "generator": noise}

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
            f"blocks, {rows * columns} tokens of {config.token_dim} numbers an image</p>",
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
                    method = gr.Dropdown(list(METHODS), label="Method", min_width=100)
                    denoise = gr.Number(
                        first.denoise, label="Denoising", step=0.1, min_width=100, visible=config.noise_std > 0
                    )
                with gr.Row():
                    other = gr.Button("Another seed", min_width=100, elem_id="other")
                    stop = gr.Button("Stop", interactive=False, min_width=100, elem_id="stop")
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=5, min_width=320):
                message = gr.HTML(elem_id="message")
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
        except ConfigError as error:
            return gr.skip(), gr.skip(), f'<p class="problem" role="alert">{html.escape(str(error))}</p>'
        except Stopped:
            return gr.skip(), gr.skip(), "<p>Stopped.</p>"
        return drawing.grid, figures_of(drawing), ""

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
    report = drawing.report
    exact = "not measured" if report.certificate is None else f"{report.certificate:.1e}"
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items() if seconds >= 0.005)
    shown = [
        ("certificate", exact, "max |flow(x) − z|"),
        ("seconds", f"{drawing.seconds:.2f} s", stages),
        ("images", str(drawing.count), f"seed {drawing.seed}"),
        ("method", report.method, f"{report.steps} steps"),
    ]
    parts = (
        f'<div><dt>{name}</dt><dd id="{name}">{html.escape(value)}</dd><small>{html.escape(note)}</small></div>'
        for name, value, note in shown
    )
    return f"<dl>{''.join(parts)}</dl>"


CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto; }
#title h1 { font-size: 1.5rem; margin: 0.5rem 0 0; }
#title p, #figures small { color: var(--body-text-color-subdued); margin: 0; }
#grid img { image-rendering: pixelated; }
#message .problem { border-left: 3px solid var(--error-icon-color, #b91c1c); padding: 0.25rem 0.75rem; }
#figures dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; margin: 0.5rem 0; }
#figures dt { color: var(--body-text-color-subdued); font-size: 0.85rem; text-transform: capitalize; }
#figures dd { font-size: 1.25rem; margin: 0; font-variant-numeric: tabular-nums; }
"""
