"""What an earlier start has left, looked at before anything is written.

What only this file knows (study.json, optuna.db, epochs.jsonl, verdict.json) must be whole, or the
study is refused and stays as it is. Everything else is made anew where it is missing or damaged:
trials.csv and confirm.csv from what they are made of, a confirmation run by training it again, the
report and the bundle at the end in any case. When phases ran (phases.jsonl) is no reason not to go
on; where that is damaged, the report leaves it out.
"""

import sqlite3
from collections.abc import Iterator

from analysis.rundir import EpochRow, RunDir
from analysis.rundir.codec import from_json
from analysis.rundir.errors import RunDirError
from analysis.rundir.optuna_db import read_searches
from study.errors import UserError
from study.searcher import run_id
from study.storage.lock import LOCK
from study.study import Study


def refuse_foreign(rundir: RunDir) -> None:
    """Refuse to begin in a directory that holds something.

    Raises:
        UserError: It does.
    """
    # A start that was killed in its first moment has left as much.
    begun = {LOCK, f".{rundir.study_json.name}.part"}
    if {file.name for file in rundir.path.iterdir()} - begun:
        raise UserError(
            f"{rundir.path} holds no study.json, but other files: bring study.json back, or give"
            " another --name."
        )


def check_left(study: Study) -> None:
    """Make sure that a study can go on with what it has left.

    Raises:
        UserError: Names the file that is damaged or missing; nothing has been written.
    """
    try:
        for problem in _problems(study):
            raise RunDirError(problem)
    except RunDirError as error:
        raise UserError(
            f"--resume: {error}. Bring back a copy of the file, or start anew under another --name."
        ) from error


def _problems(study: Study) -> Iterator[str]:
    rundir = study.rundir
    rows = rundir.read_epochs()
    if rundir.verdict.exists():
        from_json(rundir.verdict.read_bytes(), str(rundir.verdict))
    searched = [row for row in rows if row.phase == "search"]
    if not rundir.optuna_db.exists():
        if searched:
            yield f"{rundir.optuna_db} is missing, but epochs.jsonl holds epochs of trials"
        return
    yield from _database_problems(study)
    yield from _differences(study, searched)


def _database_problems(study: Study) -> Iterator[str]:
    file = study.rundir.optuna_db
    try:
        # Read and write, so that SQLite can finish what a crash has left in its journal; a file
        # that is not there is not made.
        with sqlite3.connect(f"file:{file}?mode=rw", uri=True) as database:
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                yield f"{file} is damaged: {verdict}"
            (pages,) = database.execute("PRAGMA page_count").fetchone()
            (size,) = database.execute("PRAGMA page_size").fetchone()
            if pages * size != file.stat().st_size:
                yield f"{file} is damaged: it was cut short"
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if "trials" not in tables and study.rundir.read_epochs():
                yield f"{file} holds no trials"
    except sqlite3.Error as error:
        yield f"{file} is damaged: {error}"


def _differences(study: Study, rows: list[EpochRow]) -> Iterator[str]:
    """Where optuna.db and epochs.jsonl disagree on trials that have ended."""
    rundir = study.rundir
    if rundir.optuna_db.stat().st_size == 0:  # made, and nothing in it yet
        return
    epochs: dict[str, set[int]] = {}
    for row in rows:
        epochs.setdefault(row.run_id, set()).add(row.epoch)
    known = set()
    for arm, ot_study in read_searches(rundir.optuna_db).items():
        for trial in ot_study.get_trials(deepcopy=False):
            name = run_id(arm, trial.number)
            known.add(name)
            lacking = trial.intermediate_values.keys() - epochs.get(name, set())
            if trial.state.is_finished() and lacking:
                yield f"{rundir.epochs} lacks epoch {min(lacking)} of trial {name}"
    if lost := epochs.keys() - known:
        yield f"{rundir.optuna_db} lacks trial {min(lost)}, of which epochs.jsonl holds epochs"
