"""What is read from a run directory: frames, statistics, tables, figures and the report."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.frames import StudyFrames


def load(run_dir: str | PathLike[str]) -> "StudyFrames":
    """A study as tidy pandas frames.

    Args:
        run_dir: Its run directory.

    Returns:
        `epochs`, `trials` and `confirm`, a row per epoch, trial and confirmation run, with the
        columns that `analysis.rundir` describes, and `record`, which is study.json.

    Raises:
        RunDirError: It is no run directory, or a file in it cannot be read.
    """
    # pandas takes a second to import, which whoever needs the layout only need not wait for.
    from analysis.frames import load_frames

    return load_frames(Path(run_dir))
