"""Scores of images against the command line of torch-fidelity and the classes of torchmetrics."""

import json

import pytest
import torch
from support import workers
from support.commands import fails
from support.inception import fidelity, save_images, save_random_weights

pytest.importorskip("torch_fidelity")
pytest.importorskip("torchmetrics")
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance

from starflow.cli import main
from starflow.evaluation.fid import extract, images_below, read_rgb
from starflow.evaluation.inception import WEIGHTS_URL, Inception
from starflow.evaluation.statistics import read_statistics

COUNT, LAYER = 24, 64
# The scores of random weights are small.
CLOSE = {"rel": 1e-5, "abs": 1e-8}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    save_random_weights(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return save_images(root / "a", COUNT, 0), save_images(root / "b", COUNT, 1)


@pytest.fixture(scope="module")
def features(weights, folders):
    """Features of both folders by the layer LAYER."""
    network = Inception(weights, LAYER)
    return [extract(images_below(folder), network, LAYER, "x") for folder in folders]


def evaluate(tmp_path, *arguments) -> dict:
    report = tmp_path / "report.json"
    assert main(["eval", "--fid", "--json", str(report), *map(str, arguments)]) == 0
    return json.loads(report.read_text())["results"]["image_scores"]


def test_scores_are_those_of_the_command_line_of_torch_fidelity(weights, folders, tmp_path):
    layers = [word for name in ("fid", "kid", "prc") for word in (f"--feature-layer-{name}", str(LAYER))]
    # A subset of all images makes the scores of all subsets equal.
    expected = fidelity(weights, *folders, "--fid", "--kid", "--prc", "--kid-subset-size", str(COUNT), *layers)
    found = evaluate(
        tmp_path, "--images", folders[0], "--reference", folders[1], "--inception", weights, "--layer", LAYER
    )
    assert expected["frechet_inception_distance"] > 1e-3
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], **CLOSE)
    assert found["kid"]["mean"] == pytest.approx(expected["kernel_inception_distance_mean"], **CLOSE)
    assert (found["precision"], found["recall"]) == (expected["precision"], expected["recall"])
    assert found["not_measured"] == {"inception_score": "it is defined for the layer 2048 alone"}
    assert found["images"] == found["reference"]["images"] == COUNT
    assert found["images_per_process"] == [COUNT] and found["inception"]["is_published"] is False
    assert found["drawn"] is None and found["seed"] is None


def test_the_inception_score_is_that_of_the_command_line_of_torch_fidelity(weights, tmp_path):
    folder = save_images(tmp_path / "images", 10, 0)
    expected = fidelity(weights, folder, folder, "--isc")
    found = evaluate(tmp_path, "--images", folder, "--save-statistics", tmp_path / "x.npz", "--inception", weights)
    assert found["inception_score"]["mean"] == pytest.approx(expected["inception_score_mean"], **CLOSE)
    assert found["inception_score"]["standard_deviation"] == pytest.approx(expected["inception_score_std"], **CLOSE)
    assert "fid" not in found and found["reference"] is None
    assert read_statistics(tmp_path / "x.npz", 2048).images == 10


def torchmetrics_fid(weights, features) -> FrechetInceptionDistance:
    """Return torchmetrics' metric with features of both folders."""

    class Given(torch.nn.Module):
        num_features = LAYER

        def forward(self, values):
            return values

    metric = FrechetInceptionDistance(feature=Given())
    metric.update(features[0].values, real=False)
    metric.update(features[1].values, real=True)
    return metric


def test_fid_and_kid_are_those_of_torchmetrics(weights, folders, features, tmp_path):
    found = evaluate(
        tmp_path, "--images", folders[0], "--reference", folders[1], "--inception", weights, "--layer", LAYER
    )
    assert found["fid"] == pytest.approx(torchmetrics_fid(weights, features).compute().item(), rel=1e-4)
    with pytest.warns(UserWarning, match="large memory"):
        kid = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=2, subset_size=COUNT)
    kid.update(features[0].values, real=False)
    kid.update(features[1].values, real=True)
    assert found["kid"]["mean"] == pytest.approx(kid.compute()[0].item(), rel=1e-2, abs=1e-5)


def test_features_are_those_of_torchmetrics_with_the_resize_of_the_released_statistics(weights, folders, features):
    # torchmetrics up to 1.7, with which the TarFlow code computed its statistics, had no other.
    metric = FrechetInceptionDistance(LAYER, feature_extractor_weights_path=str(weights), antialias=False)
    images = torch.stack([read_rgb(path) for path in images_below(folders[0])])
    assert torch.allclose(metric.inception(images), features[0].values, rtol=1e-5, atol=1e-6)


class Released(FrechetInceptionDistance):
    """Metric of the TarFlow code, whose state holds the sums and the network."""

    def add_state(self, name, default, *args, **kwargs):
        self.register_buffer(name, default)


