"""Weight files: the Hugging Face layout, strict, and one tensor at a time in memory."""

import json
import os
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starflow import CheckpointError, Flow, FlowConfig, StarflowError
from starflow.io.files import write_folder
from starflow.io.weights import Entry, read_weights, write_weights

INDEX = "model.safetensors.index.json"
FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


def entries(state: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in state.items()]


@pytest.fixture
def sharded(tmp_path):
    """A flow, and its folder with the weights in three files."""
    flow = Flow(FlowConfig(image_size=4, image_channels=1, patch_size=2, channels=16, layers=(1, 1), head_dim=8))
    flow.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    size = sum(t.nbytes for t in flow.state_dict().values())
    files = write_weights(tmp_path, entries(flow.state_dict()), size // 3 + 2000)
    assert files == [FIRST, "model-00002-of-00003.safetensors", LAST, INDEX]
    return flow, tmp_path


def test_round_trip(sharded):
    flow, folder = sharded
    again = Flow.from_pretrained(folder)
    assert all(torch.equal(t, flow.state_dict()[n]) for n, t in again.state_dict().items())


def test_files_are_those_of_safetensors(tmp_path):
    """Mixed dtypes, a scalar and an empty tensor, as the library itself reads and writes them."""
    state = {
        "half": torch.randn(3).bfloat16(), "scalar": torch.tensor(2.5), "double": torch.randn(2, 2).double(),
        "empty": torch.zeros(0, 4), "odd": torch.randn(5).half(), "ümlaut": torch.randn(2, 3, 4).mT,
    }  # fmt: skip
    assert write_weights(tmp_path, entries(state)) == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in state.items())
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "theirs").stat().st_size == (tmp_path / "model.safetensors").stat().st_size
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_larger_than_a_weight_file(tmp_path):
    state = {"small": torch.zeros(2), "large": torch.zeros(100), "after": torch.zeros(2)}
    files = write_weights(tmp_path, entries(state), 64)
    assert [sorted(load_file(tmp_path / f)) for f in files[:-1]] == [["small"], ["large"], ["after"]]
    assert read_weights(tmp_path).keys() == state.keys()


def test_one_tensor_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def load() -> torch.Tensor:
        assert not any(reference() is not None for reference in alive)
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    write_weights(tmp_path, [Entry(str(i), (1000,), torch.float32, load) for i in range(10)], 9000)
    assert len(alive) == 10


def edit(folder, change):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(index)))


def set_map(name, file):
    return lambda index: {**index, "weight_map": {**index["weight_map"], name: file}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / LAST).unlink(), f"lacks the weight file {LAST}"),
        (lambda f: (f / LAST).write_bytes((f / LAST).read_bytes()[:-4]), LAST),
        (lambda f: (f / LAST).write_bytes(b""), LAST),
        (lambda f: (f / LAST).write_bytes((f / FIRST).read_bytes()), f"{LAST} does not fit"),
        (lambda f: (f / INDEX).write_text("{"), "not an index"),
        (lambda f: (f / INDEX).write_text("[]"), "not an index"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), "not an index"),
        (lambda f: edit(f, set_map("x", "../x.safetensors")), "not the name of a weight file"),
        (lambda f: edit(f, set_map("x", "/etc/passwd")), "not the name of a weight file"),
        (lambda f: edit(f, set_map("x", LAST)), f"{LAST} does not fit .*: x is in only one"),
        (lambda f: edit(f, set_map("blocks.0.proj_in.weight", LAST)), "does not fit"),
        (lambda f: edit(f, lambda index: {**index, "metadata": {"total_size": 1}}), "total_size is 1"),
        (lambda f: edit(f, lambda index: {"weight_map": {}}), "lacks weights"),
        (lambda f: (f / INDEX).unlink(), r"model\.safetensors"),
    ],
)
def test_damage(sharded, damage, message):
    _, folder = sharded
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        Flow.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_folders_are_whole_or_absent(tmp_path):
    target = tmp_path / "made" / "for" / "this"
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises((StarflowError, KeyboardInterrupt)), write_folder(target) as folder:
            (folder / "half").write_text("half")
            raise error
        assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        with write_folder(target, overwrite=text == "new") as folder:
            (folder / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["new"] and list(target.parent.iterdir()) == [target]
    with pytest.raises(StarflowError, match="exists already"), write_folder(target):
        raise AssertionError
    with pytest.raises(ZeroDivisionError), write_folder(target, overwrite=True):
        raise ZeroDivisionError
    assert (target / "new").read_text() == "new"


def spoil(path) -> None:
    """Overwrite the second half of a file in place."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


def test_a_file_that_changes_later_does_not_change_the_flow(sharded):
    _, folder = sharded
    flow = Flow.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    for path in folder.glob("*.safetensors"):
        spoil(path)
        os.truncate(path, 100)
    assert all(torch.equal(tensor, before[name]) for name, tensor in flow.state_dict().items())


def test_a_file_is_mapped_on_request(sharded):
    _, folder = sharded
    flow = Flow.from_pretrained(folder, mmap=True)
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    spoil(folder / LAST)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in flow.state_dict().items())
