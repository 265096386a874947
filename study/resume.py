"""What an earlier start has left, looked at before anything is written.

What only this file knows (study.json, optuna.db, epochs.jsonl, verdict.json) must be whole, or the
study is refused and stays as it is. Everything else is made anew where it is missing or damaged:
trials.csv and confirm.csv from what they are made of, a confirmation run by training it again, the
report and the bundle at the end in any case. When phases ran (phases.jsonl) is no reason not to go
on; where that is damaged, the report leaves it out.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from analysis.rundir import EpochRow, RunDir, RunDirError
from analysis.rundir.codec import from_json
from analysis.rundir.optuna_db import read_searches
from study.config import OPERATIONAL
from study.errors import UserError
from study.provenance import describe_environment, new_record, requested
from study.search.searcher import run_id
from study.storage.lock import LOCK
from study.study import Study

#: Options that a study may have more of when it goes on.
GROWING = ("trials", "seeds")


def load_or_create_record(study: Study) -> dict[str, Any]:
    """study.json as an earlier start left it, or as a new study begins it.

    Raises:
        UserError: The study cannot go on, or the directory holds something else.
    """
    rundir = study.rundir
    if not rundir.study_json.exists():
        refuse_foreign(rundir)
        record = new_record(study)
        rundir.write_study(record)
        return record
    record = rundir.read_study()
    check_same_request(record, study)
    check_left(rundir)
    rundir.delete_partial()
    return record


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


def check_left(rundir: RunDir) -> None:
    """Make sure that a study can go on with what it has left.

    Raises:
        UserError: Names the file that is damaged or missing; nothing has been written.
    """
    try:
        for problem in _problems(rundir):
            raise RunDirError(problem)
    except RunDirError as error:
        raise UserError(
            f"--resume: {error}. Bring back a copy of the file, or start anew under another --name."
        ) from error


def _problems(rundir: RunDir) -> Iterator[str]:
    rows = rundir.read_epochs()
    if rundir.verdict.exists():
        from_json(rundir.verdict.read_bytes(), str(rundir.verdict))
    searched = [row for row in rows if row.phase == "search"]
    if not rundir.optuna_db.exists():
        if searched:
            yield f"{rundir.optuna_db} is missing, but epochs.jsonl holds epochs of trials"
        return
    yield from _database_problems(rundir)
    yield from _differences(rundir, searched)


def _database_problems(rundir: RunDir) -> Iterator[str]:
    file = rundir.optuna_db
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
            if "trials" not in tables and rundir.read_epochs():
                yield f"{file} holds no trials"
    except sqlite3.Error as error:
        yield f"{file} is damaged: {error}"


def _differences(rundir: RunDir, rows: list[EpochRow]) -> Iterator[str]:
    """Where optuna.db and epochs.jsonl disagree on trials that have ended."""
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


def pinned_sources(record: Mapping[str, Any]) -> dict[str, str]:
    """Where an earlier start had its data and weights from; nothing where there was none."""
    if "data" not in record or "weights" not in record:
        return {}
    return {"data": record["data"]["source_key"], "weights": record["weights"]["name"]}


def check_same_request(old: Mapping[str, Any], study: Study) -> None:
    """Refuse to go on with a study under options that make its results incomparable.

    Raises:
        UserError: Names the first difference.
    """
    new = requested(study)
    for option, value in new["config"].items():
        before = old["config"].get(option)
        if option in OPERATIONAL or before == value:
            continue
        shown = f"--{option.replace('_', '-')}"
        if option not in GROWING:
            raise UserError(
                f"--resume: this study has {shown} {before}, not {value}; leave the option out,"
                " or give a new --name."
            )
        if value < before:
            raise UserError(
                f"--resume: this study has {shown} {before}, which cannot become fewer; give more,"
                " or leave the option out."
            )
    for part, before in old.get("space", new["space"]).items():
        if before != new["space"].get(part):
            raise UserError(
                f"--resume: the space {study.space.name} changed since this study's start: its"
                f" {part} was {before} and is {new['space'].get(part)}; change it back, or give a"
                " new --name."
            )


def check_same_inputs(old: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Refuse to go on with a study on other data, weights or another split.

    Raises:
        UserError: Names the first difference.
    """
    for part in ("data", "weights", "split"):
        if part in old and old[part]["sha256"] != inputs[part]["sha256"]:
            raise UserError(
                f"--resume: the {part} changed since this study's start (sha256 "
                f"{old[part]['sha256'][:12]}, now {inputs[part]['sha256'][:12]}); "
                "bring the old one back, or give a new --name."
            )


def describe_changes(record: Mapping[str, Any]) -> str:
    """In what this start is made otherwise than the first, where figures may depend on it."""
    now = describe_environment()
    changed = [
        f"{name} {record['versions'].get(name)}, now {version}"
        for name, version in now["versions"].items()
        if record["versions"].get(name) != version
    ]
    if record["git_commit"] != now["git_commit"]:
        changed.append(f"commit {record['git_commit']}, now {now['git_commit']}")
    return "; ".join(changed)
