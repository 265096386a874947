"""The command on an autoscaling cluster that has no capacity yet."""

from pathlib import Path

import pytest

from analysis.rundir import RunDir
from tests.support.command import SMALL, run
from tests.support.servers.clusters import growing_cluster


def test_waiting_trials_make_a_cluster_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grows from a head without cores to two nodes, as requested with --max-concurrent.

    The cluster requires a token; any token will do.
    """
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    options = f"{SMALL} --space tests.support.spaces:TINY --trials 4 --epochs 3 --seeds 1"
    with growing_cluster(3, tmp_path) as address:
        refused = run(f"{options} --address {address}", tmp_path / "refused")
        assert refused.returncode == 2
        assert "set the number of runs to request with --max-concurrent" in refused.stderr
        done = run(f"{options} --address {address} --max-concurrent 2", tmp_path / "study")
    assert done.returncode == 0, done.stderr
    assert "2 at once after nodes have joined, 0 now" in done.stdout
    rundir = RunDir(tmp_path / "study")
    assert [row.state for row in rundir.read_trials()] == ["completed"] * 4
    workers = {row.worker.partition(":")[2] for row in rundir.read_epochs()}
    assert len(workers) >= 2
