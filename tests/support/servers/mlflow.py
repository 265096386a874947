"""A real MLflow server on loopback, in its own process and environment.

Full MLflow needs another version of pyarrow than this project; its client works with ours.
"""

import os
import signal
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tests.support.environments import make_environment
from tests.support.servers.s3 import free_port


def install_mlflow(folder: Path) -> Path:
    """Create an environment with full MLflow in the client's version; return its Python."""
    return make_environment(folder, f"mlflow=={version('mlflow-skinny')}")


def start_mlflow(
    python: Path, folder: Path, port: int | None = None
) -> "tuple[subprocess.Popen[bytes], str]":
    """Start a server.

    Args:
        python: From `install_mlflow`.
        folder: Holds the server's data and log.
        port: Port to listen on; default: any free one.

    Returns:
        The process, leader of its own process group, and the server's URI.
    """
    port = port or free_port()
    server = [str(python), "-m", "mlflow", "server"]
    options = {
        "host": "127.0.0.1",
        "port": str(port),
        "workers": "1",
        "backend-store-uri": f"sqlite:///{folder}/mlflow.db",
        "artifacts-destination": str(folder / "artifacts"),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = folder / "log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*server, *words],
            stdout=file,
            stderr=file,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    end = time.monotonic() + 300
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return process, f"http://127.0.0.1:{port}"
        except (URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, "the server does not respond"
            time.sleep(0.1)


def kill_mlflow(pid: int) -> None:
    """Kill a server and all of its processes."""
    os.killpg(pid, signal.SIGKILL)
