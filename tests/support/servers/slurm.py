"""A real Slurm cluster with two simulated nodes on this machine, for the duration of a test.

Both nodes are this machine: two slurmd, one slurmctld and one munged, without systemd, all files
in one folder. Needs root, and Debian's packages slurm-wlm and munge.
"""

import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
FirstJobId={first_job}
GresTypes=gpu
NodeName=DEFAULT CPUs=64 RealMemory=500000 Gres=gpu:1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""


def missing() -> str:
    """Return why Slurm cannot run here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"needs {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else ""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm cluster."""

    environment: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60
        )

    def field(self, job: str, name: str) -> str:
        """Return a field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job).stdout.split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start two nodes, each with a GPU as far as Slurm knows."""
    host = socket.gethostname()
    config = folder / "slurm.conf"
    first_job = random.randrange(1000, 1_000_000)
    config.write_text(
        CONFIG.format(host=host, ports=_free_ports(3), folder=folder, first_job=first_job)
    )
    (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")
    for name in ("state", "spool-n1", "spool-n2", "home"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(64))
    key.chmod(0o400)
    environment = {
        # As in a fresh shell: an earlier study in this process may have set Ray's variables.
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "SLURM_CONF": str(config),
        "HOME": str(folder / "home"),
    }
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
    munged += [f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log"]
    daemons = [munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"]]
    daemons.append(["slurmd", "-D", "-N", "n2"])
    slurm = Slurm(environment)
    with ExitStack() as stack:
        for number, command in enumerate(daemons):
            log = stack.enter_context((folder / f"daemon-{number}.log").open("w"))
            daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(_end, daemon)
            if command is munged:
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(
            lambda: slurm.run("sinfo", "-h", "-o", "%t %D").stdout.split() == ["idle", "2"], folder
        )
        try:
            yield slurm
        finally:
            slurm.run("scancel", "--user=root")
            _wait(lambda: not slurm.run("squeue", "-h").stdout.strip(), folder)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _wait(there: Callable[[], bool], folder: Path) -> None:
    until = time.monotonic() + 90
    while not there():
        if time.monotonic() > until:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
            raise TimeoutError(f"Slurm did not reach the expected state:\n{logs}")
        time.sleep(0.2)
