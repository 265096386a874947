"""The command on a real Ray cluster of several nodes, all of them on this machine."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from analysis.rundir import ConfirmRow, RunDir, TrialRow
from tests.clusters import ray_cluster
from tests.test_end_to_end import SMALL, run, start

TINY = f"{SMALL} --space tests.spaces:TINY"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster(4) as started:
        yield started


def trials_without_times(rundir: Path) -> list[TrialRow]:
    return [replace(row, start=0, end=0) for row in RunDir(rundir).read_trials()]


def confirm_without_times(rundir: Path) -> list[ConfirmRow]:
    return [replace(row, seconds=0) for row in RunDir(rundir).read_confirm()]


def wait_for_epochs(rundir: Path, count: int, driver: subprocess.Popen[bytes]) -> None:
    """Until the study has written down so many epochs."""
    deadline = time.monotonic() + 240
    while len(RunDir(rundir).read_epochs()) < count:
        assert driver.poll() is None, driver.stderr and driver.stderr.read().decode()
        assert time.monotonic() < deadline, "the study has not come so far"
        time.sleep(0.05)


def test_four_nodes_find_what_one_machine_finds(cluster: Cluster, tmp_path: Path) -> None:
    """With fewer trials than TPE draws at random, and no rung of ASHA, nothing depends on time."""
    options = f"{TINY} --trials 6 --epochs 3 --seeds 2"
    alone = run(options, tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    spread = run(f"{options} --address {cluster.address}", tmp_path / "spread")
    assert spread.returncode == 0, spread.stderr
    assert "4 at once (4 CPUs, 0 GPUs on 5 nodes)" in spread.stdout
    assert trials_without_times(tmp_path / "spread") == trials_without_times(tmp_path / "alone")
    assert confirm_without_times(tmp_path / "spread") == confirm_without_times(tmp_path / "alone")
    (start_record,) = RunDir(tmp_path / "spread").read_study()["starts"]
    assert [node["cpus"] for node in start_record["nodes"]].count(1) == 4


def test_a_node_that_dies_costs_its_trials_no_more_than_an_epoch(
    cluster: Cluster, tmp_path: Path
) -> None:
    victim = next(iter(cluster.worker_nodes))
    rundir = tmp_path / "study"
    driver = start(f"{TINY} --trials 6 --epochs 40 --seeds 1 --address {cluster.address}", rundir)
    wait_for_epochs(rundir, 20, driver)
    cluster.remove_node(victim, allow_graceful=False)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    trials = RunDir(rundir).read_trials()
    assert {row.state for row in trials} <= {"completed", "pruned"}
    assert any(row.attempts == 2 for row in trials)
    assert "its machine was lost; it goes on from its last state" in RunDir(rundir).log.read_text()
