"""Flows of other packages before and after `accelerate`: same weights, same noise, one process.

    pip install 'starflow-kernels[adapters,models]'
    python -m benchmarks.cpu.accelerate --peer DIR --json benchmarks/results/accelerate_cpu.json

Five autoregressive transforms of zuko, nflows, normflows and Pyro over the 64 pixels of scikit-learn's digits, after a
short training, in their slow direction. With the folder of transformer_flow.py of github.com/apple/ml-tarflow, also its
model on 32x32 images; with that of github.com/apple/ml-starflow, which must be on PYTHONPATH too, its text-conditional
model on latents, with guidance; both with random weights. Times are medians of runs in turns. Errors are largest
differences from the package's own result in float64; that of the package in float32 stands beside ours.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from starflow.data.datasets import DataConfig, dequantize, load
from starflow_kernels import accelerate

from ..command import benchmark
from ..peers.released import load_peer, median_seconds, timed

D, TRANSFORMS, HIDDEN, BATCH = 64, 5, 64, 256
AGREEMENT = 1e-5


class Zuko(nn.Module):
    """A flow of zuko; the slow direction is sampling."""

    def __init__(self, kind: str) -> None:
        import zuko

        super().__init__()
        self.flow = getattr(zuko.flows, kind)(D, transforms=TRANSFORMS)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return -self.flow().log_prob(x).mean()

    def slow(self, z: torch.Tensor) -> torch.Tensor:
        return self.flow().transform.inv(z)


class Nflows(nn.Module):
    """Transforms of nflows, with reversed order in between; the slow direction is sampling."""

    def __init__(self, kind: str, **options) -> None:
        from nflows import transforms

        super().__init__()
        each = getattr(transforms, f"Masked{kind}AutoregressiveTransform")
        parts = [p for _ in range(TRANSFORMS) for p in (each(D, HIDDEN, **options), transforms.ReversePermutation(D))]
        self.transform = transforms.CompositeTransform(parts)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        z, logdet = self.transform(x)
        return (z.square().sum(1) / 2 - logdet).mean()

    def slow(self, z: torch.Tensor) -> torch.Tensor:
        return self.transform.inverse(z)[0]


class Normflows(nn.Module):
    """Transforms of normflows; the slow direction of MAF is the density, so it is trained on its own samples."""

    def __init__(self) -> None:
        import normflows

        super().__init__()
        self.flows = nn.ModuleList(normflows.flows.MaskedAffineAutoregressive(D, HIDDEN) for _ in range(TRANSFORMS))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        logdets = 0.0
        for flow in self.flows:
            x, logdet = flow(x)
            logdets = logdets + logdet
        return (x.square().sum(1) / 2 - logdets).mean()

    def slow(self, z: torch.Tensor) -> torch.Tensor:
        for flow in reversed(self.flows):
            z, _ = flow.inverse(z)
        return z


class Pyro(nn.Module):
    """Affine transforms of Pyro, trained on data as the fast direction; the slow one is the inverse."""

    def __init__(self) -> None:
        from pyro.distributions.transforms import affine_autoregressive

        super().__init__()
        self.flows = nn.ModuleList(affine_autoregressive(D, [HIDDEN, HIDDEN]) for _ in range(TRANSFORMS))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        logdets = 0.0
        for flow in self.flows:
            y = flow(x)
            logdets, x = logdets + flow.log_abs_det_jacobian(x, y), y
            # Copies of the flow have no part of this graph.
            flow._cached_x_y, flow._cached_log_scale = (None, None), None
        return (x.square().sum(1) / 2 - logdets).mean()

    def slow(self, z: torch.Tensor) -> torch.Tensor:
        for flow in reversed(self.flows):
            # A new object, which the cache of the transform does not know.
            z = flow.inv(z.clone())
        return z


FLOWS: dict[str, Callable[[], nn.Module]] = {
    "zuko MAF": lambda: Zuko("MAF"),
    "zuko NSF": lambda: Zuko("NSF"),
    "nflows MAF": lambda: Nflows("Affine"),
    "nflows NSF": lambda: Nflows("PiecewiseRationalQuadratic", tails="linear", tail_bound=5.0),
    "normflows MAF": Normflows,
    "Pyro IAF": Pyro,
}


def train(name: str, steps: int) -> nn.Module:
    """Return a flow that is trained on digits."""
    torch.manual_seed(0)
    part = load(DataConfig("digits"))[0]
    images = torch.stack([part.fetch(i) for i in range(len(part))]).flatten(1)
    flow, random = FLOWS[name](), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=random)
        loss = flow.loss(dequantize(images[rows], 17, 0, random))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
    return flow.eval().requires_grad_(False)


def compare(name: str, flow: nn.Module, batch: int, repeats: int) -> dict:
    """Return the row of a flow and a batch size."""
    z = torch.randn(batch, D, generator=torch.Generator().manual_seed(batch))
    fast, wide = copy.deepcopy(flow), copy.deepcopy(flow).double()
    report = accelerate(fast)
    assert len(report.accelerated) == TRANSFORMS, str(report)
    # The inverse of Pyro has the default dtype.
    torch.set_default_dtype(torch.float64)
    exact, fast_wide = wide.slow(z.double()), copy.deepcopy(fast).double().slow(z.double())
    torch.set_default_dtype(torch.float32)
    seconds: dict[str, list[float]] = {"library": [], "accelerated": []}
    for _ in range(repeats):
        for way, model in (("library", flow), ("accelerated", fast)):
            seconds[way].append(timed(lambda model=model: model.slow(z))[1])
    median = {way: statistics.median(values) for way, values in seconds.items()}
    scale = exact.abs().max().clamp(min=1)
    difference = ((fast_wide - exact).abs().max() / scale).item()
    assert difference < 1e-6, f"{name}: results differ by {difference}"
    return {
        "case": f"{name}, batch {batch}",
        "milliseconds": {way: 1e3 * value for way, value in median.items()},
        "ratio": median["library"] / median["accelerated"],
        "difference_float64": difference,
        "error": ((fast.slow(z) - exact).abs().max() / scale).item(),
        "error_library": ((flow.slow(z) - exact).abs().max() / scale).item(),
    }


def compare_released(case: str, run: Callable, model: nn.Module, fast: nn.Module, repeats: int) -> dict:
    """Return the row of a case that `run` runs with a model."""
    expected, found = run(model).clone(), run(fast).clone()
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference < AGREEMENT, f"{case}: results differ by {difference}"
    ways = {"library": model, "accelerated": fast}
    median = {way: median_seconds(functools.partial(run, each), repeats) for way, each in ways.items()}
    return {
        "case": case,
        "milliseconds": {way: 1e3 * value for way, value in median.items()},
        "ratio": median["library"] / median["accelerated"],
        "difference": difference,
    }


def tarflow(folder: Path, batch: int, repeats: int) -> list[dict]:
    """Return the rows of the released model on 32x32 images: sampling, density and a training step."""
    torch.manual_seed(0)
    model = load_peer(folder).Model(3, 32, 2, 128, 4, 4).eval()
    for block in model.blocks:
        nn.init.normal_(block.proj_out.weight, std=1e-2)
    fast = copy.deepcopy(model)
    assert len(accelerate(fast).accelerated) == len(model.blocks)
    z, x = torch.randn(batch, 256, 12), torch.randn(batch, 3, 32, 32)

    def sample(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.reverse(z.clone())

    def density(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(x)[0]

    def step(model: nn.Module) -> torch.Tensor:
        model.zero_grad()
        z, _, logdets = model(x)
        model.get_loss(z, logdets).backward()
        return model.blocks[0].proj_in.weight.grad

    rows = []
    for name, run in {"sampling": sample, "density": density, "training step": step}.items():
        rows.append(compare_released(f"ml-tarflow 32x32, {name}, batch {batch}", run, model, fast, repeats))
    return rows


def starflow(folder: Path, channels: int, size: int, repeats: int) -> dict:
    """Return the row of the released text-conditional model: guided samples of batch 1 on size x size latents."""
    torch.manual_seed(0)
    model = load_peer(folder).Model(
        in_channels=4, img_size=size, patch_size=1, channels=channels, num_blocks=4, layers_per_block=[2, 2, 2, 6],
        rope=True, hf_style_rope=True, pt_seq_len=size, sos=True, txt_size=16, txt_dim=64, cond_top_only=True,
        use_softplus=True, soft_clip=4.0, seq_order="L2R", norm_type="rms_norm", use_final_norm=True, use_swiglu=True,
        use_qk_norm=True, use_post_norm=True, use_bias=False, num_heads=channels // 64, num_kv_heads=channels // 128,
    ).eval()  # fmt: skip
    with torch.no_grad():  # some of the weights are zero
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape))
    fast = copy.deepcopy(model)
    assert {f"blocks.{i}" for i in range(len(model.blocks))} <= {part.name for part in accelerate(fast).accelerated}
    z, text = torch.randn(1, 4, size, size), torch.randn(1, 16, 64)
    both = torch.cat([text, torch.zeros_like(text)])

    def sample(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(z.clone(), both, reverse=True, guidance=2.0)

    case = f"ml-starflow, {channels} channels, {size * size} tokens, guided sampling, batch 1"
    return compare_released(case, sample, model, fast, repeats)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flows", nargs="*", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--peer", type=Path, help="folder with the released transformer_flow.py of TarFlow")
    parser.add_argument("--starflow", type=Path, help="folder with the released transformer_flow.py of STARFlow")
    parser.add_argument("--batch", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--steps", type=int, default=300, help="training steps of each flow")
    parser.add_argument("--repeats", type=int, default=3)


def results(args: argparse.Namespace) -> dict:
    rows = []
    for name in args.flows:
        flow = train(name, args.steps)
        for batch in args.batch:
            rows.append(compare(name, flow, batch, args.repeats))
            print(rows[-1], flush=True)
    for batch in (1, 16) if args.peer else ():
        rows += tarflow(args.peer, batch, args.repeats)
    for channels, size in ((128, 8), (256, 16)) if args.starflow else ():
        rows.append(starflow(args.starflow, channels, size, args.repeats))
    return {"rows": rows}


main = benchmark(__doc__, results, options)


if __name__ == "__main__":
    main()
