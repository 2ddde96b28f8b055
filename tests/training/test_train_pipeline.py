"""Training a whole pipeline: stages, resuming, what is derived, and a text encoder that is trained along."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from starflow import CheckpointError, ConfigError, Flow
from starflow.cli import main
from starflow.data.encode import EncodeConfig, encode
from starflow.data.prompts import load_text, save_text
from starflow.data.vocabulary import make_tokenizer
from starflow.pipelines import STARFlowPipeline
from starflow.settings import PRESETS, presets, read_settings
from starflow.training.checkpoints import latest
from starflow.training.config import SETTINGS
from starflow.training.flow import FlowTrainer
from starflow.training.pipeline import PipelineTrainer

STAGES = ("autoencoder", "text", "latents", "flow", "decoder", "pipeline")


def settings() -> dict:
    """Settings of a small pipeline on digits of 16 pixels."""
    loop = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "sample_every": 0, "checkpoint_every": 1}
    model = {
        "patch_size": 2, "channels": 16, "layers": [1, 1], "head_dim": 8, "start": True, "scale": "softplus",
        "rotary": "interleaved", "condition_blocks": "last", "noise_std": 0.3,
    }  # fmt: skip
    return {
        "data": {"source": "digits", "size": 16, "templates": ["the digit {}", "{}"]},
        "autoencoder": {
            "autoencoder": {"block_channels": [4, 8], "groups": 4, "latent_channels": 2},
            "data": {"seed": 0},
            "training": dict(loop),
        },
        "text": {"width": 16, "layers": 1, "length": 4},
        "latents": {},
        "flow": {"model": model, "training": {**loop, "ema": 0.9}},
        "decoder": {"decoder": {"lpips_weight": 0.0, "gan_channels": 4, "gan_layers": 1}, "training": dict(loop)},
        "pipeline": {"guidance": 0.5, "notice": "Digits of scikit-learn.\n"},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    PipelineTrainer(settings(), folder).run(quiet=True)
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    """All weights of a pipeline."""
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted((folder / "pipeline").rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def test_a_run_makes_a_pipeline_that_draws(run):
    pipe = STARFlowPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["7", "the digit 7"], generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(16, 16)] * 2


def test_a_pipeline_has_its_own_guidance_and_no_denoising(run):
    config = STARFlowPipeline.from_pretrained(run / "pipeline").config
    assert (config.guidance, config.denoise) == (0.5, 0.0)


def test_the_notice_is_in_the_pipeline_and_on_its_card(run):
    notice = (run / "pipeline" / "transformer" / "NOTICE").read_text()
    assert notice == "Digits of scikit-learn.\n" and notice in (run / "pipeline" / "README.md").read_text()


def test_a_pipeline_is_stored_in_float16(run):
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float16}


def test_a_pipeline_has_the_decoder_that_was_tuned(run):
    tuned = load_file(run / "decoder" / "diffusion_pytorch_model.safetensors")["decoder.conv_in.weight"]
    before = load_file(run / "autoencoder" / "diffusion_pytorch_model.safetensors")["decoder.conv_in.weight"]
    stored = weights(run)["vae.decoder.conv_in.weight"]
    assert torch.equal(stored, tuned.half()) and not torch.equal(stored, before.half())


def test_the_text_encoder_is_trained_along_with_the_flow(run):
    before, after = (load_text(run / name)[1].state_dict() for name in ("text", "flow"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if "block" in name)


def test_a_finished_run_is_left_as_it_is(run):
    before = weights(run)
    times = {path: path.stat().st_mtime_ns for name in STAGES[:-1] for path in (run / name).rglob("*.safetensors")}
    PipelineTrainer.resume(run).run(quiet=True)
    assert same(before, weights(run))
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize("stage", ["AutoencoderTrainer", "FlowTrainer", "DecoderTrainer"])
def test_an_interrupted_stage_continues_at_the_bit(run, stage, tmp_path, monkeypatch):
    from starflow.training import pipeline

    class Interrupted(getattr(pipeline, stage)):
        def train_step(self, *arguments):
            if self.step == 2:
                raise KeyboardInterrupt
            return super().train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, stage, Interrupted)
        with pytest.raises(KeyboardInterrupt):
            PipelineTrainer(settings(), tmp_path / "run").run(quiet=True)
    PipelineTrainer.resume(tmp_path / "run").run(quiet=True)
    assert same(weights(run), weights(tmp_path / "run"))


def test_the_command_trains_resumes_and_refuses_a_folder_with_a_run(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert main(["train-pipeline", "--resume", str(folder), "--quiet"]) == 0
    assert f"{folder / 'pipeline'}: " in capsys.readouterr().out
    assert main(["train-pipeline", "--config", str(folder / SETTINGS), "--out", str(folder), "--quiet"]) == 2
    assert "holds a run" in capsys.readouterr().err


def test_the_commands_of_the_stages_take_their_settings_and_give_the_same_bits(run):
    text = ["--text", f"{run}/text", "--text-dtype", "none", "--length", "4"]
    commands = {
        "autoencoder": ["train-autoencoder", "--config", f"{run}/autoencoder/settings.yaml"],
        "latents": ["encode", "--config", f"{run}/settings.yaml", "--vae", "autoencoder", *text],
        "flow": ["train", "--config", f"{run}/flow/settings.yaml", "--set", "data.path=latents"],
        "decoder": ["train-decoder", "--config", f"{run}/decoder/settings.yaml", "--vae", "autoencoder"],
    }
    for stage, command in commands.items():
        assert main([*command, "--out", stage, "--quiet"]) == 0
        files = list(Path(stage).rglob("*.safetensors"))
        assert files and all(file.read_bytes() == (run / file).read_bytes() for file in files)


def test_an_interrupted_command_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def interrupt(self, quiet):
        raise KeyboardInterrupt

    monkeypatch.setattr(PipelineTrainer, "run", interrupt)
    arguments = ["train-pipeline", "--preset", "emoji", "--out", str(tmp_path), "--seed", "3"]
    assert main(arguments) == 130
    assert f"continue with: starflow train-pipeline --resume {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("text"), "settings need exactly the sections"),
        (lambda s: s["data"].update(size=0), "data: size=0"),
        (lambda s: s["text"].update(width=20), "text: width=20"),
        (lambda s: s["text"].update(size=20), "text: unknown TextConfig settings size"),
        (lambda s: s["latents"].update(size=0), "latents: size=0"),
        (lambda s: s["pipeline"].update(guidance=-1.0), "pipeline: guidance=-1"),
        (lambda s: s["flow"]["model"].update(image_size=4), "flow.model: image_size follows from other stages"),
        (lambda s: s["decoder"]["training"].update(stepz=1), "decoder: training: unknown LoopConfig settings stepz"),
        (lambda s: s["autoencoder"]["data"].update(size=0), "autoencoder: data: size=0"),
        (lambda s: s["autoencoder"].update(data=3), "autoencoder: data is not a mapping"),
        (lambda s: s["flow"].update(training=3), "flow: training is not a mapping"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_stage(change, message, tmp_path):
    wrong = settings()
    change(wrong)
    with pytest.raises(ConfigError, match=f"^{message}"):
        PipelineTrainer(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        PipelineTrainer.resume(tmp_path)


@pytest.mark.parametrize("name", presets("pipeline"))
def test_presets_are_valid(name, tmp_path):
    trainer = PipelineTrainer(read_settings(PRESETS / "pipeline" / f"{name}.yaml"), tmp_path)
    trainer.autoencoder.autoencoder.build(trainer.autoencoder.data.size)
    Flow(trainer.flow.model)


def test_latents_without_text_states_need_the_text_encoder(run, tmp_path):
    trainer = PipelineTrainer.resume(run)
    config = trainer.flow.to_dict()
    config["training"]["text_encoder"] = ""
    with pytest.raises(ConfigError, match=r"training\.text_encoder: needed"):
        FlowTrainer(type(trainer.flow).from_dict(config), tmp_path)


def test_a_text_encoder_without_text_states_is_refused(run, tmp_path):
    trainer = PipelineTrainer.resume(run)
    config = trainer.flow.to_dict()
    config["model"] |= {"text_dim": 0, "text_len": 0}
    with pytest.raises(ConfigError, match=r"training\.text_encoder: given"):
        FlowTrainer(type(trainer.flow).from_dict(config), tmp_path)


def test_tokens_and_text_states_in_a_cache_belong_together(run, tmp_path):
    config = PipelineTrainer.resume(run).latents
    fields = {name: getattr(config, name) for name in ("data", "vae", "text", "length")}
    encode(EncodeConfig(**fields), tmp_path, quiet=True)
    with_states, tokens = (load_file(folder / "text-00000.safetensors") for folder in (tmp_path, run / "latents"))
    assert torch.equal(with_states["tokens"], tokens["tokens"]) and tokens.keys() == {"tokens"}
    padding = with_states["tokens"] == 0
    assert torch.equal(padding, (with_states["states"] == 0).all(-1))


def test_a_text_encoder_with_another_tokenizer_is_refused(run, tmp_path):
    trainer = PipelineTrainer.resume(run)
    config = trainer.flow.to_dict()
    config["training"]["text_encoder"] = str(tmp_path / "text")
    save_text(make_tokenizer(["other words"]), load_text(run / "text")[1], tmp_path / "text")
    with pytest.raises(ConfigError, match="encoded with another tokenizer"):
        FlowTrainer(type(trainer.flow).from_dict(config), tmp_path / "flow")


def test_a_checkpoint_whose_average_has_other_weights_is_refused(run, tmp_path):
    shutil.copytree(run / "flow", tmp_path / "flow")
    path = latest(tmp_path / "flow") / "run.json"
    progress = json.loads(path.read_text())
    progress["config"]["training"]["ema"] = 0.0
    path.write_text(json.dumps(progress))
    with pytest.raises(CheckpointError, match=r"does not fit its settings: its average\.model\.blocks"):
        FlowTrainer.resume(tmp_path / "flow")
