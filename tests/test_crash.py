"""A study that is killed at random moments ends as one that was left alone (see tests/crash.py)."""

import random
from pathlib import Path

import pytest

from analysis.rundir import RunDir
from tests.crash import check_ended, check_results, run_killed


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(3, 1), *(pytest.param(5, seed, marks=pytest.mark.full) for seed in range(2, 6))],
)
def test_a_killed_study_ends_as_it_would_have(kills: int, seed: int, tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "killed")
    done = run_killed(rundir, kills, random.Random(seed))
    assert all(kill.phase != "none: it had ended" for kill in done), "choose another seed"
    check_ended(rundir)
    check_results(rundir, runs=4)
