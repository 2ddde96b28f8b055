"""Errors of conversion: one line that says what is wrong, and nothing is left behind."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml
from support.commands import fails
from support.upstream import STARFLOW, TARFLOW, make

from starflow import CheckpointError, ConfigError, Flow, StarflowError
from starflow.convert import convert, export_upstream, names


def refused(message: str, path, out, **options) -> str:
    """Conversion fails with the message in one line and leaves nothing but the source."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(StarflowError, match=message) as error:
        convert(path, out, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert sorted(out.parent.rglob("*")) == before
    return str(error.value)


def test_only_a_folder_of_a_conversion_is_overwritten(tarflow):
    path, _, out = tarflow
    convert(path, out)
    refused("exists already", path, out)
    convert(path, out, overwrite=True, dtype=torch.bfloat16)
    assert next(Flow.from_pretrained(out).parameters()).dtype == torch.bfloat16
    (out / "notes.txt").write_text("mine")
    refused("holds other files", path, out, overwrite=True)
    refused("holds other files", path, path.parent, overwrite=True)
    refused("holds other files", path, path, overwrite=True)
    convert(path, out.parent / "new" / "folder" / "out")
    assert sorted(p.name for p in out.parent.iterdir()) == ["in", "new", "out"]


def change(name, value):
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("extra", torch.zeros(1)), "unknown weights extra"),
        (change("module.blocks.0.proj_in.weight", torch.zeros(1)), "unknown weights module.blocks.0.proj_in.weight"),
        (
            change("learnable_self_denoiser.proj_in.bias", torch.zeros(64)),
            "are the denoiser of STARFlow-V",
        ),
        (change("time_embed.mlp.0.weight", torch.zeros(4)), "are the noise levels of iTARFlow"),
        (change("shared_backbone.layers.0.weight", torch.zeros(4)), "are the shared layers of iTARFlow"),
        (change("blocks.0.sos_embed", torch.zeros(1, 1, 48)), "unknown weights blocks.0.sos_embed"),
        (change("blocks.1.qkv", torch.zeros(1)), "unknown weights blocks.1.qkv"),
        (
            lambda s: s.pop("blocks.1.attn_blocks.0.mlp.main.2.bias"),
            "lacks weights .*blocks.1.attn_blocks.0.mlp.main.2",
        ),
        (lambda s: s.pop("blocks.2.class_embed"), "lacks weights blocks.2.class_embed"),
        (lambda s: s.pop("blocks.0.pos_embed"), "not the weights of a TarFlow"),
        (change("blocks.1.proj_in.weight", torch.zeros(64, 12)), r"blocks.1.proj_in.weight is .*\(64, 12\)"),
        (change("blocks.1.proj_in.weight", torch.zeros(64, 48, dtype=torch.int64)), "int64"),
        (change("blocks.1.attn_mask", torch.zeros(5, 5)), "blocks.1.attn_mask is .*other sizes"),
        (change("blocks.2.proj_out.bias", torch.full((96,), torch.nan)), "blocks.2.proj_out.bias is not finite"),
        (change("blocks.2.proj_out.bias", torch.full((96,), torch.inf)), "blocks.2.proj_out.bias is not finite"),
        (change("var", torch.full((4, 48), 1.5)), "var is not one"),
        (change("blocks.0.pos_embed", torch.zeros(5, 64)), "do not fit the weights: 5 tokens"),
        (change("blocks.0.pos_embed", torch.zeros(())), "not the weights of a TarFlow"),
        (change("blocks.1.proj_in.bias", "text"), "'blocks.1.proj_in.bias' is a str"),
        (change(7, torch.zeros(1)), "'7' is a Tensor"),
        (change("blocks.1.proj_in.bias", torch.zeros(1).expand(64)), "not contiguous"),
        (change("blocks.1.proj_in.bias", torch.zeros(64).to_sparse()), "not a dense tensor"),
        (lambda s: s.clear(), "holds no weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tarflow, edit, message):
    path, state, out = tarflow
    edit(state)
    torch.save(state, path)
    refused(message, path, out)


def test_unknown_weights_are_dropped_on_request_only(tarflow):
    path, state, out = tarflow
    torch.save(state | {"ema.blocks": torch.zeros(1), "ema.steps": torch.zeros(1)}, path)
    refused("unknown weights ema.blocks", path, out)
    assert convert(path, out, drop=["ema.*"]).dropped["ema.blocks"] == "as asked"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet_model_4_128_3_1_0.15.pth", "channels is 128 in the file's name but 64"),
        ("imagenet_model_4_64_8_1_0.15.pth", "blocks is 8"),
        ("imagenet_model_4_64_3_8_0.15.pth", r"layers_per_block is \[8\]"),
        ("imagenet_model_5_64_3_1_0.15.pth", "patches of 5x5"),
        ("imagenet_model_0_64_3_1_0.15.pth", "patches of 0x0"),
        ("imagenet.pth", "give --config"),
        ("imagenet_model_4_64_3_1_0.15.bin", "give --config"),
    ],
)
def test_a_file_name_that_contradicts_the_weights_is_refused(tarflow, name, message):
    path, _, out = tarflow
    refused(message, path.rename(path.parent / name), out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"channels": 128}, "starflow.yaml asks for"),
        ({"blocks": 4, "layers_per_block": 1}, "lacks weights blocks.3"),
        ({"layers_per_block": "1 2 2"}, "lacks weights blocks.1.attn_blocks.1"),
        ({"img_size": 8}, "attn_mask is .*other sizes"),
        ({"txt_size": 5}, "attn_mask is .*other sizes"),
        ({"txt_size": 0}, "unknown weights blocks.2.proj_txt"),
        ({"text": "google/flan-t5-xl"}, "blocks.2.proj_txt.weight"),
        ({"cond_top_only": 0}, "lacks weights blocks.0.proj_txt"),
        ({"vae": "stabilityai/sd-vae-ft-ema"}, "img_size=4 is no multiple of 8"),
        ({"patch_size": 0}, "img_size=4"),
        ({"use_pretrained_lm": "gemma3_1b"}, "use_pretrained_lm=gemma3_1b"),
        ({"norm_type": "batch_norm"}, "norm_type=batch_norm"),
        ({"channels": "many"}, "channels='many'"),
        ({"chanels": 64}, "unknown flag 'chanels'"),
        ({"seq_order": "up"}, "sequence_order='up'"),
        ({"rope": 0, "txt_size": 0}, "not the weights of a TarFlow.*--config"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(starflow, flags, message):
    path, config, out = starflow
    arguments = {k: v for entry in yaml.safe_load(config.read_text())["arguments"] for k, v in entry.items()}
    config.write_text(yaml.safe_dump({"arguments": [{k: v} for k, v in {**arguments, **flags}.items()]}))
    refused(message, path, out, config=config)


def test_a_missing_or_malformed_configuration_is_refused(starflow):
    path, config, out = starflow
    refused("give --config", path, out)
    refused("nowhere.yaml", path, out, config="nowhere.yaml")
    for text, message in (("{", "starflow.yaml"), ("model: {}", "arguments:"), ("arguments: [1]", "arguments:")):
        config.write_text(text)
        refused(message, path, out, config=config)


@pytest.mark.parametrize(
    ("flag", "value", "part"),
    [
        ("vid_size", "81:16", "frames of a video"),
        ("fps_cond", 1, "prompts with the frame rate"),
        ("cond_noise_level", True, "prompts with the noise level"),
        ("learnable_self_denoiser", 1, "the denoiser"),
        ("temporal_causal", 2, "the order of frames"),
        ("shallow_block_local", 1, "attention inside a frame"),
        ("local_attn_window", 5, "a window of frames"),
        ("last_frame_cond", 1, "a given last frame"),
        ("video_to_video", 1, "a given video"),
    ],
)
def test_a_part_of_starflow_v_is_refused(starflow, flag, value, part):
    path, config, out = starflow
    arguments = yaml.safe_load(config.read_text())["arguments"]
    config.write_text(yaml.safe_dump({"arguments": [*arguments, {flag: value}]}))
    refused(rf"STARFlow-V, and no flow of this package has {part} \({flag}={value}\)", path, out, config=config)


def test_flags_of_starflow_v_that_are_off_change_nothing(starflow):
    path, config, out = starflow
    settings = yaml.safe_load(config.read_text())
    settings["arguments"] += [{"vid_size": "none"}, {"fps_cond": 0}, {"temporal_causal": False}]
    config.write_text(yaml.safe_dump(settings))
    assert not {"vid_size", "fps_cond", "temporal_causal"} & convert(path, out, config).arguments.keys()


def test_the_denoiser_of_starflow_v_is_refused_also_where_it_is_to_be_dropped(starflow):
    path, config, out = starflow
    torch.save(torch.load(path) | {"learnable_self_denoiser.proj_in.bias": torch.zeros(64)}, path)
    refused("the denoiser of STARFlow-V", path, out, config=config, drop=["learnable_self_denoiser.*"])


def test_truncated_files_are_refused(tarflow):
    path, _, out = tarflow
    whole = path.read_bytes()
    for length in [0, 1, 3, 4, 100, 5000, len(whole) // 2, len(whole) - 100_000, len(whole) - 30, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused("damaged|not a checkpoint", path, out)


def test_damaged_bytes_are_refused_or_harmless(tarflow):
    """Refused, or without harm to the weights."""
    path, state, out = tarflow
    whole = path.read_bytes()
    places = torch.randint(len(whole), (20,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in [0, 5, 40, 300, len(whole) - 5, *places]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            convert(path, out, overwrite=True)
        except StarflowError as error:
            assert "\n" not in str(error) and not out.exists()
        else:
            # A time stamp, padding or the like.
            flow = Flow.from_pretrained(out)
            theirs = names.upstream_names(flow.config)
            assert all(torch.equal(t, state[theirs[n]].reshape(t.shape)) for n, t in flow.state_dict().items())
            shutil.rmtree(out)
    place = whole.index(state["blocks.1.proj_in.weight"].numpy().tobytes())
    path.write_bytes(whole[:place] + b"\0" + whole[place + 1 :])
    refused("is damaged: the checksum of its record .*/data/", path, out)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("archive", [True, False, None])
@pytest.mark.parametrize("place", ["instead", "inside"])
def test_malicious_pickles_are_not_run(tarflow, archive, place):
    """The call is not made in a file of present torch, of torch before 1.6, or in a bare pickle."""
    path, state, out = tarflow
    victim = out.parent / "in" / "victim"
    victim.write_text("unharmed")
    payload = Call(os.system, f"rm {victim}")
    payload = payload if place == "instead" else {**state, "blocks.0.proj_in.bias": payload}
    if archive is None:
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=archive)
    message = refused("refused|damaged|not a checkpoint", path, out)
    assert archive is None or "system" in message
    assert victim.read_text() == "unharmed"


@pytest.mark.parametrize("content", [[1, 2], {"optimizer": {"state": {}}}, {"a": 1}, torch.zeros(3), "text"])
def test_a_file_that_holds_no_state_dict_is_refused(tarflow, content):
    path, _, out = tarflow
    torch.save(content, path)
    refused("no state dict|holds no weights", path, out)


def test_a_file_of_another_kind_is_refused(tarflow):
    path, _, out = tarflow
    refused("no checkpoint at", path.parent / "nothing.pth", out)
    folder = path.parent / "imagenet_model_4_64_3_1_0.16.pth"
    folder.mkdir()
    refused("is a folder", folder, out)
    for content in (b"hello", os.urandom(1000)):
        path.write_bytes(content)
        refused("damaged|not a checkpoint", path, out)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"0" * 1000)
    refused("truncated or damaged: compressed", path, out)


def test_a_flow_without_upstream_settings_is_not_exported(tmp_path):
    for change, message in (
        ({"head_dim": 32}, "head_dim=32"),
        ({"expansion": 2}, "expansion=2"),
        ({"start": True}, "start=True"),
        ({"layers": (1, 2)}, "layers"),
        ({"levels": 17, "patch_order": "hwc"}, "patch_order='hwc', levels=17"),
    ):
        make({**TARFLOW, **change}).save_pretrained(tmp_path / "flow")
        with pytest.raises(ConfigError, match=message):
            export_upstream(tmp_path / "flow", tmp_path / "out")
    make({**STARFLOW, "rotary": "half"}).save_pretrained(tmp_path / "flow")
    with pytest.raises(ConfigError, match="rotary='half'"):
        export_upstream(tmp_path / "flow", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        export_upstream(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(tarflow, capsys):
    path, _, out = tarflow
    assert "no checkpoint at nowhere.pth" in fails(capsys, "convert", "nowhere.pth", "--out", str(out))
    assert "--max-file-size" in fails(capsys, "convert", str(path), "--out", str(out), "--max-file-size", "five")
    assert "--dtype" in fails(capsys, "convert", str(path), "--out", str(out), "--dtype", "int8")
    back = ["convert", "digits", "--out", str(out), "--to", "upstream"]
    assert "no setting for this flow: head_dim=64" in fails(capsys, *back)
    for flag in (["--dtype", "float32"], ["--config", "x.yaml"], ["--drop", "x"], ["--max-file-size", "1GB"]):
        assert f"{flag[0]}: --to upstream keeps weights and settings" in fails(capsys, *back, *flag)
    assert "--device: a conversion runs on the CPU" in fails(capsys, *back, "--device", "cuda")


@pytest.mark.parametrize("direction", ["ours", "upstream"])
def test_a_full_disk_leaves_nothing_behind(tarflow, direction):
    """A limit on the size of files stands for it: the first bytes are written, the rest is refused."""
    path, _, out = tarflow
    if direction == "upstream":
        convert(path, out.parent / "ours")
        path = out.parent / "ours"
    code = (
        "import resource, sys; from starflow.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", str(path), "--out", str(out / "x"), "--to", direction]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert f"cannot write {out / 'x'}" in found.stderr and not out.exists()
