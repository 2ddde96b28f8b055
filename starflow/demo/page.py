"""A local web page that draws images: prompt or class, guidance, seed, progress, a grid and its certificate."""

from __future__ import annotations

import html
import random
import threading

import gradio as gr

from ..data.prompts import ASPECT_RATIOS
from ..errors import StarflowError
from ..inversion.request import METHODS
from .model import EACH, NONE, RULES, Choices, DemoModel, Drawing, Stopped


class Page:
    """Layout of the page, and the actions of its buttons.

    Args:
        model: draws the images.
    """

    def __init__(self, model: DemoModel):
        self.model = model
        self._stops: dict[str, threading.Event] = {}
        with gr.Blocks(title=f"starflow · {model.name}", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            self._lay_out()
        self.blocks = blocks

    def launch(self, host: str, port: int, open_browser: bool = False) -> str:
        """Serve the page from a separate thread and return its address.

        Args:
            host: address to listen on.
            port: port to listen on.
            open_browser: whether to open the page in a browser.
        """
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
        """Place the fields and connect the buttons."""
        model, first = self.model, self.model.defaults
        config = model.config
        rows, columns = config.grid
        gr.HTML(
            f"<h1>{html.escape(model.name)}</h1><p>{model.parameters:,} parameters in {len(config.layers)} flow "
            f"blocks, {rows * columns} tokens of {config.token_dim} values</p>",
            elem_id="title",
        )
        conditional = model.text or config.num_classes
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                if model.text:
                    condition = gr.Textbox("", label="Prompt", lines=3, placeholder="a red heart")
                else:
                    named = ([EACH] if config.num_classes else []) + [str(n) for n in range(config.num_classes)]
                    condition = gr.Dropdown(
                        [*named, NONE], value=first.condition, label="Class", allow_custom_value=True,
                        visible=bool(config.num_classes), elem_id="class",
                    )  # fmt: skip
                aspect = gr.Dropdown(
                    list(ASPECT_RATIOS), label="Aspect ratio", visible=model.text and config.rotary != "none"
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
        triggers = [draw.click, condition.submit] if model.text else [draw.click]
        started = gr.on(triggers, self.begin, None, [draw, stop, message], queue=False, **options)
        drawn = started.then(
            self.draw, choices, [image, figures, message], show_progress_on=image, concurrency_limit=None, **options
        )
        drawn.then(self.end, None, [draw, stop], queue=False, **options)
        stop.click(self.stop, None, [stop], queue=False, **options)
        gr.context.Context.root_block.unload(self.leave)

    def begin(self, request: gr.Request) -> tuple:
        """Return the state of the buttons during a drawing."""
        self._stops[request.session_hash] = threading.Event()
        return gr.Button(interactive=False), gr.Button(interactive=True), ""

    def draw(
        self, condition, count, seed, guidance, rule, method, denoise, aspect, request: gr.Request, show=gr.Progress()
    ) -> tuple:
        """Draw the images that the fields describe; return grid, figures and message."""
        choices = Choices(condition, count, seed, guidance, rule, method, denoise, aspect)

        def steps(done: int, total: int) -> None:
            show((done, total), desc="Drawing", unit="tokens")

        def waiting(others: int) -> None:
            show(None, desc=f"Waiting for {others} other drawing{'s' if others > 1 else ''}")

        # A page that outlived a restart of the server has no event yet.
        stopped = self._stops.setdefault(request.session_hash, threading.Event())
        try:
            drawing = self.model.draw(choices, steps, waiting, stopped)
        except StarflowError as error:
            return gr.skip(), gr.skip(), _problem(str(error))
        except Stopped:
            return gr.skip(), gr.skip(), "<p>Stopped.</p>"
        unknown = ", ".join(map(repr, drawing.unknown))
        return (
            drawing.grid(),
            figures_html(drawing),
            _problem(f"Words that the model does not know: {unknown}") if unknown else "",
        )

    def end(self) -> tuple:
        """Return the state of the buttons between drawings."""
        return gr.Button(interactive=True), gr.Button(interactive=False)

    def stop(self, request: gr.Request) -> dict:
        """End the drawing of this page's user."""
        if event := self._stops.get(request.session_hash):
            event.set()
        return gr.Button(interactive=False)

    def leave(self, request: gr.Request) -> None:
        """End the drawing of a user who closed the page."""
        if event := self._stops.pop(request.session_hash, None):
            event.set()


def _problem(text: str) -> str:
    """Return a message as HTML."""
    return f'<p class="problem" role="alert">{html.escape(text)}</p>'


def figures_html(drawing: Drawing) -> str:
    """Return certificate, time, number of images and method as HTML."""
    report, exact, mean = drawing.report, "not defined", ""
    if report.certificate is not None:
        exact, mean = f"{report.certificate:.1e}", f", mean {report.certificate_mean:.1e}"
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.stages.items() if seconds >= 0.005)
    shown = [
        ("certificate", exact, f"max |flow(x) − z|{mean}"),
        ("time", f"{report.seconds:.2f} s", f"{report.images_per_second:.3g} images per second: {stages}"),
        ("images", str(report.count), f"seed {drawing.seed}"),
        ("method", report.method, f"{report.steps:,} passes"),
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
