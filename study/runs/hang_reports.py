"""Where a run hung, as its watchdog left it.

In a study whose run directory every machine sees, that is left there. In one that is kept in a
store it is left on the machine, since a process that hangs cannot upload it, and fetched from there
when the run is known to be lost.
"""

import hashlib
import tempfile
from pathlib import Path

from study.cluster.remote import call_on_nodes, live_nodes
from study.runs.failures import Failure
from study.storage.object_store import Remote
from study.study import Study

#: Seconds in which a machine has to tell what was left there.
_ANSWER = 10.0


def hang_file(remote: Remote, run_id: str, attempt: int) -> Path:
    """Where on this machine the watchdog leaves where an attempt at a run stood.

    Args:
        remote: The run directory in a store.
        run_id: Of the run.
        attempt: At it, from 1.
    """
    name = hashlib.sha256(f"{remote.uri} {run_id} {attempt}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"dropout-study-hang-{name}.txt"


def find_hang(study: Study, run_id: str, attempt: int) -> Failure | None:
    """What the watchdog of a lost run has left; None where the run did not hang.

    Args:
        study: Its run directory holds that, or gets it by this.
        run_id: Of the run.
        attempt: At it, from 1.
    """
    if study.config.trial_timeout is None:
        return None
    file = study.rundir.failure(run_id, attempt)
    where = str(file)
    if study.remote is not None:
        where = study.remote.child("failures").child(file.name).uri
        answers = call_on_nodes(live_nodes(), _take, study.remote, run_id, attempt, seconds=_ANSWER)
        # A machine that is lost has taken it along.
        if text := "".join(answer for answer in answers.values() if isinstance(answer, str)):
            study.rundir.write_failure(run_id, attempt, text)
    text = file.read_text() if file.exists() else ""
    if not text.startswith("Timeout"):
        return None
    return Failure("lost", f"no epoch ended within --trial-timeout (where it stood: {where})", text)


def _take(remote: Remote, run_id: str, attempt: int) -> str:
    """What the watchdog has left on this machine; it is deleted."""
    file = hang_file(remote, run_id, attempt)
    text = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    return text
