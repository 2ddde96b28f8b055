"""Features of image files, with a small network in place of Inception."""

import numpy as np
import pytest
import torch
from PIL import Image

from starflow import DataError
from starflow.evaluation import fid
from starflow.evaluation.fid import extract, images_below

DIMS = 6


def network(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of the rows' thirds and of their squares per image, and ten of the pixels."""
    x = images.float() / 255
    parts = torch.cat([x.mean((2, 3)), x.square().mean((2, 3))], dim=1)
    return parts, x.flatten(1)[:, :10]


@pytest.fixture
def folder(tmp_path):
    """Return a folder of 70 images, two of its folders with images of their own."""
    rng = np.random.default_rng(0)
    for i in range(70):
        path = tmp_path / "images" / ("", "a", "b")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def simulate(monkeypatch, count: int, call):
    """Run a function as the processes of a run, one after the other; return the results, that of rank 0 last."""
    parts = {}

    class Simulated:
        def __init__(self):
            self.count, self.rank = count, count - 1 - len(parts)

        def collect(self, value):
            parts[self.rank] = value
            return [parts[rank] for rank in range(count)] if self.rank == 0 else None

    monkeypatch.setattr(fid, "Processes", Simulated)
    return [call() for _ in range(count)]


def test_features_are_those_of_each_file_in_order(folder):
    files = images_below(folder)
    found = extract(files, network, DIMS, "x")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files])
    expected, logits = network(pixels)
    assert torch.allclose(found.values, expected) and torch.allclose(found.logits, logits)
    assert found.size == (5, 4) and found.shares == [70]
    assert np.allclose(found.statistics.covariance, np.cov(expected.double().numpy(), rowvar=False), atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_features_have_the_same_bits_for_any_number_of_processes(folder, count, monkeypatch):
    files = images_below(folder)
    alone = extract(files, network, DIMS, "x")
    *others, found = simulate(monkeypatch, count, lambda: extract(files, network, DIMS, "x"))
    assert others == [None] * (count - 1)
    assert torch.equal(found.values, alone.values) and torch.equal(found.logits, alone.logits)
    assert found.digest == alone.digest and sum(found.shares) == 70 and len(found.shares) == count
    assert np.allclose(found.statistics.covariance, alone.statistics.covariance, rtol=0, atol=1e-13)


def test_the_digest_is_of_the_pixels(folder):
    before = extract(images_below(folder), network, DIMS, "x").digest
    path = folder / "0.png"
    Image.open(path).save(path, compress_level=0)
    assert extract(images_below(folder), network, DIMS, "x").digest == before
    Image.new("RGB", (4, 5)).save(path)
    assert extract(images_below(folder), network, DIMS, "x").digest != before


def test_many_images_keep_mean_and_covariance_alone(folder, monkeypatch):
    whole = extract(images_below(folder), network, DIMS, "x")
    monkeypatch.setattr(fid, "MOST_KEPT", 69)
    found = extract(images_below(folder), network, DIMS, "x")
    assert found.values is None and found.logits is None
    assert np.array_equal(found.statistics.mean, whole.statistics.mean)


def test_gray_images_have_three_equal_channels(tmp_path):
    for i in range(2):
        Image.new("L", (4, 4), 100 * i).save(tmp_path / f"{i}.png")
    values = extract(images_below(tmp_path), network, DIMS, "x").values
    assert torch.equal(values[:, 0], values[:, 2]) and values[1, 0] == pytest.approx(100 / 255)


def test_scaled_images_have_the_size_asked_for(folder):
    Image.new("RGB", (30, 50)).save(folder / "0.png")
    assert extract(images_below(folder), network, DIMS, "x", size=4).size == (4, 4)


def test_an_image_of_another_size_is_named(folder):
    Image.new("RGB", (4, 6)).save(folder / "b" / "65.png")
    with pytest.raises(DataError, match=r"65.png: 4x6 pixels, but .*/0.png has 4x5"):
        extract(images_below(folder), network, DIMS, "x")


def test_an_image_whose_features_are_not_finite_is_named(folder):
    def broken(images):
        features, logits = network(images)
        features[3, 2] = float("nan")
        return features, logits

    files = images_below(folder)
    with pytest.raises(DataError, match=f"{files[3].name}: the features of the image are not finite"):
        extract(files, broken, DIMS, "x")


def test_one_image_is_refused(folder):
    with pytest.raises(DataError, match="x: number of images 1, a covariance takes at least 2"):
        extract(images_below(folder)[:1], network, DIMS, "x")


def test_a_damaged_image_is_refused(folder):
    (folder / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        extract(images_below(folder), network, DIMS, "x")


def test_the_grid_beside_samples_is_no_sample(tmp_path):
    for name in ("000000-0000.png", "000001-0000.png", "grid.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert len(images_below(tmp_path)) == 3
    (tmp_path / "samples.jsonl").write_text("{}\n")
    assert [path.name for path in images_below(tmp_path)] == ["000000-0000.png", "000001-0000.png"]


def test_a_missing_folder_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder of images at nowhere"):
        images_below(tmp_path.relative_to(tmp_path) / "nowhere")
    with pytest.raises(DataError, match="no images in"):
        images_below(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match="one image, a covariance takes at least 2"):
        images_below(tmp_path)
