"""Runs that hang: each is ended by its own process's watchdog, which leaves where it stood.

In a study whose run directory every machine sees, that is left there. In one that is kept in a
store it is left on the machine, since a process that hangs cannot upload it, and fetched from there
when the run is known to be lost.
"""

import contextlib
import faulthandler
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from analysis.rundir import RunDir
from study.errors import storage_error
from study.failures import Failure
from study.storage import Remote

#: Seconds in which a machine has to tell what was left there.
_ANSWER = 10.0


class Watch:
    """Ends this process when it has shown no sign of life for too long.

    It is the interpreter's own watchdog, which needs no cooperation of the code that hangs.
    """

    def __init__(self, seconds: float | None, file: TextIO | None) -> None:
        """Watch for so many seconds and write where it stood; None: do not watch."""
        self._seconds, self._file = seconds, file

    def alive(self) -> None:
        """Show a sign of life."""
        if self._seconds is not None and self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def pause(self) -> None:
        """Watch no more until the next sign of life."""
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def watched(file: Path, seconds: float | None) -> Iterator[Watch]:
    """End this process if the block hangs.

    Args:
        file: Where it stood is left there.
        seconds: Without a sign of life; None: wait for ever.

    Raises:
        StorageError: The file cannot be written.
    """
    if seconds is None:
        yield Watch(None, None)
        return
    try:
        file.parent.mkdir(exist_ok=True)
        opened = file.open("w")
    except OSError as error:
        raise storage_error(error, file) or error from error
    with opened:
        watch = Watch(seconds, opened)
        watch.alive()
        try:
            yield watch
        finally:
            watch.pause()
            file.unlink(missing_ok=True)


def hang_file(remote: Remote, run_id: str, attempt: int) -> Path:
    """Where on this machine the watchdog leaves where an attempt at a run stood.

    Args:
        remote: The run directory in a store.
        run_id: Of the run.
        attempt: At it, from 1.
    """
    name = hashlib.sha256(f"{remote.uri} {run_id} {attempt}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"dropout-study-hang-{name}.txt"


def find_hang(rundir: RunDir, remote: Remote | None, run_id: str, attempt: int) -> Failure | None:
    """What the watchdog of a lost run has left; None where the run did not hang.

    Args:
        rundir: In which its failure file is, or is written by this.
        remote: The run directory in a store, if the study is kept in one.
        run_id: Of the run.
        attempt: At it, from 1.
    """
    failure = rundir.failure(run_id, attempt)
    if remote is not None and (text := _ask_nodes(remote, run_id, attempt)):
        rundir.write_failure(run_id, attempt, text)
    text = failure.read_text() if failure.exists() else ""
    if not text.startswith("Timeout"):
        return None
    where = failure if remote is None else f"{remote.uri}/failures/{failure.name}"
    return Failure("lost", f"no epoch ended within --trial-timeout (where it stood: {where})", text)


def _ask_nodes(remote: Remote, run_id: str, attempt: int) -> str:
    """What the watchdog has left on one of Ray's machines; it is deleted there."""
    task = ray.remote(_take)
    asked = [
        task.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(remote, run_id, attempt)
        for node in ray.nodes()
        if node["Alive"]
    ]
    answers, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER)
    texts = []
    for answer in answers:
        with contextlib.suppress(RayError):  # a machine that is lost has taken it along
            texts.append(ray.get(answer))
    return "".join(texts)


def _take(remote: Remote, run_id: str, attempt: int) -> str:
    file = hang_file(remote, run_id, attempt)
    text = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    return text
