"""Images in tar files and tables: they are split, captioned, ordered and resumed as those of a folder are."""

import io
import json
import sys
import tarfile

import pytest
import torch
from PIL import Image

from starflow import ConfigError, DataError
from starflow.data.datasets import DataConfig, data_state, load
from starflow.data.tables import TableImages
from starflow.errors import ImageError
from starflow.training.flow import FlowRunConfig, FlowTrainer

MODEL = {"image_size": 8, "image_channels": 3, "patch_size": 4, "channels": 16, "layers": [1, 1], "head_dim": 8}


def png(level: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (level, 0, 0)).save(file, format="PNG")
    return file.getvalue()


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def parts(i: int) -> dict[str, bytes]:
    return {"png": png(i), "cls": str(i % 2).encode(), "txt": f"image {i}\n".encode()}


def levels(images) -> list[int]:
    return [int(image[0, 0, 0]) for image, _ in images]


@pytest.fixture
def tars(tmp_path):
    """Three tar files with four samples each, of two classes, with captions."""
    for t in range(3):
        members = {}
        for i in range(4 * t, 4 * t + 4):
            members |= {f"part/{i:03d}.{suffix}": data for suffix, data in parts(i).items()}
        write_tar(tmp_path / f"{t}.tar", members)
    return tmp_path


def tar_config(path, **settings) -> DataConfig:
    return DataConfig(**{"source": "webdataset", "path": str(path), "size": 8, "held_out": 0.0, **settings})


def test_samples_of_tar_files_have_images_classes_and_captions(tars):
    train, held_out = load(tar_config(tars))
    assert len(train) == 12 and not len(held_out) and train.classes == ("0", "1")
    assert levels(train) == list(range(12)) and train.labels.tolist() == [0, 1] * 6
    assert [train.captions(i) for i in (0, 11)] == [("image 0",), ("image 11",)]
    assert len(load(tar_config(tars / "1.tar"))[0]) == 4


def test_tar_files_of_the_library_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(7):
            image = Image.new("RGB", (8, 8), (i, 0, 0))
            writer.write({"__key__": f"{i:04d}", "png": image, "cls": i % 3, "json": {"caption": f"no. {i}"}})
    train, _ = load(tar_config(tmp_path))
    assert levels(train) == list(range(7)) and train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert train.captions(5) == ("no. 5",)


def test_fields_of_json_take_the_place_of_members(tmp_path):
    fields = {"label": 1, "caption": "a dog"}
    write_tar(tmp_path / "a.tar", {"x.jpg": png(3), "x.json": json.dumps(fields).encode(), "__notes__.txt": b"?"})
    train, _ = load(tar_config(tmp_path, class_names=["cat", "dog"]))
    assert train.labels.tolist() == [1] and train.captions(0) == ("a dog",)


