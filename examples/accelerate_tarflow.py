"""Sample a TarFlow, take its density and train it, before and after `accelerate`.

    pip install starflow-kernels
    python examples/accelerate_tarflow.py --peer DIR

`DIR` holds transformer_flow.py of github.com/apple/ml-tarflow. Without it, the flow is the short one below. It has the
structure of that code and its names of modules, but no cache of keys and values.

Takes 6 seconds.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import starflow_kernels


class Order(nn.Module):
    """Order of the tokens of a block: that of the data, or the reverse."""

    def __init__(self, flip: bool):
        super().__init__()
        self.flip = flip

    def forward(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Change from the one order to the other."""
        return x.flip(dim) if self.flip else x


class Attention(nn.Module):
    """Causal attention with heads of 32 channels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.num_heads, self.sqrt_scale = width // 32, 32**-0.25

    def forward(self, x: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Let each token attend to the tokens up to it."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3 * self.num_heads, 32)).transpose(1, 2).chunk(3, 1)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.sqrt_scale**2 / temperature)
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each token."""
        return self.main(self.norm(x))


class Layer(nn.Module):
    """Layer of a transformer."""

    def __init__(self, width: int):
        super().__init__()
        self.attention, self.mlp = Attention(width), MLP(width)

    def forward(self, x: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Apply attention and MLP."""
        x = x + self.attention(x, temperature)
        return x + self.mlp(x)


class Block(nn.Module):
    """Flow block whose network predicts scale and shift of a token from the tokens before it."""

    def __init__(self, dim: int, width: int, tokens: int, layers: int, flip: bool):
        super().__init__()
        self.permutation, self.nvp, self.class_embed = Order(flip), True, None
        self.proj_in, self.proj_out = nn.Linear(dim, width), nn.Linear(width, 2 * dim)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(tokens, width))
        self.attn_blocks = nn.ModuleList(Layer(width) for _ in range(layers))

    def scale_and_shift(self, x: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parameters of all tokens; the first token passes unchanged."""
        h = self.proj_in(x) + self.permutation(self.pos_embed, dim=0)[: x.shape[1]]
        for layer in self.attn_blocks:
            h = layer(h, temperature)
        return F.pad(self.proj_out(h)[:, :-1], (0, 0, 1, 0)).chunk(2, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Map data to noise, all tokens at once."""
        x = self.permutation(x)
        a, b = self.scale_and_shift(x)
        return self.permutation((x - b) * (-a).exp()), -a.mean((1, 2))

    def reverse(self, x, y=None, guidance=0, guide_what="ab", attn_temp=1.0, annealed_guidance=False):
        """Map noise to data, token by token."""
        z = self.permutation(x)
        x = z.clone()
        for t in range(1, x.shape[1]):
            weight = guidance * t / (x.shape[1] - 1) if annealed_guidance else guidance
            a, b = self.scale_and_shift(x[:, : t + 1])
            if guidance:
                other_a, other_b = self.scale_and_shift(x[:, : t + 1], attn_temp)
                a, b = a + weight * (a - other_a), b + weight * (b - other_b)
            x[:, t] = z[:, t] * a[:, t].exp() + b[:, t]
        return self.permutation(x)


class Model(nn.Module):
    """Flow on images (B, C, H, W); noise is (B, T, D)."""

    def __init__(self, channels: int, size: int, patch: int, width: int, blocks: int, layers: int):
        super().__init__()
        self.size, self.patch, dim, tokens = size, patch, channels * patch**2, (size // patch) ** 2
        self.blocks = nn.ModuleList(Block(dim, width, tokens, layers, i % 2 == 1) for i in range(blocks))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Return the noise, the latents after each block, and the log-determinant per dimension."""
        x, latents, logdets = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2), [], 0.0
        for block in self.blocks:
            x, logdet = block(x)
            latents, logdets = [*latents, x], logdets + logdet
        return x, latents, logdets

    def get_loss(self, z: torch.Tensor, logdets: torch.Tensor) -> torch.Tensor:
        """Return the negative log density per dimension, without its constant."""
        return 0.5 * z.square().mean() - logdets.mean()

    def reverse(self, z: torch.Tensor) -> torch.Tensor:
        """Return images of the noise."""
        for block in reversed(self.blocks):
            z = block.reverse(z)
        return F.fold(z.transpose(1, 2), (self.size, self.size), self.patch, stride=self.patch)


def load(folder: Path | None) -> type[nn.Module]:
    """Return the class of the released model in a folder, or the one above."""
    if folder is None:
        return Model
    spec = importlib.util.spec_from_file_location("transformer_flow", folder / "transformer_flow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model


def clock(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return a result and the shorter of two times in seconds."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--peer", type=Path, help="folder of transformer_flow.py of github.com/apple/ml-tarflow")
torch.manual_seed(0)
model = load(parser.parse_known_args()[0].peer)(3, 32, 4, 128, 4, 2)
for block in model.blocks:
    nn.init.normal_(block.proj_out.weight, std=0.01)
images, noise = torch.randn(16, 3, 32, 32), torch.randn(16, 64, 48)


@torch.no_grad()
def sample() -> torch.Tensor:
    """Return images of the noise."""
    return model.reverse(noise)


@torch.no_grad()
def density() -> torch.Tensor:
    """Return the log-determinants of the images."""
    return model(images)[2]


def step() -> torch.Tensor:
    """Return the gradient of the loss with respect to all weights."""
    z, _, logdets = model(images)
    gradients = torch.autograd.grad(model.get_loss(z, logdets), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


before = [clock(run) for run in (sample, density, step)]
print(starflow_kernels.accelerate(model))
for run, (expected, slow) in zip((sample, density, step), before):
    found, fast = clock(run)
    difference = (found - expected).abs().max()
    print(f"{run.__name__}: {slow:.3f} s before, {fast:.3f} s after; largest difference {difference:.0e}")
    assert difference < 1e-5
