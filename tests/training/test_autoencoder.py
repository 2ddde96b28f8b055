"""Training an autoencoder: it learns, its folder is one of diffusers, a resumed run repeats an uninterrupted one."""

from pathlib import Path

import pytest
import torch
from support.commands import fails
from support.entries import entries

from starflow import CheckpointError, ConfigError
from starflow.cli import main
from starflow.data.datasets import DataConfig, load
from starflow.models.autoencoder import decode, load_vae, posterior, scale_images
from starflow.training.autoencoder import AutoencoderRunConfig, AutoencoderTrainer

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"block_channels": [4, 8], "groups": 4, "layers": 1, "latent_channels": 2}
TRAINING = {"steps": 6, "batch_size": 8, "learning_rate": 5e-3, "sample_every": 0, "checkpoint_every": 0}


def settings(autoencoder=None, data=None, **training) -> AutoencoderRunConfig:
    return AutoencoderRunConfig.from_dict(
        {
            "autoencoder": {**TINY, **(autoencoder or {})},
            "data": {"size": 16, **(data or {})},
            "training": {**TRAINING, "log_every": 1, **training},
        }
    )


def train(config: AutoencoderRunConfig, folder) -> AutoencoderTrainer:
    trainer = AutoencoderTrainer(config, folder)
    trainer.run(quiet=True)
    return trainer


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_reconstruction_improves(loss, tmp_path):
    trainer = train(settings({"loss": loss}, steps=60, sample_every=60), tmp_path)
    errors = [m["reconstruction"] for m in trainer.metrics]
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])
    assert (tmp_path / "samples" / "0000060.png").exists()
    assert {"config.json", "diffusion_pytorch_model.safetensors", "settings.yaml"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_the_scaling_factor_normalizes_the_latents(tmp_path):
    train(settings(steps=20), tmp_path)
    vae, (images, _) = load_vae(tmp_path), load(DataConfig(size=16))
    x = scale_images(torch.stack([images[i][0] for i in range(400)]), 256, 3)
    mean, std = (moment * vae.config.scaling_factor for moment in posterior(vae, x))
    assert (mean + std * torch.randn(mean.shape)).std() == pytest.approx(1, abs=0.05)
    assert torch.equal(decode(vae, mean), vae.decode(mean / vae.config.scaling_factor).sample)


def test_resume_repeats_an_uninterrupted_run(tmp_path):
    whole = train(settings(), tmp_path / "whole")
    part = AutoencoderTrainer(settings(), tmp_path / "part")
    step = part.train_step

    def interrupted(*batch):
        if part.step == 3:
            raise KeyboardInterrupt
        return step(*batch)

    part.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        part.run(quiet=True)
    torch.manual_seed(1234)
    resumed = AutoencoderTrainer.resume(tmp_path / "part")
    assert resumed.step == 3
    resumed.run(quiet=True)
    assert resumed.metrics == whole.metrics
    weights = [(tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("autoencoder", "data", "message"),
    [
        ({"groups": 3}, {}, "groups=3"),
        ({"loss": "l3"}, {}, "l3"),
        ({"kl_weight": -1}, {}, "kl_weight=-1"),
        ({"depth": 3}, {}, "unknown AutoencoderConfig settings depth"),
        ({"channels": 4}, {}, "takes 4 channels"),
        ({}, {"size": 15}, "size=15"),
    ],
)
def test_wrong_settings_are_named(autoencoder, data, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        AutoencoderTrainer(settings(autoencoder, data), tmp_path)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no autoencoder"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not an autoencoder"):
        load_vae(tmp_path)


def test_the_command_writes_an_autoencoder_and_keeps_a_run(capsys):
    Path("tiny.yaml").write_text(
        "autoencoder: {block_channels: [8, 8]}\ndata: {size: 16}\ntraining: {steps: 2, batch_size: 8}\n"
    )
    arguments = ["train-autoencoder", "--config", "tiny.yaml", "--out", "run", "--quiet"]
    assert main([*arguments, "--json", "report.json"]) == 0
    assert load_vae("run").config.latent_channels == 4
    assert "holds a run" in fails(capsys, *arguments)


def test_defaults_of_torch_do_not_change_a_run(hostile, tmp_path):
    train(settings(sample_every=6), tmp_path / "usual")
    hostile()
    train(settings(sample_every=6), tmp_path / "other")
    assert entries(tmp_path / "usual") == entries(tmp_path / "other")
    for name in (WEIGHTS, "config.json", "samples/0000006.png"):
        assert (tmp_path / "usual" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
