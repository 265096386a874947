"""What a user reads about nodes that cannot run trials."""

from pathlib import Path

import pytest
from ray.exceptions import GetTimeoutError, RayError

from study.cluster.machines import Node
from study.errors import UserError
from study.runs.node_report import NodeReport, installed_versions
from study.runs.preflight import inspect_nodes

NODE = Node("192.0.2.2", 2, 0)


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (
            GetTimeoutError("late"),
            "no answer within 120 s; check that Ray can start a worker there",
        ),
        (
            NodeReport({**installed_versions(), "torch": ""}, False, None, None),
            "torch not installed there; install there what pyproject.toml pins",
        ),
        (
            NodeReport(installed_versions(), False, None, "not the same folder"),
            "not the same folder; give a --storage that all nodes can access",
        ),
    ],
)
def test_the_remedy_fits_the_problem(
    answer: NodeReport | RayError, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's answer is a mock: a real node would keep the test waiting for two minutes."""
    monkeypatch.setattr("study.runs.preflight.call_on_nodes", lambda *_, **__: {NODE: answer})
    with pytest.raises(UserError) as refused:
        inspect_nodes([NODE], tmp_path)
    assert str(refused.value) == (
        f"1 of 1 nodes cannot run trials: 192.0.2.2: {remedy}, or remove the node from the cluster."
    )
