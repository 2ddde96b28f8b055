"""`starflow sample` of pipeline folders: any number of images, in any batches, in one run or in several."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from support import components

from starflow import Flow
from starflow.cli import main
from starflow.inversion.request import TOLERANCE
from starflow.io.files import temporary_name
from starflow.pipelines import FlowModel, TarFlowPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(components.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits")
    TarFlowPipeline(FlowModel.from_flow(Flow.from_pretrained("digits"))).save_pretrained(path)
    return str(path)


def fails(capsys, *arguments: str) -> str:
    assert main(["sample", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("starflow sample: error:") and "\n" not in error
    return error


def images(out) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("0*.png"))}


def files(out) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(out.glob("0*.png"))}


def ledger(out) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_the_result_is_one_line_on_standard_output(tmp_path, capsys):
    out = str(tmp_path)
    assert main(["sample", "--num", "10", "--out", out]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(rf"{out}/grid\.png: 10 images in \d+\.\d\d s \([\d.]+ per second\)\n", printed.out)
    assert printed.err == ""
    assert main(["sample", "--num", "10", "--format", "npz", "--certify", "--out", out]) == 0
    result, certificate = capsys.readouterr().out.splitlines()
    assert result.startswith(f"{out}: 10 images in ")
    assert re.fullmatch(r"certificate: max \|flow\(x\) - z\| = \d\.\de-\d\d, mean \d\.\de-\d\d", certificate)


def test_prompt_as_in_the_documentation(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--prompt", "a red cat", "--checkpoint", folder, "--aspect", "3:2", "--num", "5", "--guidance", "3.6"]
    report = tmp_path / "report.json"
    arguments += ["--method", "auto", "--certify", "--batch-size", "2", "--json", str(report)]
    assert main(["sample", *arguments, "--out", str(out)]) == 0
    found = images(out)
    assert list(found) == [f"000000-{copy:04d}.png" for copy in range(5)]
    assert all(image.shape == (14, 20, 3) for image in found.values()) and (out / "grid.png").exists()
    assert [line["condition"] for line in ledger(out)[1:]] == ["a red cat"] * 5
    results = json.loads(report.read_text())["results"]
    assert results["count"] == 5 and results["kept"] == 0 and results["certificate"] < 1e-4
    assert set(results["stages"]) == {"text", "flow", "certify", "denoise", "decode", "write"}
    printed = capsys.readouterr()
    assert "5 images in" in printed.out and "max |flow(x) - z|" in printed.out
    assert (
        printed.err.startswith("starflow: warning: the model was trained on images of") and printed.err.count("\n") == 1
    )


def test_images_depend_on_prompt_number_and_seed_alone(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n\nthe small dog\na blue piano\n")
    arguments = ["sample", "--checkpoint", folder, "--prompt-file", str(prompts), "--num", "2"]
    for name, more in (("a", ["--batch-size", "1"]), ("b", ["--batch-size", "4"]), ("c", ["--seed", "1"])):
        assert main([*arguments, "--out", str(tmp_path / name), *more]) == 0
    a, b, c = (images(tmp_path / name) for name in "abc")
    assert list(a) == [f"{i:06d}-{copy:04d}.png" for i in range(3) for copy in range(2)]
    for name in a:
        # Batches of the text encoder and of denoising round apart: a level of 255 at most.
        assert np.abs(a[name] - b[name]).max() <= 1 and np.abs(a[name] - c[name]).max() > 10
    # More copies and more prompts are added to what is there.
    before = files(tmp_path / "a")
    prompts.write_text("a red cat\nthe small dog\na blue piano\nseven\n")
    assert main([*arguments[:-1], "3", "--out", str(tmp_path / "a")]) == 0
    after = files(tmp_path / "a")
    assert len(after) == 12 and before.items() <= after.items()


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfa cat\r\na dog\r\n", ["a cat", "a dog"]),
        (b"a cat\ra dog\r", ["a cat", "a dog"]),
        ("\n\u00a0\n \t\n a cat \n\na dog".encode(), ["a cat", "a dog"]),
        ("a\u2028cat\u0085on\x0ca\x1cmat\n\u732b\n".encode(), ["a\u2028cat\u0085on\x0ca\x1cmat", "\u732b"]),
    ],
)
def test_prompts_are_the_lines_of_a_file(folder, tmp_path, content, prompts):
    (tmp_path / "prompts.txt").write_bytes(content)
    arguments = ["--prompt-file", str(tmp_path / "prompts.txt"), "--num", "1", "--out", str(tmp_path / "out")]
    assert main(["sample", "--checkpoint", folder, *arguments]) == 0
    assert [line["condition"] for line in ledger(tmp_path / "out")[1:]] == prompts


def test_a_prompt_file_in_another_encoding_is_refused(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes("a cat".encode("utf-16"))
    arguments = ["--prompt-file", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    assert "prompts.txt: 'utf-8' codec" in fails(capsys, "--checkpoint", folder, *arguments)


def test_a_killed_run_continues(folder, tmp_path, capsys):
    arguments = ["sample", "--checkpoint", folder, "--prompt", "a red cat", "--num", "40", "--batch-size", "2"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-m", "starflow", *arguments, "--threads", "1", "--out", str(out)])
    deadline = time.monotonic() + 120
    while len(files(out)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = files(out)
    assert 5 <= len(before) < 40
    # What a kill at the worst moments leaves: a line cut short, an image without its line, a temporary file.
    text = (out / "samples.jsonl").read_text()
    (out / "samples.jsonl").write_text(text[:-10])
    (out / temporary_name("000009-0000.png")).write_text("half")
    assert main([*arguments, "--out", str(out)]) == 0
    assert f"{40 - len(before)} images ({len(before)} were there)" in capsys.readouterr().out
    after = files(out)
    assert len(after) == 40 and before.items() <= after.items() and not list(out.glob(".*"))
    assert sorted(line["file"] for line in ledger(out)[1:]) == sorted(after)
    assert main([*arguments, "--out", str(whole)]) == 0
    assert [after[name][1] for name in after] == [content for _, content in files(whole).values()]
    # Once more: nothing is left to do. An image that was removed is drawn again.
    assert main([*arguments, "--out", str(out)]) == 0
    assert files(out) == after
    (out / "000000-0003.png").unlink()
    assert main([*arguments, "--out", str(out)]) == 0
    assert np.array_equal(images(out)["000000-0003.png"], images(whole)["000000-0003.png"])


def test_another_method_continues_a_run_and_another_tolerance_does_not(folder, tmp_path, capsys):
    base = ["--checkpoint", folder, "--prompt", "a red cat", "--out", str(tmp_path), "--num"]
    assert main(["sample", *base, "1"]) == 0
    assert main(["sample", *base, "2", "--method", "jacobi", "--window", "16", "--tol", str(TOLERANCE)]) == 0
    assert "1 image (1 was there)" in capsys.readouterr().out
    assert "begun with another tol" in fails(capsys, *base, "3", "--method", "jacobi", "--tol", "0.1")
    assert "begun with another quantize" in fails(capsys, *base, "3", "--quantize", "int8")
    assert main(["sample", *base, "3", "--method", "sequential"]) == 0
    assert len(images(tmp_path)) == 3


def test_a_folder_of_another_run_is_left_alone(folder, tmp_path, capsys):
    base = ["--checkpoint", folder, "--num", "1", "--out", str(tmp_path / "out")]
    assert main(["sample", *base, "--prompt", "a red cat"]) == 0
    before = files(tmp_path / "out")
    changed = [
        (["--prompt", "a red cat", "--seed", "1"], "begun with another seed"),
        (["--prompt", "a red cat", "--guidance", "1"], "begun with another guidance"),
        (["--prompt", "a red cat", "--aspect", "1:1"], "begun with another aspect"),
        (["--prompt", "a dog"], "was drawn for 'a red cat', not 'a dog'"),
    ]
    for more, message in changed:
        assert message in fails(capsys, *base, *more)
    (tmp_path / "out" / "samples.jsonl").write_text("[]\n")
    assert "not the ledger of a run" in fails(capsys, *base, "--prompt", "a red cat")
    (tmp_path / "out" / "samples.jsonl").unlink()
    assert "holds images but no samples.jsonl" in fails(capsys, *base, "--prompt", "a red cat")
    assert files(tmp_path / "out") == before


def test_flags_of_the_released_code(folder, tmp_path, capsys):
    base = ["sample", "--checkpoint", folder, "--prompt", "a cat", "--num", "1", "--seed", "999"]
    released = ["--cfg", "2.5", "--attn_temp", "1.5", "--jacobi", "1", "--jacobi_th", "0.001"]
    assert main([*base, *released, "--jacobi_block_size", "16", "--out", str(tmp_path / "a")]) == 0
    assert f"jacobi iterates to --tol {TOLERANCE:g}" in capsys.readouterr().err
    ours = ["--guidance", "2.5", "--attention-temperature", "1.5", "--method", "jacobi", "--window", "16"]
    assert main([*base, *ours, "--out", str(tmp_path / "b")]) == 0
    one, other = (list(files(tmp_path / name).values()) for name in "ab")
    assert [content for _, content in one] == [content for _, content in other]


def test_classes(digits, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["sample", "--checkpoint", digits, "--num", "20", "--certify", "--out", str(out)]
    assert main([*arguments, "--guidance", "1"]) == 0
    found = images(out)
    assert list(found) == [f"{label:06d}-{copy:04d}.png" for label in range(10) for copy in range(2)]
    assert {image.shape for image in found.values()} == {(8, 8)}
    assert (
        main(["sample", "--checkpoint", digits, "--label", "3", "--num", "2", "--out", str(tmp_path / "threes")]) == 0
    )
    assert list(images(tmp_path / "threes")) == ["000003-0000.png", "000003-0001.png"]
    nothing = ["--label", "none", "--num", "2", "--out", str(tmp_path / "none")]
    assert main(["sample", "--checkpoint", digits, *nothing]) == 0
    capsys.readouterr()
    assert "--prompt: this pipeline takes no text" in fails(capsys, "--checkpoint", digits, "--prompt", "a cat")
    for label in ("10", ""):
        assert f"--label {label}: expected 0 .. 9" in fails(capsys, "--checkpoint", digits, "--label", label)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt or --prompt-file"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt-file", "/dev/null"], "/dev/null: no prompts in it"),
        (["--prompt", "a cat", "--aspect", "wide"], "'wide'"),
        (["--prompt", "a cat", "--height", "9"], "height=9"),
        (["--prompt", "a cat", "--method", "magic"], "method='magic': expected auto or one of sequential"),
        (["--prompt", "a cat", "--guidance", "-1"], "--guidance -1: expected a finite weight of at least 0"),
        (["--prompt", "a cat", "--variant", "fp8"], "variant"),
        (["--prompt", "a cat", "--out", "/dev/full/x"], "/dev/full"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, arguments, message, capsys):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert message in fails(capsys, "--checkpoint", folder, *out, *arguments)
    assert not images(tmp_path / "out")


def test_a_mistake_does_not_bind_the_folder(folder, tmp_path, capsys):
    base = ["--checkpoint", folder, "--prompt", "a cat", "--out", str(tmp_path)]
    fails(capsys, *base, "--height", "9")
    assert main(["sample", *base, "--height", "8"]) == 0


def test_a_plain_flow_takes_no_prompt(tmp_path, capsys):
    arguments = ["--checkpoint", "digits", "--prompt", "a cat", "--out", str(tmp_path)]
    assert "--prompt: digits is not the folder of a pipeline" in fails(capsys, *arguments)
    assert "method='magic'" in fails(capsys, "--method", "magic", "--out", str(tmp_path))


def test_a_damaged_folder(tmp_path, capsys):
    folder = components.save(tmp_path / "model")
    # Saving shows progress bars.
    capsys.readouterr()
    for part in ("text_encoder/model.safetensors", "vae/config.json", "transformer/config.json", "model_index.json"):
        whole = (folder / part).read_bytes()
        (folder / part).write_bytes(whole[: len(whole) // 2])
        fails(capsys, "--checkpoint", str(folder), "--prompt", "a cat", "--out", str(tmp_path / "out"))
        (folder / part).write_bytes(whole)
