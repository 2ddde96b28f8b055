"""Benchmarks of sampling and density on the CPU, with a small model of the structure of the released code."""

import types

import pytest
from torch import nn

from benchmarks.cpu import density, sampling
from tests.support import released_flows

CASE = sampling.Case("8x8 images", image=(3, 8), patch=2, channels=64, blocks=2, layers=1, batch=2, repeats=1)


class Model(nn.Module):
    """Model of the constructor and the methods that the benchmarks use."""

    def __init__(self, channels, size, patch, width, blocks, layers, num_classes=0):
        super().__init__()
        self.patch, self.num_patches = patch, (size // patch) ** 2
        sizes = channels * patch**2, width, self.num_patches
        self.blocks = nn.ModuleList(
            released_flows.TarFlowBlock(*sizes, i % 2 == 1, layers, classes=num_classes) for i in range(blocks)
        )

    def patchify(self, x):
        return nn.functional.unfold(x, self.patch, stride=self.patch).transpose(1, 2) if x.ndim == 4 else x

    def reverse(self, z, y=None, guidance=0):
        for block in reversed(self.blocks):
            z = block.reverse(z, y, guidance)
        return z

    def forward(self, x):
        z, logdets = self.patchify(x), 0
        for block in self.blocks:
            z, logdet = block(z)
            logdets = logdets + logdet
        return z, [], logdets

    def get_loss(self, z, logdets):
        return 0.5 * z.pow(2).mean() - logdets.mean()


@pytest.fixture
def peer():
    return types.SimpleNamespace(Model=Model)


@pytest.mark.parametrize("guidance", [0, 1.5])
def test_sampling_agrees_with_its_peers(peer, monkeypatch, guidance):
    monkeypatch.setattr(sampling, "compiled_inverse", lambda: sampling.sliced_inverse)
    monkeypatch.setattr(sampling, "read_bandwidth", lambda size: 1e11)
    monkeypatch.setattr(sampling, "peak_flops", lambda: 1e11)
    row = sampling.measure(peer, sampling.dataclasses.replace(CASE, guidance=guidance))
    assert row["error"].keys() >= {"ours", "released"} | (set() if guidance else {"plain", "compiled"})
    assert max(row["error"].values()) < 1e-5


def test_density_agrees_with_the_released_code(peer, monkeypatch):
    monkeypatch.setattr(density, "peak_flops", lambda: 1e11)
    rows = density.measure(peer, batch=1, repeats=1)
    assert [row["case"] for row in rows] == ["32x32, density pass, batch 1", "32x32, training step, batch 1"]
    assert all(error < 1e-5 for row in rows for error in row["error_of_loss"].values())
