"""`starflow eval`: what each flag measures, in any number of processes, and flags without effect."""

import json

import pytest
from PIL import Image
from support import workers
from support.commands import fails

from starflow import Flow, FlowConfig
from starflow.cli import main


def evaluate(tmp_path, *arguments: str) -> dict:
    report = tmp_path / "report.json"
    assert main(["eval", *arguments, "--json", str(report)]) == 0
    return json.loads(report.read_text())["results"]


def test_bits_per_dim_measures_both_bounds_and_the_round_trips_alone(tmp_path, capsys):
    found = evaluate(tmp_path, "--bits-per-dim", "--importance", "3")
    assert set(found) == {
        "images", "likelihood", "importance_weighted", "inverse_of_forward", "forward_of_inverse", "processes",
    }  # fmt: skip
    uniform, tighter = found["likelihood"], found["importance_weighted"]
    assert uniform["draws"] == tighter["draws"] == 3 and uniform["images"] == 360
    assert tighter["bits_per_dim"] < uniform["bits_per_dim"] and found["inverse_of_forward"]["max"] < 1e-4
    printed = capsys.readouterr().out
    assert "bits/dim, importance-weighted over 3 draws" in printed and "classifier" not in printed


def test_the_likelihood_of_eval_is_that_of_bits_per_dim(tmp_path):
    base = ["--draws", "1", "--seed", "5"]
    assert evaluate(tmp_path, *base)["likelihood"] == evaluate(tmp_path, *base, "--bits-per-dim")["likelihood"]


def test_two_processes_measure_what_one_measures(tmp_path):
    command = ["eval", "--importance", "2", "--batch-size", "50", "--threads", "1", "--json"]
    assert main([*command, str(tmp_path / "one.json")]) == 0
    codes, texts = workers.run(tmp_path, 2, *command, str(tmp_path / "two.json"))
    assert codes == [0, 0] and texts[1] == "" and "bits/dim" in texts[0], texts
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert set(one) == set(two)
    for name in ("likelihood", "importance_weighted"):
        assert two[name] == pytest.approx(one[name], abs=1e-9)
    assert two["bayes_accuracy"] == one["bayes_accuracy"]


def test_a_folder_of_one_image(tmp_path):
    flow = Flow(FlowConfig(image_size=8, image_channels=3, patch_size=4, channels=16, layers=(1,), head_dim=8))
    flow.save_pretrained(tmp_path / "model")
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a" / "x.png")
    base = ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "images")]
    assert evaluate(tmp_path, *base, "--bits-per-dim")["likelihood"]["images"] == 1


def test_a_model_of_gaussian_noise_has_no_bits_per_dim(tmp_path, capsys):
    settings = {"image_size": 8, "image_channels": 3, "patch_size": 4, "channels": 16, "layers": (1,), "head_dim": 8}
    Flow(FlowConfig(**settings, noise_std=0.1)).save_pretrained(tmp_path / "model")
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a" / "x.png")
    base = ["eval", "--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "images")]
    for flags in (["--bits-per-dim"], ["--importance", "2"], ["--draws", "2"]):
        message = f"{flags[0]}: the model was trained with Gaussian noise, not with dequantization"
        assert message in fails(capsys, *base, *flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--importance", "3", "--draws", "2"], "--draws: the draws of --importance serve both bounds"),
        (["--reference", "x"], "--reference: it goes with --fid"),
        (["--bits-per-dim", "--count", "3"], "--count: it goes with --fid"),
        (["--denoise", "1"], "--denoise: it goes with --fid"),
        (["--jacobi_th", "1"], "--jacobi_th: it goes with --fid"),
        (["--fid", "--reference", "x", "--draws", "3"], "--draws: --fid measures no densities, see --bits-per-dim"),
        (["--fid", "--reference", "x", "--data", "y"], "--data: --fid measures no densities, see --bits-per-dim"),
        (["--fid"], "--fid: give --reference, or --save-statistics to prepare one"),
        (["--fid", "--reference", "x", "--images", "y", "--count", "3"], "--count: the images of --images are"),
        (["--fid", "--reference", "x", "--images", "y", "--guidance", "3"], "--guidance: the images of --images are"),
    ],
)
def test_flags_without_effect_are_refused(arguments, message, capsys):
    assert message in fails(capsys, "eval", *arguments)
