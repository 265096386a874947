"""The machines that a study's runs may use: this one, or the nodes of a Ray cluster."""

import math
import os
import re
import socket
from collections.abc import Container
from dataclasses import dataclass, replace

from study.errors import UserError

#: The label in which Ray says what GPUs a node has.
GPU_TYPE_LABEL = "ray.io/accelerator-type"

#: Seconds within which the head of a cluster must take a connection.
CONNECT_TIMEOUT = 10.0


@dataclass(frozen=True)
class Node:
    """A machine, or what a Ray cluster takes for one."""

    address: str
    """Its host name or IP address."""
    cpus: float
    gpus: int
    gpu_type: str = ""
    """As Ray names it; empty where there is no GPU."""
    node_id: str = ""
    """Ray's; empty for this machine without a cluster."""

    def room(self, cpus: float, gpus: float) -> int:
        """How many runs that take so much fit on it at once."""
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
        """CPU cores in all."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return sum(node.gpus for node in self.nodes)

    def room(self, cpus: float, gpus: float) -> int:
        """How many runs that take so much of one machine fit at once."""
        return sum(node.room(cpus, gpus) for node in self.nodes)

    def with_gpus(self, types: Container[str]) -> "Machines":
        """Those whose GPUs are of these types."""
        nodes = tuple(node for node in self.nodes if node.gpus and node.gpu_type in types)
        return replace(self, nodes=nodes)

    def __str__(self) -> str:
        """What there is: "2 CPUs, 0 GPUs here"."""
        place = f"on {len(self.nodes)} nodes" if self.is_cluster else "here"
        return f"{self.cpus:g} CPUs, {self.gpus} GPUs {place}"


def cluster_address(given: str | None) -> str | None:
    """The cluster that a study is to run on, as Ray takes it; None for a Ray of its own.

    Args:
        given: By the option; None: Ray's own variable decides.
    """
    address = given or os.environ.get("RAY_ADDRESS") or "local"
    return None if address == "local" else address


def check_address(option: str, address: str) -> None:
    """Make sure that an address is one; whether a cluster is there is another matter.

    Raises:
        UserError: It is none that a study can use.
    """
    if address.startswith("ray://"):
        raise UserError(
            f"{option} {address}: a study does not go through the Ray client, whose connection"
            " would have to last as long as the study. Submit it as a job: ray job submit --address"
            " http://HOST:8265 --working-dir . -- python run_study.py ..."
        )
    if address not in ("auto", "local") and not re.fullmatch(r".+:\d{1,5}", address):
        raise UserError(
            f"{option} {address}: give auto, local, or host:port of the cluster's head, as in"
            " head:6379."
        )


def check_reachable(given: str, address: str) -> None:
    """Make sure that something answers at a cluster's address, before Ray tries for minutes.

    Args:
        given: How the user gave it.
        address: As Ray takes it.

    Raises:
        UserError: Nothing does.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{given}: nothing answers there ({error}); `ray status` on the head tells whether it"
            " runs, and its address is what `ray start --head` has printed."
        ) from None
