"""Pipelines: from a prompt or a class to a PNG through real components, saved and loaded in the layout of diffusers."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from support import components
from support.backends import needs_native
from support.components import TEXT_DIM, TEXT_LEN

from starflow import CheckpointError, ConfigError, Flow, FlowConfig, Guidance, open_model
from starflow.convert import convert, export_upstream
from starflow.data.prompts import encode_prompts, load_text
from starflow.inversion.request import METHODS
from starflow.models.autoencoder import load_vae
from starflow.pipelines import FlowModel, FlowPipeline, STARFlowPipeline, TarFlowPipeline
from starflow.pipelines.base import denoise_rows

PROMPTS = ["a red cat", "three small dog"]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def opened(folder, kind=FlowPipeline, **options):
    pipe = kind.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return components.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(folder):
    return opened(folder, STARFlowPipeline)


@pytest.fixture(scope="module")
def tarflow():
    flow = Flow(
        FlowConfig(image_size=8, image_channels=1, patch_size=4, channels=16, layers=(1, 1), head_dim=8, num_classes=3)
    )
    for parameter in flow.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    pipe = TarFlowPipeline(FlowModel.from_flow(flow))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_open_model_tells_flows_from_pipelines(folder, tmp_path):
    Flow.save_pretrained(components.flow_model(), tmp_path)
    flow, digits, pipe = open_model(tmp_path), open_model("digits"), open_model(folder, dtype=torch.bfloat16)
    assert type(flow) is type(digits) is Flow and isinstance(pipe, STARFlowPipeline)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae.use_slicing
    with pytest.raises(CheckpointError, match="no checkpoint at nowhere"):
        open_model("nowhere")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(umask, pipe, tmp_path):
    before = os.umask(umask)
    try:
        pipe.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    weights = list(tmp_path.rglob("*.safetensors"))
    assert len(weights) == 3 and {stat.S_IMODE(path.stat().st_mode) for path in weights} == {0o666 & ~umask}


def test_layout(folder):
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written >= {
        "model_index.json", "README.md", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
    }  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "STARFlowPipeline" and index["transformer"] == ["starflow.pipelines", "FlowModel"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "text-to-image" in card and "STARFlowPipeline" in card


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", ["starflow", "tarflow"])
def test_prompt_to_png(pipe, method, rule, tmp_path):
    output = pipe(
        PROMPTS, generator=seeds(0, 1), guidance_scale=2.0, guidance_rule=rule, method=method, certify=True, denoise=1.0
    )
    output.images[1].save(tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").size == (16, 16) and len(output.images) == 2
    report = output.report
    assert report.method == method and 0 < report.certificate_mean < report.certificate < 1e-4
    assert report.steps == 3 * 64 if method == "sequential" else 3 <= report.steps <= 3 * 65
    assert [block.method for block in report.blocks] == [method] * 3
    assert list(report.stages) == ["text", "flow", "certify", "denoise", "decode", "write"]
    assert all(seconds > 0 for stage, seconds in report.stages.items() if stage != "write")
    assert report.count == 2 and report.seconds > max(report.stages.values())


def test_the_stages_are_those_of_the_parts(pipe):
    """Once more by hand: states, flow under guidance, score step, decoder."""
    flow, vae = pipe.transformer, pipe.vae
    text = encode_prompts(PROMPTS, pipe.tokenizer, pipe.text_encoder, TEXT_LEN)
    empty = encode_prompts([""], pipe.tokenizer, pipe.text_encoder, TEXT_LEN)
    z = torch.cat([flow.noise(1, generator) for generator in seeds(3, 4)])
    x = flow.inverse(z, None, text, Guidance(2.0, "starflow"), empty).x
    options = {"guidance_scale": 2.0, "generator": seeds(3, 4)}
    torch.testing.assert_close(pipe(PROMPTS, denoise=0, output_type="latent", **options).images, x)
    x = flow.denoise(x, None, text, factor=0.7)
    found = pipe(PROMPTS, denoise=0.7, output_type="latent", latents=z, guidance_scale=2.0).images
    torch.testing.assert_close(found, x)
    with torch.no_grad():
        expected = (vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    images = pipe(PROMPTS, denoise=0.7, output_type="pt", **{**options, "generator": seeds(3, 4)}).images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


def test_output_types(pipe):
    made = {kind: pipe("a cat", generator=seeds(0), output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert made["pt"].shape == (1, 3, 16, 16) and made["np"].shape == (1, 16, 16, 3)
    assert made["latent"].shape == (1, 4, 8, 8)
    np.testing.assert_array_equal(made["np"], made["pt"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(made["pil"][0]), (made["np"][0] * 255).round().astype(np.uint8))
    images, report = pipe("a cat", generator=seeds(0), output_type="pt", return_dict=False)
    assert torch.equal(images, made["pt"]) and report.certificate is None


def test_an_image_does_not_depend_on_its_batch(pipe):
    prompts = [*PROMPTS, "a blue piano"]
    together = pipe(prompts, generator=seeds(5, 6, 7), output_type="pt").images
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeds(5 + i), output_type="pt").images[0]
        torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=0)
    split = pipe(prompts, generator=seeds(5, 6, 7), output_type="pt", denoise_batch_size=2).images
    torch.testing.assert_close(split, together, atol=1e-5, rtol=0)


def test_several_images_of_a_prompt(pipe):
    many = pipe(PROMPTS, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), output_type="pt").images
    third = pipe(PROMPTS[1], generator=seeds(2), output_type="pt").images[0]
    torch.testing.assert_close(many[2], third, atol=1e-5, rtol=0)
    assert (many[2] - many[3]).abs().max() > 1e-2
    one = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), output_type="latent").images
    again = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert torch.equal(one, again)


def test_guidance_moves_away_from_the_negative_prompt(pipe):
    def draw(**options):
        return pipe("a red cat", generator=seeds(0), output_type="latent", denoise=0, **options).images

    plain = draw(guidance_scale=0)
    torch.testing.assert_close(draw(guidance_scale=3, negative_prompt="a red cat"), plain, atol=1e-5, rtol=1e-5)
    assert (draw(guidance_scale=3) - plain).abs().max() > 1e-2
    assert torch.equal(draw(guidance_scale=3), draw(guidance_scale=3, negative_prompt=""))
    states = encode_prompts(["a red cat"], pipe.tokenizer, pipe.text_encoder, TEXT_LEN)
    given = pipe(prompt_embeds=states, generator=seeds(0), output_type="latent", denoise=0, guidance_scale=0).images
    assert torch.equal(given, plain)
    assert (draw(guidance_scale=3, annealed=True) - draw(guidance_scale=3)).abs().max() > 1e-3
    assert (draw(guidance_scale=3, attention_temperature=2.0) - draw(guidance_scale=3)).abs().max() > 1e-4


def test_other_sizes(pipe):
    wide = pipe("a cat", aspect_ratio="3:2", certify=True)
    assert wide.images[0].size == (20, 14) and wide.report.certificate < 1e-4
    assert pipe("a cat", height=8, width=24).images[0].size == (24, 8)


def test_a_saved_pipeline_names_no_folder(tmp_path):
    components.pipeline().save_pretrained(tmp_path / "first")
    FlowPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert not [path for path in (tmp_path / "second").rglob("*.json") if str(tmp_path) in path.read_text()]


def test_a_model_of_mixed_ratios_names_them_in_the_prompt(tmp_path):
    components.pipeline(mixed_aspect=True, denoise=0.5).save_pretrained(tmp_path)
    pipe = opened(tmp_path)
    assert pipe.config.mixed_aspect and pipe.config.denoise == 0.5
    named = [f"{text}\n in a 3:2 aspect ratio.\n" for text in ("a cat", "")]
    states, empty = encode_prompts(named, pipe.tokenizer, pipe.text_encoder, TEXT_LEN).split(1)
    expected = pipe(
        prompt_embeds=states, negative_prompt_embeds=empty, height=14, width=20, generator=seeds(0), output_type="pt"
    ).images
    for shape in ({"aspect_ratio": "3:2"}, {"height": 14, "width": 20}):
        assert torch.equal(pipe("a cat", generator=seeds(0), output_type="pt", **shape).images, expected)


def test_callbacks(pipe, capsys):
    seen, blocks = [], []

    def step_end(owner, step, block, tensors):
        blocks.append((step, block))
        assert owner is pipe and tensors["latents"].shape == (1, 4, 8, 8)
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    made = pipe(
        "a cat", callback_on_step_end=step_end, progress=lambda *n: seen.append(n), output_type="latent", denoise=0
    ).images
    assert blocks == [(0, 2), (1, 1), (2, 0)] and not made.any() and seen[-1] == (192, 192)
    capsys.readouterr()
    pipe.set_progress_bar_config(disable=False)
    pipe("a cat")
    pipe.set_progress_bar_config(disable=True)
    assert "192/192" in capsys.readouterr().err

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a cat", progress=stop)


def test_a_pipeline_read_in_inference_mode_denoises(folder):
    options = {"denoise": 1.0, "output_type": "pt"}
    expected = opened(folder)("a cat", generator=seeds(0), **options).images
    with torch.inference_mode():
        assert torch.equal(opened(folder)("a cat", generator=seeds(0), **options).images, expected)


@needs_native  # the bits of a product by torch depend on the address of the weights
def test_shards_and_variants(pipe, tmp_path):
    components.save(tmp_path, max_shard_size="40KB")
    components.save(tmp_path, variant="fp16")
    names = sorted(path.name for path in (tmp_path / "transformer").iterdir())
    assert "diffusion_pytorch_model.safetensors.index.json" in names and len(names) > 4
    expected = pipe("a cat", generator=seeds(0), output_type="pt").images
    for options in ({}, {"variant": "fp16"}):
        again = opened(tmp_path, **options)
        assert torch.equal(again("a cat", generator=seeds(0), output_type="pt").images, expected)


def test_to_the_upstream_format_and_back(pipe, tmp_path):
    components.save(tmp_path / "model", max_shard_size="40KB")
    files = export_upstream(tmp_path / "model", tmp_path / "upstream").files
    weights, settings = (next(tmp_path.glob(f"upstream/*{end}")) for end in (".pth", ".yaml"))
    assert {weights.name, settings.name} <= set(files)
    convert(weights, tmp_path / "ours", settings)
    again = components.pipeline()
    again.register_modules(transformer=FlowModel.from_flow(Flow.from_pretrained(tmp_path / "ours")))
    expected = pipe("a cat", generator=seeds(0), output_type="pt").images
    assert torch.equal(again("a cat", generator=seeds(0), output_type="pt").images, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights(folder, pipe, dtype):
    narrow = opened(folder, dtype=dtype)
    assert narrow.transformer.dtype == narrow.vae.dtype == dtype
    options = {"output_type": "latent", "denoise": 0}
    made = narrow("a cat", generator=seeds(0), **options).images
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, pipe("a cat", generator=seeds(0), **options).images, atol=0.3, rtol=0)
    assert narrow("a cat", generator=seeds(0), output_type="pt").images.isfinite().all()


def test_the_model_is_a_flow(folder, tmp_path):
    model = FlowModel.from_pretrained(folder / "transformer")
    assert isinstance(model, Flow) and model.config == components.flow_model().config and not model.training
    Flow.save_pretrained(model, tmp_path / "plain")
    plain = Flow.from_pretrained(tmp_path / "plain")
    shared = FlowModel.from_flow(plain)
    shared.save_pretrained(tmp_path / "again")
    again = FlowModel.from_pretrained(tmp_path / "again")
    assert model.state_dict().keys() == plain.state_dict().keys() and not shared.training and not again.training
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) and torch.equal(tensor, again.state_dict()[name])
        assert shared.state_dict()[name].data_ptr() == tensor.data_ptr()


def test_folders_that_do_not_fit(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def damaged(name, change):
        shutil.copytree(folder / "transformer", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def weights(change):
        def edit(path):
            path = path / "diffusion_pytorch_model.safetensors"
            state = load_file(path)
            change(state)
            save_file(state, path, metadata={"format": "pt"})

        return edit

    def setting(**changes):
        def edit(path):
            fields = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**fields, **changes}))

        return edit

    cases = {
        "missing": (weights(lambda s: s.pop("blocks.0.proj_in.weight")), "blocks.0.proj_in.weight"),
        "unknown": (weights(lambda s: s.update(extra=torch.zeros(1))), "extra"),
        "shape": (weights(lambda s: s.update({"blocks.0.proj_in.weight": torch.zeros(3, 4)})), "proj_in.weight"),
        "setting": (setting(chanels=3), "chanels"),
        "value": (setting(scale="log"), "scale='log'"),
        "cut": (lambda p: (p / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 50), "cut"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(CheckpointError, match=message):
            FlowModel.from_pretrained(damaged(name, change))
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        FlowPipeline.from_pretrained(tmp_path / "missing")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(CheckpointError, match="DiTPipeline, expected STARFlowPipeline or TarFlowPipeline"):
        FlowPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "prompt: give it or prompt_embeds"),
        ({"prompt": 3}, "list of at least one string"),
        ({"prompt": []}, "list of at least one string"),
        ({"prompt_embeds": torch.zeros(1, TEXT_LEN, TEXT_DIM)}, "one of them"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, TEXT_DIM)}, "prompt_embeds: expected"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt: 3"),
        ({"method": "magic"}, "method='magic': expected auto or one of sequential"),
        ({"window": 8}, "window=8: for method='jacobi'"),
        ({"method": "jacobi", "window": -1}, "window=-1"),
        ({"method": "jacobi", "tol": -1.0}, "tol=-1.0"),
        ({"quantize": "int4"}, "quantize='int4': expected one of none, int8, fp8"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"generator": seeds(0, 1)}, "generator: 2 of them for 1 images"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents: expected \(1, 4, 8, 8\), got \(1, 4, 4, 4\)"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "not finite"),
        ({"height": 15}, "height=15: expected a multiple of 2"),
        ({"width": 0}, "width=0"),
        ({"aspect_ratio": "3x2"}, "'3x2'"),
        ({"aspect_ratio": "1:1", "height": 16}, "aspect_ratio"),
        ({"guidance_scale": -1.0}, "weight=-1.0"),
        ({"guidance_rule": "none"}, "rule='none'"),
        ({"attention_temperature": 0.0}, "temperature=0.0"),
        ({"denoise": -1.0}, "denoise=-1.0"),
    ],
)
def test_wrong_arguments_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a cat", **arguments})


def test_without_a_text_encoder(folder):
    pipe = opened(folder, text_encoder=None, tokenizer=None)
    with pytest.raises(ConfigError, match="no text encoder"):
        pipe("a cat")
    states = torch.zeros(2, TEXT_LEN, TEXT_DIM)
    assert len(pipe(prompt_embeds=states, negative_prompt_embeds=states[:1]).images) == 2


@needs_native  # the bits of a product by torch depend on the address of the weights
def test_offload_brings_every_part_to_its_device(folder):
    """On a machine without an accelerator the CPU stands for one; the hooks are those of accelerate."""
    pipe = opened(folder)
    expected = pipe("a cat", generator=seeds(0), output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    visited = []
    for name in ("text_encoder", "transformer", "vae"):
        hook = getattr(pipe, name)._hf_hook
        hook.pre_forward = lambda module, *a, _name=name, _call=hook.pre_forward, **k: (
            visited.append(_name) or _call(module, *a, **k)
        )
    made = pipe("a cat", generator=seeds(0), output_type="pt", certify=True).images
    assert torch.equal(made, expected)
    assert list(dict.fromkeys(visited)) == ["text_encoder", "transformer", "vae"]


def test_classes_in_pixels(tarflow, tmp_path):
    tarflow.save_pretrained(tmp_path)
    again = opened(tmp_path)
    assert isinstance(again, TarFlowPipeline) and "Class-conditional" in (tmp_path / "README.md").read_text()
    options = {"num_images_per_prompt": 2, "guidance_scale": 1.5, "certify": True}
    first = tarflow([0, 2], generator=seeds(0, 1, 2, 3), **options)
    second = again([0, 2], generator=seeds(0, 1, 2, 3), **options)
    assert len(first.images) == 4 and first.images[0].size == (8, 8) and first.images[0].mode == "L"
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]
    assert first.report.certificate < 1e-4 and first.report.stages["text"] == first.report.stages["denoise"] == 0
    labels = torch.tensor([0, 0, 2, 2])
    z = torch.cat([tarflow.transformer.noise(1, generator) for generator in seeds(0, 1, 2, 3)])
    x = tarflow([0, 2], generator=seeds(0, 1, 2, 3), output_type="latent", **options).images
    torch.testing.assert_close(x, tarflow.transformer.inverse(z, labels, guidance=Guidance(1.5)).x)
    assert tarflow(num_images_per_prompt=3, output_type="np").images.shape == (3, 8, 8, 1)
    assert tarflow(1, output_type="pt").images.shape == (1, 1, 8, 8)


def test_bundled_digits_as_a_pipeline():
    pipe = TarFlowPipeline(FlowModel.from_flow(Flow.from_pretrained("digits")))
    pipe.set_progress_bar_config(disable=True)
    output = pipe(list(range(10)), generator=seeds(*range(10)), certify=True)
    assert len(output.images) == 10 and output.report.certificate < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 3}, "class_labels=.*: expected classes of -1"),
        ({"class_labels": [0, "1"]}, "class_labels"),
        ({"height": 16}, "draws 8x8 alone"),
        ({"denoise": 1.0}, "not trained with Gaussian noise"),
        ({"guidance_scale": 1.0}, "attention temperature"),
    ],
)
def test_wrong_arguments_in_pixels(tarflow, arguments, message):
    with pytest.raises(ValueError, match=message):
        tarflow(**arguments)


def test_denoising_is_split_to_fit():
    small = components.flow_model()
    assert denoise_rows(small, 64) > 100
    config = FlowConfig(
        image_size=32, image_channels=4, patch_size=1, channels=3072, layers=(2, 2, 2, 2, 2, 24), text_dim=2048,
        text_len=128,
    )  # fmt: skip
    with torch.device("meta"):
        assert denoise_rows(Flow(config), 1024) == 1


def test_without_diffusers():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import starflow.cli, starflow.training.flow\n"
        "try: import starflow.pipelines\n"
        "except starflow.ConfigError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.startswith("pipelines need diffusers: pip install 'starflow-kernels[models]'"), found.stderr


@pytest.mark.parametrize("maps", [False, True])
def test_files_that_change_later_change_a_pipeline_only_if_it_maps_them(maps, tmp_path):
    components.save(tmp_path)
    pipe = opened(tmp_path, **({"disable_mmap": False} if maps else {}))
    parts = {"transformer": pipe.transformer, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    if not maps:
        parts |= {"loaded vae": load_vae(tmp_path), "loaded text encoder": load_text(tmp_path)[1]}
    before = {name: [tensor.clone() for tensor in part.parameters()] for name, part in parts.items()}
    for path in tmp_path.rglob("*.safetensors"):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.seek(size // 2)
            file.write(bytes(size // 4))
    same = {name: all(map(torch.equal, part.parameters(), before[name])) for name, part in parts.items()}
    assert same == dict.fromkeys(parts, not maps)


def test_defaults_of_torch_do_not_change_a_pipeline(folder, hostile):
    arguments = {"prompt": PROMPTS[:1], "height": 16, "width": 16, "output_type": "np"}
    expected = open_model(folder)(**arguments, generator=seeds(0)).images
    hostile()
    found = open_model(folder)(**arguments, generator=[torch.Generator("cpu").manual_seed(0)]).images
    assert np.array_equal(found, expected)
