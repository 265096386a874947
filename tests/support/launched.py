"""Stand-in for a study in the test of slurm.sh.

The first run prints what it finds and waits for SIGTERM; after a requeue it reports that it
resumed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ray

if os.environ.get("SLURM_RESTART_COUNT"):
    print("resumed", flush=True)
    sys.exit(3)

ray.init("auto", log_to_driver=False)


@ray.remote(num_gpus=1)
def where() -> str:
    """Return the Ray node that this runs on, keeping it busy for a moment."""
    time.sleep(1)
    return str(ray.get_runtime_context().get_node_id())


print(f"gpus {ray.cluster_resources()['GPU']:g}", flush=True)
print(f"nodes {len(set(ray.get([where.remote() for _ in range(4)])))}", flush=True)

token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
print(f"token {token.stat().st_mode & 0o777:o} of {token.parent.stat().st_mode & 0o777:o}")
for name, changed in (
    ("without", {"RAY_AUTH_MODE": "disabled"}),
    ("wrong", {"RAY_AUTH_TOKEN": "0" * 64}),
    ("right", {}),
):
    tried = subprocess.run(
        ["ray", "status", "--address", os.environ["RAY_ADDRESS"]],
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
        timeout=60,
    )
    refused = "AuthenticationError" in tried.stderr
    print(f"{name} token: {'refused' if refused else tried.returncode}", flush=True)


def stop(*_: object) -> None:
    """Exit as a study does."""
    print("stopping", flush=True)
    sys.exit(143)


signal.signal(signal.SIGTERM, stop)
print("waiting", flush=True)
time.sleep(300)
