"""Data sets and dequantization."""

import pytest
import torch
from PIL import Image

from starflow import ConfigError, DataError
from starflow.data.datasets import DataConfig, ShuffledBatches, dequantize, load, to_pixels
from starflow.seeds import generator


def test_digits_are_split_by_class_without_overlap():
    train, held_out = load(DataConfig())
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.levels == 17 and train.classes == tuple("0123456789")
    image, label = train[0]
    assert image.dtype == torch.uint8 and image.shape == (1, 8, 8) and label.dtype == torch.int64
    rows = {tuple(image.flatten().tolist()) for image, _ in train} & {tuple(i.flatten().tolist()) for i, _ in held_out}
    assert not rows
    counts = torch.bincount(held_out.labels)
    assert counts.min() >= 34 and counts.max() <= 38


def test_photos_hold_out_a_strip():
    train, held_out = load(DataConfig(source="photos", size=32))
    assert train.levels == 256 and train.classes == ("china", "flower")
    assert train[0][0].shape == (3, 32, 32) and len(held_out) == 2 * (427 // 32) * 4
    _, corners, size = train.fetch.args
    assert max(column + size for _, _, column in corners) <= 640 - 128
    assert min(column for _, _, column in held_out.fetch.args[1]) >= 640 - 128


@pytest.fixture
def folder(tmp_path):
    for name, count in (("cat", 8), ("dog", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_a_folder_is_split_by_class_in_the_same_way_each_time(folder):
    config = DataConfig(source="folder", path=str(folder), size=8, held_out=0.25)
    train, held_out = load(config)
    assert train.classes == ("cat", "dog") and (len(train), len(held_out)) == (9, 3)
    assert torch.bincount(train.labels).tolist() == [6, 3]
    seen = [int(image[0, 0, 0]) for image, label in [*train, *held_out] if label == 0]
    assert sorted(seen) == list(range(8))
    assert [int(image[0, 0, 0]) for image, _ in load(config)[1]] == [int(image[0, 0, 0]) for image, _ in held_out]


def test_images_of_another_size_are_resized_on_request_only(folder):
    Image.new("L", (12, 8)).save(folder / "cat" / "wide.png")
    with pytest.raises(DataError, match=r"wide\.png: 12x8 pixels, expected 8x8; .* --set data\.resize=true"):
        list(load(DataConfig(source="folder", path=str(folder), size=8, held_out=0))[0])
    resized = DataConfig(source="folder", path=str(folder), size=4, held_out=0, resize=True)
    assert {image.shape for image, _ in load(resized)[0]} == {(3, 4, 4)}


def test_an_unreadable_image_is_named(folder):
    (folder / "cat" / "wide.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"wide\.png: not a readable image"):
        list(load(DataConfig(source="folder", path=str(folder), size=8, held_out=0))[0])


def test_missing_data_and_wrong_settings_are_named(tmp_path):
    with pytest.raises(DataError, match="no folder of images"):
        load(DataConfig(source="folder", path=str(tmp_path / "nothing")))
    with pytest.raises(DataError, match="no images in"):
        load(DataConfig(source="folder", path=str(tmp_path)))
    with pytest.raises(ConfigError, match="source='cifar'"):
        DataConfig(source="cifar")
    with pytest.raises(ConfigError, match="path"):
        DataConfig(source="folder")
    with pytest.raises(DataError, match="size=200"):
        load(DataConfig(source="photos", size=200))


def test_batches_depend_on_seed_and_step_alone():
    whole = list(ShuffledBatches(10, 3, seed=1, first=0, last=9))
    assert list(ShuffledBatches(10, 3, seed=1, first=4, last=9)) == whole[4:]
    for epoch in range(3):
        assert len({i for batch in whole[3 * epoch : 3 * epoch + 3] for i in batch}) == 9
    assert list(ShuffledBatches(10, 3, seed=2, first=0, last=9)) != whole
    assert [len(batch) for batch in ShuffledBatches(2, 5, seed=0, first=0, last=3)] == [2, 2, 2]


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_pixels_come_back_from_dequantized_images(levels):
    k = torch.arange(levels, dtype=torch.uint8)
    expected = (k.float() * (255 / (levels - 1))).round().to(torch.uint8)
    uniform = dequantize(k.repeat(50, 1), levels, 0.0, generator(0))
    assert uniform.min() >= -1 and uniform.max() <= 1
    assert torch.equal(to_pixels(uniform, levels, 0.0), expected.repeat(50, 1))
    noisy = dequantize(k.repeat(4000, 1), levels, 0.1, generator(0))
    assert (noisy.mean(0) - (k.float() / (levels - 1) * 2 - 1)).abs().max() < 0.01
    assert noisy.std(0).mean() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(to_pixels(noisy.mean(0), levels, 0.1), expected) or levels == 256
