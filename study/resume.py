"""Checks of an existing run directory before a study is resumed.

Files that hold the only copy of their contents (study.json, optuna.db, epochs.jsonl, verdict.json)
must be intact, or the study is refused and left unchanged. Everything else is rebuilt if missing or
damaged: trials.csv and confirm.csv from their sources, a confirmation run by retraining it, the
report and the bundle at the end of every start. A damaged phases.jsonl does not prevent resuming;
the report then omits phase times.
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

#: Options that may be increased on resume.
GROWING = ("trials", "seeds")


def load_or_create_record(study: Study) -> dict[str, Any]:
    """Return study.json from an earlier start, or create it for a new study.

    Raises:
        UserError: The study cannot be resumed, or the directory holds something else.
    """
    rundir = study.rundir
    if not rundir.study_json.exists():
        refuse_foreign(rundir)
        record = new_record(study)
        rundir.write_study(record)
        return record
    record = rundir.read_study()
    check_same_request(record, study)
    check_intact(rundir)
    rundir.delete_partial()
    return record


def refuse_foreign(rundir: RunDir) -> None:
    """Refuse to start a new study in a directory with other files.

    Raises:
        UserError: The directory holds other files.
    """
    # A start that was killed right away leaves these.
    allowed = {LOCK, f".{rundir.study_json.name}.part"}
    if {file.name for file in rundir.path.iterdir()} - allowed:
        raise UserError(
            f"{rundir.path} holds other files but no study.json: restore study.json, or give"
            " another --name."
        )


def check_intact(rundir: RunDir) -> None:
    """Check that a study's files are intact, so that it can be resumed.

    Raises:
        UserError: Names the damaged or missing file; nothing has been written.
    """
    try:
        for problem in _problems(rundir):
            raise RunDirError(problem)
    except RunDirError as error:
        raise UserError(
            f"--resume: {error}. Restore a copy of the file, or start again under another --name."
        ) from error


def _problems(rundir: RunDir) -> Iterator[str]:
    rows = rundir.read_epochs()
    if rundir.verdict.exists():
        from_json(rundir.verdict.read_bytes(), str(rundir.verdict))
    searched = [row for row in rows if row.phase == "search"]
    if not rundir.optuna_db.exists():
        if searched:
            yield f"{rundir.optuna_db} is missing, but epochs.jsonl has epochs of trials"
        return
    yield from _database_problems(rundir)
    yield from _differences(rundir, searched)


def _database_problems(rundir: RunDir) -> Iterator[str]:
    file = rundir.optuna_db
    try:
        # mode=rw lets SQLite roll back a journal left by a crash, but does not create the file.
        with sqlite3.connect(f"file:{file}?mode=rw", uri=True) as database:
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                yield f"{file} is damaged: {verdict}"
            (pages,) = database.execute("PRAGMA page_count").fetchone()
            (size,) = database.execute("PRAGMA page_size").fetchone()
            if pages * size != file.stat().st_size:
                yield f"{file} is damaged: it is truncated"
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if "trials" not in tables and rundir.read_epochs():
                yield f"{file} has no trials"
    except sqlite3.Error as error:
        yield f"{file} is damaged: {error}"


def _differences(rundir: RunDir, rows: list[EpochRow]) -> Iterator[str]:
    """Yield disagreements between optuna.db and epochs.jsonl on trials that have ended."""
    if rundir.optuna_db.stat().st_size == 0:  # created, still empty
        return
    epochs: dict[str, set[int]] = {}
    for row in rows:
        epochs.setdefault(row.run_id, set()).add(row.epoch)
    known = set()
    for arm, ot_study in read_searches(rundir.optuna_db).items():
        for trial in ot_study.get_trials(deepcopy=False):
            name = run_id(arm, trial.number)
            known.add(name)
            missing = trial.intermediate_values.keys() - epochs.get(name, set())
            if trial.state.is_finished() and missing:
                yield f"{rundir.epochs} lacks epoch {min(missing)} of trial {name}"
    if lost := epochs.keys() - known:
        yield f"{rundir.optuna_db} lacks trial {min(lost)}, but epochs.jsonl has epochs of it"


def pinned_sources(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the sources of data and weights of an earlier start; empty if there was none."""
    if "data" not in record or "weights" not in record:
        return {}
    return {"data": record["data"]["source_key"], "weights": record["weights"]["name"]}


def check_same_request(old: Mapping[str, Any], study: Study) -> None:
    """Refuse to resume a study with options that would make its results incomparable.

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
            was = f"without {shown}" if before is None else f"with {shown} {before}"
            raise UserError(
                f"--resume: this study was started {was}; omit the option, or give a new --name."
            )
        if value < before:
            raise UserError(
                f"--resume: this study has {shown} {before}, which cannot be reduced; give more,"
                " or omit the option."
            )
    for part, before in old.get("space", new["space"]).items():
        if before != new["space"].get(part):
            raise UserError(
                f"--resume: the space {study.space.name} has changed since this study started: its"
                f" {part} was {before} and is now {new['space'].get(part)}; change it back, or give"
                " a new --name."
            )


def check_same_inputs(old: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Refuse to resume a study with different data, weights or split.

    Raises:
        UserError: Names the first difference.
    """
    for part in ("data", "weights", "split"):
        if part in old and old[part]["sha256"] != inputs[part]["sha256"]:
            raise UserError(
                f"the {part} changed since this study started (sha256"
                f" {old[part]['sha256'][:12]}, now {inputs[part]['sha256'][:12]});"
                " restore the original, or start a new study."
            )


def describe_changes(record: Mapping[str, Any]) -> str:
    """Describe version and commit changes since the first start, which may affect results."""
    now = describe_environment()
    changed = [
        f"{name} {record['versions'].get(name)}, now {version}"
        for name, version in now["versions"].items()
        if record["versions"].get(name) != version
    ]
    if record["git_commit"] != now["git_commit"]:
        changed.append(f"commit {record['git_commit'] or 'unknown'}, now {now['git_commit']}")
    return "; ".join(changed)
