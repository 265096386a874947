"""A local S3 server (moto) in a separate process, on loopback."""

import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

#: What pyarrow needs to connect; any key works.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Without this, pyarrow looks for credentials at a metadata service that other clouds lack.
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port


def start_s3(
    log: Path, port: int | None = None, host: str = "127.0.0.1"
) -> "tuple[subprocess.Popen[bytes], str]":
    """Start an empty server.

    Args:
        log: File that gets a line per request.
        port: Port to listen on; default: any free one.
        host: Address to listen on.

    Returns:
        The process and its address as host:port.
    """
    port = port or free_port()
    with log.open("ab") as file:
        command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    end = time.monotonic() + 60
    while True:
        try:
            urlopen(f"http://{host}:{port}/", timeout=5).close()
            return process, f"{host}:{port}"
        except (URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, "the server does not respond"
            time.sleep(0.05)


def new_bucket(endpoint: str) -> str:
    """Create a bucket; return the URI of a folder in it."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    make_bucket(endpoint, name)
    return f"s3://{name}/runs?endpoint_override={endpoint}&scheme=http"


def make_bucket(endpoint: str, name: str) -> None:
    """Create a bucket of that name."""
    from pyarrow import fs

    fs.S3FileSystem(
        endpoint_override=endpoint, scheme="http", allow_bucket_creation=True
    ).create_dir(name)
