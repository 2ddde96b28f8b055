"""Reading of training data: crops, mirror images, and images that cannot be read."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support import workers
from support.entries import entries

from starflow import DataError
from starflow.data.batches import ShuffledBatches
from starflow.data.crops import fetch_image, read_image, vary_image
from starflow.data.datasets import DataConfig, load, mirrored
from starflow.data.encode import EncodeConfig
from starflow.data.reading import PREFETCH, Reader, loader_options, readable_row, training_batches
from starflow.errors import ConfigError, ImageError
from starflow.seeds import generator
from starflow.training.flow import FlowRunConfig, FlowTrainer

RAMP = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (40, 60, 3))


@pytest.fixture
def folder(tmp_path):
    """Folder with twelve images of one class, whose pixels are the numbers 0 to 11."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / "a" / f"{i:02d}.png")
    return tmp_path / "images"


def config(folder, **settings) -> DataConfig:
    return DataConfig(**{"source": "folder", "path": str(folder), "size": 8, "held_out": 0.0, **settings})


def spoil(folder, *numbers: int) -> None:
    for number in numbers:
        (folder / "a" / f"{number:02d}.png").write_bytes(b"no image")


def read(folder, workers: int = 0, steps: int = 6, first: int = 0, **settings) -> tuple[list, dict]:
    images, broken = load(config(folder, **settings))[0], {}
    order = ShuffledBatches(len(images), 4, seed=0, first=first, last=steps)
    return [batch[0] for batch in training_batches(images, order, workers, "cpu", broken)], broken


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_takes_the_place_of_one_that_cannot_be_read(folder, workers):
    whole = [batch[:, 0, 0, 0].tolist() for batch in read(folder)[0]]
    spoil(folder, 3, 4, 11)
    with pytest.warns(UserWarning, match="not a readable image") as warned:
        batches, broken = read(folder, workers)
    replaced = {3: 5, 4: 5, 11: 0}
    assert [b[:, 0, 0, 0].tolist() for b in batches] == [[replaced.get(i, i) for i in batch] for batch in whole]
    assert broken.keys() == replaced.keys()
    names = [str(w.message).split(":")[0].rpartition("/")[2] for w in warned if "readable" in str(w.message)]
    assert sorted(names) == ["03.png", "04.png", "11.png"]


def test_outside_of_training_an_image_that_cannot_be_read_is_an_error(folder):
    spoil(folder, 3)
    images, _ = load(config(folder))
    with pytest.raises(ImageError, match=r"03\.png: not a readable image"):
        list(images)
    assert readable_row(images, 3)[0][0, 0, 0] == 4


def test_images_of_another_size_are_not_taken_for_broken_ones(folder):
    Image.new("RGB", (9, 9)).save(folder / "a" / "03.png")
    with pytest.raises(DataError, match="9x9 pixels, expected 8x8"):
        read(folder)


def test_a_data_set_without_a_readable_image_is_an_error(folder):
    spoil(folder, *range(12))
    with pytest.raises(DataError, match="none of the 12 images can be read"):
        Reader(load(config(folder))[0])[0, 5]


def run_settings(folder) -> dict:
    model = {"image_size": 8, "image_channels": 3, "patch_size": 4, "channels": 16, "layers": [1], "head_dim": 8}
    training = {"steps": 6, "batch_size": 4, "sample_every": 0, "checkpoint_every": 3, "log_every": 1}
    data = {"source": "folder", "path": str(folder), "size": 8, "held_out": 0.0, "flip": True}
    return {"model": model, "data": data, "training": training}


def test_a_run_goes_on_and_counts_images_that_cannot_be_read(folder, tmp_path):
    spoil(folder, 0, 7)
    trainer = FlowTrainer(FlowRunConfig.from_dict(run_settings(folder)), tmp_path / "r")
    with pytest.warns(UserWarning, match="training takes another image in its place"):
        trainer.run(quiet=True)
    counts = [m["broken_images"] for m in trainer.metrics]
    assert counts == sorted(counts) and counts[-1] == 2 and trainer.step == 6
    assert FlowTrainer.resume(tmp_path / "r").broken.keys() == {0, 7}


