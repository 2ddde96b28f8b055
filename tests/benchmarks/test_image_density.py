"""Densities of small images: codecs, a Gaussian and flows from end to end, in a size of seconds."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("zuko", reason="flows are compared with those of zuko")
pytest.importorskip("sklearn", reason="the Gaussian's covariance is shrunk by scikit-learn")

from benchmarks.science import image_density


def noise(levels: int, count: int = 60) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(levels, (count, 1, 4, 4), generator=random, dtype=torch.uint8)


@pytest.fixture
def images(monkeypatch):
    images = image_density.split(noise(256), noise(256, 20))
    monkeypatch.setitem(image_density.DATA, "Fashion-MNIST", lambda: images)
    return images


def test_parts_share_no_image():
    numbers = torch.arange(200, dtype=torch.uint8)[:, None, None, None]
    train, validation, _ = image_density.split(numbers, noise(2))
    assert len(validation) == 10
    assert sorted(torch.cat([train, validation]).flatten().tolist()) == list(range(200))


def test_bits_of_a_uniform_density():
    # A density of 2^-16 on [-1, 1]^16 gives each of 256^16 images the same probability.
    found = image_density.bits(torch.full((3,), -16 * torch.tensor(2.0).log().item()), 16)
    assert found["bits_per_dim"] == pytest.approx(8.0)
    assert found["error"] == pytest.approx(0.0, abs=1e-12)


def test_a_codec_counts_the_bits_of_files():
    flat, rough = torch.zeros(2, 1, 28, 28, dtype=torch.uint8), noise(256, 49 * 2).view(2, 1, 28, 28)
    png = [image_density.codec(images, image_density.CODECS["PNG"])["bits_per_dim"] for images in (flat, rough)]
    assert png[0] < 1.5 and png[1] > 8


def test_rows(tmp_path, images):
    sizes = {"image_size": 4, "channels": 64, "layers": [1, 1]}
    arguments = [
        "--seconds",
        "0.3",
        "--draws",
        "2",
        "--sizes",
        json.dumps(sizes),
        "--json",
        str(tmp_path / "found.json"),
    ]
    image_density.main(
        [*arguments, "--cases", "Fashion-MNIST, PNG|Fashion-MNIST, Gaussian|Fashion-MNIST, T|MNIST, MAF"]
    )
    rows = {row["case"]: row for row in json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == [f"Fashion-MNIST, {name}" for name in ("PNG", "Gaussian", "TarFlow", "MAF")]
    # Independent uniform pixels have 8 bits.
    assert all(row["bits_per_dim"] > 7.9 for row in rows.values())
    assert rows["Fashion-MNIST, TarFlow"]["bound_of_all_draws"] <= rows["Fashion-MNIST, TarFlow"]["bits_per_dim"]
    assert rows["Fashion-MNIST, TarFlow"]["steps"] > 0
