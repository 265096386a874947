"""Time accounting of made-up phases and epochs; times in seconds since the study began."""

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.frames import StudyFrames, load_readable_frames
from analysis.report.text_tables import show_slot_times, show_times
from analysis.report.times import PhaseTime, SlotTime, Times, compute_times, describe_times
from analysis.report.write import write_report
from analysis.rundir import PhaseRow, RunDir, RunDirError
from study.system.phase_timer import PhaseTimer
from tests.support.fake_frames import frames

BEGAN = 1e9
#: A phase of a start: number of the start, name, begin, end, slots.
Phase = tuple[int, str, float, float, int]
#: Consecutive epochs of a run: run, worker, begin of each, seconds per epoch.
Run = tuple[str, str, Sequence[float], float]


def study(
    phases: Sequence[Phase],
    runs: Sequence[Run],
    trials: Mapping[str, str] | None = None,
    seconds: Mapping[str, float] | None = None,
    epochs: int = 9,
) -> StudyFrames:
    """Make the frames of a study.

    Args:
        phases: The rows of phases.jsonl.
        runs: Names that begin with "c" are confirmation runs; several entries of one name are its
            attempts.
        trials: States of trials by run id; the arm is the run id's first letter.
        seconds: Durations of the confirmation runs, by run id.
        epochs: Number of epochs of a full run.
    """
    rows: list[dict[str, Any]] = []
    attempts = Counter[str]()
    for run_id, worker, begins, took in runs:
        attempts[run_id] += 1
        rows += [
            {
                "phase": "confirm" if run_id.startswith("c") else "search",
                "run_id": run_id,
                "attempt": attempts[run_id],
                "arm": run_id[0],
                "start": BEGAN + begin,
                "end": BEGAN + begin + took,
                "worker": worker,
            }
            for begin in begins
        ]
    named = [{"run_id": n, "arm": n[0], "state": s} for n, s in (trials or {}).items()]
    confirmed = [{"run_id": n, "seconds": s, "setting": n} for n, s in (seconds or {}).items()]
    made = frames(
        trials=pd.DataFrame(named) if named else None,
        confirm=pd.DataFrame(confirmed) if confirmed else None,
        record={"config": {"epochs": epochs}},
    )
    moved = [PhaseRow(n, name, BEGAN + b, BEGAN + e, slots) for n, name, b, e, slots in phases]
    return replace(made, epochs=pd.DataFrame(rows), phases=pd.DataFrame(moved))


def phase(times: Times, name: str) -> PhaseTime:
    return next(phase for phase in times.phases if phase.phase == name)


def slots(times: Times, name: str = "search") -> SlotTime:
    found = phase(times, name).slot_time
    assert found is not None
    return found


def rounded(time: SlotTime) -> list[float]:
    """Compute, between epochs, measuring, between runs, start-up, idle."""
    return [round(part, 3) for part in astuple(time)]


#: Two workers: the first trains two trials with a second between them, the other trains one.
WHOLE: tuple[Phase, ...] = (
    (1, "start-up", 0, 8, 1),
    (1, "data", 8, 10, 1),
    (1, "search", 12, 40, 2),
    (1, "confirm", 40, 61, 2),
    (1, "report", 62, 65, 1),
    (1, "export", 65, 70, 1),
)
RUNS: tuple[Run, ...] = (
    ("a-0", "h:1", (15, 18.5, 22), 3),  # to 25, with half a second between epochs, twice
    ("a-1", "h:1", (26, 29), 3),  # to 32
    ("b-0", "h:2", (17, 22, 27), 5),  # to 32
)


def test_a_whole_study_by_hand() -> None:
    times = compute_times(study(WHOLE, RUNS))
    assert [p.phase for p in times.phases] == [name for _, name, *_ in WHOLE]
    assert [p.wall for p in times.phases] == [8, 2, 28, 21, 3, 5]
    # 10 to 12 and 61 to 62.
    assert (times.other, times.total, times.whole) == (3, 70, True)
    # Epochs 9 + 6 + 15; from 12 to 15 and to 17; from 32 to 40, twice.
    assert rounded(slots(times)) == [30, 1, 0, 1, 8, 16]
    assert slots(times).efficiency == pytest.approx(30 / 56)
    assert phase(times, "data").slot_time is None


def test_confirmation_runs_measure_beyond_their_epochs() -> None:
    runs = [("c-0", "h:1", (45, 47), 2.0), ("c-1", "h:1", (53, 55), 2.0), *RUNS]
    times = compute_times(study(WHOLE, runs, seconds={"c-0": 7, "c-1": 6}))
    # Until 52 and 59; 45 - 40 until the first epoch; the other slot is idle.
    assert rounded(slots(times, "confirm")) == [8, 0, 5, 1, 5, 23]


