"""Where the time went: what each phase took, what the slots did meanwhile, what ASHA saved.

A slot is room for one run. In search and confirm, slot time is slots times wall time, and it is
divided without remainder. What one process has measured comes first, since its clock is one; what
lies between two clocks, those of driver and worker, takes what is left, and is never negative.
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

#: What the phases that have slots are called in a sentence.
PHASE_WORDS = {"search": "the search", "confirm": "the confirmation"}

#: Seconds without an epoch after which a study that has not written down its phases stood still.
LONGEST_GAP = 600.0


@dataclass(frozen=True)
class SlotTime:
    """What the slots of a phase did; seconds, all slots together.

    Attributes:
        compute: In epochs, evaluation included.
        between_epochs: Between the epochs of a run: it reports, and saves its state.
        measuring: Confirmation runs beyond their epochs: they measure on all parts of the data.
        between_runs: Between two runs of one worker, which waits for the next one.
        start_up: From the phase's begin to the first epoch of each slot.
        idle: The rest: idle at the end, lost attempts, workers that are replaced.
    """

    compute: float = 0.0
    between_epochs: float = 0.0
    measuring: float = 0.0
    between_runs: float = 0.0
    start_up: float = 0.0
    idle: float = 0.0

    @property
    def total(self) -> float:
        """Slots times wall time."""
        return float(sum(astuple(self)))

    @property
    def efficiency(self) -> float:
        """Compute as a fraction of slot time; NaN where there is none."""
        return self.compute / self.total if self.total else math.nan

    def __add__(self, other: "SlotTime") -> "SlotTime":
        return SlotTime(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class PhaseTime:
    """What a phase took, all starts of the study together.

    Attributes:
        phase: Its name.
        wall: Seconds from begin to end.
        slots: Runs at once, the most of any start.
        slot_time: What the slots did; None but in search and confirm.
        unrecorded: Whether a start has not written down when it began and ended: it then counts
            from its first epoch to its last, and what came before is unknown.
    """

    phase: str
    wall: float
    slots: int
    slot_time: SlotTime | None = None
    unrecorded: bool = False


@dataclass(frozen=True)
class RunTime:
    """What a run took.

    Attributes:
        phase: `search` or `confirm`.
        run_id: Its name.
        arm: As in epochs.jsonl.
        worker: That trained it last; empty where it has no epoch.
        epochs: How many it has.
        compute: Seconds in epochs.
        waiting: Seconds between its epochs, without the time in which no worker had it.
        began: Seconds from the phase's begin to its first epoch; NaN where one is unknown.
        saved: Seconds that the epochs which ASHA did not let it train would have taken.
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
        trained: Epochs that were trained.
        full: Epochs that full runs would have.
        compute: Seconds of the epochs that were trained.
        saved: Seconds that the others would have taken, each at its trial's mean.
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
        phases: In the order of a study; those that took place.
        other: Seconds between the phases.
        runs: In the order of their first epochs; runs without one come last.
        savings: By arm.
        left_out: Diverged and failed trials, which ASHA has not stopped.
        whole: Whether the latest start has come to its end.
    """

    phases: tuple[PhaseTime, ...]
    other: float
    runs: tuple[RunTime, ...]
    savings: tuple[ArmSaving, ...]
    left_out: int
    whole: bool

    @property
    def total(self) -> float:
        """Seconds of the study, all starts together."""
        return self.other + sum(phase.wall for phase in self.phases)


class _Epoch(NamedTuple):
    """Of a row of epochs.jsonl, what this is about."""

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
    """Epochs of a run that one worker trained in a row, within one start."""

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
    """A phase in one start, with what ran in it."""

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
    """Add up what a study has written down of its phases, epochs and runs."""
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
    """The rows of phases that make sense, a row per phase of each start."""
    if frames.phases.empty:
        return pd.DataFrame(columns=["start", "phase", "begin", "end", "slots"])
    rows = frames.phases
    rows = rows[rows[["begin", "end"]].map(math.isfinite).all(axis=1)]
    merged = rows.groupby(["start", "phase"], sort=False, as_index=False).agg(
        begin=("begin", "min"), end=("end", "max"), slots=("slots", "max")
    )
    return merged.assign(slots=merged["slots"].clip(lower=1))


def _epochs(frames: StudyFrames) -> list[_Epoch]:
    """The epochs whose times make sense, in the order in which they began."""
    if frames.epochs.empty:
        return []
    columns = (frames.epochs[name] for name in _Epoch._fields)
    epochs = [_Epoch(*values) for values in zip(*columns, strict=True)]
    whole = [epoch for epoch in epochs if math.isfinite(epoch.start) and math.isfinite(epoch.end)]
    return sorted(whole, key=lambda epoch: epoch.start)


def _last_attempts(
    frames: StudyFrames, epochs: Sequence[_Epoch]
) -> Mapping[str, tuple[float, float]]:
    """By run id of a confirmation run: the earliest begin of its last attempt, and what that took.

    All rows of such a run are written at its end, under its last attempt. What does not fit into
    that was trained by an earlier one.
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
    """Every phase of every start: as it is written down, else from its first epoch to its last."""
    by_begin = rows.groupby("start")["begin"].min().sort_values()
    starts, begins = list(by_begin.index), list(by_begin)
    trained: dict[tuple[int, str], list[_Epoch]] = {}
    for epoch in epochs:
        # It belongs to the last start that began before it: what clocks differ by is less than
        # what a start takes until it trains. Before the first one nothing was written down.
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
    """The stretches of the epochs of one phase in one start."""
    groups: dict[tuple[str, int, str], list[_Epoch]] = {}
    for epoch in epochs:
        groups.setdefault((epoch.run_id, epoch.attempt, epoch.worker), []).append(epoch)
    for (run_id, _, worker), group in groups.items():
        begin, took = last_attempts.get(run_id, (-math.inf, 0.0))
        if earlier := [epoch for epoch in group if epoch.start < begin]:
            yield _stretch("", earlier)  # its worker is not known
        if last := [epoch for epoch in group if epoch.start >= begin]:
            stretch = _stretch(worker, last)
            yield replace(stretch, measuring=max(0.0, took - (stretch.end - stretch.begin)))