def test_without_captions_the_names_of_the_classes_are_used(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": png(0), "x.cls": b"0", "y.png": png(1), "y.cls": b"1"})
    train, _ = load(tar_config(tmp_path, class_names=["cat", "dog"], templates=["a {}"]))
    assert [train.captions(i) for i in range(2)] == [("a cat",), ("a dog",)]


def test_held_out_samples_stay_when_a_tar_file_is_added(tars):
    before = set(levels(load(tar_config(tars, held_out=0.4))[1]))
    write_tar(tars / "0a.tar", {f"{i}.png": png(i) for i in range(100, 110)})
    with pytest.raises(DataError, match="22 images, of which 12 have a class: expected all or none"):
        load(tar_config(tars))
    (tars / "0a.tar").unlink()
    added = {f"{i}.{suffix}": data for i in range(100, 110) for suffix, data in parts(i).items()}
    write_tar(tars / "0a.tar", added)
    after = set(levels(load(tar_config(tars, held_out=0.4))[1]))
    assert before and {level for level in after if level < 100} == before


def test_the_state_of_tar_files_follows_names_and_sizes(tars):
    states = [data_state(tar_config(tars))]
    assert states[0]["tars"] == 3
    (tars / "2.tar").rename(tars / "3.tar")
    states.append(data_state(tar_config(tars)))
    write_tar(tars / "3.tar", {"x.png": png(0)})
    states.append(data_state(tar_config(tars)))
    assert len({state["digest"] for state in states}) == 3


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x.txt": b"a"}, r"a\.tar/x: a sample without an image; its members are txt"),
        ({"x.png": png(0), "x.cls": b"cat"}, "class 'cat' is not an integer"),
        ({"x.png": png(0), "x.cls": b"1048576"}, r"a\.tar/x: class '1048576' is not an integer from 0 to 1048575"),
        ({"x.png": png(0), "x.cls": b"9" * 5000}, r"a\.tar/x: class '9+\.\.\.9+' is not an integer"),
        ({"x.png": png(0), "x.json": b'{"label": 1048576}'}, r"a\.tar/x: class 1048576 is not an integer"),
        ({"x.png": png(0), "x.json": b"{"}, r"a\.tar/x\.json"),
        ({"x.png": png(0), "x.json": b'{"caption": ["a", "b"]}'}, r"a\.tar/x\.json: the caption is a list"),
        ({"x.png": png(0), "x.json": rb'{"caption": "a \ud83d"}'}, r"a\.tar/x\.json: the caption has half of a"),
        ({}, "no images in the tar files"),
    ],
)
def test_wrong_samples_are_named(members, message, tmp_path):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=f"{tmp_path}.*{message}"):
        load(tar_config(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x.png", "y.png", "x.png", "y.png"], r"a\.tar/x: two samples of this key"),
        (["part/x.png", "part/y.png", "part/x.cls"], r"a\.tar/part/x: two samples of this key"),
        (["x.png", "x.png"], r"a\.tar/x\.png: two members of this name"),
    ],
)
def test_a_sample_that_comes_twice_in_a_tar_file_is_named(names, message, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(png(0))
            tar.addfile(info, io.BytesIO(png(0)))
    with pytest.raises(DataError, match=f"{tmp_path}/{message}"):
        load(tar_config(tmp_path))


def test_a_key_may_come_in_several_tar_files(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, {"x.png": png(0)})
    assert len(load(tar_config(tmp_path))[0]) == 2


def test_a_broken_image_is_named_by_tar_file_and_key(tmp_path):
    write_tar(tmp_path / "a.tar", {"part/x.png": b"no image", "part/x.txt": b"\xff"})
    train, _ = load(tar_config(tmp_path))
    with pytest.raises(ImageError, match=rf"^{tmp_path}/a\.tar/part/x: not a readable image \(unknown format") as error:
        train[0]
    assert "object at" not in str(error.value)
    with pytest.raises(DataError, match=rf"^{tmp_path}/a\.tar/part/x: .* can't decode byte 0xff"):
        train.captions(0)


def test_a_broken_image_of_a_table_is_named_by_path_and_row(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    values = [{"bytes": b"no image", "path": None}, {"bytes": None, "path": str(tmp_path / "x.png")}, None]
    images = TableImages([{"image": value} for value in values], "image", "", "saved/one")
    for row, message in enumerate((": not a readable", rf" \({tmp_path}/x\.png\): not a readable", ": no image")):
        with pytest.raises(ImageError, match=rf"^saved/one\[{row}\]{message}") as error:
            images(row)
        assert "object at" not in str(error.value)


def test_the_message_without_the_package_datasets_names_the_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"^saved/one: source 'huggingface' needs datasets"):
        load(table_config("saved/one"))


def test_wrong_tar_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no tar files at"):
        load(tar_config(tmp_path))
    with pytest.raises(DataError, match="no tar files at"):
        load(tar_config(tmp_path / "nothing"))
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"a\.tar: not an uncompressed tar file"):
        load(tar_config(tmp_path))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("damage", ["flipped header", "cut header", "no end", "cut data", "zeros", "joined"])
