"""Packages that starflow uses, and how to install a missing one."""

from __future__ import annotations

from typing import NamedTuple


class Package(NamedTuple):
    """Name of a package on PyPI, and the extra of starflow-kernels that installs it; "" for a required package."""

    name: str
    extra: str


# Name of the imported module -> package.
PACKAGES = {
    "torch": Package("torch", ""),
    "numpy": Package("numpy", ""),
    "safetensors": Package("safetensors", ""),
    "yaml": Package("PyYAML", ""),
    "tqdm": Package("tqdm", ""),
    "PIL": Package("Pillow", ""),
    "sklearn": Package("scikit-learn", "models"),
    "accelerate": Package("accelerate", "models"),
    "diffusers": Package("diffusers", "models"),
    "transformers": Package("transformers", "models"),
    "emoji": Package("emoji", "emoji"),
    "lpips": Package("lpips", "lpips"),
    "torch_fidelity": Package("torch-fidelity", "fid"),
    "gradio": Package("gradio", "demo"),
    "tensorboard": Package("tensorboard", "logging"),
    "datasets": Package("datasets", "data"),
    "matplotlib": Package("matplotlib", "plot"),
    "wandb": Package("wandb", "logging"),
    "triton": Package("triton", "gpu"),
    "flash_attn": Package("flash-attn", "flash"),
}


def install_command(package: Package) -> str:
    """Return the pip command that installs a package, through the extra of starflow-kernels if it has one."""
    return f"pip install 'starflow-kernels[{package.extra}]'" if package.extra else f"pip install {package.name}"


def install_line(module: str | None) -> str | None:
    """Return a line that says which package is missing and how to install it, None for a module not in PACKAGES."""
    package = PACKAGES.get((module or "").partition(".")[0])
    return package and f"the package {package.name} is not installed: {install_command(package)}"
