"""A sample that is not finite ends a run with its name; it is neither dropped nor drawn again with other noise."""

import pytest
import torch
from support.commands import fails

from starflow import Flow, FlowConfig, InverseError
from starflow.cli import main
from starflow.sampling.sample import SampleOptions, sample

CONFIG = FlowConfig(
    image_size=4, image_channels=1, patch_size=2, channels=16, layers=(1,), head_dim=8, noise_std=0.1, levels=256
)


@pytest.fixture
def broken_denoising(monkeypatch):
    """Let denoising give NaN in the second sample that it gets."""
    denoise, calls = Flow.denoise, []

    def broken(self, x, *arguments, **options):
        result = denoise(self, x, *arguments, **options)
        for i in range(len(result)):
            calls.append(i)
            if len(calls) == 2:
                result[i, 0, 1, 1] = float("nan")
        return result

    monkeypatch.setattr(Flow, "denoise", broken)


def test_denoising_to_nan_names_the_sample(broken_denoising):
    flow = Flow(CONFIG).eval()
    with pytest.raises(InverseError, match="images 0 to 2: denoising: values of sample 1 are not finite"):
        sample(flow, 3, options=SampleOptions(denoise=1.0))


def test_no_image_of_a_batch_with_nan_is_written_and_the_run_continues(broken_denoising, tmp_path, capsys):
    Flow(CONFIG).save_pretrained(tmp_path / "model")
    command = ["sample", "--checkpoint", str(tmp_path / "model"), "--count", "6", "--format", "png", "--denoise", "1"]
    command += ["--batch-size", "2", "--out"]
    out = tmp_path / "out"
    error = fails(capsys, *command, str(out))
    assert error.endswith("000000-0000.png to 000000-0001.png: denoising: values of sample 1 are not finite")
    assert not list(out.glob("0*.png"))
    # The same command draws the same samples.
    assert main([*command, str(out)]) == 0 and main([*command, str(tmp_path / "whole")]) == 0
    drawn, whole = (
        {path.name: path.read_bytes() for path in each.glob("0*.png")} for each in (out, tmp_path / "whole")
    )
    assert len(drawn) == 6 and drawn == whole


def test_decoding_to_nan_names_the_sample(tmp_path, capsys, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from support import components

    from starflow.pipelines import STARFlowPipeline

    def decode(self, x):
        images = torch.zeros(len(x), 3, 16, 16)
        images[1, 2, 3] = float("inf")
        return images

    monkeypatch.setattr(STARFlowPipeline, "decode", decode)
    folder = str(components.save(tmp_path / "model"))
    assert (
        main(["sample", "--checkpoint", folder, "--prompt", "a cat", "--num", "2", "--out", str(tmp_path / "out")]) == 2
    )
    assert capsys.readouterr().err.strip().endswith("decoding: values of sample 1 are not finite")
    assert not list((tmp_path / "out").glob("0*.png"))
