"""Cached latents: what is stored, continuing after a kill, refusing another cache, and training from them."""

import json
import multiprocessing
import shutil
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import components

from starflow import CheckpointError, ConfigError, DataError
from starflow.cli import main
from starflow.data import encode as encoding
from starflow.data.datasets import DataConfig, load
from starflow.data.encode import EncodeConfig, encode
from starflow.data.latents import EMPTY_PROMPT, CacheIndex, draw_latents
from starflow.data.prompts import encode_prompts, load_text
from starflow.models.autoencoder import load_vae, posterior, save_vae, scale_images
from starflow.seeds import generator
from starflow.training.autoencoder import AutoencoderConfig
from starflow.training.flow import FlowRunConfig, FlowTrainer

WORDS = ("a cat", "the dog")
LENGTH = components.TEXT_LEN
MODEL = {
    "image_size": 8, "image_channels": 2, "patch_size": 2, "patch_order": "hwc", "channels": 16, "layers": [1, 1],
    "head_dim": 8, "scale": "softplus", "soft_clip": 4.0, "start": True, "rotary": "interleaved",
    "sequence_order": "L2R", "condition_blocks": "last", "final_norm": True, "levels": 0, "noise_std": 0.3,
    "text_dim": components.TEXT_DIM, "text_len": LENGTH,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An autoencoder, a text encoder with its tokenizer, and a folder of images with classes."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    vae = AutoencoderConfig(block_channels=(4, 8), groups=4, latent_channels=2).build(16)
    save_vae(vae, root / "vae", 0.5)
    components.text_encoder().save_pretrained(root / "text" / "text_encoder")
    components.tokenizer().save_pretrained(root / "text" / "tokenizer")
    for label, name in enumerate(("cat", "dog")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), (20 * i, 255 * label, 0)).save(root / "images" / name / f"{i}.png")
    return root


def data_config(parts, **changes) -> DataConfig:
    fields = {"source": "folder", "path": str(parts / "images"), "size": 16, "held_out": 0.2, "class_names": WORDS}
    return DataConfig(**{**fields, "templates": ("{}", "small {}"), **changes})


def encode_config(parts, **changes) -> EncodeConfig:
    fields = {"data": data_config(parts), "vae": str(parts / "vae"), "text": str(parts / "text"), "length": LENGTH}
    return EncodeConfig(**{**fields, "rows_per_file": 3, **changes})


@pytest.fixture(scope="module")
def cache(parts):
    encode(encode_config(parts), parts / "cache", quiet=True)
    return parts / "cache"


def bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cache_holds_moments_labels_and_text_states(parts, cache):
    index = CacheIndex.load(cache)
    assert index.complete and index.counts == {"train": 16, "held_out": 4, "text": 5}
    assert (index.shape, index.scaling_factor, index.text) == ((2, 8, 8), 0.5, (LENGTH, components.TEXT_DIM))
    vae, (tokenizer, text_encoder) = load_vae(parts / "vae"), load_text(parts / "text")
    config = DataConfig(source="latents", path=str(cache), size=8)
    for images, latents in zip(load(data_config(parts)), load(config)):
        assert len(images) == len(latents) and latents.levels == 0 and latents.classes == ("cat", "dog")
        for i in range(len(images)):
            pixels, label = images[i]
            moments, stored, captions = latents[i]
            mean, std = posterior(vae, scale_images(pixels.unsqueeze(0), 256, 3))
            torch.testing.assert_close(moments, 0.5 * torch.cat([mean, std]))
            assert stored == label
            states = encode_prompts(list(images.captions(i)), tokenizer, text_encoder, LENGTH)
            torch.testing.assert_close(latents.texts.states(captions), states)
    empty = latents.texts.states(torch.tensor([EMPTY_PROMPT]))
    torch.testing.assert_close(empty, encode_prompts([""], tokenizer, text_encoder, LENGTH))


def test_a_complete_cache_is_left_alone(parts, cache):
    before = bytes_of(cache)
    report = encode(encode_config(parts), cache, quiet=True)
    assert report.written == 0 and report.found == 6 + 2 + 2 and bytes_of(cache) == before


