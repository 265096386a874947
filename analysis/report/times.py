"""Time accounting: wall time per phase, how the slots spent it, and what ASHA saved.

A slot is room for one run. In search and confirm, slot time is slots times wall time, and all of it
is accounted for. Times measured by a single process come first, since they rely on one clock. Times
between two clocks (driver and worker) share what is left, and are never negative.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import reduce
from typing import NamedTuple

import pandas as pd

from analysis.frames import StudyFrames
from analysis.words import count, duration

#: The phases in the order of a study.
PHASES = (
    "start-up",
    "ray",
    "data",
    "features",
    "hand over",
    "search",
    "confirm",
    "report",
    "export",
)

#: Names in a sentence of the phases that have slots.
PHASE_WORDS = {"search": "the search", "confirm": "the confirmation runs"}

#: Seconds without an epoch that count as a pause if the phase has no recorded begin and end.
LONGEST_GAP = 600.0


@dataclass(frozen=True)
class SlotTime:
    """How the slots of a phase spent their time: seconds, summed over slots.

    Attributes:
        compute: In epochs, including evaluation.
        between_epochs: Between the epochs of a run, which reports and saves a checkpoint.
        measuring: In confirmation runs outside their epochs: final evaluation on all splits.
        between_runs: Between two runs of one worker, which waits for the next.
        start_up: From the start of the phase to the first epoch of each slot.
        idle: The rest: idle at the end, lost attempts, replaced workers.
    """

    compute: float = 0.0
    between_epochs: float = 0.0
    measuring: float = 0.0
    between_runs: float = 0.0
    start_up: float = 0.0
    idle: float = 0.0

    @property
    def total(self) -> float:
        """Slot time: slots times wall time."""
        return float(sum(astuple(self)))

    @property
    def efficiency(self) -> float:
        """Compute as a fraction of slot time; NaN without slot time."""
        return self.compute / self.total if self.total else math.nan

    def __add__(self, other: "SlotTime") -> "SlotTime":
        return SlotTime(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class PhaseTime:
    """The time of a phase, summed over all starts of the study.

    Attributes:
        phase: Its name.
        wall: Seconds from begin to end.
        slots: Number of concurrent runs, the maximum over starts.
        slot_time: How the slots spent their time; None except in search and confirm.
        unrecorded: True if a start has not recorded the phase's begin and end. The phase then
            counts from its first epoch to its last; its start-up time is unknown.
    """

    phase: str
    wall: float
    slots: int
    slot_time: SlotTime | None = None
    unrecorded: bool = False


@dataclass(frozen=True)
class RunTime:
    """The time of a run.

    Attributes:
        phase: `search` or `confirm`.
        run_id: Its name.
        arm: As in epochs.jsonl.
        worker: The last worker that trained it; empty without an epoch.
        epochs: Number of epochs.
        compute: Seconds in epochs.
        waiting: Seconds between its epochs, excluding time in which it was on no worker.
        began: Seconds from the start of the phase to its first epoch; NaN if either is unknown.
        saved: Estimated seconds of the epochs that ASHA skipped.
    """

    phase: str
    run_id: str
    arm: str
    worker: str
    epochs: int
    compute: float
    waiting: float
    began: float
    saved: float


@dataclass(frozen=True)
class ArmSaving:
    """What ASHA saved in an arm, over its completed and pruned trials.

    Attributes:
        arm: Its name.
        trained: Epochs trained.
        full: Epochs without early stopping.
        compute: Seconds of the trained epochs.
        saved: Estimated seconds of the skipped epochs, at their trial's mean epoch time.
    """

    arm: str
    trained: int
    full: int
    compute: float
    saved: float


@dataclass(frozen=True)
class Times:
    """Where the time of a study went.

    Attributes:
        phases: Those that took place, in the order of a study.
        other: Seconds between the phases.
        runs: In the order of their first epochs; runs without an epoch come last.
        savings: By arm.
        left_out: Number of diverged and failed trials, which do not count in the savings.
        whole: True if the latest start has finished.
    """

    phases: tuple[PhaseTime, ...]
    other: float
    runs: tuple[RunTime, ...]
    savings: tuple[ArmSaving, ...]
    left_out: int
    whole: bool

    @property
    def total(self) -> float:
        """Seconds of the study, summed over all starts."""
        return self.other + sum(phase.wall for phase in self.phases)


class _Epoch(NamedTuple):
    """The fields of a row of epochs.jsonl used here."""

    phase: str
    run_id: str
    attempt: int
    arm: str
    start: float
    end: float
    worker: str

    @property
    def seconds(self) -> float:
        return max(0.0, self.end - self.start)


@dataclass(frozen=True)
class _Stretch:
    """Consecutive epochs of a run on one worker, within one start."""

    run_id: str
    worker: str
    begin: float
    end: float
    compute: float
    measuring: float = 0.0

    @property
    def between_epochs(self) -> float:
        return max(0.0, self.end - self.begin - self.compute)


@dataclass(frozen=True)
class _Stay:
    """A phase in one start, with the runs in it."""

    phase: str
    begin: float
    end: float
    slots: int
    stretches: tuple[_Stretch, ...] = ()
    recorded: bool = True

    @property
    def wall(self) -> float:
        return max(0.0, self.end - self.begin)


def compute_times(frames: StudyFrames) -> Times:
    """Add up the recorded times of a study's phases, epochs and runs."""
    rows = _phase_rows(frames)
    epochs = _epochs(frames)
    stays = _stays(rows, epochs, _last_attempts(frames, epochs))
    names = dict.fromkeys([*PHASES, *(stay.phase for stay in stays)])
    grouped = {name: [stay for stay in stays if stay.phase == name] for name in names}
    runs = _run_times(frames, stays, epochs)
    savings, left_out = _savings(frames, runs)
    return Times(
        phases=tuple(_phase_time(name, found) for name, found in grouped.items() if found),
        other=_between_phases(rows),
        runs=tuple(runs),
        savings=savings,
        left_out=left_out,
        whole="export" in set(rows.loc[rows["start"] == rows["start"].max(), "phase"]),
    )


