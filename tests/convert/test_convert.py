"""Upstream checkpoints to ours and back: the same names, numbers and bits."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.parity import assert_parity, load
from support.upstream import FLOWS, STARFLOW, TARFLOW, THREE_BILLION, make, settings, upstream_state

from starflow import Flow, FlowConfig
from starflow.cli import main
from starflow.convert import convert, export_upstream, names
from starflow.convert.formats import flow_config, parse_arguments, read_arguments


@pytest.fixture(params=FLOWS)
def named(request):
    return request.param, make(FLOWS[request.param])


def assert_same(flow: Flow, state: dict[str, torch.Tensor]) -> None:
    assert flow.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in flow.state_dict().items())


def test_tarflow_has_its_upstream_names_and_shapes():
    fields = {**TARFLOW, "layers": (1,), "num_classes": 5, "scale": "unit"}
    layer = "blocks.0.attn_blocks.0."
    expected = {
        "var": (16, 12), "blocks.0.attn_mask": (16, 16), "blocks.0.pos_embed": (16, 64),
        "blocks.0.class_embed": (5, 1, 64), "blocks.0.proj_in.weight": (64, 12), "blocks.0.proj_in.bias": (64,),
        "blocks.0.proj_out.weight": (12, 64), "blocks.0.proj_out.bias": (12,),
        layer + "attention.norm.weight": (64,), layer + "attention.norm.bias": (64,),
        layer + "attention.qkv.weight": (192, 64), layer + "attention.qkv.bias": (192,),
        layer + "attention.proj.weight": (64, 64), layer + "attention.proj.bias": (64,),
        layer + "mlp.norm.weight": (64,), layer + "mlp.norm.bias": (64,),
        layer + "mlp.main.0.weight": (256, 64), layer + "mlp.main.0.bias": (256,),
        layer + "mlp.main.2.weight": (64, 256), layer + "mlp.main.2.bias": (64,),
    }  # fmt: skip
    assert {n: tuple(t.shape) for n, t in upstream_state(make(fields)).items()} == expected


def test_starflow_has_its_upstream_names_and_shapes():
    fields = {**FLOWS["gemma"], "layers": (1,)}
    layer = "blocks.0.attn_blocks.0."
    expected = {
        "var": (16, 4), "feat_rope.freqs_cos": (19, 64), "feat_rope.freqs_sin": (19, 64),
        "blocks.0.attn_mask": (19, 19), "blocks.0.sos_embed": (1, 1, 4), "blocks.0.final_norm.weight": (64,),
        "blocks.0.proj_in.weight": (64, 4), "blocks.0.proj_in.bias": (64,),
        "blocks.0.proj_txt.weight": (64, 6), "blocks.0.proj_txt.bias": (64,),
        "blocks.0.proj_out.weight": (8, 64), "blocks.0.proj_out.bias": (8,),
        layer + "attention.norm.weight": (64,), layer + "attention.qkv.weight": (256, 64),
        layer + "attention.query_norm.weight": (64,), layer + "attention.key_norm.weight": (64,),
        layer + "attention.proj.weight": (64, 128), layer + "attention.post_norm.weight": (64,),
        layer + "mlp.norm.weight": (64,), layer + "mlp.gate_proj.weight": (256, 64),
        layer + "mlp.up_proj.weight": (256, 64), layer + "mlp.down_proj.weight": (64, 256),
        layer + "mlp.post_norm.weight": (64,),
    }  # fmt: skip
    assert {n: tuple(t.shape) for n, t in upstream_state(make(fields)).items()} == expected


def test_export_and_conversion_keep_every_bit(named, tmp_path):
    """Ours, upstream, ours: the same configuration and the same bits; and upstream, ours, upstream."""
    name, flow = named
    stem = name.split("_model_")[0]
    flow.save_pretrained(tmp_path / stem)
    written = export_upstream(tmp_path / stem, tmp_path / "upstream")
    path, config = (tmp_path / "upstream" / file for file in written.files)
    assert path.name == f"{name}.pth"
    state = torch.load(path, weights_only=True)
    wanted = upstream_state(flow)
    assert state.keys() == wanted.keys() and all(torch.equal(state[n], t) for n, t in wanted.items())
    for i, options in enumerate([{"config": config}] + [{}] * ("_model_" in name)):
        report = convert(path, tmp_path / f"ours{i}", **options)
        again = Flow.from_pretrained(tmp_path / f"ours{i}")
        assert again.config == flow.config
        assert_same(again, flow.state_dict())
        assert report.kept.keys() | report.dropped.keys() == state.keys()
        assert set(report.dropped) == set(names.dead_buffers(flow.config))
        assert report.parameters == sum(p.numel() for p in flow.parameters())


@pytest.mark.parametrize("name", ["starflow", "starflow_plain", "starflow_resolution"])
def test_converted_weights_compute_what_the_upstream_code_does(name, tmp_path):
    case = load(name)
    torch.save(upstream_state(case.flow), tmp_path / "x.pth")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings(case.flow)))
    convert(tmp_path / "x.pth", tmp_path / "ours", tmp_path / "x.yaml")
    flow = Flow.from_pretrained(tmp_path / "ours")
    z, logdet, _ = flow(case.tensors["x"], None, case.tensors["text"])
    assert_parity(z, case.tensors["z"])
    assert_parity(logdet, case.tensors["logdet"])
    assert_parity(flow.inverse(case.noise(), **case.sampling_context()).x, case.tensors["sample"])


@pytest.mark.parametrize(
    ("name", "size", "classes", "parameters"),
    [
        ("imagenet64_model_2_768_8_8_uniform", 64, 0, 460_142_784),
        ("imagenet64_model_2_768_8_8_0.05", 64, 0, 460_142_784),
        ("imagenet_model_2_768_8_8_0.05", 64, 1000, 466_286_784),
        ("imagenet_model_4_1024_8_8_0.05", 64, 1000, 817_636_096),
        ("imagenet_model_4_1024_8_8_0.15", 128, 1000, 823_927_552),
        ("afhq_model_8_768_8_8_0.07", 256, 3, 463_481_856),
    ],
)
def test_size_and_classes_of_published_files_come_from_the_shapes(name, size, classes, parameters):
    """The size of the images and the number of classes are in the shapes alone."""
    patch, channels, *_, noise = name.split("_model_")[1].split("_")
    fields = {**TARFLOW, "patch_size": int(patch), "channels": int(channels), "layers": (8,) * 8, "image_size": size}
    config = FlowConfig(**fields, num_classes=classes, noise_std=0.0 if noise == "uniform" else float(noise))
    ours, theirs = names.weight_shapes(config), names.upstream_names(config)
    shapes = {theirs[n]: names.upstream_shape(n, s) for n, s in ours.items()} | names.dead_buffers(config)
    assert len(shapes) == 817 + 8 * bool(classes) and names.count(ours) == parameters
    arguments, where = read_arguments(Path(f"{name}.pth"), None)
    assert flow_config(arguments, shapes, where) == config


def test_the_published_text_to_image_model_has_its_configuration():
    arguments = parse_arguments({"arguments": [{k: v} for k, v in THREE_BILLION.items()]}, "3B")
    config = flow_config(arguments, {}, "3B")
    assert config == FlowConfig(
        **{
            **STARFLOW,
            "image_size": 32,
            "channels": 3072,
            "layers": (2, 2, 2, 2, 2, 24),
            "text_dim": 2048,
            "text_len": 128,
        }
    )
    ours, theirs = names.weight_shapes(config), names.upstream_names(config)
    upstream = {theirs[name]: names.upstream_shape(name, shape) for name, shape in ours.items()}
    dead = names.dead_buffers(config)
    assert (len(ours), len(upstream), len(dead)) == (446, 446, 9) and not upstream.keys() & dead.keys()
    assert names.count(ours) == 3_858_281_544
    assert sorted(n for n in upstream if "attn_blocks" not in n and n.startswith("blocks.5")) == [
        f"blocks.5.{n}" for n in ("final_norm.weight", "proj_in.bias", "proj_in.weight", "proj_out.bias",
                                  "proj_out.weight", "proj_txt.bias", "proj_txt.weight", "sos_embed")
    ]  # fmt: skip
    assert upstream["blocks.5.attn_blocks.23.attention.qkv.weight"] == (9216, 3072)
    assert upstream["blocks.5.attn_blocks.23.mlp.main.2.weight"] == (3072, 12288)
    assert upstream["blocks.5.proj_txt.weight"] == (3072, 2048) and "blocks.4.proj_txt.weight" not in upstream
    assert dead["blocks.0.attn_mask"] == (1152, 1152) and dead["feat_rope.freqs_cos"] == (1152, 64)
    assert [config.block_spec(i).flip for i in range(6)] == [True, False] * 3


def test_weights_are_split_into_files_with_an_index(tarflow):
    path, state, out = tarflow
    report = convert(path, out, dtype=torch.bfloat16, max_bytes=100_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and [p.name for p in files] == [n for n in report.files if n.endswith(".safetensors")]
    assert all(p.stat().st_size < 110_000 for p in files) and not (out / "model.safetensors").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {name: tensor for p in files for name, tensor in load_file(p).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values()) == report.bytes
    assert all(index["weight_map"][name] == p.name for p in files for name in load_file(p))
    flow = Flow.from_pretrained(out)
    assert all(p.dtype == torch.bfloat16 for p in flow.parameters()) and report.dtype == "bfloat16"
    assert torch.equal(flow.blocks[1].class_embed, state["blocks.1.class_embed"].squeeze(1).bfloat16())


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float64, torch.float32)],
)
def test_the_dtype_of_the_file_is_kept_where_flows_have_it(tarflow, dtype, kept):
    path, state, out = tarflow
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, path)
    convert(path, out)
    flow = Flow.from_pretrained(out)
    assert torch.equal(flow.blocks[2].proj_in.weight, state["blocks.2.proj_in.weight"].to(dtype).to(kept))


def test_the_old_format_of_torch_is_read(tarflow):
    path, state, out = tarflow
    torch.save(state, path, _use_new_zipfile_serialization=False)
    convert(path, out)
    assert torch.equal(Flow.from_pretrained(out).blocks[0].proj_in.weight, state["blocks.0.proj_in.weight"])


def test_the_command_reports_what_it_did(tarflow, capsys):
    path, _, out = tarflow
    assert main(["convert", str(path), "--out", str(out), "--json", "-"]) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)["results"]
    assert "kept: 54 weights" in printed.err and "dropped: 4, dead buffer: blocks.*.attn_mask, var" in printed.err
    assert {k: v for k, v in results.items() if k != "seconds"} == {
        k: v for k, v in json.loads((out / "conversion.json").read_text()).items() if k != "seconds"
    }
    assert "var is one" in results["checked"] and results["config"]["noise_std"] == 0.15


def test_the_other_commands_take_a_converted_folder(tarflow):
    path, _, out = tarflow
    convert(path, out)
    assert main(["convert", str(out), "--out", str(out.parent / "back"), "--to", "upstream"]) == 0
    assert main(["sample", "--checkpoint", str(out), "--num", "2", "--out", str(out.parent / "drawn")]) == 0


def test_a_folder_of_diffusers_is_exported(starflow):
    path, config, out = starflow
    convert(path, out, config)
    pipeline = out.parent / "pipeline" / "transformer"
    pipeline.mkdir(parents=True)
    (out / "model.safetensors").rename(pipeline / "diffusion_pytorch_model.safetensors")
    fields = {"_class_name": "FlowModel", "_diffusers_version": "1", **json.loads((out / "config.json").read_text())}
    (pipeline / "config.json").write_text(json.dumps(fields))
    report = export_upstream(pipeline.parent, out.parent / "upstream")
    state, again = torch.load(path), torch.load(out.parent / "upstream" / report.files[0])
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_missing_checksums_are_reported(tarflow):
    path, state, out = tarflow
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert any("has no checksums" in check for check in convert(path, out).checked)