def test_a_killed_run_is_continued(parts, cache, tmp_path, monkeypatch):
    folder, save = tmp_path / "killed", encoding.save_tensors
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "save_tensors", lambda *arguments: (save(*arguments), time.sleep(0.3)))
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=encode, args=(encode_config(parts), folder), kwargs={"quiet": True})
        child.start()
    deadline = time.monotonic() + 60
    while not (folder / "train-00001.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.join()
    with pytest.raises(DataError, match="not complete"):
        load(DataConfig(source="latents", path=str(folder), size=8))
    report = encode(encode_config(parts), folder, quiet=True)
    assert report.found >= 2 and report.written >= 1
    found = {name: content for name, content in bytes_of(folder).items() if not name.startswith(".")}
    assert found == bytes_of(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 5}, "length=12, not 5"),
        ({"text_dtype": "bfloat16"}, "text_dtype=float32, not bfloat16"),
        ({"rows_per_file": 4}, "rows_per_file=3, not 4"),
        ({"data": {"seed": 1}}, "data.seed=0, not 1"),
        ({"vae": "other"}, "made with vae="),
    ],
)
def test_a_cache_of_other_settings_is_refused(parts, cache, change, message, tmp_path):
    if "data" in change:
        change = {"data": data_config(parts, **change["data"])}
    if "vae" in change:
        save_vae(load_vae(parts / "vae"), tmp_path, 0.25)
        change = {"vae": str(tmp_path)}
    before = bytes_of(cache)
    with pytest.raises(DataError, match=message):
        encode(encode_config(parts, **change), cache, quiet=True)
    assert bytes_of(cache) == before


@pytest.mark.parametrize("section", ["files", "data"])
def test_a_cache_whose_version_recorded_less_is_refused_with_what_it_lacks(section, parts, cache, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(cache, folder)
    index = json.loads((folder / "index.json").read_text())
    if section == "files":
        del index["settings"]["files"]
    else:
        index["settings"]["data"]["mirrored"] = True
    (folder / "index.json").write_text(json.dumps(index))
    message = "another version of this package, without files" if section == "files" else "data.mirrored=True, not None"
    with pytest.raises(DataError, match=message):
        encode(encode_config(parts), folder, quiet=True)


@pytest.fixture
def changed(parts):
    """A folder in which one image was replaced by another, and back."""
    image, other = parts / "images" / "cat" / "0.png", parts / "images" / "cat" / "x.png"
    image.rename(other)
    yield parts
    other.rename(image)


def test_a_cache_of_other_files_is_refused(cache, changed):
    with pytest.raises(DataError, match=r"made with files\.digest="):
        encode(encode_config(changed), cache, quiet=True)


def test_a_run_resumes_on_the_same_files_only(parts, cache, tmp_path):
    shutil.copytree(parts / "images", tmp_path / "images")
    shutil.copytree(cache, tmp_path / "cache")
    images = {"source": "folder", "path": str(tmp_path / "images"), "size": 16}
    model = {"image_channels": 3, "image_size": 16, "levels": 256, "text_dim": 0, "text_len": 0}
    model |= {"num_classes": 2, "condition_blocks": "all"}
    settings = {**run_config(tmp_path / "cache", sample_every=0).to_dict(), "model": {**MODEL, **model}, "data": images}
    train(FlowRunConfig.from_dict(settings), tmp_path / "pixels")
    train(run_config(tmp_path / "cache"), tmp_path / "latents")
    for name in ("pixels", "latents"):
        assert FlowTrainer.resume(tmp_path / name).step == 6
    (tmp_path / "images" / "cat" / "0.png").unlink()
    index = tmp_path / "cache" / "index.json"
    index.write_text(index.read_text() + "\n")
    with pytest.raises(DataError, match=r"images: the data changed since .*'images': 20, .*'images': 19, ") as error:
        FlowTrainer.resume(tmp_path / "pixels")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="cache: the data changed since the run began"):
        FlowTrainer.resume(tmp_path / "latents")


def test_a_folder_without_a_cache_is_refused(parts, tmp_path):
    config = DataConfig(source="latents", path=str(tmp_path), size=8)
    with pytest.raises(DataError, match="no cached latents"):
        load(config)
    (tmp_path / "index.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="not an index"):
        load(config)
    (tmp_path / "index.json").unlink()
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="something else"):
        encode(encode_config(parts), tmp_path, quiet=True)
    with pytest.raises(CheckpointError, match="no text encoder"):
        encode(encode_config(parts, text=str(tmp_path)), tmp_path / "new", quiet=True)


