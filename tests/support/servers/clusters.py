"""Real Ray clusters on this machine: every node has processes of its own."""

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

#: What `ray start --autoscaling-config` asks for beside the nodes, with Ray's own stand-in for a
#: cloud: its "machines" are processes here.
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


@contextmanager
def growing_cluster(at_most: int, folder: Path) -> Iterator[str]:
    """A head that runs nothing, and nodes of one core that come as runs ask for them.

    Ray lets nobody in without the token that RAY_AUTH_TOKEN_PATH leads to.

    Args:
        at_most: So many nodes beside the head; one goes when it has been idle for a while.
        folder: For the configuration and the log.

    Yields:
        Its address.
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
    """Until something listens there."""
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
