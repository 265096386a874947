"""Checks of every node of a cluster before anything runs there."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ray
from ray.exceptions import RayError

from study.cluster.machines import Machines, Node
from study.cluster.remote import call_on_nodes
from study.cluster.resources import plan_resources
from study.config import ResourceOptions
from study.errors import UserError, first_line
from study.features.extract import Precision
from study.runs.node_report import NodeReport, installed_versions, report_node
from study.storage.object_store import Remote
from study.storage.probe import probed

#: Timeout for a node's answer, in seconds; the first worker of a node imports torch.
NODE_TIMEOUT = 120.0


def check_cluster(
    options: ResourceOptions,
    machines: Machines,
    place: Path | Remote,
    notify: Callable[[str], None],
) -> Precision:
    """Check that every node large enough for a trial has what runs need.

    Args:
        options: Resources of one run.
        machines: Machines of the cluster.
        place: The run directory, which this process can write to.
        notify: Called with a line if nodes differ in a way that may affect results.

    Returns:
        Precision in which all nodes compute features.

    Raises:
        UserError: Names each node that cannot run trials, and why.
    """
    resources = plan_resources(options, machines)
    large_enough = [
        node for node in machines.nodes if node.capacity(resources.cpus, resources.gpus)
    ]
    reports = inspect_nodes(large_enough, place)
    if found := describe_differences(reports):
        notify(f"Nodes differ, which may affect results: {found}.")
    native = bool(reports) and all(report.native_bf16 for report in reports.values())
    return "bf16" if native else "fp32"


def inspect_nodes(nodes: Sequence[Node], place: Path | Remote) -> dict[Node, NodeReport]:
    """Return every node's report of its packages and its access to the run directory.

    Args:
        nodes: Nodes large enough for a trial.
        place: The run directory, which this process can write to.

    Raises:
        UserError: Names each node that cannot run trials, and why.
    """
    with probed(place) as token:
        answers = call_on_nodes(nodes, report_node, place, token, seconds=NODE_TIMEOUT)
    reports = {node: report for node, report in answers.items() if isinstance(report, NodeReport)}
    problems = [
        f"{node.address}: {_explain_no_answer(error)}"
        for node, error in answers.items()
        if isinstance(error, RayError)
    ]
    problems += [
        f"{node.address}: {why}"
        for node, report in reports.items()
        if (why := _find_problem(report))
    ]
    if problems:
        if any(report.storage for report in reports.values()):
            remedy = "give a --storage that all nodes can access"
        elif any(_find_problem(report) for report in reports.values()):
            remedy = "install there what pyproject.toml pins"
        else:
            remedy = "check that Ray can start a worker there"
        raise UserError(
            f"{len(problems)} of {len(nodes)} nodes cannot run trials: {'; '.join(problems)};"
            f" {remedy}, or remove the node from the cluster."
        )
    return reports


def describe_differences(reports: Mapping[Node, NodeReport]) -> str:
    """Describe version differences between nodes; empty if there are none."""
    own = installed_versions()
    found = [
        f"{package} {version} on {node.address}, {own[package]} here"
        for node, report in reports.items()
        for package, version in report.versions.items()
        if version != own[package]
    ]
    return "; ".join(found)


def _find_problem(report: NodeReport) -> str | None:
    missing = [package for package, version in report.versions.items() if not version]
    if missing:
        return f"{' and '.join(missing)} not installed there"
    if report.unusable:
        return f"the code of runs cannot be imported there ({report.unusable})"
    return report.storage


def _explain_no_answer(error: RayError) -> str:
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"no answer within {NODE_TIMEOUT:.0f} s"
    return f"{type(error).__name__}: {first_line(error)}"