def test_the_starts_of_a_resumed_study_add_up() -> None:
    phases = [
        (1, "search", 10, 30, 2),
        (2, "start-up", 5000, 5010, 1),
        (2, "search", 5010, 5030, 1),
    ]
    runs = [("a-0", "h:1", (12,), 10.0), ("a-0", "h:9", (5015,), 10.0)]
    times = compute_times(study(phases, runs))
    found = phase(times, "search")
    assert (found.wall, found.slots, found.unrecorded) == (40, 2, False)
    # The pause between the starts, 30 to 5000, does not count.
    assert rounded(slots(times)) == [20, 0, 0, 0, 7, 33]
    assert (times.total, times.other) == (50, 0)
    (run,) = times.runs
    assert (run.epochs, run.compute, run.waiting, run.began) == (2, 20, 0, 2)
    assert run.worker == "h:9"


def test_an_interrupted_confirmation_run_measures_in_its_last_attempt_only() -> None:
    """All its rows are written at its end, under its last attempt and worker."""
    phases = [
        (1, "confirm", 10, 40, 1),
        (2, "start-up", 5000, 5010, 1),
        (2, "confirm", 5010, 5040, 1),
    ]
    runs = [("c-0", "h:9", (12, 22, 5015, 5025), 10.0)]
    times = compute_times(study(phases, runs, seconds={"c-0": 23}))
    # In the first start: 2 s until it trains, and 8 s at the end, in which an epoch was lost.
    assert rounded(slots(times, "confirm")) == [40, 0, 3, 0, 7, 10]


def test_a_worker_that_dies_leaves_its_slot_to_another() -> None:
    runs = [
        ("a-0", "h:1", (15, 18), 3.0),  # to 21, then its worker dies
        ("b-0", "h:2", (15, 18), 3.0),
        ("a-0", "h:3", (30,), 3.0),
        ("b-1", "h:2", (21.5,), 3.0),
    ]
    # 9 s are lost with the worker, and 7 + 15.5 s idle at the end; no third slot starts up.
    times = compute_times(study(WHOLE, runs))
    assert rounded(slots(times)) == [18, 0, 0, 0.5, 6, 31.5]
    dying = [("c-0", "h:3", (42, 45, 55), 3.0), *RUNS]
    times = compute_times(study(WHOLE, dying, seconds={"c-0": 5}))
    # The seven seconds without a worker are not between epochs: the last attempt took 5 s.
    assert rounded(slots(times, "confirm")) == [9, 0, 2, 0, 2, 29]


def test_more_workers_than_slots_do_not_exceed_the_slot_time() -> None:
    runs = [(f"a-{n}", f"h:{n}", (13 + n,), 12.0) for n in range(8)]
    times = compute_times(study(WHOLE, runs))
    assert rounded(slots(times)) == [56, 0, 0, 0, 0, 0]
    assert slots(times).efficiency == 1


@pytest.mark.parametrize("apart", [-4.0, 4.0, 30.0])
def test_clock_differences_only_move_time_between_start_up_and_idle(apart: float) -> None:
    here, there = (
        compute_times(
            study(WHOLE, [(n, w, [b + by for b in begins], s) for n, w, begins, s in RUNS])
        )
        for by in (0, apart)
    )
    assert rounded(slots(there))[:4] == rounded(slots(here))[:4]
    assert slots(there).total == pytest.approx(56)
    assert min(astuple(slots(there))) >= 0


def test_a_phase_of_zero_length_has_no_efficiency() -> None:
    times = compute_times(study([(1, "search", 10, 10, 2)], []))
    assert rounded(slots(times)) == [0, 0, 0, 0, 0, 0]
    assert show_slot_times(times).rows[0][-1] == ""
    assert [row[2] for row in show_times(times).rows] == ["", ""]


def test_a_search_that_trained_nothing_is_idle() -> None:
    times = compute_times(study(WHOLE, []))
    assert rounded(slots(times)) == [0, 0, 0, 0, 0, 56]
    assert not times.runs
    assert not times.savings
    assert "computing" not in " ".join(describe_times(times))


def test_trials_that_failed_in_their_first_epoch_are_listed() -> None:
    times = compute_times(study(WHOLE, RUNS, {"b-1": "failed", "a-0": "completed"}))
    assert [run.run_id for run in times.runs] == ["a-0", "b-0", "a-1", "b-1"]
    failed = times.runs[-1]
    assert (failed.epochs, failed.compute, failed.saved, failed.worker) == (0, 0, 0, "")
    assert math.isnan(failed.began)


