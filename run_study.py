"""The command that runs a study.

    python run_study.py --trials 40

Arguments become a StudyConfig, are checked as a whole, and then the phases run in order. Exit
status 0: the study is finished; 2: something that the user can mend, in one line; 130: interrupted.
"""

import sys
from collections.abc import Sequence

from analysis.errors import RunDirError
from study.config import check, parse
from study.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; `arguments` as in `sys.argv[1:]`."""
    study = None
    try:
        study = check(parse(arguments))
        # Only now: ray and torch take seconds to import, which a wrong option need not wait for.
        from study.phases import run

        run(study)
    except (UserError, RunDirError) as error:
        sys.stderr.write(f"run_study.py: {error}\n")
        return 2
    except KeyboardInterrupt:
        again = f" Go on with --resume --name {study.config.name}." if study else ""
        sys.stderr.write(f"run_study.py: interrupted.{again}\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
