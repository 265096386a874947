"""A study on separate hosts, each with its own address, processes, /tmp and cache.

    uv run --group dashboard python -m tests.support.servers.hosts

Needs root on Linux; takes about 10 minutes on 2 cores. Each host is a set of Linux namespaces on a
bridge, which also connects an S3 server. The hosts share only the program on disk. Steps:

1. Start a head without cores and two workers, with Ray's token authentication. The command is
   refused without the token, and with a local folder as storage, which the workers do not share.
2. Submit the study as a job.
3. In mid-search, disconnect one worker from the network.
4. In mid-search, kill the head's host, and the driver with it.
5. Start a new Ray cluster on two other hosts, and resume the study with --resume.

It prints what happens, and fails if anything else does.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from study.storage.object_store import Remote
from tests.support import ROOT
from tests.support.servers.s3 import ENVIRONMENT, new_bucket, start_s3

NETWORK = "10.77.0"
BRIDGE = f"{NETWORK}.254"
GCS_PORT, DASHBOARD = 6379, "http://127.0.0.1:8265"
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
STUDY = (
    "--images 3000 --image-size 32 --transfer frozen --space tests.support.spaces:TINY --trials 12"
    " --epochs 80 --seeds 2 --name study"
)


@dataclass(frozen=True)
class Host:
    """A set of namespaces, kept alive by a sleeping process."""

    number: int
    keeper: "subprocess.Popen[bytes]"
    cache: Path

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    def command(self, line: str, *, token: bool = True) -> list[str]:
        """Return the arguments that run a command line on this host."""
        settings = {**ENVIRONMENT, **(TOKEN if token else {}), "XDG_CACHE_HOME": str(self.cache)}
        enter = ["nsenter", "--target", str(self._first_process), "--net", "--pid", "--mount"]
        environment = [f"{name}={value}" for name, value in settings.items()]
        return [*enter, "--", "env", "-C", str(ROOT), *environment, *shlex.split(line)]

    def run(self, line: str, *, token: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a command line to its end."""
        words = self.command(line, token=token)
        return subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)

    def start_ray(self, options: str) -> None:
        """Start Ray on this host."""
        done = self.run(f"{RAY} start --node-ip-address {self.address} {options}")
        assert done.returncode == 0, done.stdout + done.stderr

    def cut_off(self) -> None:
        """Disconnect the host from the network."""
        _ip(f"link set study{self.number} down")

    def kill(self) -> None:
        """Kill every process on the host at once."""
        self.cut_off()
        os.kill(self._first_process, signal.SIGKILL)
        self.keeper.wait()

    @property
    def _first_process(self) -> int:
        pid = self.keeper.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


RAY = f"{Path(sys.executable).parent}/ray"


@contextmanager
def hosts(count: int, caches: Path) -> Iterator[list[Host]]:
    """Start `count` hosts, numbered from 1, and the bridge between them."""
    started: list[Host] = []
    _ip("link add study0 type bridge")
    try:
        _ip(f"addr add {BRIDGE}/24 dev study0")
        _ip("link set study0 up")
        for number in range(1, count + 1):
            host = _start_host(number, caches / str(number))
            started.append(host)  # at once, so that it is killed if the next one fails
        yield started
    finally:
        for host in started:
            host.keeper.kill()
            host.keeper.wait()
        _ip("link del study0")


