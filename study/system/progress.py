"""Progress bars: live on a terminal, occasional lines in a pipe or log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Unit = Literal["bytes", "images"]

#: The console of all modules; in a pipe or log, lines are wide enough for the tables.
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress(what: str, total: int, unit: Unit) -> Iterator[Callable[[int], None]]:
    """Show the progress of a long step.

    Args:
        what: The step, capitalised to start a sentence, for example "Downloading CIFAR-10".
        total: Number of units in the whole step, at least 1.
        unit: The unit counted.

    Yields:
        A function that takes the number of units done since its last call.
    """
    if not console.is_terminal:
        with _plain_progress(what, total, unit) as advance:
            yield advance
        return
    counts = (
        (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def _plain_progress(what: str, total: int, unit: Unit) -> Iterator[Callable[[int], None]]:
    """Print a line at the start, once a minute, and at the end."""
    started = printed = time.monotonic()
    done = 0

    def advance(more: int) -> None:
        nonlocal done, printed
        done += more
        if time.monotonic() - printed > 60:
            printed = time.monotonic()
            console.print(f"{what}: {100 * done / total:.0f} %")

    size = f"{total / 1e6:,.0f} MB" if unit == "bytes" else f"{total:,} {unit}"
    console.print(f"{what}: {size} ...")
    yield advance
    console.print(f"{what}: done in {time.monotonic() - started:,.0f} s")
