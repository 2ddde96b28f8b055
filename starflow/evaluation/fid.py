"""FID, KID, inception score, precision and recall of image files, computed by torch-fidelity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.crops import read_image
from ..data.folders import image_files
from ..errors import DataError
from ..io.digests import digest
from ..io.files import located
from ..io.images import open_image
from ..sampling.ledger import LEDGER
from ..sampling.many import ProgressBar
from ..sampling.processes import Processes
from .statistics import Moments, Statistics

# Images per call of the network. The batches do not depend on the processes, so neither do the features.
BATCH = 32
# Threads that read image files.
READERS = 4
# Larger sets keep mean and covariance alone: the features of this many images take 1.6 GB.
MOST_KEPT = 200_000
KID_SUBSET = 1000
KID_SUBSETS = 100
SPLITS = 10
NEIGHBORS = 3
# Rows of a matrix of distances that are in memory at once.
DISTANCE_ROWS = 2000

# Maps uint8 images (N, 3, H, W) to features (N, D) and logits (N, K), or None for no logits, on the CPU.
Network = Callable[[torch.Tensor], "tuple[torch.Tensor, torch.Tensor | None]"]


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a set of images.

    Args:
        statistics: mean and covariance of all features.
        values: (N, D) float32 features; None for more than MOST_KEPT images.
        logits: (N, K) float32 logits; None for more than MOST_KEPT images, or a network without logits.
        size: height and width of the images.
        digest: SHA-256 of the pixels of all images.
        shares: images per process.
    """

    statistics: Statistics
    values: torch.Tensor | None
    logits: torch.Tensor | None
    size: tuple[int, int]
    digest: str
    shares: list[int]