def _stretch(worker: str, epochs: Sequence[_Epoch]) -> _Stretch:
    begin, end = min(e.start for e in epochs), max(e.end for e in epochs)
    compute = sum(epoch.seconds for epoch in epochs)
    return _Stretch(epochs[0].run_id, worker, begin, max(begin, end), compute)


def _unrecorded(phase: str, stretches: Sequence[_Stretch]) -> Iterator[_Stay]:
    """Stays of which only the epochs are known, apart where nothing trained for long."""
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
    """The most stretches that go on at the same time."""
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
    """Divide the slot time of a stay: every part takes what it needs of what is left."""
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
    """The stretches slot by slot.

    A worker keeps its slot. A new one takes the slot of the run that it takes up again, else one
    that was not used yet, else the one that has been free for longest.
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
    """Seconds that belong to no phase, within each start."""
    other = 0.0
    for _, phases in rows.groupby("start"):
        walls = (phases["end"] - phases["begin"]).clip(lower=0).sum()
        other += max(0.0, float(phases["end"].max() - phases["begin"].min() - walls))
    return other


def _run_times(
    frames: StudyFrames, stays: Sequence[_Stay], epochs: Sequence[_Epoch]
) -> list[RunTime]:
    """A row per run that has an epoch, then the trials that have none."""
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
    """What ASHA saved by arm, and how many trials it has not decided on."""
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
    """How many epochs a trial has that ASHA does not stop."""
    asked = frames.record.get("config", {}).get("epochs")
    if type(asked) is int:
        return asked
    return int(max(frames.trials["epochs"], default=0)) if "epochs" in frames.trials else 0


def _column(frames: StudyFrames, name: str) -> dict[str, str]:
    """A column of the trials by run id."""
    if not {"run_id", name} <= set(frames.trials.columns):
        return {}
    return dict(zip(frames.trials["run_id"], frames.trials[name], strict=True))


def describe_times(times: Times) -> tuple[str, ...]:
    """How well the slots were used, and what ASHA saved; a sentence each."""
    recorded = [phase for phase in times.phases if not phase.unrecorded]
    until = "" if times.whole else " until this report was written"
    said = [f"The study took {duration(times.total)}{until}."] if recorded else []
    used = [
        f"in {PHASE_WORDS[phase.phase]} {count(phase.slots, 'slot')} computed for"
        f" {100 * phase.slot_time.efficiency:.0f} % of {duration(phase.wall)}"
        for phase in times.phases
        if phase.slot_time and phase.slot_time.compute
    ]
    if used:
        sentence = ", ".join(used)
        said.append(f"{sentence[0].upper()}{sentence[1:]}.")
    return tuple([" ".join(said)] if said else []) + _describe_savings(times)


def _describe_savings(times: Times) -> tuple[str, ...]:
    if not times.savings:
        return ()
    trained, full = (
        sum(getattr(arm, name) for arm in times.savings) for name in ("trained", "full")
    )
    compute, saved = (sum(getattr(arm, n) for arm in times.savings) for n in ("compute", "saved"))
    if trained == full:
        return (f"ASHA stopped no trial: all {full} epochs were trained.",)
    by_arm = "; ".join(f"{arm.arm}: {arm.trained} of {arm.full}" for arm in times.savings)
    sentence = (
        f"ASHA trained {trained} of {full} epochs: about {duration(saved)} of compute saved of"
        f" {duration(compute + saved)}{f' ({by_arm})' if len(times.savings) > 1 else ''}."
    )
    if times.left_out:
        word = "is" if times.left_out == 1 else "are"
        sentence += f" {count(times.left_out, 'diverged or failed trial')} {word} left out."
    return (sentence,)
