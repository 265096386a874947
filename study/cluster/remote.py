"""A question to every machine that Ray has, which each answers for itself."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from study.cluster.machines import GPU_TYPE_LABEL, Node

Answer = TypeVar("Answer")


def live_nodes() -> list[Node]:
    """The machines that Ray has now, in the order of their addresses."""
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
    nodes: Sequence[Node], question: Callable[..., Answer], *arguments: Any, seconds: float
) -> dict[Node, Answer | RayError]:
    """Call a function on every node, beside whatever runs there.

    Args:
        nodes: Which.
        question: The function.
        arguments: Its arguments.
        seconds: How long to wait for the last answer.

    Returns:
        What each node answers; a GetTimeoutError where there is no answer in time.
    """
    task = ray.remote(question)
    asked = {
        node: task.options(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node)).remote(
            *arguments
        )
        for node in nodes
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
    answers: dict[Node, Answer | RayError] = {}
    for node, answer in asked.items():
        try:
            answers[node] = ray.get(answer, timeout=0)
        except RayError as error:
            answers[node] = error
    return answers


def on_node(node: Node) -> NodeAffinitySchedulingStrategy | str:
    """Ray's way to send a task to a certain node."""
    if not node.node_id:
        return "DEFAULT"
    return NodeAffinitySchedulingStrategy(node.node_id, soft=False)