def _phase_rows(frames: StudyFrames) -> pd.DataFrame:
    """Return the valid rows of phases, one per phase and start."""
    if frames.phases.empty:
        return pd.DataFrame(columns=["start", "phase", "begin", "end", "slots"])
    rows = frames.phases
    rows = rows[rows[["begin", "end"]].map(math.isfinite).all(axis=1)]
    merged = rows.groupby(["start", "phase"], sort=False, as_index=False).agg(
        begin=("begin", "min"), end=("end", "max"), slots=("slots", "max")
    )
    return merged.assign(slots=merged["slots"].clip(lower=1))


def _epochs(frames: StudyFrames) -> list[_Epoch]:
    """Return the epochs with finite times, in order of their start."""
    if frames.epochs.empty:
        return []
    columns = (frames.epochs[name] for name in _Epoch._fields)
    epochs = [_Epoch(*values) for values in zip(*columns, strict=True)]
    valid = [epoch for epoch in epochs if math.isfinite(epoch.start) and math.isfinite(epoch.end)]
    return sorted(valid, key=lambda epoch: epoch.start)


def _last_attempts(
    frames: StudyFrames, epochs: Sequence[_Epoch]
) -> Mapping[str, tuple[float, float]]:
    """Return the earliest start and the duration of the last attempt of each confirmation run.

    All rows of such a run are written at its end, under its last attempt. Epochs that do not fit
    into it were trained by an earlier one.
    """
    if not {"run_id", "seconds"} <= set(frames.confirm.columns):
        return {}
    took = dict(zip(frames.confirm["run_id"], frames.confirm["seconds"], strict=True))
    ends: dict[str, float] = {}
    for epoch in epochs:
        if epoch.phase == "confirm" and math.isfinite(took.get(epoch.run_id, math.nan)):
            ends[epoch.run_id] = max(epoch.end, ends.get(epoch.run_id, epoch.end))
    return {run_id: (end - took[run_id], took[run_id]) for run_id, end in ends.items()}


