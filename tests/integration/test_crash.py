"""A study killed at random moments has the same results as an undisturbed one."""

import random
from pathlib import Path

import pytest

from analysis.rundir import RunDir
from tests.support.crash import LATEST, check_ended, check_results, run_killed


@pytest.mark.parametrize(
    ("kills", "seed", "latest"),
    [(3, 1, 15.0), *(pytest.param(5, n, LATEST, marks=pytest.mark.full) for n in range(2, 6))],
)
def test_a_killed_study_gives_the_same_results(
    kills: int, seed: int, latest: float, tmp_path: Path
) -> None:
    rundir = RunDir(tmp_path / "killed")
    done = run_killed(rundir, kills, random.Random(seed), latest)
    assert done[0].phase != "none: it had ended", "the kills come too late on this machine"
    check_ended(rundir)
    check_results(rundir, runs=4)