def _start_host(number: int, cache: Path) -> Host:
    # Share downloads with the user's cache.
    known = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dropout-study"
    (cache / "dropout-study").mkdir(parents=True)
    for entry in known.iterdir():
        if entry.name not in ("studies", "features"):
            (cache / "dropout-study" / entry.name).symlink_to(entry)
    # Ray keeps its sessions in /tmp, and finds a local cluster by its processes.
    inside = "mount -t tmpfs tmpfs /tmp && exec sleep infinity"
    apart = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
    host = Host(number, subprocess.Popen([*apart, "sh", "-c", inside]), cache)
    time.sleep(1)
    _ip(f"link add study{number} type veth peer name eth0 netns {host._first_process}")
    _ip(f"link set study{number} master study0 up")
    for line in (f"addr add {host.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
        assert host.run(f"ip {line}").returncode == 0, line
    return host


def _ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


@dataclass(frozen=True)
class Log:
    """Prints events with the seconds since the start."""

    start: float

    def __call__(self, what: str) -> None:
        print(f"{time.monotonic() - self.start:6.0f} s  {what}", flush=True)


def epochs_by_worker(store: Remote) -> dict[str, int]:
    """Count the epochs in the store's epochs.jsonl by the worker's address."""
    counts: dict[str, int] = {}
    for line in (store.read("epochs.jsonl") or b"").decode().splitlines():
        address = line.rpartition('"worker":')[2].strip(' "}').partition(":")[0]
        counts[address] = counts.get(address, 0) + 1
    return counts


def wait_until(met: Callable[[], bool], driver: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a condition is met while a driver runs."""
    end = time.monotonic() + 600
    while not met():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def matching_lines(log: Path, words: Sequence[str]) -> str:
    """Return the lines of a log that contain one of some words."""
    lines = log.read_text().splitlines()
    return "\n".join(f"          {line}" for line in lines if any(word in line for word in words))


def main() -> None:
    """Run the steps of the module docstring."""
    say = Log(time.monotonic())
    python = sys.executable
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        work = Path(folder)
        with hosts(5, work / "caches") as (head, one, two, new_head, three):
            server, endpoint = start_s3(work / "s3.log", host=BRIDGE)
            try:
                os.environ.update(ENVIRONMENT)
                storage = new_bucket(endpoint)
                store = Remote(storage).child("study")
                place = f"--address {{}}:{GCS_PORT} --storage '{storage}'"

                head.start_ray(f"--head --port {GCS_PORT} --num-cpus 0")
                for worker in (one, two):
                    worker.start_ray(f"--address {head.address}:{GCS_PORT} --num-cpus 1")
                say("a head without cores, two workers; Ray requires a token")
                command = f"{python} run_study.py {STUDY}"
                refused = head.run(f"{command} {place.format(head.address)}", token=False)
                say(f"without the token, status {refused.returncode}: {refused.stderr.strip()}")
                assert refused.returncode == 2
                mine = f"--address {head.address}:{GCS_PORT} --storage {head.cache}/runs"
                (two.cache / "runs").mkdir()
                refused = head.run(f"{command} {mine.replace(str(head.cache), '/tmp')}")
                say(f"a folder that is not shared, status {refused.returncode}:")
                say(refused.stderr.strip())
                assert refused.returncode == 2

                job = work / "job.log"
                submit = f"{RAY} job submit --address {DASHBOARD} --working-dir . -- {command}"
                with job.open("wb") as output:
                    driver = subprocess.Popen(
                        head.command(f"{submit} --storage '{storage}'"),
                        stdout=output,
                        stderr=output,
                    )
                say("the study is submitted as a job")
                wait_until(lambda: sum(epochs_by_worker(store).values()) > 100, driver, job)
                say(f"epochs in the store, by worker: {epochs_by_worker(store)}")
                one.cut_off()
                say(f"{one.address} is disconnected from the network")
                wait_until(lambda: "resuming from its last" in job.read_text(), driver, job)
                say(f"the job's log:\n{matching_lines(job, ['resuming from'])}")
                before = sum(epochs_by_worker(store).values())
                wait_until(lambda: sum(epochs_by_worker(store).values()) > before + 50, driver, job)
                head.kill()
                say(f"{head.address} dies, with head and driver: {epochs_by_worker(store)}")
                driver.kill()
                two.kill()

                new_head.start_ray(f"--head --port {GCS_PORT} --num-cpus 0")
                three.start_ray(f"--address {new_head.address}:{GCS_PORT} --num-cpus 1")
                say(f"a new head at {new_head.address}, a worker at {three.address}")
                again = new_head.run(
                    f"{python} run_study.py --resume --name study {place.format(new_head.address)}"
                )
                say(f"--resume has ended with status {again.returncode}: {epochs_by_worker(store)}")
                print(again.stdout[-6000:], again.stderr)
                assert again.returncode == 0
            finally:
                server.kill()


if __name__ == "__main__":
    main()