def test_without_phases_epochs_are_used_and_the_start_up_is_unknown() -> None:
    later = [(f"{n}-later", w, [b + 7200 for b in begins], s) for n, w, begins, s in RUNS]
    times = compute_times(study((), [*RUNS, *later]))
    found = phase(times, "search")
    # From 15 to 32, and again two hours later.
    assert (found.wall, found.slots, found.unrecorded) == (34, 2, True)
    assert rounded(slots(times)) == [60, 2, 0, 2, 0, 4]
    assert times.total == 34
    assert math.isnan(times.runs[0].began)
    grid = show_slot_times(times)
    assert grid.rows[0][grid.header.index("start-up")] == "unknown"
    text = " ".join(describe_times(times))
    assert text == "During the search, 2 slots spent 88 % of 34 s computing."
    assert "from its first epoch to its last" in show_times(times).note
    assert "python -m analysis" not in show_times(times).note


def test_a_killed_start_is_reconstructed_from_its_epochs() -> None:
    """Its search has no row, and is not mistaken for that of the next start."""
    phases = [(1, "start-up", 0, 10, 1), (2, "start-up", 40, 50, 1), (2, "search", 50, 70, 1)]
    runs = [("a-0", "h:1", (12, 15), 3.0), ("a-1", "h:7", (60,), 3.0)]
    times = compute_times(study(phases, runs))
    found = phase(times, "search")
    assert (found.wall, found.unrecorded) == (26, True)
    assert rounded(slots(times)) == [9, 0, 0, 0, 10, 7]


def test_what_asha_saved_by_hand() -> None:
    runs = [
        ("a-0", "h:1", range(100, 109), 1.0),
        ("a-1", "h:1", (120, 123, 126), 2.0),  # six more epochs of 2 s
        ("b-0", "h:2", range(100, 109), 1.0),
        ("b-1", "h:2", (120, 121), 0.5),  # diverged
    ]
    states = {"a-0": "completed", "a-1": "pruned", "b-0": "completed", "b-1": "diverged"}
    times = compute_times(study((), runs, {**states, "b-2": "failed"}))
    a, b = times.savings
    assert (a.arm, a.trained, a.full, a.compute, a.saved) == ("a", 12, 18, 15, 12)
    assert (b.arm, b.trained, b.full, b.compute, b.saved) == ("b", 9, 9, 9, 0)
    assert {run.run_id: run.saved for run in times.runs if run.saved} == {"a-1": 12}
    assert describe_times(times)[-1] == (
        "ASHA trained 21 of 27 epochs, saving about 12 s of 36 s of compute (a: 12 of 18; b: 9 of"
        " 9). 2 diverged or failed trials are not counted."
    )


def test_the_description_says_if_asha_stopped_nothing() -> None:
    runs = [("a-0", "h:1", range(100, 109), 1.0)]
    texts = describe_times(compute_times(study((), runs, {"a-0": "completed"})))
    assert texts[-1] == "ASHA stopped no trials: all 9 epochs were trained."


def test_the_page_says_that_the_export_is_not_included() -> None:
    until_now = compute_times(study(WHOLE[:-2], RUNS))
    assert "python -m analysis RUN adds them" in show_times(until_now).note
    assert describe_times(until_now)[0].startswith("The study took 1 min 01 s until this report")
    whole = compute_times(study(WHOLE, RUNS))
    assert "python -m analysis" not in show_times(whole).note
    assert describe_times(whole)[0].startswith(
        "The study took 1 min 10 s. During the search, 2 slots"
    )


def test_shares_and_the_time_between_phases_are_shown() -> None:
    rows = {row[0]: row[1:] for row in show_times(compute_times(study(WHOLE, RUNS))).rows}
    assert rows["search"] == ("28 s", "40 %")
    assert rows["between phases"] == ("3 s", "4 %")
    assert rows["all"] == ("1 min 10 s", "100 %")


def test_invalid_times_are_ignored() -> None:
    phases = [
        (1, "search", 50, 10, 2),
        (1, "confirm", math.nan, 10, 2),
        (2, "<b>", 100, 120, -3),
        (2, "search", 100, math.inf, 1),
    ]
    runs = [("a-0", "h:1", (20, math.nan, 30), -3.0), ("a-1", "h:1", (math.inf,), 1.0)]
    times = compute_times(study(phases, runs))
    assert {p.phase: p.wall for p in times.phases} == {"search": 7, "<b>": 20}
    assert rounded(slots(times)) == [0, 7, 0, 0, 0, 0]
    assert [(run.run_id, run.compute) for run in times.runs] == [("a-0", 0)]


