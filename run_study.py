"""Command that runs a study.

    python run_study.py --trials 40

Exit status 0: the study finished; 2: an error the user can fix, reported in one line; 130, 143 or
129: interrupted by Ctrl-C, SIGTERM or SIGHUP.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from analysis.rundir import RunDirError
from study import STARTED
from study.config import StudyConfig, resume_command
from study.errors import StudyStoppedError, UserError
from study.study import Study, parse_config, resolve_study
from study.system import signals


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """Run a study.

    Args:
        arguments: As in `sys.argv[1:]`.
        started: When the command started, in Unix seconds; None: now.
    """
    started = time.time() if started is None else started
    study = None
    signals.install_handlers()
    try:
        study = resolve_study(parse_config(arguments))
        with start_ray_early(study.config):
            # Imported late: torch takes seconds to import, during which Ray starts.
            from study.pipeline import run

            run(study, started)
    except (UserError, RunDirError) as error:
        stopped = isinstance(error, StudyStoppedError)
        return leave(f"{error}{how_to_resume(study) if stopped else ''}", 2)
    except KeyboardInterrupt:
        return leave(f"interrupted.{how_to_resume(study)}", signals.exit_status())
    return 0


def start_ray_early(config: StudyConfig) -> AbstractContextManager[None]:
    """Start Ray before the slow imports, except for a dry run or on a cluster.

    Raises:
        UserError: Not even one run fits on this machine.
    """
    # Imported late: Ray takes a second to import, and an invalid option should fail before that.
    from study.cluster.machines import cluster_address
    from study.cluster.resources import plan_cores
    from study.cluster.session import find_machines, ray_started_early

    if config.dry_run or cluster_address(config.address) is not None:
        return nullcontext()
    return ray_started_early(plan_cores(config, find_machines(None)), verbose=config.verbose)


def how_to_resume(study: Study | None) -> str:
    """Return how to resume a study, as a sentence."""
    return f" Resume with: {resume_command(study.config)}" if study else ""


def leave(message: str, status: int) -> int:
    """Print why the command exits; return its exit status."""
    sys.stderr.write(f"run_study.py: {message}\n")
    return status


if __name__ == "__main__":
    exit_status = main(started=STARTED)
    if signals.received:
        # Ray's cleanup in an interrupted process may abort it with another exit status.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