def _stays(
    rows: pd.DataFrame,
    epochs: Sequence[_Epoch],
    last_attempts: Mapping[str, tuple[float, float]],
) -> list[_Stay]:
    """Return every phase of every start: as recorded, else from its first epoch to its last."""
    by_begin = rows.groupby("start")["begin"].min().sort_values()
    starts, begins = list(by_begin.index), list(by_begin)
    trained: dict[tuple[int, str], list[_Epoch]] = {}
    for epoch in epochs:
        # An epoch belongs to the last start that began before it: clocks differ by less than a
        # start takes until its first epoch. Start 0: no recorded start began before it.
        index = bisect_right(begins, epoch.start) - 1
        start = starts[index] if index >= 0 else 0
        trained.setdefault((start, epoch.phase), []).append(epoch)
    stays = []
    for row in rows.to_dict("records"):
        found = trained.pop((row["start"], row["phase"]), [])
        stretches = tuple(_stretches(found, last_attempts))
        stays.append(_Stay(row["phase"], row["begin"], row["end"], int(row["slots"]), stretches))
    for (_, phase), found in trained.items():
        stays += _unrecorded(phase, list(_stretches(found, last_attempts)))
    return stays


def _stretches(
    epochs: Sequence[_Epoch], last_attempts: Mapping[str, tuple[float, float]]
) -> Iterator[_Stretch]:
    """Group the epochs of one phase in one start into stretches."""
    groups: dict[tuple[str, int, str], list[_Epoch]] = {}
    for epoch in epochs:
        groups.setdefault((epoch.run_id, epoch.attempt, epoch.worker), []).append(epoch)
    for (run_id, _, worker), group in groups.items():
        begin, took = last_attempts.get(run_id, (-math.inf, 0.0))
        if earlier := [epoch for epoch in group if epoch.start < begin]:
            yield _stretch("", earlier)  # its worker is unknown
        if last := [epoch for epoch in group if epoch.start >= begin]:
            stretch = _stretch(worker, last)
            yield replace(stretch, measuring=max(0.0, took - (stretch.end - stretch.begin)))


def _stretch(worker: str, epochs: Sequence[_Epoch]) -> _Stretch:
    begin, end = min(e.start for e in epochs), max(e.end for e in epochs)
    compute = sum(epoch.seconds for epoch in epochs)
    return _Stretch(epochs[0].run_id, worker, begin, max(begin, end), compute)


def _unrecorded(phase: str, stretches: Sequence[_Stretch]) -> Iterator[_Stay]:
    """Build stays from epochs alone, split at long pauses."""
    in_order = sorted(stretches, key=lambda stretch: stretch.begin)
    parts: list[list[_Stretch]] = []
    over = -math.inf
    for stretch in in_order:
        if stretch.begin - over > LONGEST_GAP:
            parts.append([])
        parts[-1].append(stretch)
        over = max(over, stretch.end + stretch.measuring)
    for part in parts:
        begin = part[0].begin
        end = max(stretch.end + stretch.measuring for stretch in part)
        yield _Stay(phase, begin, end, _at_once(part), tuple(part), recorded=False)


def _at_once(stretches: Sequence[_Stretch]) -> int:
    """Return the maximum number of concurrent stretches."""
    changes = [(stretch.begin, 1) for stretch in stretches]
    changes += [(stretch.end, -1) for stretch in stretches]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return max(1, most)


