"""Analyse a run directory: frames, statistics, tables, figures and the report."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.frames import StudyFrames


def load(run_dir: str | PathLike[str]) -> "StudyFrames":
    """Load a study as tidy pandas frames.

    Args:
        run_dir: The study's run directory.

    Returns:
        `epochs`, `trials` and `confirm` with one row per epoch, trial and confirmation run, whose
        columns `analysis.rundir` describes, and `record`, the content of study.json.

    Raises:
        RunDirError: Not a run directory, or a file in it is unreadable.
    """
    # pandas takes a second to import; code that needs only the layout should not wait for it.
    from analysis.frames import load_frames

    return load_frames(Path(run_dir))
