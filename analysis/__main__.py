"""Write the report of a study anew: `python -m analysis runs/NAME`."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from analysis.report import write_report
from analysis.rundir import RunDirError

#: Columns of the output where no terminal says how wide it is.
PIPE_WIDTH = 140


def main() -> int:
    """Write and print the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Write the tables and figures of a study into its run directory.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="for example runs/my-study")
    run_dir = parser.parse_args().run_dir
    try:
        report = write_report(run_dir)
    except (RunDirError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(highlight=False, width=width)
    for table in report.as_rich():
        console.print(table)
    console.print(f"Used: {report.inputs}", soft_wrap=True)
    console.print(f"Report: {report.path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