@pytest.mark.parametrize("seed", range(100))
def test_the_parts_add_up_to_the_slot_time(seed: int) -> None:
    """With random starts, dying workers, and clocks a few seconds apart."""
    chance = random.Random(seed)
    phases: list[Phase] = []
    runs: list[Run] = []
    now, expected = 0.0, 0.0
    for start in range(1, chance.randint(2, 4)):
        count, begin = chance.randint(1, 4), now + chance.uniform(5, 20)
        phases.append((start, "start-up", now, begin, 1))
        ends = [begin]
        for slot in range(chance.randint(0, count + 1)):
            worker, clock = f"h:{start}-{slot}", chance.uniform(-3, 3)
            at = begin + clock + chance.uniform(0, 15)
            for number in range(chance.randint(0, 4)):
                took, gap = chance.uniform(0, 5), chance.uniform(0, 1)
                begins = [at + epoch * (took + gap) for epoch in range(chance.randint(1, 4))]
                runs.append((f"{chance.choice('ab')}-{start}{slot}{number}", worker, begins, took))
                at = begins[-1] + took + chance.uniform(0, 3)
                worker = worker if chance.random() < 0.8 else f"{worker}'"
                ends.append(at - clock)
        end = max(ends) + chance.uniform(-1, 10)
        if start > 1 or chance.random() < 0.7:  # else it was killed
            phases.append((start, "search", begin, end, count))
        now = end + chance.uniform(0, 1000)
    times = compute_times(study(phases, runs))
    for found in times.phases:
        if found.slot_time is None:
            continue
        assert min(astuple(found.slot_time)) >= 0
        assert found.slot_time.compute <= found.slot_time.total + 1e-6
        if not found.unrecorded:
            expected = sum(n * max(0, e - b) for _, name, b, e, n in phases if name == "search")
            assert found.slot_time.total == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert sum(run.epochs for run in times.runs) == sum(len(begins) for _, _, begins, _ in runs)
    assert times.total >= 0


# --- phases.jsonl --------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    made = RunDir(tmp_path / "run")
    made.write_study({"starts": []})
    return made


def test_a_truncated_line_is_skipped_and_overwritten(run: RunDir) -> None:
    rows = [PhaseRow(1, "data", 1.5, 2.5, 1), PhaseRow(1, "search", 2.5, 9, 2)]
    for row in rows:
        run.append_phase(row)
    assert run.read_phases() == rows
    run.phases.write_bytes(run.phases.read_bytes()[:-9])
    assert run.read_phases() == rows[:1]
    run.append_phase(rows[1])
    assert run.read_phases() == rows


def test_the_timer_counts_starts_and_ends_interrupted_phases(run: RunDir) -> None:
    clock = PhaseTimer(run, 100.0)
    assert not run.phases.exists()
    clock.record_start_up()
    with pytest.raises(KeyboardInterrupt), clock.phase("search", 3):
        raise KeyboardInterrupt
    first, second = run.read_phases()
    assert (first.start, first.phase, first.begin, first.slots) == (1, "start-up", 100, 1)
    assert (second.start, second.phase, second.slots) == (1, "search", 3)
    assert first.end <= second.begin <= second.end
    PhaseTimer(run, 200.0).record_start_up()
    assert run.read_phases()[-1].start == 2
    # Starts that are in study.json only count too.
    run.write_study({"starts": [{}, {}, {}]})
    PhaseTimer(run, 300.0).record_start_up()
    assert run.read_phases()[-1].start == 4


def test_a_write_error_does_not_hide_the_exception_of_a_phase(run: RunDir) -> None:
    clock = PhaseTimer(run, 100.0)
    run.phases.mkdir()
    with pytest.raises(ValueError, match="the reason"), clock.phase("search"):
        raise ValueError("the reason")
    with pytest.raises(OSError, match=r"phases\.jsonl"), clock.phase("search"):
        pass


def test_a_damaged_file_is_reported_and_does_not_stop_the_study(run: RunDir) -> None:
    run.write_study({"starts": [{}]})
    run.phases.write_text("garbage\n")
    with pytest.raises(RunDirError, match=r"phases\.jsonl, line 1"):
        run.read_phases()
    assert "phases.jsonl, line 1" in " ".join(load_readable_frames(run.path).problems)
    PhaseTimer(run, 100.0).record_start_up()
    assert json.loads(run.phases.read_text().splitlines()[-1])["start"] == 2


def test_hostile_phases_stay_text(run: RunDir) -> None:
    run.append_phase(PhaseRow(-7, "<script>evil()</script>", 1, 2, 1))
    page = write_report(run.path).path.read_text()
    assert "&lt;script&gt;evil()" in page
    assert "<script>evil()" not in page
