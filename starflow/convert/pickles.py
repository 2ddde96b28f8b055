"""Reading of tensors from upstream .pth files. No code in a file is run, and the weights are mapped, not loaded."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from ..errors import CheckpointError

ZIP = b"PK\x03\x04"
UNCHECKED = "the file has no checksums: its bytes are not checked"


def read_pickle(path: Path, contiguous: bool = True) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors of a state dict, mapped from the file, and the checks that passed, in words.

    Args:
        path: .pth file.
        contiguous: refuse tensors that are not contiguous.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, is no state dict, or holds more than tensors.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; where it is a distributed checkpoint, write one file of it first with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    checks = []
    try:
        with open(path, "rb") as file:
            zipped = file.read(len(ZIP)) == ZIP
        # Files from torch before 1.6 are not archives and cannot be mapped.
        checks.append(_check_archive(path) if zipped else UNCHECKED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} is refused: loading it would call {wanted[1]}, and weights need no such call"
            ) from None
        # Leave out the rest of the message, which advises the user to trust the file.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise CheckpointError(f"{path} is not a checkpoint of torch: {_line(reason)}") from None
    except Exception as error:
        # A damaged pickle can raise any type of error.
        raise CheckpointError(f"{path} is damaged or not a checkpoint of torch: {_line(error)}") from None
    _check_state(path, state, contiguous)
    return dict(state), [*checks, "the file holds tensors alone and was read with weights_only"]


def _line(error: Exception | str) -> str:
    """Return the start of a message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _check_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise zipfile.BadZipFile("compressed, which torch never is")
            if not any(record.CRC for record in records if "/data/" in record.filename):
                return UNCHECKED
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {_line(error)}") from None
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of its record {damaged} differs")
    return f"checksums of {len(records)} records"


def _check_state(path: Path, state: object, contiguous: bool) -> None:
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds no weights but a {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise CheckpointError(f"{path} is no state dict of a model: {str(name)[:80]!r} is a {kind}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is not a dense tensor")
        if contiguous and not tensor.is_contiguous():
            raise CheckpointError(f"{path}: {name} is not contiguous")
