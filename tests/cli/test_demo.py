"""The web page: what its buttons do, the command's errors, and the whole of it in a real browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from starflow import ConfigError, Flow, FlowConfig, Guidance
from starflow.cli import main

pytest.importorskip("gradio")

from starflow.demo.model import EACH, NONE, Choices, DemoModel, Stopped
from starflow.demo.page import Page, figures_html

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The server in a process that reports every connection to elsewhere.
SERVER = """
import socket, sys
connect = socket.socket.connect
def watched(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        print("connects to", address, flush=True)
    return connect(self, address)
socket.socket.connect = watched
from starflow.cli import main
sys.exit(main(["demo", "--checkpoint", "digits", "--port", "0", "--threads", "1", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def digits():
    return DemoModel("digits")


def test_the_first_choices_draw(digits):
    drawing = digits.draw(digits.defaults)
    assert drawing.images.shape == (100, 1, 8, 8) and drawing.columns == 10
    assert drawing.report.certificate < 1e-4 and f">{drawing.report.certificate:.1e}<" in figures_html(drawing)


def test_a_seed_draws_the_images_of_the_command(digits):
    choices = Choices(condition="3", count=5, seed=7, guidance=1.5)
    drawn = digits.draw(choices).images
    expected = digits.flow.sample(5, torch.full((5,), 3), guidance=Guidance(1.5), seed=7).images
    assert torch.equal(drawn, expected) and torch.equal(drawn, digits.draw(choices).images)
    assert not torch.equal(drawn, digits.draw(Choices(condition="3", count=5, seed=8, guidance=1.5)).images)


def test_methods(digits):
    drawn = {method: digits.draw(Choices(count=4, method=method)) for method in ("auto", "sequential", "jacobi")}
    assert digits.defaults.method == "auto" and torch.equal(drawn["auto"].images, drawn["sequential"].images)
    assert [drawing.report.method for drawing in drawn.values()] == ["sequential", "sequential", "jacobi"]
    assert (drawn["jacobi"].images.int() - drawn["sequential"].images.int()).abs().max() <= 1
    shown = figures_html(drawn["jacobi"])
    assert (
        f"mean {drawn['jacobi'].report.certificate_mean:.1e}" in shown
        and f"{drawn['jacobi'].report.steps:,} passes" in shown
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": -1}, "Guidance weight: expected a number of at least 0, got -1"),
        ({"guidance": float("nan")}, "Guidance weight"),
        ({"guidance": 1, "condition": NONE}, "no class to guide towards"),
        ({"condition": "10"}, "Class '10': expected 0 to 9"),
        ({"condition": None}, "Class ''"),
        ({"count": 101}, "Images: expected a whole number from 1 to 100, got 101"),
        ({"count": 2.5}, "got 2.5"),
        ({"seed": -1}, "Seed"),
        ({"seed": None}, "got nothing"),
        ({"method": "guess"}, "method='guess'"),
        ({"denoise": -1}, "Denoising"),
    ],
)
def test_choices_out_of_range_are_named(digits, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        digits.draw(Choices(**changes))


def test_stop_ends_a_drawing_at_once(digits):
    stop, seen = threading.Event(), []

    def progress(done, total):
        seen.append(done / total)
        stop.set()

    with pytest.raises(Stopped):
        digits.draw(Choices(EACH, 20), progress, stop=stop)
    assert len(seen) == 1 and seen[0] < 0.2
    assert digits.draw(Choices(EACH, 20)).report.certificate < 1e-4


def test_one_drawing_at_a_time(digits):
    inside, go, order = threading.Event(), threading.Event(), []

    def hold(done, total):
        inside.set()
        assert go.wait(10)

    first = threading.Thread(target=lambda: order.append(digits.draw(Choices(count=1), hold).seed))
    first.start()
    assert inside.wait(10)
    stop = threading.Event()
    with pytest.raises(Stopped):
        digits.draw(Choices(count=1), waiting=lambda others: stop.set(), stop=stop)
    waits = []
    second = threading.Thread(
        target=lambda: order.append(
            digits.draw(Choices(count=1, seed=1), waiting=lambda n: (waits.append(n), go.set())).seed
        )
    )
    second.start()
    first.join(10)
    second.join(10)
    assert order == [0, 1] and set(waits) == {1}


def test_denoising_of_a_model_with_noise(tmp_path):
    fields = {"image_size": 4, "image_channels": 3, "patch_size": 2, "channels": 16, "layers": (1, 1), "head_dim": 8}
    Flow(FlowConfig(**fields, noise_std=0.5)).save_pretrained(tmp_path)
    model = DemoModel(tmp_path)
    plain, denoised = (model.draw(Choices(NONE, 3, denoise=factor)).images for factor in (0, 1))
    assert plain.shape == (3, 3, 4, 4) and not torch.equal(plain, denoised)
    Page(model)


def test_words_that_the_model_does_not_know_are_named(tmp_path):
    pytest.importorskip("diffusers")
    from support import components

    components.save_bundled(tmp_path / "pipeline", "red heart")
    page = Page(DemoModel(tmp_path / "pipeline"))
    page._stops["session"] = threading.Event()
    request = types.SimpleNamespace(session_hash="session")
    arguments = (1, 0, 0.0, "starflow", "auto", 0.0, "1:1", request, lambda *_, **__: None)
    with pytest.warns(UserWarning, match="does not know 'dragon'"):
        message = page.draw("red dragon", *arguments)[2]
    assert "dragon" in message and "red" not in message
    assert page.draw("red heart", *arguments)[2] == ""


def test_a_pipeline_has_a_prompt(tmp_path):
    pytest.importorskip("diffusers")
    from support import components

    model = DemoModel(components.save(tmp_path / "pipeline"))
    assert model.text and model.defaults.condition == ""
    with pytest.raises(ConfigError, match="Prompt: say what to draw"):
        model.draw(model.defaults)
    drawing = model.draw(Choices("a cat", 2, 0, 2.0, "starflow", denoise=1.0, aspect="3:2"))
    assert len(drawing.images) == 2 and drawing.report.certificate < 1e-4
    config = Page(model).blocks.get_config_file()
    shown = {part["props"].get("label") for part in config["components"] if part["props"].get("visible", True)}
    assert "Prompt" in shown and "Class" not in shown


@pytest.mark.parametrize("case", ["gradio", "port", "checkpoint"])
def test_errors_of_the_command(case, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1]) if case == "port" else "0"
        if case == "gradio":
            monkeypatch.delitem(sys.modules, "starflow.demo.page")
            monkeypatch.setitem(sys.modules, "gradio", None)
        assert main(["demo", "--port", port, *(["--checkpoint", "nowhere"] if case == "checkpoint" else [])]) == 2
    error = capsys.readouterr().err.strip()
    expected = {"gradio": "pip install 'starflow-kernels[demo]'", "port": f"--port {port}: Address already in use"}
    assert expected.get(case, "no checkpoint at nowhere") in error and "\n" not in error


@pytest.fixture
def server(tmp_path):
    log = (tmp_path / "log").open("w+")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=log, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    yield process
    process.terminate()
    said = process.stdout.read()
    assert process.wait(30) == 0 and "connects to" not in said


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on the PATH, nor one of playwright")
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_in_a_browser(browser, server):
    first = server.stdout.readline()
    assert first.startswith("digits: http://127.0.0.1:"), first
    address = first.split()[1]
    page, requests, pictures = browser.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.fill("#class input", "3")
    page.press("#class input", "Tab")
    page.fill("#count input", "9")
    for seed in ("5", "6", "5"):
        page.fill("#seed input", seed)
        page.press("#seed input", "Tab")
        page.click("#draw")
        page.wait_for_function(
            "seed => document.querySelector('#figures')?.innerText.includes('seed ' + seed)", arg=seed
        )
        page.wait_for_selector("#draw:not([disabled])")
        pictures.append(page.request.get(page.get_attribute("#grid img", "src")).body())
        assert 0 < float(page.inner_text("#certificate")) < 1e-4
        assert page.inner_text("#images") == "9"
    assert pictures[0] == pictures[2] != pictures[1] and pictures[0].startswith(b"\x89PNG")
    page.fill("#count input", "1000")
    page.press("#count input", "Tab")
    page.click("#draw")
    assert "from 1 to 100, got 1000" in page.inner_text("#message .problem")
    outside = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert len(requests) > 10 and outside == []