def _phase_time(phase: str, stays: Sequence[_Stay]) -> PhaseTime:
    runs = phase in PHASE_WORDS
    return PhaseTime(
        phase=phase,
        wall=sum(stay.wall for stay in stays),
        slots=max(stay.slots for stay in stays),
        slot_time=reduce(SlotTime.__add__, map(_divide, stays)) if runs else None,
        unrecorded=not all(stay.recorded for stay in stays),
    )


def _divide(stay: _Stay) -> SlotTime:
    """Divide the slot time of a stay: each part takes at most what is left."""
    measured = {"compute": 0.0, "between_epochs": 0.0, "measuring": 0.0}
    measured |= {"between_runs": 0.0, "start_up": 0.0}
    for lane in _lanes(stay):
        for index, stretch in enumerate(lane):
            before = lane[index - 1] if index else None
            after = lane[index + 1] if index + 1 < len(lane) else None
            gap = max(0.0, after.begin - stretch.end) if after else math.inf
            measured["compute"] += stretch.compute
            measured["between_epochs"] += stretch.between_epochs
            measured["measuring"] += min(stretch.measuring, gap)
            if before is None and stay.recorded:
                measured["start_up"] += max(0.0, stretch.begin - stay.begin)
            elif before is not None and before.worker == stretch.worker != "":
                over = before.end + before.measuring
                measured["between_runs"] += max(0.0, stretch.begin - over)
    left = stay.slots * stay.wall
    parts = {}
    for name, seconds in measured.items():
        parts[name] = min(seconds, left)
        left -= parts[name]
    return SlotTime(**parts, idle=left)


def _lanes(stay: _Stay) -> list[list[_Stretch]]:
    """Assign the stretches to slots.

    A worker keeps its slot. A new worker takes the slot of the run that it resumes, else an unused
    slot, else the one that has been free for longest.
    """
    lanes: list[list[_Stretch]] = []
    for stretch in sorted(stay.stretches, key=lambda stretch: stretch.begin):
        free = [lane for lane in lanes if lane[-1].end <= stretch.begin]
        own = [lane for lane in free if lane[-1].worker == stretch.worker != ""]
        own += [lane for lane in free if lane[-1].run_id == stretch.run_id]
        if own:
            own[0].append(stretch)
        elif len(lanes) < stay.slots:
            lanes.append([stretch])
        else:
            min(lanes, key=lambda lane: lane[-1].end).append(stretch)
    return lanes


def _between_phases(rows: pd.DataFrame) -> float:
    """Return the seconds between phases, summed over starts."""
    other = 0.0
    for _, phases in rows.groupby("start"):
        walls = (phases["end"] - phases["begin"]).clip(lower=0).sum()
        other += max(0.0, float(phases["end"].max() - phases["begin"].min() - walls))
    return other


def _run_times(
    frames: StudyFrames, stays: Sequence[_Stay], epochs: Sequence[_Epoch]
) -> list[RunTime]:
    """Return a row per run with an epoch, then the trials without one."""
    of_run: dict[tuple[str, str], list[tuple[_Stay, _Stretch]]] = {}
    for stay in stays:
        for stretch in stay.stretches:
            of_run.setdefault((stay.phase, stretch.run_id), []).append((stay, stretch))
    full, states = _full_epochs(frames), _column(frames, "state")
    by_run: dict[tuple[str, str], list[_Epoch]] = {}
    for epoch in epochs:
        by_run.setdefault((epoch.phase, epoch.run_id), []).append(epoch)
    runs = []
    for (phase, run_id), trained in by_run.items():
        parts = sorted(of_run[phase, run_id], key=lambda part: part[1].begin)
        stay, first = parts[0]
        compute = sum(epoch.seconds for epoch in trained)
        missing = max(0, full - len(trained)) if states.get(run_id) == "pruned" else 0
        runs.append(
            RunTime(
                phase=phase,
                run_id=run_id,
                arm=trained[-1].arm,
                worker=trained[-1].worker,
                epochs=len(trained),
                compute=compute,
                waiting=sum(stretch.between_epochs for _, stretch in parts),
                began=max(0.0, first.begin - stay.begin) if stay.recorded else math.nan,
                saved=missing * compute / len(trained),
            )
        )
    known = {run.run_id for run in runs if run.phase == "search"}
    arms = _column(frames, "arm")
    return runs + [
        RunTime("search", run_id, arms[run_id], "", 0, 0.0, 0.0, math.nan, 0.0)
        for run_id in states
        if run_id not in known
    ]


