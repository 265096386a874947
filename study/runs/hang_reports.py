"""Hang reports: the traceback that a run's watchdog writes.

With a run directory that all machines share, the report is written there. With an object store it
is written to the machine's local disk, since a hung process cannot upload it, and fetched from
there once the run is known to be lost.
"""

import hashlib
import tempfile
from pathlib import Path

from study.cluster.remote import call_on_nodes, live_nodes
from study.runs.failures import Failure
from study.storage.object_store import Remote
from study.study import Study

#: Seconds that nodes have to return a report.
_ANSWER = 10.0


def hang_file(remote: Remote, run_id: str, attempt: int) -> Path:
    """Return the local file for the hang report of an attempt at a run.

    Args:
        remote: The run directory in its object store.
        run_id: The run.
        attempt: Number of the attempt, from 1.
    """
    name = hashlib.sha256(f"{remote.uri} {run_id} {attempt}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"dropout-study-hang-{name}.txt"


def find_hang(study: Study, run_id: str, attempt: int) -> Failure | None:
    """Return the failure of a lost run from its hang report; None if it did not hang.

    Args:
        study: The study; a report found on a node is saved in its run directory.
        run_id: The run.
        attempt: Number of the attempt, from 1.
    """
    if study.config.trial_timeout is None:
        return None
    file = study.rundir.failure(run_id, attempt)
    where = str(file)
    if study.remote is not None:
        where = study.remote.child("failures").child(file.name).uri
        answers = call_on_nodes(
            live_nodes(), _take_report, study.remote, run_id, attempt, seconds=_ANSWER
        )
        # The report is gone if its machine was lost.
        if text := "".join(answer for answer in answers.values() if isinstance(answer, str)):
            study.rundir.write_failure(run_id, attempt, text)
    text = file.read_text() if file.exists() else ""
    if not text.startswith("Timeout"):
        return None
    return Failure("lost", f"no epoch ended within --trial-timeout (traceback: {where})", text)


def _take_report(remote: Remote, run_id: str, attempt: int) -> str:
    """Return and delete the hang report on this machine; empty if there is none."""
    file = hang_file(remote, run_id, attempt)
    text = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    return text