def test_missing_and_damaged_files_are_named(parts, tmp_path):
    encode(encode_config(parts), tmp_path, quiet=True)
    config = DataConfig(source="latents", path=str(tmp_path), size=8)
    with pytest.raises(DataError, match=r"8x8 pixels, but data\.size=4"):
        load(DataConfig(source="latents", path=str(tmp_path), size=4))
    (tmp_path / "train-00002.safetensors").write_bytes(b"damage")
    with pytest.raises(DataError, match=r"train-00002\.safetensors is damaged"):
        load(config)
    (tmp_path / "train-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"train-00002\.safetensors is missing"):
        load(config)
    assert encode(encode_config(parts), tmp_path, quiet=True).written == 1
    load(config)


def test_draws_have_the_variance_of_posterior_and_noise():
    moments = torch.stack([torch.full((20000, 1, 2, 2), 3.0), torch.full((20000, 1, 2, 2), 0.4)], dim=1)
    z = draw_latents(moments, 0.3, generator(0))
    assert z.mean() == pytest.approx(3, abs=0.01) and z.std() == pytest.approx(0.5, rel=0.01)


def run_config(cache, model=None, **training) -> FlowRunConfig:
    loop = {"steps": 6, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_every": 0, "log_every": 1, **training}
    return FlowRunConfig.from_dict(
        {
            "model": {**MODEL, **(model or {})},
            "data": {"source": "latents", "path": str(cache), "size": 8},
            "training": loop,
        }
    )


def train(config: FlowRunConfig, folder) -> FlowTrainer:
    trainer = FlowTrainer(config, folder)
    trainer.run(quiet=True)
    return trainer


def test_defaults_of_torch_do_not_change_a_run(cache, tmp_path, hostile):
    expected = train(run_config(cache, steps=2), tmp_path / "expected")
    hostile()
    found = train(run_config(cache, steps=2), tmp_path / "found")
    assert found.metrics == expected.metrics


@pytest.mark.parametrize("model", [{}, {"text_dim": 0, "text_len": 0, "num_classes": 2, "condition_blocks": "all"}])
def test_a_flow_learns_from_latents(cache, model, tmp_path):
    trainer = train(run_config(cache, model, steps=40), tmp_path)
    losses = [m["loss"] for m in trainer.metrics]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not (tmp_path / "samples").exists()


def test_resume_repeats_an_uninterrupted_run(cache, tmp_path):
    train(run_config(cache, label_drop=0.5), tmp_path / "whole")
    part = FlowTrainer(run_config(cache, label_drop=0.5), tmp_path / "part")
    step = part.train_step

    def interrupted(*batch):
        if part.step == 3:
            raise KeyboardInterrupt
        return step(*batch)

    part.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        part.run(quiet=True)
    FlowTrainer.resume(tmp_path / "part").run(quiet=True)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_dropped_captions_are_the_empty_prompt(cache, drop, tmp_path):
    trainer = FlowTrainer(run_config(cache, label_drop=drop), tmp_path)
    batch = [torch.stack(column) for column in zip(*(trainer.images[i] for i in range(8)))]
    _, labels, text = trainer.conditions(batch, generator(0))
    empty = trainer.images.texts.states(torch.zeros(8, dtype=torch.int64))
    own = [trainer.images.texts.states(rows) for rows in batch[2]]
    assert labels is None
    assert (
        torch.equal(text, empty) if drop else all((row == states).all((1, 2)).any() for row, states in zip(text, own))
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"levels": 256}, "levels=256"),
        ({"image_channels": 4}, "image_channels=4"),
        ({"text_len": 5}, "text_len=5"),
        ({"text_dim": 4}, "text_dim=4"),
    ],
)
def test_a_model_that_does_not_fit_the_latents_is_refused(cache, model, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        FlowTrainer(run_config(cache, model), tmp_path)


def test_a_text_model_needs_a_cache_with_text(parts, tmp_path):
    encode(encode_config(parts, text=""), tmp_path / "cache", quiet=True)
    with pytest.raises(ConfigError, match="has no text"):
        FlowTrainer(run_config(tmp_path / "cache"), tmp_path)


def test_the_command_fills_a_cache_once(parts, tmp_path, capsys):
    settings = tmp_path / "data.yaml"
    settings.write_text(f"data: {{source: folder, path: {parts / 'images'}, size: 16}}")
    arguments = ["encode", "--vae", str(parts / "vae"), "--config", str(settings), "--out", str(tmp_path / "cache")]
    arguments += ["--quiet", "--text", str(parts / "text"), "--length", str(LENGTH)]
    assert main(arguments) == 0 and "2 held-out" in capsys.readouterr().out
    assert main(arguments) == 0 and "already complete" in capsys.readouterr().out
    assert main([*arguments, "--set", "data.seed=3"]) == 2
    assert "data.seed=0, not 3" in capsys.readouterr().err


def test_unknown_words_of_all_captions_are_named_once(parts, tmp_path):
    config = encode_config(parts, data=data_config(parts, class_names=("a café", "the 犬")))
    with pytest.warns(UserWarning) as caught:
        encode(config, tmp_path, batch_size=1, quiet=True)
    warned = [str(each.message) for each in caught if each.category is UserWarning]
    assert warned == ["the text encoder does not know 'café', '犬'"]


def test_pixel_commands_refuse_a_flow_on_latents(cache, tmp_path, capsys):
    train(run_config(cache), tmp_path / "run")
    for command in (["sample", "--out", str(tmp_path / "drawn")], ["eval"]):
        assert main([*command, "--checkpoint", str(tmp_path / "run")]) == 2
        assert "latents" in capsys.readouterr().err


def test_captions_come_from_a_metadata_file(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    config = DataConfig(source="folder", path=str(tmp_path), size=8, held_out=0)
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    images, _ = load(config)
    assert [images.captions(i) for i in range(3)] == [(f"number {int(image[0, 0, 0])}",) for image, _ in images]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(DataError, match=r"no line for 2\.png"):
        load(config)
    (tmp_path / "metadata.jsonl").write_text(lines[0] + '\n{"file_name": "1.png"}')
    with pytest.raises(DataError, match="line 2"):
        load(config)


@pytest.mark.parametrize("text", ["a\u2028cat", "a\u0085cat", "a\x0ccat", "a\ncat", "", " caf\u00e9 "])
@pytest.mark.parametrize("encoding_name", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n \n"])
def test_lines_of_metadata_end_at_line_feeds_alone(tmp_path, text, encoding_name, end):
    lines = []
    for name in ("cafe\u0301.png", "sub/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name, caption in (("./caf\u00e9.png", text), ("sub\\2.png", "a dog")):
        # A form feed must be escaped in JSON.
        lines.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii="\x0c" in caption))
    (tmp_path / "metadata.jsonl").write_bytes((end.join(lines) + end).encode(encoding_name))
    images, _ = load(DataConfig(source="folder", path=str(tmp_path), size=8, held_out=0))
    assert sorted(images.captions(i) for i in range(2)) == sorted([(text,), ("a dog",)])


def test_wrong_metadata_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    config = DataConfig(source="folder", path=str(tmp_path), size=8)
    for content in (b'{"file_name": 1, "text": "a"}', b'\n["a"]', b'{"file_name": "1.png", "text": null}', b"x"):
        (tmp_path / "metadata.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="expected JSON"):
            load(config)
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "1.png", "text": "a"}'.encode("utf-16"))
    with pytest.raises(DataError, match=r"metadata\.jsonl: 'utf-8' codec"):
        load(config)


def test_scaled_digits_keep_their_split_and_have_captions():
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    scaled = load(DataConfig(size=64, class_names=names, templates=("{}", "the digit {}")))
    for small, large in zip(load(DataConfig()), scaled):
        assert torch.equal(small.labels, large.labels) and large.levels == 256
        image = large[0][0]
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        cells = torch.nn.functional.avg_pool2d(image[:1].float(), 8) * 16 / 255
        correlation = torch.corrcoef(torch.stack([cells.flatten(), small[0][0].float().flatten()]))[0, 1]
        assert correlation > 0.95
        name = names[int(large.labels[0])]
        assert large.captions(0) == (name, f"the digit {name}")
    with pytest.raises(ConfigError, match="9 class_names"):
        load(DataConfig(class_names=names[:9]))
    with pytest.raises(ConfigError, match="templates"):
        DataConfig(templates=("digit",))
