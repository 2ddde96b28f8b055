"""The command line in this process."""

from __future__ import annotations

from starflow.cli import main


def fails(capsys, *arguments: str) -> str:
    """Return the single line of an error that exits with 2."""
    try:
        code = main(list(arguments))
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.startswith("starflow") and "\n" not in error
    return error
