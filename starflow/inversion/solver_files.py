"""A calibration beside the weights that it was measured on: solvers.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, StarflowError
from ..io.files import write_text
from ..models.config import FlowConfig
from .solvers import METHODS, BlockMeasurement, Calibration, Conditions, Measurement, Trial

SETTINGS = "solvers.json"
VERSION = 1


def save_calibration(calibration: Calibration | None, folder: Path) -> None:
    """Write a calibration into a checkpoint folder; None removes one of other weights."""
    path = Path(folder) / SETTINGS
    if calibration is not None:
        write_text(path, json.dumps({"version": VERSION, **dataclasses.asdict(calibration)}, indent=1) + "\n")
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StarflowError(f"cannot remove {path}: {error.strerror}") from None


def read_calibration(folder: Path, config: FlowConfig) -> Calibration | None:
    """The calibration of a checkpoint folder, None where it has none.

    Raises CheckpointError for a file that is damaged, or is that of a flow of another shape.
    """
    path = Path(folder) / SETTINGS
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text())
        if settings["version"] != VERSION:
            raise ValueError(f"version {settings['version']!r}, this is for {VERSION}")
        measurements = tuple(_measurement(fields) for fields in settings["measurements"])
        calibration = Calibration(tuple(settings["grid"]), settings["token_dim"], measurements)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a calibration ({reason}): delete it and calibrate again") from None
    shape = len(config.layers), config.grid, config.token_dim
    for measurement in measurements:
        found = len(measurement.blocks), calibration.grid, calibration.token_dim
        if found != shape:
            raise CheckpointError(
                f"{path} is of another flow, (blocks, grid, token_dim) {found} where this one has {shape}: delete it "
                "and calibrate again"
            )
    return calibration


def _measurement(fields: dict[str, Any]) -> Measurement:
    conditions, blocks = Conditions(**fields["conditions"]), []
    if conditions.batch_size < 1 or conditions.guidance < 0:
        raise ValueError(f"batch_size {conditions.batch_size}, guidance {conditions.guidance}")
    for i, block in enumerate(fields["blocks"]):
        trials = tuple(Trial(**{**trial, "neighbours": tuple(trial["neighbours"])}) for trial in block["trials"])
        measured = BlockMeasurement(trials, block["chosen"])
        if not isinstance(measured.chosen, int) or not 0 <= measured.chosen < len(trials):
            raise ValueError(f"block {i} chooses {measured.chosen} of {len(trials)} solvers")
        if trials[0].method != METHODS[0] or measured.choice.seconds is None:
            raise ValueError(f"block {i} has no time of the sequential solver and of its choice")
        measured.solver(conditions.tol)
        blocks.append(measured)
    return Measurement(conditions, fields["machine"], tuple(blocks))
