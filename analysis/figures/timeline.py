"""Timeline of the runs, by worker."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis.figures.style import INK, MUTED, STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames
from analysis.words import count, duration

#: With more worker processes, a row each would not fit; runs then share rows.
MOST_WORKERS = 16

#: Maximum height of the rows together.
MOST_INCHES = 8.0

#: Minutes without training beyond which the gap counts as a pause and is cut out.
LONGEST_BREAK = 10.0

PHASE_LABELS = {"search": "search", "confirm": "confirmation runs"}

#: Label of confirmation runs that are not in confirm.csv yet.
UNFINISHED = "setting not recorded yet"


@dataclass(frozen=True)
class Bar:
    """The time of a run on one worker; minutes since the study's first epoch began.

    Attributes:
        run_id: The run; it has several bars if another worker resumed it.
        phase: `search` or `confirm`.
        group: The arm of a trial, the setting of a confirmation run.
        lane: Its row, from 0.
        start: Start of its first epoch.
        end: End of its last epoch.
    """

    run_id: str
    phase: str
    group: str
    lane: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The runs of a study over time.

    Attributes:
        bars: In the order of their starts.
        lanes: Number of rows.
        by_worker: True if each row is a worker process; else runs fill any free row.
        pauses: Position and length of each pause that is cut out, in minutes.
    """

    bars: tuple[Bar, ...]
    lanes: int
    by_worker: bool
    pauses: tuple[tuple[float, float], ...]

    @property
    def minutes(self) -> float:
        """Minutes from the first start to the last end, excluding pauses."""
        return max(bar.end for bar in self.bars)

    @property
    def at_once(self) -> int:
        """Maximum number of concurrent runs."""
        return 1 + max(_pack([bar.start for bar in self.bars], [bar.end for bar in self.bars]))

    @property
    def busy(self) -> float:
        """Fraction of the time of `at_once` slots in which runs trained."""
        taken = sum(bar.end - bar.start for bar in self.bars)
        return taken / (self.at_once * self.minutes) if self.minutes else 1.0

    @property
    def longest(self) -> tuple[str, float]:
        """The longest run, and its minutes."""
        minutes: dict[str, float] = {}
        for bar in self.bars:
            minutes[bar.run_id] = minutes.get(bar.run_id, 0) + bar.end - bar.start
        return max(minutes.items(), key=lambda item: item[1])


def make_timeline(frames: StudyFrames) -> Picture | None:
    """Make the figure: a row per worker, a bar per run."""
    timeline = compute_timeline(frames)
    if timeline is None:
        return None
    ink = colours(frames)
    with mpl.rc_context(STYLE):
        figure = new_figure(1.6 + min(0.3 * timeline.lanes, MOST_INCHES))
        draw_timeline(timeline, ink, figure.subplots())
    return Picture("timeline", _title(timeline), _caption(timeline), figure)


def compute_timeline(frames: StudyFrames) -> Timeline | None:
    """Return when each run trained; None before the first epoch has ended."""
    epochs = frames.epochs.dropna(subset=["start", "end"])
    if epochs.empty:
        return None
    runs = (
        epochs.groupby(["phase", "run_id", "arm", "worker"], sort=False)
        .agg(start=("start", "min"), end=("end", "max"))
        .reset_index()
        .sort_values("start", kind="stable")
    )
    runs[["start", "end"]] = (runs[["start", "end"]] - runs["start"].min()) / 60
    runs, pauses = _without_pauses(runs)
    lanes, by_worker = _lanes(runs)
    setting_of = dict(zip(frames.confirm["run_id"], frames.confirm["setting"], strict=True))
    bars = tuple(
        Bar(
            run_id=run["run_id"],
            phase=run["phase"],
            group=run["arm"]
            if run["phase"] == "search"
            else setting_of.get(run["run_id"], UNFINISHED),
            lane=lane,
            start=run["start"],
            end=run["end"],
        )
        for run, lane in zip(runs.to_dict("records"), lanes, strict=True)
    )
    return Timeline(bars, 1 + max(lanes), by_worker, pauses)