def images_below(folder: Path) -> list[Path]:
    """Return the image files in a folder and in folders below, sorted; a folder of samples has those of its ledger.

    Raises:
        DataError: there is no folder, or there are fewer than two images in it.
    """
    if not folder.is_dir():
        raise DataError(f"no folder of images at {located(folder)}")
    if (folder / LEDGER).exists():
        # A grid of the samples may lie beside them.
        files = sorted(folder.glob("[0-9]*.png"))
    else:
        files = sorted(path for paths in image_files(folder, flat=True).values() for path in paths)
    if not files:
        raise DataError(f"no images in {folder}: expected .png, .jpg, .webp or other image files")
    if len(files) < 2:
        raise DataError(f"{folder}: one image, a covariance takes at least 2")
    return files


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image file in pixels."""
    height, width = read_rgb(path).shape[1:]
    return height, width


def extract(files: Sequence[Path], network: Network, dims: int, name: str, size: int | None = None) -> Features | None:
    """Compute the features of image files.

    Under torchrun every process calls this function and computes its part of the batches. The result is the same for
    any number of processes.

    Args:
        files: the image files, all of one size.
        network: the network.
        dims: number of features D.
        name: name of the images for messages.
        size: side in pixels to scale and crop the images to; None takes them as they are.

    Returns:
        The features on rank 0, None on the other processes.

    Raises:
        DataError: a file is unreadable or of another size, a feature is not finite, or there are fewer than two files.
    """
    processes, keep = Processes(), len(files) <= MOST_KEPT
    first, moments, rows, digests = files[0], Moments(dims), [], []
    values: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    shape = read_rgb(first, size).shape[1:]
    starts = range(0, len(files), BATCH)[processes.rank :: processes.count]

    def read(path: Path) -> torch.Tensor:
        image = read_rgb(path, size)
        if image.shape[1:] != shape:
            raise DataError(f"{path}: {image.shape[2]}x{image.shape[1]} pixels, but {first} has {shape[1]}x{shape[0]}")
        return image

    with ThreadPoolExecutor(READERS) as readers, ProgressBar(len(files), hidden=processes.rank > 0) as bar:
        for start in starts:
            batch = files[start : start + BATCH]
            images = torch.stack(list(readers.map(read, batch)))
            found, batch_logits = network(images)
            if not found.isfinite().all():
                bad = batch[int(found.isfinite().all(1).logical_not().nonzero()[0])]
                raise DataError(f"{bad}: the features of the image are not finite")
            moments.add(found)
            rows.extend(range(start, start + len(batch)))
            digests.extend(digest(image.numpy().tobytes()) for image in images)
            if keep:
                values.append(found)
                logits.extend([] if batch_logits is None else [batch_logits])
            if (progress := bar.of_batch(start, len(batch))) is not None:
                progress(1, 1)
    gathered = processes.collect((rows, digests, moments, values, logits))
    if gathered is None:
        return None
    order = torch.tensor([row for part in gathered for row in part[0]], dtype=torch.int64, device="cpu").argsort()
    ordered = [digests for part in gathered for digests in part[1]]
    kept, kept_logits = (
        torch.cat(tensors)[order] if (tensors := [each for part in gathered for each in part[column]]) else None
        for column in (3, 4)
    )
    return Features(
        sum((part[2] for part in gathered), Moments(dims)).statistics(name),
        kept,
        kept_logits,
        tuple(shape),
        digest("".join(ordered[i] for i in order.tolist()).encode()),
        [len(part[0]) for part in gathered],
    )


def image_scores(evaluated: Features, reference: Features | Statistics | None) -> dict[str, Any]:
    """Return the scores of images.

    Args:
        evaluated: features of the images.
        reference: features of the reference images, or their mean and covariance, which are enough for FID; None gives
            the inception score alone.

    Returns:
        "fid"; "kid" and "inception_score", each with mean, standard deviation and settings; "precision" and "recall" of
        Kynkaanniemi et al. (arXiv 1904.06991) on the same features; "not_measured", the reason by name.

    Raises:
        DataError: the statistics allow no FID.
    """
    scores: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    fake, real = evaluated.values, reference.values if isinstance(reference, Features) else None
    too_many = f"more than {MOST_KEPT} images, whose features are not kept"
    if reference is not None:
        other = reference if isinstance(reference, Statistics) else reference.statistics
        scores["fid"] = _fid(evaluated.statistics, other)
    if fake is not None and real is not None:
        scores["kid"] = _kid(fake, real)
        if min(len(fake), len(real)) > NEIGHBORS:
            scores |= _precision_and_recall(fake, real)
        else:
            reasons |= dict.fromkeys(("precision", "recall"), f"more than {NEIGHBORS} images of each kind are needed")
    else:
        needed = "a folder as reference is needed, with features of each image"
        reason = too_many if isinstance(reference, Features) else needed
        reasons |= dict.fromkeys(("kid", "precision", "recall"), reason)
    if evaluated.logits is None:
        reasons["inception_score"] = too_many if fake is None else "it is defined for the layer 2048 alone"
    elif len(evaluated.logits) < SPLITS:
        reasons["inception_score"] = f"at least {SPLITS} images are needed"
    else:
        scores["inception_score"] = _inception_score(evaluated.logits)
    return {**scores, "not_measured": reasons}


def _fid(fake: Statistics, real: Statistics) -> float:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    pair = [{"mu": each.mean, "sigma": each.covariance} for each in (fake, real)]
    try:
        return fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]
    except np.linalg.LinAlgError as error:
        raise DataError(f"FID: {error}") from None


def _kid(fake: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET, len(fake), len(real))
    found = kid_features_to_metric(fake, real, kid_subset_size=size, kid_subsets=KID_SUBSETS, verbose=False)
    mean, deviation = found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]
    return {"mean": mean, "standard_deviation": deviation, "subset_size": size, "subsets": KID_SUBSETS}


def _precision_and_recall(fake: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(
        fake, real, prc_neighborhood=NEIGHBORS, prc_batch_size=DISTANCE_ROWS, save_cpu_ram=True, verbose=False
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


def _inception_score(logits: torch.Tensor) -> dict[str, float]:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, SPLITS)
    return {"mean": found[KEY_METRIC_ISC_MEAN], "standard_deviation": found[KEY_METRIC_ISC_STD], "splits": SPLITS}


def read_rgb(path: Path, size: int | None = None) -> torch.Tensor:
    """Return a uint8 image (3, H, W), scaled and cropped to a square of side `size` unless that is None."""
    if size is not None:
        return read_image(path, size, resize=True)
    return torch.from_numpy(np.asarray(open_image(path)).copy()).permute(2, 0, 1)
