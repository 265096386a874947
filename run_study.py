"""The command that runs a study.

    python run_study.py --trials 40

Arguments become a StudyConfig, are checked as a whole, and then the phases run in order. Exit
status 0: the study is finished; 2: something that the user can mend, in one line; 130, 143 or 129:
interrupted by Ctrl-C, SIGTERM or SIGHUP.
"""

import os
import sys
import time
from collections.abc import Sequence

from analysis.rundir.errors import RunDirError
from study import STARTED
from study.config import Study, check, parse, resume_command
from study.errors import StudyStoppedError, UserError
from study.system import signals


def main(arguments: Sequence[str] | None = None, began: float | None = None) -> int:
    """Run a study.

    Args:
        arguments: As in `sys.argv[1:]`.
        began: When the command began, in Unix seconds; None: now.
    """
    began = time.time() if began is None else began
    study = None
    signals.install_handlers()
    try:
        study = check(parse(arguments))
        # Only now: ray and torch take seconds to import, which a wrong option need not wait for.
        from study.ray_session import ray_ahead

        with ray_ahead(study):
            from study.phases import run

            run(study, began)
    except (UserError, RunDirError) as error:
        stopped = isinstance(error, StudyStoppedError)
        return leave(f"{error}{go_on(study) if stopped else ''}", 2)
    except KeyboardInterrupt:
        return leave(f"interrupted.{go_on(study)}", signals.exit_status())
    return 0


def go_on(study: Study | None) -> str:
    """How to go on with a study, as a sentence."""
    return f" Go on with: {resume_command(study.config)}" if study else ""


def leave(message: str, status: int) -> int:
    """Say why the command ends; its exit status."""
    sys.stderr.write(f"run_study.py: {message}\n")
    return status


if __name__ == "__main__":
    exit_status = main(began=STARTED)
    if signals.received:
        # What Ray does at the end of an interrupted process may abort it, with a status of its own.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
