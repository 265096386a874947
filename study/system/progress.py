"""Progress bars: live on a terminal, a line now and then in a pipe or log."""

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

#: Everything that a person reads on the screen goes through this one console; a pipe or log gets
#: lines that are wide enough for the tables.
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress(what: str, total: int, unit: Unit) -> Iterator[Callable[[int], None]]:
    """Show how far a long step has come.

    Args:
        what: The step, as a phrase that starts a sentence, for example "Downloading CIFAR-10".
        total: Number of units in the whole step, at least 1.
        unit: What is counted.

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
    """A line at the start, one a minute, and one at the end."""
    started = said = time.monotonic()
    done = 0

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        if time.monotonic() - said > 60:
            said = time.monotonic()
            console.print(f"{what}: {100 * done / total:.0f} %")

    size = f"{total / 1e6:,.0f} MB" if unit == "bytes" else f"{total:,} {unit}"
    console.print(f"{what}: {size} ...")
    yield advance
    console.print(f"{what}: done in {time.monotonic() - started:,.0f} s")
