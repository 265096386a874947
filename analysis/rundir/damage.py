"""Find files of a run directory that exist but are unreadable."""

from collections.abc import Callable
from pathlib import Path

from analysis.rundir import RunDir
from analysis.rundir.errors import RunDirError
from analysis.rundir.optuna_db import read_searches
from analysis.rundir.predictions import read_predictions


def find_damage(run_dir: Path) -> tuple[str, ...]:
    """Return a sentence per damaged file other than the rows; figures that need it are omitted."""
    directory = RunDir(run_dir)
    readers: list[tuple[Path, Callable[[Path], object]]] = [
        (directory.optuna_db, read_searches),
        *((file, read_predictions) for file in sorted(directory.confirm_dir.glob("*.npz"))),
    ]
    found = []
    for file, read in readers:
        if not file.is_file():
            continue
        try:
            read(file)
        except RunDirError as error:
            found.append(f"Skipped a damaged file: {error}.")
    return tuple(found)
