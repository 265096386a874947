"""How a study's phases grow: with images, trials, image size, and trials at once.

    python -m tests.benchmarks.growth [--repeats 5] [--axes images trials size at-once]

Each point is a whole study by the command, features computed anew, 2 confirmation seeds, 5 epochs;
along an axis one thing changes. Points of an axis are run in turn; the first round, which does not
count, is the one in which memory is measured: the most that all processes of the study held at
once. `/ first` is the whole study against the axis's first point, round by round. `start` is all
until the search but the features, `end` the report and the export.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from analysis.frames import load_frames
from analysis.times import Times, compute_times
from study.data import load_dataset
from study.hardware import cpu_count
from study.weights import load_weights
from tests.benchmarks.paired import Spread, about, in_turn, ratio, show
from tests.benchmarks.processes import cache_without_features, watch_memory

ROOT = Path(__file__).parents[2]

#: A study that is over soon; a later option counts more.
SMALL = (
    "--name=growth",
    "--transfer=frozen",
    "--weights=keras",
    "--epochs=5",
    "--seeds=2",
    "--image-size=32",
)

#: What the table calls phases.
COLUMNS = {
    "start": ("start-up", "ray", "data", "hand over"),
    "features": ("features",),
    "search": ("search",),
    "confirm": ("confirm",),
    "end": ("report", "export"),
}


@dataclass
class Point:
    """A size of study; called, it runs one."""

    label: str
    options: tuple[str, ...]
    seconds: list[Mapping[str, float]] = field(default_factory=list)
    """By column, of each study."""
    epochs: int = 0
    """In the search and the confirmation of the last study."""
    efficiency: float = 0.0
    """Of the last study's search."""
    memory: int = 0
    """In bytes."""

    def __call__(self) -> None:
        """Run a study and note what it took.

        Raises:
            RuntimeError: It has failed.
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
                self.memory = self.memory or watch_memory(process)
                if process.wait():
                    raise RuntimeError(output.read_text(errors="replace"))
            frames = load_frames(Path(folder) / "growth")
        times = compute_times(frames)
        self.seconds.append(by_column(times))
        self.epochs = len(frames.epochs)
        self.efficiency = search_efficiency(times)
        print(f"{self.label}: {times.total:.0f} s", file=sys.stderr, flush=True)


def by_column(times: Times) -> Mapping[str, float]:
    """Seconds of the phases, added up to columns of the table."""
    walls = {phase.phase: phase.wall for phase in times.phases}
    return {
        column: sum(walls.get(phase, 0.0) for phase in phases) for column, phases in COLUMNS.items()
    }


def search_efficiency(times: Times) -> float:
    """Time in epochs as a fraction of the slots' time in the search."""
    (search,) = (phase.slot_time for phase in times.phases if phase.phase == "search")
    return search.efficiency if search else 0.0


def axis_points(axis: str) -> list[Point]:
    """Along an axis, from small to large."""
    match axis:
        case "images":
            sizes = (5_000, 10_000, 20_000, 50_000)
            return [point(f"{images:,} images", images=images) for images in sizes]
        case "trials":
            return [point(f"{trials:,} trials", trials=trials) for trials in (10, 100, 1_000)]
        case "size":
            return [point(f"{size} px", image_size=size) for size in (32, 64, 96)]
        case _:
            counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < cpu_count()]
            return [
                point(f"{count} at once", images=10_000, trials=20, max_concurrent=count)
                for count in [*counts, cpu_count()]
            ]


def point(label: str, **options: int) -> Point:
    """A study of 10 trials on 1,000 images, but for what is given."""
    given = {"images": 1_000, "trials": 10, **options}
    more = (f"--{name.replace('_', '-')}={value}" for name, value in given.items())
    return Point(label, (*SMALL, *more))


AXES = ("images", "trials", "size", "at-once")
HEADS = ("", *COLUMNS, "whole", "/ first", "epochs", "efficiency", "memory MB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    options = parser.parse_args(arguments)
    print(about("ray", "optuna", "onnxruntime"))
    load_dataset("cifar10", None)
    load_weights("keras")
    for axis in options.axes:
        points = axis_points(axis)
        works: dict[str, Callable[[], object]] = {p.label: p for p in points}
        in_turn(works, options.repeats)
        print(f"\n{show(HEADS, [row(p, points[0], options.repeats) for p in points])}", flush=True)
    print(f"\nmedian (min to max) of seconds, n = {options.repeats}")


def row(point: Point, first: Point, repeats: int) -> list[str]:
    """What the last studies of a point say."""
    whole, whole_of_first = (
        Spread(tuple(sum(columns.values()) for columns in p.seconds[-repeats:]))
        for p in (point, first)
    )
    columns = (
        Spread(tuple(study[column] for study in point.seconds[-repeats:])) for column in COLUMNS
    )
    return [
        point.label,
        *(spread.shown(1) for spread in columns),
        whole.shown(0),
        ratio(whole, whole_of_first).shown(),
        str(point.epochs),
        f"{point.efficiency:.2f}",
        f"{point.memory / 1e6:,.0f}",
    ]


if __name__ == "__main__":
    main()
