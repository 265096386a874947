"""Real Ray clusters on this machine: every node has processes of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster


@contextmanager
def ray_cluster(nodes: int, **resources: Any) -> Iterator[Cluster]:
    """A head that runs nothing, and so many nodes of one core each.

    Args:
        nodes: Beside the head.
        resources: Of each node, as `Cluster.add_node` takes them.
    """
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(nodes):
            cluster.add_node(wait=False, **{"num_cpus": 1, **resources})
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()
