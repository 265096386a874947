"""Paired timings, which every benchmark here uses.

Contenders do the same work in turn, in alternating order, round after round, so that other load on
the machine affects all of them alike; the first round is a warm-up and is discarded. The result is
the ratio within a round; seconds are printed only as an order of magnitude.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from study.system.hardware import cpu_count


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity."""

    values: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The median."""
        return median(self.values)

    def shown(self, digits: int = 2) -> str:
        """Format median, minimum and maximum."""
        low, high = min(self.values), max(self.values)
        return f"{self.middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def in_turn(
    works: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: bool = True
) -> dict[str, Spread]:
    """Time several works in turn; return their seconds by name.

    Args:
        works: Functions that each do the whole work once.
        repeats: Number of measured rounds.
        warm_up: Whether to run a discarded round first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + warm_up):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            works[name]()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: Spread(tuple(values)) for name, values in seconds.items()}


def ratio(first: Spread, second: Spread) -> Spread:
    """Return the ratio of the first's time to the second's, round by round."""
    return Spread(tuple(a / b for a, b in zip(first.values, second.values, strict=True)))


def show(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format an aligned Markdown table; the first column is text, the others are numbers."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(heads), line(rule), *map(line, rows)])


def about(*packages: str) -> str:
    """Describe machine and versions in one line."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    best = torch.backends.cpu.get_cpu_capability()
    found = []
    for package in ("torch", *packages):
        try:
            found.append(f"{package} {version(package).split('+')[0]}")
        except PackageNotFoundError:
            continue
    return (
        f"{cpu_count()} cores of {cpu_name()} ({best}){gpu}; load before the start"
        f" {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {', '.join(found)}"
    )


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
