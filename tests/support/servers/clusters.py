"""Real Ray clusters on this machine: each node has its own processes."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

#: What `ray start --autoscaling-config` needs besides the nodes, for Ray's fake cloud provider,
#: whose "machines" are local processes.
FAKE_CLOUD = {
    "cluster_name": "growing",
    "upscaling_speed": 1.0,
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


@contextmanager
def ray_cluster(nodes: int, **resources: Any) -> Iterator[Cluster]:
    """Start a head without cores, and nodes of one core each.

    Args:
        nodes: Number of nodes besides the head.
        resources: Resources of each node, passed to `Cluster.add_node`.
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


@contextmanager
def growing_cluster(at_most: int, folder: Path) -> Iterator[str]:
    """Start a head without cores, and an autoscaler that adds nodes of one core on demand.

    Ray requires the token in the file that RAY_AUTH_TOKEN_PATH names.

    Args:
        at_most: Maximum number of nodes besides the head; idle ones are removed after a minute.
        folder: Holds the configuration and the log.

    Yields:
        The address of the cluster.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    head, worker = ({"resources": {"CPU": cpus}, "node_config": {}} for cpus in (0, 1))
    config = {
        **FAKE_CLOUD,
        "max_workers": at_most,
        "idle_timeout_minutes": 1,
        "provider": {
            "type": "fake_multinode",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {**head, "max_workers": 0},
            "worker": {**worker, "min_workers": 0, "max_workers": at_most},
        },
    }
    file = folder / "autoscaling.json"
    file.write_text(json.dumps(config))
    command = [f"{Path(sys.executable).parent}/ray", "start", "--head", "--block", "--num-cpus=0"]
    command += [f"--port={port}", "--include-dashboard=false", f"--autoscaling-config={file}"]
    environment = {
        "RAY_AUTH_MODE": "token",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
    }
    with (folder / "ray.log").open("wb") as log:
        started = psutil.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
    try:
        _wait_for(port)
        yield address
    finally:
        family = [*started.children(recursive=True), started]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)


def _wait_for(port: int) -> None:
    """Wait until something listens on a port of this node."""
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((ray.util.get_node_ip_address(), port), timeout=1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            return
