"""A study on all 60,000 images: `pytest -m full`, about 20 minutes on 2 cores."""

from pathlib import Path

import pytest

from analysis.frames import load_frames
from tests.support.command import run


@pytest.mark.full
def test_a_study_at_32_pixels_reaches_68_per_cent(tmp_path: Path) -> None:
    """The better of the two settings, on average over the confirmation runs."""
    done = run("--trials 20 --seeds 3 --image-size 32", tmp_path / "full")
    assert done.returncode == 0, done.stderr
    confirm = load_frames(tmp_path / "full").confirm
    assert confirm.groupby("setting")["test_accuracy"].mean().max() >= 0.68
