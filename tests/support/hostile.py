"""A run directory whose names and texts try to inject markup into the report."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.rundir import RunDir
from tests.support import FIXTURES

STUDY = FIXTURES / "study"

#: Breaks out of an attribute, an element, a formula or a style.
EVIL = "\"'><script>evil()</script><img src=x onerror=evil()>&lt;$\\frac{$[/bold][red]"
#: The same for names that are also file names.
EVIL_NAME = "\"'><img src=x onerror=evil()>&lt;$\\frac{$[red]"


def make_hostile_study(folder: Path) -> RunDir:
    """Copy the small study of the fixtures to a folder and make every name and text hostile."""
    path = Path(shutil.copytree(STUDY, folder / f"study{EVIL_NAME}"))
    run = RunDir(path)
    epochs = [
        replace(r, arm=r.arm + EVIL, run_id=r.run_id + EVIL_NAME, worker=r.worker + EVIL)
        for r in run.read_epochs()
    ]
    trials = [
        replace(
            trial,
            arm=trial.arm + EVIL,
            run_id=trial.run_id + EVIL_NAME,
            error=EVIL,
            hyperparameters={
                **trial.hyperparameters,
                "head": f"{trial.hyperparameters['head']}{EVIL}",
                f"own{EVIL}": EVIL,
            },
            # Some failed trials, so that the report describes their region.
            **({"state": "failed"} if number % 3 == 0 else {}),  # type: ignore[arg-type]
        )
        for number, trial in enumerate(run.read_trials())
    ]
    confirm = [
        replace(
            row,
            run_id=row.run_id + EVIL_NAME,
            recipe=row.recipe + EVIL,
            setting=row.setting + EVIL,
            hyperparameters={**row.hyperparameters, "head": EVIL},
        )
        for row in run.read_confirm()
    ]
    record = run.read_study()
    run.epochs.unlink()
    run.append_epochs(epochs)
    run.write_trials(trials)
    run.write_confirm(confirm)
    arms = {name + EVIL: arm for name, arm in record["arms"].items()}
    record = {**_each_text(record, lambda text: text + EVIL), "arms": arms}
    record["config"]["metric"] = "val_accuracy"
    record["data"]["classes"] = [f"class {number} {EVIL}" for number in range(10)]
    record["space"] = {"name": EVIL, "question": EVIL}
    run.study_json.write_text(json.dumps({**record, "format": 1}))
    for file in run.confirm_dir.glob("*.npz"):
        file.rename(file.with_name(f"{file.stem}{EVIL_NAME}.npz"))
    (run.confirm_dir / f"damaged{EVIL_NAME}.npz").write_bytes(b"damaged")
    with closing(sqlite3.connect(run.optuna_db)) as database, database:
        database.execute("UPDATE studies SET study_name = study_name || ?", (EVIL,))
        database.execute(
            "UPDATE trial_params SET param_name = 'own' || ? WHERE param_name = 'weight_decay'",
            (EVIL,),
        )
    return run


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