def test_a_state_of_the_tarflow_code_is_reference_and_network(weights, folders, tmp_path):
    metric = Released(LAYER, feature_extractor_weights_path=str(weights), antialias=False, reset_real_features=False)
    metric.update(torch.stack([read_rgb(path) for path in images_below(folders[1])]), real=True)
    path = tmp_path / "afhq_256_fid_stats.pth"
    torch.save(metric.state_dict(), path)
    base = ["--images", folders[0], "--layer", LAYER]
    expected = evaluate(tmp_path, *base, "--reference", folders[1], "--inception", weights)
    found = evaluate(tmp_path, *base, "--reference", path, "--inception", path)
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-5)
    assert found["reference"]["images"] == COUNT and found["inception"]["is_published"] is None
    assert set(found["not_measured"]) == {"kid", "precision", "recall", "inception_score"}


def test_saved_statistics_are_a_reference(weights, folders, tmp_path):
    base = ["--inception", weights, "--layer", LAYER]
    evaluate(tmp_path, *base, "--images", folders[1], "--save-statistics", tmp_path / "b.npz")
    expected = evaluate(tmp_path, *base, "--images", folders[0], "--reference", folders[1])
    found = evaluate(tmp_path, *base, "--images", folders[0], "--reference", tmp_path / "b.npz")
    assert found["fid"] == pytest.approx(expected["fid"], abs=1e-12)


def test_drawn_samples_have_the_scores_of_one_process_however_often_they_stop(weights, folders, tmp_path, capsys):
    """A run of one process, and one of two processes that continues a run in which samples are missing."""
    base = ["--layer", str(LAYER), "--inception", str(weights), "--reference", str(folders[1]), "--crop", "--seed", "3"]
    drawing = ["--count", "40", "--threads", "1", "--guidance", "0.5"]
    one = evaluate(tmp_path, *base, *drawing, "--out", tmp_path / "one", "--batch-size", "40")
    assert one["drawn"]["count"] == 40 and one["images"] == 40 and one["seed"] == 3
    capsys.readouterr()
    out = tmp_path / "two"
    command = ["eval", "--fid", *base, *drawing, "--out", str(out), "--batch-size", "7"]
    report = str(tmp_path / "two.json")
    codes, texts = workers.run(tmp_path, 2, *command, "--json", report)
    assert codes == [0, 0], texts
    two = json.loads((tmp_path / "two.json").read_text())["results"]["image_scores"]
    assert two["processes"] == 2 and two["images_per_process"] == [32, 8] and texts[1] == ""
    for path in sorted(out.glob("0*.png"))[5:30]:
        path.unlink()
    (out / "000003-0099.png").write_bytes((out / "000000-0000.png").read_bytes())
    codes, texts = workers.run(tmp_path, 2, *command, "--json", report)
    again = json.loads((tmp_path / "two.json").read_text())["results"]["image_scores"]
    assert codes == [0, 0] and again["drawn"]["count"] == 25 and again["drawn"]["kept"] == 15, texts
    for other in (two, again):
        assert other["images_sha256"] == one["images_sha256"]
        for name in ("fid", "precision", "recall"):
            assert other[name] == pytest.approx(one[name], abs=1e-9)
        assert other["kid"]["mean"] == pytest.approx(one["kid"]["mean"], abs=1e-9)


def test_missing_weights_are_named_with_their_source(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert WEIGHTS_URL == URL_INCEPTION_V3
    base = ["eval", "--fid", "--images", str(folders[0]), "--reference", str(folders[1])]
    for arguments in ([], ["--inception", str(tmp_path / "x.pth")]):
        error = fails(capsys, *base, *arguments)
        assert "no weights of the Inception network at" in error and URL_INCEPTION_V3 in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a file of torch", "is not a checkpoint of torch"),
        ({"weight": torch.zeros(3)}, "not the weights of torch-fidelity's Inception network"),
        ([1], "holds no weights but a list"),
        (None, "size mismatch for fc.weight"),
    ],
)
def test_other_weights_are_refused(content, message, weights, folders, tmp_path, capsys):
    path = tmp_path / "x.pth"
    if content is None:
        content = {**torch.load(weights, weights_only=True), "fc.weight": torch.zeros(3, 3)}
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    base = ["eval", "--fid", "--images", str(folders[0]), "--reference", str(folders[1])]
    assert message in fails(capsys, *base, "--inception", str(path))


def test_what_cannot_be_compared_is_refused(weights, folders, tmp_path, capsys):
    base = ["eval", "--fid", "--inception", str(weights), "--layer", str(LAYER), "--images", str(folders[0])]
    assert "give --reference, or --save-statistics" in fails(capsys, *base)
    other = save_images(tmp_path / "other", 2, 0, size=32)
    message = "000.png has 32x32 pixels, "
    assert message in fails(capsys, *base, "--reference", str(other))
    assert main([*base, "--reference", str(other), "--crop"]) == 0
    single = save_images(tmp_path / "single", 1, 0)
    capsys.readouterr()
    assert "single: one image, a covariance takes at least 2" in fails(capsys, *base, "--reference", str(single))
    (tmp_path / "empty").mkdir()
    assert "no images in" in fails(capsys, *base, "--reference", str(tmp_path / "empty"))
    statistics = str(tmp_path / "x.npz")
    assert main([*base, "--save-statistics", statistics]) == 0
    capsys.readouterr()
    assert "--crop: " in fails(capsys, *base, "--reference", statistics, "--crop")
    assert "expected 192 features" in fails(capsys, *base, "--reference", statistics, "--layer", "192")
