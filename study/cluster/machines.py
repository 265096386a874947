"""The machines available to a study's runs: this one, or the nodes of a Ray cluster."""

import math
import os
import re
import socket
from collections.abc import Container
from dataclasses import dataclass, replace

from study.errors import UserError

#: Ray's node label for the GPU type.
GPU_TYPE_LABEL = "ray.io/accelerator-type"

#: Timeout of the connection to a cluster's head, in seconds.
CONNECT_TIMEOUT = 10.0


@dataclass(frozen=True)
class Node:
    """A machine, or a node of a Ray cluster."""

    address: str
    """Host name or IP address."""
    cpus: float
    gpus: int
    gpu_type: str = ""
    """Ray's name for it; empty without a GPU."""
    node_id: str = ""
    """Ray's node ID; empty for this machine outside a cluster."""

    def capacity(self, cpus: float, gpus: float) -> int:
        """Return how many runs with these resources fit on it at once."""
        fit = math.floor(self.cpus / cpus + 1e-6)
        # A run cannot span two GPUs, so runs are counted per GPU.
        return min(fit, self.gpus * math.floor(1 / gpus + 1e-6)) if gpus else fit


@dataclass(frozen=True)
class Machines:
    """All machines of a study."""

    nodes: tuple[Node, ...]
    is_cluster: bool

    @property
    def cpus(self) -> float:
        """Total CPU cores."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Total GPUs."""
        return sum(node.gpus for node in self.nodes)

    def capacity(self, cpus: float, gpus: float) -> int:
        """Return how many runs with these resources fit at once, each on a single machine."""
        return sum(node.capacity(cpus, gpus) for node in self.nodes)

    def with_gpus(self, types: Container[str]) -> "Machines":
        """Return the machines with GPUs of these types."""
        nodes = tuple(node for node in self.nodes if node.gpus and node.gpu_type in types)
        return replace(self, nodes=nodes)

    def __str__(self) -> str:
        """Return a summary: "2 CPUs, 0 GPUs here"."""
        place = f"on {len(self.nodes)} nodes" if self.is_cluster else "here"
        return f"{self.cpus:g} CPUs, {self.gpus} GPUs {place}"


def cluster_address(given: str | None) -> str | None:
    """Return the cluster address in Ray's form; None for a local Ray.

    Args:
        given: Value of --address; None: RAY_ADDRESS decides.
    """
    address = given or os.environ.get("RAY_ADDRESS") or "local"
    return None if address == "local" else address


def check_address(option: str, address: str) -> None:
    """Check the form of a cluster address, without connecting.

    Raises:
        UserError: The address is invalid or unsupported.
    """
    if address.startswith("ray://"):
        raise UserError(
            f"{option} {address}: the Ray client is not supported, since its connection would"
            " have to last as long as the study. Submit a job instead: ray job submit --address"
            " http://HOST:8265 --working-dir . -- python run_study.py ..."
        )
    if address not in ("auto", "local") and not re.fullmatch(r".+:\d{1,5}", address):
        raise UserError(
            f"{option} {address}: give auto, local, or host:port of the cluster's head, such as"
            " head:6379."
        )


def check_reachable(given: str, address: str) -> None:
    """Check that a cluster's address accepts connections; Ray itself would retry for minutes.

    Args:
        given: The option or variable and its value, for messages.
        address: The address in Ray's form.

    Raises:
        UserError: No connection.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{given}: no connection ({error}); check with `ray status` on the head that Ray is"
            " running, and give the address that `ray start --head` printed."
        ) from None