def test_processes_share_the_images_and_count_those_that_cannot_be_read(folder, tmp_path):
    spoil(folder, 0, 7)
    settings = run_settings(folder)
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    arguments = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "r"), "--quiet"]
    codes, outputs = workers.run(tmp_path, 2, *arguments)
    assert codes == [0, 0], outputs
    assert entries(tmp_path / "r")[-1]["broken_images"] == 2
    with pytest.warns(UserWarning, match="training takes another image in its place"):
        alone = FlowTrainer(FlowRunConfig.from_dict(settings), tmp_path / "alone")
        alone.run(quiet=True)
    together = [row["loss"] for row in entries(tmp_path / "r")]
    assert [m["loss"] for m in alone.metrics] == pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_warns_once_of_too_many_workers(rank, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    settings = run_settings(folder)
    settings["training"] |= {"steps": 1, "workers": 2}
    trainer = FlowTrainer(FlowRunConfig.from_dict(settings), tmp_path / "r")
    trainer.team.rank = rank
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.run(quiet=True)
    assert sum("2 worker processes in total" in str(warning.message) for warning in found) == 1 - rank


def test_variants_depend_on_seed_step_and_index_alone(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(8):
        Image.fromarray(np.roll(RAMP, i, 1)).save(tmp_path / "a" / f"{i}.png")
    options = {"size": 16, "resize": True, "crop": "random", "flip": True}
    whole = torch.stack(read(tmp_path, **options)[0])
    assert torch.equal(torch.stack(read(tmp_path, workers=2, **options)[0]), whole)
    assert torch.equal(torch.stack(read(tmp_path, first=2, **options)[0]), whole[2:])
    images = load(config(tmp_path, **options))[0]
    assert not torch.equal(Reader(images, 0)[0, 3][0][0], Reader(images, 0)[1, 3][0][0])
    assert not torch.equal(Reader(images, 0)[0, 3][0][0], Reader(images, 1)[0, 3][0][0])
    assert torch.equal(images[3][0], read_image(tmp_path / "a" / "3.png", 16, True))


def opened(index: int) -> tuple[Image.Image, str]:
    return Image.fromarray(RAMP), "ramp"


def test_half_of_the_images_are_mirrored():
    plain = fetch_image(opened, 20, True, 0)
    variants = [vary_image(opened, 20, True, "center", True, 0, generator(i)) for i in range(200)]
    mirrored = sum(torch.equal(variant, plain.flip(2)) for variant in variants)
    assert all(torch.equal(v, plain) or torch.equal(v, plain.flip(2)) for v in variants)
    assert 75 <= mirrored <= 125


def test_a_center_crop_halves_by_means_and_keeps_the_center():
    image = fetch_image(opened, 20, True, 0).float()
    # 60x40 pixels are halved to 30x20, of which columns 5 to 24 are the center.
    expected = torch.from_numpy(RAMP[0, :, 0].astype(np.float32)).view(30, 2).mean(1)[5:25]
    assert image.shape == (3, 20, 20) and (image[0, 7] - expected).abs().max() <= 1


def test_random_crops_have_different_places_and_scales():
    variants = [vary_image(opened, 20, True, "random", False, 0, generator(i))[0, 0].int() for i in range(200)]
    slopes = {int(v[-1] - v[0]) for v in variants}
    assert len({int(v[0]) for v in variants}) > 20
    # A crop of 80 % to 100 % of the 40 rows spans 32 to 40 of the columns, which differ by 4 levels.
    assert min(slopes) >= 4 * 29 and max(slopes) <= 4 * 40 and len(slopes) >= 5


def test_encoding_mirrors_each_image_and_takes_the_center(folder):
    images = mirrored(load(config(folder, flip=True))[0])
    assert len(images) == 24 and images.vary is None
    assert torch.equal(images[6][0], images[7][0].flip(2)) and images.captions(7) == images.captions(6) == ("a",)
    with pytest.raises(ConfigError, match="an image is encoded once"):
        EncodeConfig(config(folder, crop="random", resize=True), vae="x")


def test_for_a_gpu_workers_read_ahead_into_pinned_memory():
    assert loader_options(2, "cuda:1") == {"num_workers": 2, "pin_memory": True, "prefetch_factor": PREFETCH}
    assert loader_options(0, "cuda") == {"num_workers": 0, "pin_memory": True}
    assert loader_options(2, "cpu") == {"num_workers": 2}
