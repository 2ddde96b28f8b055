"""Packages that starflow uses, and how a missing one is installed."""

from __future__ import annotations

from typing import NamedTuple


class Package(NamedTuple):
    """Name of a package on PyPI, and the extra of starflow-kernels that installs it; "" for a required package."""

    name: str
    extra: str


# By the name of the module that is imported.
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
    "lpips": Package("lpips", "lpips"),
    "gradio": Package("gradio", "demo"),
    "tensorboard": Package("tensorboard", "logging"),
    "triton": Package("triton", "gpu"),
    "flash_attn": Package("flash-attn", "flash"),
}


def install_command(package: Package) -> str:
    """Return the pip command that installs a package with starflow-kernels."""
    return f"pip install 'starflow-kernels[{package.extra}]'" if package.extra else f"pip install {package.name}"


def install_line(module: str | None) -> str | None:
    """Return one line that says which package is missing and how to install it, None for a module that is not ours."""
    package = PACKAGES.get((module or "").partition(".")[0])
    return package and f"the package {package.name} is not installed: {install_command(package)}"
