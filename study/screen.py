"""Screen output: a live view on a terminal, otherwise one plain line per finished run.

Lines printed through Screen after start_log also go to log.txt in the run directory.
"""

import contextlib
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from rich.console import Console, Group, OverflowMethod, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from analysis.rundir.metric import Metric, is_better
from analysis.words import count, duration
from search_spaces import PARAMETERS, Value
from study.errors import UserError
from study.system.progress import console


@dataclass(frozen=True)
class EndedRun:
    """A search trial or confirmation run that has ended."""

    run_id: str
    group: str
    """The arm, or in the confirmation the recipe and setting."""
    state: str
    epoch: int
    """The last epoch that ran."""
    score: float | None
    hyperparameters: Mapping[str, Value]
    seconds: float
    error: str = ""


@dataclass
class Tally:
    """Progress of a group of runs."""

    total: int
    ended: int = 0
    pruned: int = 0
    broken: int = 0
    """Diverged or failed."""
    best: EndedRun | None = None


@dataclass
class PhaseView:
    """The live view of a phase that consists of many runs."""

    title: str
    metric: Metric
    epochs: int
    groups: dict[str, Tally]
    running: dict[str, tuple[int, float | None]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    already: int = 0
    """Runs finished by earlier starts."""

    @property
    def total(self) -> int:
        """Total number of runs in the phase."""
        return sum(tally.total for tally in self.groups.values())

    @property
    def ended(self) -> int:
        """Runs that have ended, including those of earlier starts."""
        return sum(tally.ended for tally in self.groups.values())

    def count(self, run: EndedRun) -> None:
        """Count a run that has ended."""
        self.running.pop(run.run_id, None)
        tally = self.groups[run.group]
        tally.ended += 1
        tally.pruned += run.state == "pruned"
        tally.broken += run.state in ("diverged", "failed")
        if run.state != "completed" or run.score is None:
            return
        best = tally.best
        if best is None or best.score is None or is_better(run.score, best.score, self.metric):
            tally.best = run

    def line(self, run: EndedRun) -> str:
        """Return a line of text for a run that has ended."""
        width = len(str(self.total))
        outcome = run.error if run.error else describe_score(run.score, self.metric)
        return (
            f"{self.ended:>{width}}/{self.total}  {run.run_id}  {run.state:<9}  "
            f"epoch {run.epoch:>2}/{self.epochs}  {outcome}  "
            f"{duration(run.seconds)}  ({describe_hyperparameters(run.hyperparameters)})"
        )

    def seconds_left(self) -> float | None:
        """Estimate the time left from the runs of this start; None before the first has ended."""
        here = self.ended - self.already
        if here == 0:
            return None
        return (time.monotonic() - self.started) / here * (self.total - self.ended)

    def __rich__(self) -> RenderableType:
        """Render the current view."""
        left = self.seconds_left()
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self.title, "bold"),
            ProgressBar(total=self.total, completed=self.ended, width=40),
            f"{self.ended}/{self.total}",
            duration(time.monotonic() - self.started),
            "" if left is None else f"about {duration(left)} left",
        )
        return Group("", head, self._groups_table(), self._running_line())

    def _groups_table(self) -> Table:
        # Only the last column shrinks on a narrow terminal.
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        table.add_column("", no_wrap=True)
        for name in ("ended", "pruned", "failed"):
            table.add_column(name, justify="right")
        table.add_column("best so far", no_wrap=True)
        table.add_column("with", no_wrap=True, overflow="ellipsis", ratio=1)
        for name, tally in self.groups.items():
            best = tally.best
            table.add_row(
                name,
                f"{tally.ended}/{tally.total}",
                str(tally.pruned),
                str(tally.broken),
                describe_score(best.score, self.metric) if best else "–",
                describe_hyperparameters(best.hyperparameters) if best else "",
            )
        return table

    def _running_line(self) -> Text:
        runs = (
            f"{run_id} {epoch}/{self.epochs}"
            + ("" if value is None else f" {describe_score(value, self.metric, short=True)}")
            for run_id, (epoch, value) in self.running.items()
        )
        return Text("running: " + ", ".join(runs) if self.running else "", style="dim")


