"""Fine-tuning a decoder on noisy latents: it learns, only the decoder moves, and a killed run is resumed at the bit."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from support.commands import fails
from support.entries import entries

from starflow import ConfigError
from starflow.cli import main
from starflow.models.autoencoder import load_vae, save_vae
from starflow.training.autoencoder import AutoencoderConfig
from starflow.training.checkpoints import latest
from starflow.training.decoder import DecoderRunConfig, DecoderTrainer, load_lpips
from starflow.training.discriminator import PatchDiscriminator, hinge_loss

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    save_vae(AutoencoderConfig(block_channels=(4, 8), groups=4, latent_channels=2).build(16), tmp_path / "vae", 0.5)
    return str(tmp_path / "vae")


def settings(vae: str, decoder=None, **training) -> DecoderRunConfig:
    small = {"vae": vae, "lpips_weight": 0.0, "gan_channels": 4, "gan_layers": 1}
    loop = {
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "sample_every": 0,
        "checkpoint_every": 0,
        "log_every": 1,
        **training,
    }
    return DecoderRunConfig.from_dict({"decoder": {**small, **(decoder or {})}, "data": {"size": 16}, "training": loop})


def train(config: DecoderRunConfig, folder) -> DecoderTrainer:
    trainer = DecoderTrainer(config, folder)
    trainer.run(quiet=True)
    return trainer


def test_only_the_decoder_learns(vae, tmp_path):
    trainer = train(settings(vae, {"gan_start": 20}, steps=40, sample_every=40), tmp_path / "run")
    errors = [m["square"] for m in trainer.metrics]
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])
    assert ["discriminator" in m for m in trainer.metrics] == [step >= 20 for step in range(40)]
    before, after = load_vae(vae), load_vae(tmp_path / "run")
    assert after.config.scaling_factor == 0.5
    moved = {n for n, t in before.state_dict().items() if not torch.equal(t, after.state_dict()[n])}
    assert moved and {n.split(".")[0] for n in moved} == {"decoder", "post_quant_conv"}
    assert (tmp_path / "run" / "samples" / "0000040.png").exists()


def test_a_killed_run_is_resumed_to_the_same_weights(vae, tmp_path):
    config = settings(vae, steps=30, checkpoint_every=3)
    whole = train(config, tmp_path / "whole")
    code = (
        "import sys, json, torch; torch.set_num_threads(1)\n"
        "from starflow.training.decoder import DecoderRunConfig, DecoderTrainer\n"
        "DecoderTrainer(DecoderRunConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2]).run(quiet=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, json.dumps(config.to_dict()), str(tmp_path / "killed")])
    deadline = time.monotonic() + 120
    while latest(tmp_path / "killed") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    resumed = DecoderTrainer.resume(tmp_path / "killed")
    assert 0 < resumed.step < 30
    resumed.run(quiet=True)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "killed" / WEIGHTS).read_bytes()
    assert resumed.metrics == whole.metrics
    states = [trainer.discriminator.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_patch_of_the_discriminator_is_70_pixels():
    discriminator = PatchDiscriminator(1, width=2, layers=3)
    for module in discriminator.modules():
        if isinstance(module, torch.nn.InstanceNorm2d):
            # Norms see the whole image.
            module.forward = lambda x: x
    x = torch.randn(1, 1, 256, 256, requires_grad=True)
    logits = discriminator(x)
    (gradient,) = torch.autograd.grad(logits[0, 0, 15, 15], x)
    reached = gradient[0, 0].nonzero()
    assert (reached.amax(0) - reached.amin(0) + 1).tolist() == [70, 70]


def test_the_hinge_loss_is_zero_beyond_the_margin():
    assert hinge_loss(torch.tensor([2.0, 1.0]), torch.tensor([-1.0, -3.0])) == 0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1


def test_lpips_is_left_out_with_a_warning_where_a_part_is_missing(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.warns(UserWarning, match="without LPIPS: VGG-16's weights"):
        assert load_lpips("cpu") is None
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth").touch()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.warns(UserWarning, match="package lpips"):
        assert load_lpips("cpu") is None

    class Distance(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, x, y):
            return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Distance))
    trainer = train(settings(vae, {"lpips_weight": 1.0}, steps=1), tmp_path / "run")
    assert trainer.metrics[0]["lpips"] > 0


@pytest.mark.parametrize("change", [{"noise_std": -1}, {"gan_layers": 0}, {"gan_weight": "much"}, {"gans": 1}])
def test_wrong_settings_are_named(change, vae):
    with pytest.raises(ConfigError, match=next(iter(change))):
        settings(vae, change)


def test_the_command_fine_tunes_the_given_autoencoder(vae, capsys):
    Path("tiny.yaml").write_text(
        "decoder: {lpips_weight: 0, gan_channels: 4, gan_layers: 1}\n"
        "data: {size: 16}\ntraining: {steps: 2, batch_size: 8}\n"
    )
    arguments = ["train-decoder", "--config", "tiny.yaml", "--quiet", "--out"]
    assert main([*arguments, "run", "--vae", vae]) == 0
    assert load_vae("run").config.scaling_factor == 0.5
    assert "no autoencoder at 5" in fails(capsys, *arguments, "other", "--vae", "5")


def test_defaults_of_torch_do_not_change_a_run(vae, hostile, tmp_path):
    train(settings(vae, sample_every=6), tmp_path / "usual")
    hostile()
    train(settings(vae, sample_every=6), tmp_path / "other")
    assert entries(tmp_path / "usual") == entries(tmp_path / "other")
    for name in (WEIGHTS, "config.json", "samples/0000006.png"):
        assert (tmp_path / "usual" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
