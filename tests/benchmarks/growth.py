"""Scaling of a study's phases with images, trials, image size, and trials at once.

    python -m tests.benchmarks.growth [--repeats 5]

Each point is a whole study by the command, with computed features, 3 epochs and one confirmation
seed; its label says how it differs from the base. Points run in turn, in alternating order, after
one discarded warm-up study; the table is printed after each round. `/ base` is the time of the
whole study relative to the base's, round by round. `start` is everything before the search except
the features, `end` is report and export; memory is the peak of all processes of a study together,
sampled every few seconds.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from analysis.frames import load_frames
from analysis.report.times import Times, compute_times
from study.data.load import load_dataset
from study.models.weights import load_weights
from study.system.hardware import cpu_count
from tests.benchmarks.paired import Spread, about, ratio, show
from tests.benchmarks.processes import cache_without_features, watch_memory
from tests.support import ROOT

#: Seconds between samples of the memory; one sample costs 0.05 s of a core.
LOOK_EVERY = 5.0

#: Options common to all points.
COMMON = (
    "--name=growth",
    "--transfer=frozen",
    "--weights=keras",
    "--epochs=3",
    "--seeds=1",
)

#: Phases in each column of the table.
COLUMNS = {
    "start": ("start-up", "ray", "data", "hand over"),
    "features": ("features",),
    "search": ("search",),
    "confirm": ("confirm",),
    "end": ("report", "export"),
}


@dataclass
class Point:
    """A study of one size; call it to run the study."""

    label: str
    options: tuple[str, ...]
    seconds: list[Mapping[str, float]] = field(default_factory=list)
    """Seconds by column, for each study."""
    epochs: int = 0
    """Epochs in the search and confirmation of the last study."""
    efficiency: float = 0.0
    """Efficiency of the last study's search."""
    memory: list[int] = field(default_factory=list)
    """Peak memory of each study, in bytes."""

    def __call__(self) -> None:
        """Run a study and record its time and memory.

        Raises:
            RuntimeError: The study failed.
        """
        with TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            with output.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "run_study.py", *self.options, f"--storage={folder}"],
                    cwd=ROOT,
                    env={**os.environ, "XDG_CACHE_HOME": str(cache_without_features(Path(folder)))},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
                self.memory.append(watch_memory(process, LOOK_EVERY))
                if process.wait():
                    raise RuntimeError(output.read_text(errors="replace"))
            frames = load_frames(Path(folder) / "growth")
        times = compute_times(frames)
        self.seconds.append(by_column(times))
        self.epochs = len(frames.epochs)
        self.efficiency = search_efficiency(times)
        print(f"{self.label}: {times.total:.0f} s", file=sys.stderr, flush=True)


def by_column(times: Times) -> Mapping[str, float]:
    """Sum the seconds of phases to columns of the table."""
    walls = {phase.phase: phase.wall for phase in times.phases}
    return {
        column: sum(walls.get(phase, 0.0) for phase in phases) for column, phases in COLUMNS.items()
    }


def search_efficiency(times: Times) -> float:
    """Return the fraction of the slots' time in the search that is spent in epochs."""
    (search,) = (phase.slot_time for phase in times.phases if phase.phase == "search")
    return search.efficiency if search else 0.0


def all_points() -> list[Point]:
    """Return all points, the base first."""
    fewer = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < cpu_count()]
    return [
        point("base"),
        *(point(f"{images:,} images", images=images) for images in (5_000, 20_000, 50_000)),
        *(
            point(f"5,000 images, {count} at once", images=5_000, max_concurrent=count)
            for count in fewer
        ),
        *(point(f"{trials:,} trials", trials=trials) for trials in (100, 1_000)),
        *(point(f"{size} px", image_size=size) for size in (64, 96)),
    ]


def point(label: str, **options: int) -> Point:
    """Return a study of 10 trials on 1,000 images at 32 px on all cores, with these changes."""
    given = {"images": 1_000, "trials": 10, "image_size": 32, **options}
    more = (f"--{name.replace('_', '-')}={value}" for name, value in given.items())
    return Point(label, (*COMMON, *more))


HEADS = ("", *COLUMNS, "whole", "/ base", "epochs", "efficiency", "memory MB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    print(about("ray", "optuna", "onnxruntime"), flush=True)
    load_dataset("cifar10", None)
    load_weights("keras")
    points = all_points()
    point("warm-up")()
    for number in range(options.repeats):
        for each in points if number % 2 == 0 else reversed(points):
            each()
        print(f"\n{show(HEADS, [row(p, points[0]) for p in points])}")
        print(f"\nmedian (min to max) of seconds, n = {number + 1}", flush=True)


def row(point: Point, base: Point) -> list[str]:
    """Return a point's row of the table."""
    whole, whole_of_base = (
        Spread(tuple(sum(columns.values()) for columns in p.seconds)) for p in (point, base)
    )
    columns = (Spread(tuple(study[column] for study in point.seconds)) for column in COLUMNS)
    return [
        point.label,
        *(spread.shown(1) for spread in columns),
        whole.shown(0),
        ratio(whole, whole_of_base).shown(),
        str(point.epochs),
        f"{point.efficiency:.2f}",
        f"{max(point.memory) / 1e6:,.0f}",
    ]


if __name__ == "__main__":
    main()