class Screen:
    """A study's output, on the terminal and, once start_log has been called, in log.txt."""

    def __init__(self) -> None:
        self._log: Path | None = None
        self._view: PhaseView | None = None

    def start_log(self, path: Path) -> None:
        """From now on, append all output to a file."""
        self._log = path
        self._write(f"---- {datetime.now():%Y-%m-%d %H:%M:%S}\n")

    def print(self, what: RenderableType = "") -> None:
        """Print a line or a table."""
        console.print(what, soft_wrap=isinstance(what, str))
        self._log_renderable(what)

    def log_error(self, error: BaseException) -> None:
        """Log why a start ended; with a traceback unless the user can fix it."""
        known = isinstance(error, UserError | KeyboardInterrupt)
        lines = (
            [f"{type(error).__name__}: {error}\n"] if known else traceback.format_exception(error)
        )
        # The log's own location may be the problem.
        with contextlib.suppress(OSError):
            self._write("".join(lines))

    def _log_renderable(self, what: RenderableType) -> None:
        plain = Console(width=120, no_color=True, highlight=False)
        with plain.capture() as captured:
            plain.print(what, soft_wrap=isinstance(what, str))
        self._write(captured.get())

    @contextmanager
    def phase(
        self, title: str, metric: Metric, epochs: int, groups: Mapping[str, int]
    ) -> Iterator[PhaseView]:
        """Show a phase while a block runs.

        Args:
            title: Name of the phase.
            metric: Metric of the scores.
            epochs: Epochs of a full run.
            groups: Total number of runs by group.
        """
        view = PhaseView(title, metric, epochs, {name: Tally(n) for name, n in groups.items()})
        self._view = view
        try:
            if console.is_terminal:
                with Live(view, console=console, refresh_per_second=4, transient=True):
                    yield view
            else:
                yield view
        finally:
            self._view = None
        if view.ended > view.already:
            took = duration(time.monotonic() - view.started)
            self.print(f"{title}: {count(view.ended - view.already, 'run')} in {took}")

    def run_will_be_retried(self, run_id: str, why: str) -> None:
        """Show that a run of the phase has stopped and will be retried."""
        assert self._view is not None
        self._view.running.pop(run_id, None)
        self.print(f"{run_id}  {why}")

    def run_ended(self, run: EndedRun) -> None:
        """Show that a run of the phase has ended."""
        assert self._view is not None
        self._view.count(run)
        line = self._view.line(run)
        self._log_renderable(line)
        # On a terminal each run gets one row, truncated; a pipe gets the whole line.
        overflow: OverflowMethod = "ellipsis" if console.is_terminal else "ignore"
        console.print(line, no_wrap=True, overflow=overflow, crop=console.is_terminal)

    def run_progressed(self, run_id: str, epoch: int, value: float | None) -> None:
        """Show a run's progress: epochs done and score so far."""
        if self._view is not None:
            self._view.running[run_id] = (epoch, value)

    def _write(self, text: str) -> None:
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text)


def describe_score(value: float | None, metric: Metric, *, short: bool = False) -> str:
    """Format a score: "val accuracy 88.31 %" or "val loss 0.3412"."""
    if value is None:
        return "–"
    number = f"{100 * value:.2f} %" if metric != "val_loss" else f"{value:.4f}"
    return number if short else f"{metric.replace('_', ' ')} {number}"


def describe_hyperparameters(values: Mapping[str, Value]) -> str:
    """Format hyperparameters: "head 1024, learning rate 0.00041, dropout 0.31"."""
    in_order = sorted(values, key=list(PARAMETERS).index)
    return ", ".join(
        f"{name.replace('_', ' ')} "
        + (f"{values[name]:.2g}" if isinstance(values[name], float) else str(values[name]))
        for name in in_order
    )
