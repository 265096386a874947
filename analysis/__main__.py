"""Write the report of a study, or one page comparing several: `python -m analysis runs/NAME`."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from analysis.report.compare import write_comparison
from analysis.report.write import write_report
from analysis.rundir import RunDirError

#: Width of the output in columns when it does not go to a terminal.
PIPE_WIDTH = 140

#: The page that compares several studies.
COMPARISON = Path("comparison.html")


def main() -> int:
    """Write and print the report, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Write the report of a study into its run directory. With several studies,"
        f" write one page that compares them, {COMPARISON}, into the current folder.",
    )
    parser.add_argument(
        "run_dir", type=Path, nargs="+", metavar="RUN_DIR", help="for example runs/my-study"
    )
    run_dirs = parser.parse_args().run_dir
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(highlight=False, markup=False, width=width)
    try:
        if len(run_dirs) > 1:
            console.print(write_comparison(run_dirs, COMPARISON).to_rich())
            console.print(f"Comparison: {COMPARISON}", soft_wrap=True)
            return 0
        report = write_report(*run_dirs)
    except (RunDirError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for part in report.as_rich():
        console.print(part)
    console.print(f"Used: {report.inputs}", soft_wrap=True)
    console.print(f"Report: {report.path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