def _savings(frames: StudyFrames, runs: Sequence[RunTime]) -> tuple[tuple[ArmSaving, ...], int]:
    """Return what ASHA saved by arm, and the number of diverged and failed trials."""
    full, states = _full_epochs(frames), _column(frames, "state")
    decided = {run_id for run_id, state in states.items() if state in ("completed", "pruned")}
    counted = [run for run in runs if run.phase == "search" and run.run_id in decided]
    arms = dict.fromkeys(_column(frames, "arm").values())
    by_arm = {arm: [run for run in counted if run.arm == arm and run.epochs] for arm in arms}
    savings = tuple(
        ArmSaving(
            arm=arm,
            trained=sum(run.epochs for run in trials),
            full=sum(max(full, run.epochs) for run in trials),
            compute=sum(run.compute for run in trials),
            saved=sum(run.saved for run in trials),
        )
        for arm, trials in by_arm.items()
        if trials
    )
    return savings, len(states) - len(decided)


def _full_epochs(frames: StudyFrames) -> int:
    """Return the number of epochs of a trial that is not stopped early."""
    epochs = frames.record.get("config", {}).get("epochs")
    if type(epochs) is int:
        return epochs
    return int(max(frames.trials["epochs"], default=0)) if "epochs" in frames.trials else 0


def _column(frames: StudyFrames, name: str) -> dict[str, str]:
    """Return a column of the trials by run id."""
    if not {"run_id", name} <= set(frames.trials.columns):
        return {}
    return dict(zip(frames.trials["run_id"], frames.trials[name], strict=True))


def describe_times(times: Times) -> tuple[str, ...]:
    """Describe total time and slot usage, and what ASHA saved; a sentence each."""
    recorded = [phase for phase in times.phases if not phase.unrecorded]
    until = "" if times.whole else " until this report was written"
    texts = [f"The study took {duration(times.total)}{until}."] if recorded else []
    used = [
        f"during {PHASE_WORDS[phase.phase]}, {count(phase.slots, 'slot')} spent"
        f" {100 * phase.slot_time.efficiency:.0f} % of {duration(phase.wall)} computing"
        for phase in times.phases
        if phase.slot_time and phase.slot_time.compute
    ]
    if used:
        sentence = "; ".join(used)
        texts.append(f"{sentence[0].upper()}{sentence[1:]}.")
    return tuple([" ".join(texts)] if texts else []) + _describe_savings(times)


def _describe_savings(times: Times) -> tuple[str, ...]:
    if not times.savings:
        return ()
    trained, full = (
        sum(getattr(arm, name) for arm in times.savings) for name in ("trained", "full")
    )
    compute, saved = (sum(getattr(arm, n) for arm in times.savings) for n in ("compute", "saved"))
    if trained == full:
        return (f"ASHA stopped no trials: all {full} epochs were trained.",)
    by_arm = "; ".join(f"{arm.arm}: {arm.trained} of {arm.full}" for arm in times.savings)
    sentence = (
        f"ASHA trained {trained} of {full} epochs, saving about {duration(saved)} of"
        f" {duration(compute + saved)} of compute"
        f"{f' ({by_arm})' if len(times.savings) > 1 else ''}."
    )
    if times.left_out:
        word = "is" if times.left_out == 1 else "are"
        sentence += f" {count(times.left_out, 'diverged or failed trial')} {word} not counted."
    return (sentence,)
