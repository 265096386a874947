"""Function calls on every node of Ray."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from study.cluster.machines import GPU_TYPE_LABEL, Node

Answer = TypeVar("Answer")


def live_nodes() -> list[Node]:
    """Return the nodes that are alive, sorted by address."""
    found = [
        Node(
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            int(node["Resources"].get("GPU", 0)),
            node["Labels"].get(GPU_TYPE_LABEL, ""),
            node["NodeID"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (node.address, node.node_id))


def call_on_nodes(
    nodes: Sequence[Node], function: Callable[..., Answer], *arguments: Any, seconds: float
) -> dict[Node, Answer | RayError]:
    """Call a function on every node, regardless of what else runs there.

    Args:
        nodes: The nodes.
        function: The function.
        arguments: Its arguments.
        seconds: How long to wait for all answers.

    Returns:
        The answer or error of each node; GetTimeoutError if it did not answer in time.
    """
    task = ray.remote(function)
    pending = {
        node: task.options(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node)).remote(
            *arguments
        )
        for node in nodes
    }
    ray.wait(list(pending.values()), num_returns=len(pending), timeout=seconds)
    answers: dict[Node, Answer | RayError] = {}
    for node, answer in pending.items():
        try:
            answers[node] = ray.get(answer, timeout=0)
        except RayError as error:
            answers[node] = error
    return answers


def on_node(node: Node) -> NodeAffinitySchedulingStrategy | str:
    """Return the scheduling strategy that runs a task on this node."""
    if not node.node_id:
        return "DEFAULT"
    return NodeAffinitySchedulingStrategy(node.node_id, soft=False)
