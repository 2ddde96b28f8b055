"""Data sets and dequantization."""

import numpy as np
import pytest
import torch
from PIL import Image

from starflow import ConfigError, DataError
from starflow.data.batches import ShuffledBatches
from starflow.data.crops import read_image
from starflow.data.datasets import DataConfig, data_state, dequantize, load, to_pixels
from starflow.data.folders import relative_name
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


def paths(images) -> list:
    opened, rows = images.fetch.args[0].args
    return [opened.args[0][row] for row in rows]


def held_out_names(root, **settings) -> tuple[set[str], set[str]]:
    config = DataConfig(source="folder", path=str(root), size=8, **settings)
    return tuple({str(path.relative_to(root)) for path in paths(images)} for images in load(config))


def test_a_folder_is_split_in_the_same_way_each_time(folder):
    config = DataConfig(source="folder", path=str(folder), size=8, held_out=0.25)
    train, held_out = load(config)
    assert train.classes == ("cat", "dog")
    assert held_out_names(folder, held_out=0.25)[1] == {f"cat/{i}.png" for i in (0, 1, 3, 7)}
    seen = [int(image[0, 0, 0]) for image, label in [*train, *held_out] if label == 0]
    assert sorted(seen) == list(range(8))
    assert [int(image[0, 0, 0]) for image, _ in load(config)[1]] == [int(image[0, 0, 0]) for image, _ in held_out]


def test_whether_an_image_is_held_out_depends_on_its_name_and_the_seed_alone(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(300):
        (tmp_path / "a" / f"{i}.png").touch()
    train, held_out = held_out_names(tmp_path)
    assert 15 <= len(held_out) <= 45 and not train & held_out
    assert held_out_names(tmp_path, seed=1)[1] != held_out
    assert held_out < held_out_names(tmp_path, held_out=0.3)[1] and not held_out_names(tmp_path, held_out=0)[1]
    (tmp_path / "a" / "0.png").unlink()
    (tmp_path / "a" / "new.png").touch()
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "other.png").touch()
    train_after, held_out_after = held_out_names(tmp_path)
    assert not held_out_after & train and not train_after & held_out


def test_a_name_has_one_unicode_form_and_slashes(tmp_path):
    names = [
        "caf\u00e9/1.png",
        "cafe\u0301/1.png",
        "caf\u00e9\\1.png",
        "./caf\u00e9/x/../1.png",
        tmp_path / "caf\u00e9/1.png",
    ]
    assert {relative_name(tmp_path, name) for name in names} == {"caf\u00e9/1.png"}


def test_hidden_files_and_those_of_archives_and_drives_are_ignored(folder):
    expected = held_out_names(folder)
    for name in (
        ".git/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "@eaDir/1.png", "empty/notes.txt",
        "cat/._1.png", "cat/.ipynb_checkpoints/1.png", "cat/@eaDir/1.png/thumb.jpg", "cat/Thumbs.db", "._dog.png",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")
    assert held_out_names(folder) == expected
    assert load(DataConfig(source="folder", path=str(folder), size=8))[0].classes == ("cat", "dog")


def test_a_class_may_be_named_like_an_image_and_the_folder_be_hidden(tmp_path):
    path = tmp_path / ".data" / "x.png" / "deep" / "1.PNG"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(path)
    train, _ = load(DataConfig(source="folder", path=str(tmp_path / ".data"), size=8, held_out=0))
    assert train.classes == ("x.png",) and len(train) == 1


def test_a_broken_link_is_named(folder):
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere")
    config = DataConfig(source="folder", path=str(folder), size=8, held_out=0)
    with pytest.raises(DataError, match=r"gone\.png"):
        list(load(config)[0])
    with pytest.raises(DataError, match=r"gone\.png"):
        data_state(config)


def test_the_state_of_a_folder_follows_names_and_sizes(folder):
    config = DataConfig(source="folder", path=str(folder), size=8)
    states = [data_state(config)]
    assert states[0]["images"] == 12
    (folder / "cat" / ".DS_Store").write_bytes(b"x")
    assert data_state(config) == states[0]
    (folder / "cat" / "0.png").rename(folder / "cat" / "zero.png")
    states.append(data_state(config))
    Image.new("RGB", (9, 99)).save(folder / "dog" / "1.png")
    states.append(data_state(config))
    (folder / "metadata.jsonl").write_text("{}")
    states.append(data_state(config))
    assert len({state["digest"] for state in states}) == 4 and data_state(DataConfig()) == {}


RAMP = np.linspace(0, 65535, 64).round().reshape(8, 8)
COLORS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("suffix", "levels", "options"),
    [
        ("png", RAMP.astype(np.uint16), {}),
        ("tif", RAMP.astype(np.uint16), {}),
        ("tif", 65535 - RAMP.astype(np.uint16), {"tiffinfo": {262: 0}}),
    ],
)
def test_16_bit_levels_are_scaled(suffix, levels, options, tmp_path):
    Image.fromarray(levels).save(tmp_path / f"x.{suffix}", **options)
    assert np.array_equal(read_image(tmp_path / f"x.{suffix}", 8, False)[1].numpy(), (RAMP / 257).round())


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_pixels_without_a_known_range_are_refused(dtype, kind, tmp_path):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=rf"x\.tif: pixels are {kind}"):
        read_image(tmp_path / "x.tif", 8, False)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_opaque_images_keep_their_pixels(mode, tmp_path):
    image = Image.fromarray(COLORS).convert(mode)
    image.save(tmp_path / "x.tif")
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "x.tif", 8, False), expected)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_transparent_pixels_are_white(kind, tmp_path):
    image, options = Image.new(kind[:4] if kind != "I;16" else kind, (8, 8), 0), {}
    if kind in ("RGBA", "LA"):
        image.putalpha(0)
    else:
        options = {"transparency": (0, 0, 0) if kind == "RGB" else 0}
    image.save(tmp_path / "x.png", **options)
    assert (read_image(tmp_path / "x.png", 8, False) == 255).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 100, 255, 51)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 8, False)[:, 0, 0].tolist() == [204, 224, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_orientation_is_applied(orientation, dtype, tmp_path):
    upright = np.arange(64, dtype=dtype).reshape(8, 8) * (257 if dtype == np.uint16 else 1)
    turns = {3: 2, 6: 1, 8: 3, 5: 1, 7: 3, 4: 2}
    mirrored = upright[:, ::-1] if orientation in (2, 4, 5, 7) else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(np.rot90(mirrored, turns.get(orientation, 0)))).save(
        tmp_path / "x.png", exif=exif
    )
    assert torch.equal(read_image(tmp_path / "x.png", 8, False)[0], torch.arange(64, dtype=torch.uint8).view(8, 8))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_every_damaged_image_is_named(tmp_path):
    path = tmp_path / "x.png"
    for suffix in ("png", "jpeg", "tiff", "gif"):
        Image.fromarray(COLORS).save(path, format=suffix)
        whole = path.read_bytes()
        for position in range(0, len(whole), 5):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
            try:
                read_image(path, 8, True)
            except DataError as error:
                assert str(error).startswith(str(path))


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