def test_a_damaged_tar_file_is_not_read_as_a_shorter_one(damage, format, tmp_path):
    path = tmp_path / "a.tar"
    # Long names have headers of their own in front of the header of the member.
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(6):
            info = tarfile.TarInfo(f"{'long' * 30}/{i}.png")
            info.size = len(png(i))
            tar.addfile(info, io.BytesIO(png(i)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        places = [(info.offset, info.offset_data) for info in tar]
    (start, data), end = places[3], places[5][1] + 512
    damaged, byte = {
        "flipped header": (whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :], start),
        "cut header": (whole[: start + 100], start),
        "no end": (whole[:start], start),
        "cut data": (whole[: data + 20], data + 20),
        "zeros": (whole[:start] + bytes(512) + whole[start + 512 :], start),
        "joined": (whole + whole, end),
    }[damage]
    assert len(load(tar_config(tmp_path))[0]) == 6
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{path}: .* at byte {byte}\b"):
        load(tar_config(tmp_path))


def run_config(data: DataConfig, **training) -> FlowRunConfig:
    training = {"steps": 6, "batch_size": 4, "sample_every": 0, "checkpoint_every": 0, "log_every": 1, **training}
    settings = {name: getattr(data, name) for name in ("source", "path", "size", "held_out", "flip")}
    return FlowRunConfig.from_dict({"model": MODEL, "data": settings, "training": training})


def test_a_resumed_run_on_tar_files_repeats_an_uninterrupted_one(tars, tmp_path):
    config = run_config(tar_config(tars, flip=True), workers=1)
    whole, part = FlowTrainer(config, tmp_path / "whole"), FlowTrainer(config, tmp_path / "part")
    whole.run(quiet=True)
    step = part.train_step

    def interrupted(*batch):
        if part.step == 4:
            raise KeyboardInterrupt
        return step(*batch)

    part.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        part.run(quiet=True)
    resumed = FlowTrainer.resume(tmp_path / "part")
    resumed.run(quiet=True)
    assert [m["loss"] for m in resumed.metrics] == [m["loss"] for m in whole.metrics]
    write_tar(tars / "9.tar", {"x.png": png(0), "x.cls": b"0", "x.txt": b""})
    with pytest.raises(DataError, match="the data changed since the run began"):
        FlowTrainer.resume(tmp_path / "part")


@pytest.fixture
def table(tmp_path):
    """Folder of a data set of the package datasets with six images, classes and captions."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"]), "text": datasets.Value("string")}
        | {"large": datasets.Value("int64")}
    )
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(6)],
        "kind": [i % 2 for i in range(6)],
        "text": [f"image {i}" for i in range(6)],
        "large": [0, 1, 2, 3, 4, 1048576],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "small": made.select(range(2))}).save_to_disk(str(tmp_path / "several"))
    return tmp_path


def table_config(path, **settings) -> DataConfig:
    return DataConfig(**{"source": "huggingface", "path": str(path), "size": 8, "held_out": 0.0, **settings})


def test_rows_of_a_table_have_images_classes_and_captions(table):
    train, _ = load(table_config(table / "one", label_column="kind", caption_column="text"))
    assert levels(train) == list(range(6)) and train.labels.tolist() == [0, 1] * 3
    assert train.classes == ("cat", "dog") and train.captions(5) == ("image 5",)
    plain, _ = load(table_config(table / "several", split="small"))
    assert levels(plain) == [0, 1] and plain.classes == ("several",)


def test_the_state_of_a_table_follows_its_files(table):
    one, several = data_state(table_config(table / "one")), data_state(table_config(table / "several", split="small"))
    assert one["images"] == 6 and several["images"] == 2 and one["digest"] != several["digest"]
    assert data_state(table_config(table / "one")) == one


def test_wrong_tables_and_columns_are_named(table, tmp_path):
    with pytest.raises(ConfigError, match=r"label_column='sort': .* has the columns image, kind, text, large"):
        load(table_config(table / "one", label_column="sort"))
    with pytest.raises(DataError, match=r"one\[0\]: text='image 0' is not a class"):
        load(table_config(table / "one", label_column="text"))
    with pytest.raises(DataError, match=r"one\[5\]: large=1048576 is not a class, an integer from 0 to 1048575"):
        load(table_config(table / "one", label_column="large"))
    with pytest.raises(DataError, match="not a data set that the package datasets reads"):
        load(table_config(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "webdataset"}, "path=''"),
        ({"source": "digits", "path": "x"}, "path='x'"),
        ({"source": "digits", "flip": True}, "flip goes with source 'emoji' or 'folder' or"),
        ({"source": "folder", "path": "x", "label_column": "y"}, "label_column goes with source 'huggingface'"),
        ({"source": "folder", "path": "x", "crop": "random"}, "crop='random': needs resize=true"),
        ({"source": "folder", "path": "x", "crop": "left"}, "crop='left': expected one of center, random"),
    ],
)
def test_settings_of_another_source_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_every_tar_sample_is_read_once_per_epoch(tars):
    config = run_config(tar_config(tars))
    trainer, seen = FlowTrainer(config, tars / "run"), []
    trainer.train_step = lambda random, images, labels: seen.append(images[:, 0, 0, 0]) or {"loss": 0.0}
    trainer.run(quiet=True)
    first, second = torch.cat(seen[:3]).tolist(), torch.cat(seen[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
