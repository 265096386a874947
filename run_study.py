"""The command that runs a study.

    python run_study.py --trials 40

Arguments become a StudyConfig, are checked as a whole, and then the phases run in order. Exit
status 0: the study is finished; 2: something that the user can mend, in one line; 130 or 143:
interrupted by Ctrl-C or by SIGTERM.
"""

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from analysis.errors import RunDirError
from study.config import Study, check, parse, resume_command
from study.errors import StudyStoppedError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; `arguments` as in `sys.argv[1:]`."""
    study = None
    received = listen(signal.SIGTERM, signal.SIGHUP)
    try:
        study = check(parse(arguments))
        # Only now: ray and torch take seconds to import, which a wrong option need not wait for.
        from study.phases import run

        run(study)
    except (UserError, RunDirError) as error:
        stopped = isinstance(error, StudyStoppedError)
        return leave(f"{error}{go_on(study) if stopped else ''}", 2)
    except KeyboardInterrupt:
        number = received[0] if received else signal.SIGINT
        return leave(f"interrupted.{go_on(study)}", 128 + number)
    return 0


def listen(*numbers: signal.Signals) -> list[int]:
    """Take signals that end a process as Ctrl-C is taken, unless they are to be ignored.

    Returns:
        Those received so far. (An exception of ours would not come through: Ray raises its own.)
    """
    received: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    return received


def go_on(study: Study | None) -> str:
    """How to go on with a study, as a sentence."""
    return f" Go on with: {resume_command(study.config)}" if study else ""


def leave(message: str, status: int) -> int:
    """Say why the command ends; its exit status."""
    sys.stderr.write(f"run_study.py: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