def _without_pauses(runs: pd.DataFrame) -> tuple[pd.DataFrame, tuple[tuple[float, float], ...]]:
    """Cut out long gaps without training, such as those before a resume."""
    over = runs["end"].cummax().shift(fill_value=0)
    gaps = (runs["start"] - over).where(lambda gap: gap > LONGEST_BREAK, 0)
    moved = runs.assign(
        start=runs["start"] - gaps.cumsum(),
        end=runs["end"] - gaps.cumsum(),
    )
    pauses = zip(moved.loc[gaps > 0, "start"], gaps[gaps > 0], strict=True)
    return moved, tuple((float(at), float(length)) for at, length in pauses)


def _lanes(runs: pd.DataFrame) -> tuple[list[int], bool]:
    """Return the row of every run, and whether rows are workers."""
    workers = list(runs["worker"].unique())
    over = runs.groupby("worker")["end"].transform(lambda ends: ends.cummax().shift())
    overlap = (runs["start"] < over).any()
    if len(workers) > MOST_WORKERS or overlap:
        return _pack(list(runs["start"]), list(runs["end"])), False
    return [workers.index(worker) for worker in runs["worker"]], True


def _pack(starts: Sequence[float], ends: Sequence[float]) -> list[int]:
    """Return the first free row for every run; runs are in the order of their starts."""
    free_from: list[float] = []
    lanes = []
    for start, end in zip(starts, ends, strict=True):
        lane = next((row for row, free in enumerate(free_from) if free <= start), len(free_from))
        free_from[lane : lane + 1] = [end]
        lanes.append(lane)
    return lanes


def draw_timeline(timeline: Timeline, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw a bar per run, and mark the start of each phase above the rows.

    Args:
        timeline: At least one bar.
        ink: The colour of every arm and every setting.
        ax: The axes to draw on.
    """
    groups = list(dict.fromkeys(bar.group for bar in timeline.bars))
    for group in groups:
        bars = [bar for bar in timeline.bars if bar.group == group]
        colour = ink.get(group, MUTED)
        ax.barh(
            [bar.lane for bar in bars],
            [bar.end - bar.start for bar in bars],
            left=[bar.start for bar in bars],
            height=0.7,
            # The opaque edge separates a run from the next.
            facecolor=mpl.colors.to_rgba(colour, 0.6),
            edgecolor=colour,
            linewidth=0.6,
        )
    _mark_phases(timeline, ax)
    rows = range(timeline.lanes) if timeline.by_worker else ()
    ax.set_yticks(rows, [str(row + 1) for row in rows])
    ax.set_ylim(timeline.lanes - 0.5, -0.5)
    ax.set_xlim(0, 1.002 * timeline.minutes or 1)
    ax.grid(visible=False, axis="y")
    ax.set_ylabel("worker" if timeline.by_worker else "")
    paused = sum(length for _, length in timeline.pauses)
    pauses = f", excluding {duration(60 * paused)} without training" if paused else ""
    ax.set_xlabel(f"minutes since the first start{pauses}")
    patches = [Patch(color=ink.get(group, MUTED), alpha=0.6, label=group) for group in groups]
    # Padding leaves room for the phase names between axes and legend.
    ax.legend(handles=patches, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=1.6)


def _mark_phases(timeline: Timeline, ax: Axes) -> None:
    """Label the phases above the rows, and draw a line at each phase start and pause."""
    phases = groupby(timeline.bars, key=lambda bar: bar.phase)
    starts = [(phase, next(bars).start) for phase, bars in phases]
    ends = [start for _, start in starts[1:]] + [math.inf]
    for (phase, start), end in zip(starts, ends, strict=True):
        ax.axvline(start, color=MUTED, linewidth=1)
        # A phase too short for its name stays unlabelled.
        if end - start > 0.12 * timeline.minutes:
            ax.annotate(
                PHASE_LABELS.get(phase, phase),
                (start, 1),
                xycoords=ax.get_xaxis_transform(),
                xytext=(3, 3),
                textcoords="offset points",
                color=MUTED,
            )
    for at, _ in timeline.pauses:
        ax.axvline(at, color=INK, linewidth=1.5, linestyle="--")


def _title(timeline: Timeline) -> str:
    rows = "one row per worker process" if timeline.by_worker else "packed into free rows"
    return f"When each run trained, {rows}"


def _caption(timeline: Timeline) -> str:
    """Describe slot usage and the longest run."""
    name, minutes = timeline.longest
    return (
        f"Up to {count(timeline.at_once, 'run')} trained at once, using {100 * timeline.busy:.0f} %"
        f" of that capacity over {duration(60 * timeline.minutes)}; the longest run, {name}, took"
        f" {duration(60 * minutes)}."
    )
