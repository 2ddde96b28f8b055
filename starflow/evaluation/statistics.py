"""Mean and covariance of image features: their sums over batches, and files of several programs that hold them."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ..convert.pickles import read_pickle
from ..errors import CheckpointError, DataError
from ..io.files import located, write_atomically

# Tensors of torchmetrics' FrechetInceptionDistance, which upstream's *_fid_stats.pth hold.
SUM = "real_features_sum"
PRODUCTS = "real_features_cov_sum"
COUNT = "real_features_num_samples"
TORCH_SUFFIXES = (".pth", ".pt")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64, with the divisor N - 1.
        images: number of images N; None if a file does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    images: int | None

    @property
    def dims(self) -> int:
        """Number of features."""
        return len(self.mean)

    def save(self, path: Path) -> None:
        """Write an .npz file with mu and sigma, as ADM's evaluation reads it, and with the number of images."""

        def write(temporary: Path) -> None:
            # Given a path, numpy would add a suffix to it.
            with open(temporary, "wb") as file:
                np.savez(file, mu=self.mean, sigma=self.covariance, **images)

        images = {} if self.images is None else {"images": np.array(self.images, dtype=np.int64)}
        write_atomically(path, write)


class Moments:
    """Sums of features and of their products, in float64.

    Args:
        dims: number of features D.
    """

    def __init__(self, dims: int):
        self.count = 0
        self.sum = torch.zeros(dims, dtype=torch.float64, device="cpu")
        self.products = torch.zeros(dims, dims, dtype=torch.float64, device="cpu")

    def add(self, features: torch.Tensor) -> None:
        """Add the features (N, D) of a batch."""
        features = features.double()
        self.count += len(features)
        self.sum += features.sum(0)
        self.products += features.T @ features

    def __add__(self, other: Moments) -> Moments:
        """Return the sums over both sets of images."""
        result = Moments(len(self.sum))
        result.count = self.count + other.count
        result.sum, result.products = self.sum + other.sum, self.products + other.products
        return result

    def statistics(self, name: str) -> Statistics:
        """Return mean and covariance.

        Args:
            name: name of the images for the message.

        Raises:
            DataError: there are fewer than two images.
        """
        if self.count < 2:
            raise DataError(f"{name}: number of images {self.count}, a covariance takes at least 2")
        mean = self.sum / self.count
        covariance = (self.products - self.count * mean.outer(mean)) / (self.count - 1)
        return Statistics(mean.numpy(), covariance.numpy(), self.count)


def read_statistics(path: Path, dims: int) -> Statistics:
    """Read mean and covariance from a file.

    Args:
        path: .npz with mu and sigma, as ADM and `Statistics.save` write it, or .pth with the state of torchmetrics'
            FrechetInceptionDistance, as the TarFlow code writes it.
        dims: expected number of features.

    Raises:
        DataError: the file is missing, damaged, of another kind, or has another number of features.
    """
    if not path.is_file():
        raise DataError(f"no file of statistics at {located(path)}")
    read = _read_torch if path.suffix in TORCH_SUFFIXES else _read_npz
    found = read(path)
    if found.mean.shape != (dims,) or found.covariance.shape != (dims, dims):
        raise DataError(
            f"{path}: mean of shape {found.mean.shape} and covariance of shape {found.covariance.shape}, expected "
            f"{dims} features"
        )
    if not (np.isfinite(found.mean).all() and np.isfinite(found.covariance).all()):
        raise DataError(f"{path}: values are not finite")
    if found.images is not None and found.images < 2:
        raise DataError(f"{path}: number of images {found.images}, a covariance takes at least 2")
    return found


def _read_npz(path: Path) -> Statistics:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if missing := [name for name in ("mu", "sigma") if name not in arrays]:
                names = ", ".join(sorted(arrays)[:10]) or "nothing"
                raise DataError(f"{path}: no {' and '.join(missing)} in it, but {names}")
            mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
            return Statistics(mean, covariance, int(arrays["images"]) if "images" in arrays else None)
    except DataError:
        raise
    # A file that is no archive, a damaged one, and arrays of objects raise errors of several types.
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not an .npz file with mu and sigma ({' '.join(str(error).split())[:160]})") from None


def _read_torch(path: Path) -> Statistics:
    try:
        state, _ = read_pickle(path, contiguous=False)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    if missing := [name for name in (SUM, PRODUCTS, COUNT) if name not in state]:
        raise DataError(f"{path}: no {' and '.join(missing)} in it, so it is no state of FrechetInceptionDistance")
    if state[COUNT].numel() != 1:
        raise DataError(f"{path}: {COUNT} is not one number")
    moments = Moments(0)
    moments.count = int(state[COUNT])
    moments.sum, moments.products = state[SUM].double(), state[PRODUCTS].double()
    if moments.sum.ndim != 1 or moments.products.shape != 2 * moments.sum.shape:
        raise DataError(
            f"{path}: {SUM} of shape {tuple(moments.sum.shape)} and {PRODUCTS} of shape "
            f"{tuple(moments.products.shape)} do not go together"
        )
    return moments.statistics(str(path))
