"""The command on a cluster that has no room yet, and grows with what is asked for."""

from pathlib import Path

import pytest

from analysis.rundir import RunDir
from tests.support.command import SMALL, run
from tests.support.servers.clusters import growing_cluster


def test_trials_that_wait_make_a_cluster_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a head without cores to two nodes, as many as --max-concurrent asks for.

    The cluster wants a token; that there is one is enough.
    """
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    options = f"{SMALL} --space tests.support.spaces:TINY --trials 4 --epochs 3 --seeds 1"
    with growing_cluster(3, tmp_path) as address:
        refused = run(f"{options} --address {address}", tmp_path / "refused")
        assert refused.returncode == 2
        assert "say with --max-concurrent for how many runs to ask" in refused.stderr
        done = run(f"{options} --address {address} --max-concurrent 2", tmp_path / "study")
    assert done.returncode == 0, done.stderr
    assert "2 at once once nodes have joined, 0 now" in done.stdout
    rundir = RunDir(tmp_path / "study")
    assert [row.state for row in rundir.read_trials()] == ["completed"] * 4
    workers = {row.worker.partition(":")[2] for row in rundir.read_epochs()}
    assert len(workers) >= 2
