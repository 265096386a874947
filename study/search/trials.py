"""The trials of a study as an earlier start has left them, in optuna.db and epochs.jsonl."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import optuna
from optuna.trial import FrozenTrial

from analysis.rundir import EpochRow, RunDir, TrialRow
from search_spaces import Value
from study.search.searcher import (
    State,
    finish_interrupted_trial,
    open_study,
    run_id,
    state_of,
    trial_seed,
)
from study.study import Study

#: Per arm, the weights of so many of the best trials are kept.
KEPT_PER_ARM = 3


def trial_rows(study: Study, storage: optuna.storages.RDBStorage) -> list[TrialRow]:
    """Every trial that has ended, arm by arm, from optuna.db and epochs.jsonl."""
    epochs = _epochs_by_run(study.rundir)
    rows = []
    for arm in study.searched:
        fixed = study.space.fixed_values(arm)
        for trial in open_study(storage, arm.name, study.mode).get_trials(deepcopy=False):
            state = state_of(trial)
            if state is not None:
                name = run_id(arm.name, trial.number)
                seed = trial_seed(study.config.seed, arm.name, trial.number)
                values = {**fixed, **trial.params}
                rows.append(
                    _trial_row(trial, state, name, arm.name, values, seed, epochs.get(name, []))
                )
    return rows


def count_interrupted(study: Study, storage: optuna.storages.RDBStorage) -> int:
    """How many trials have begun and not ended."""
    studies = [open_study(storage, arm.name, study.mode) for arm in study.searched]
    return sum(not trial.state.is_finished() for ot in studies for trial in ot.get_trials(False))


def recover(study: Study, storage: optuna.storages.RDBStorage) -> None:
    """Finish what an earlier start was doing when it died: ends not yet told, files not deleted."""
    rundir = study.rundir
    epochs = _epochs_by_run(study.rundir)
    for arm in study.searched:
        ot_study = open_study(storage, arm.name, study.mode)
        for trial in ot_study.get_trials(deepcopy=False):
            name = run_id(arm.name, trial.number)
            rows = epochs.get(name)
            if trial.state.is_finished() or not rows:
                continue
            reached_end = rows[-1].epoch >= study.config.epochs and rundir.has(rundir.weights(name))
            if rows[-1].rung == "stop" or reached_end:
                finish_interrupted_trial(ot_study, trial, rows, study.config.epochs)
    ended = trial_rows(study, storage)
    for row in ended:
        rundir.delete(rundir.state(row.run_id))
        if row.state != "completed":
            rundir.delete(rundir.weights(row.run_id))
    prune_weights(rundir, completed_by_arm(ended), study.mode)


def completed_by_arm(ended: Iterable[TrialRow]) -> dict[str, list[tuple[float, str]]]:
    """Score and run id of the completed trials of each arm."""
    completed: dict[str, list[tuple[float, str]]] = {}
    for row in ended:
        if row.state == "completed":
            completed.setdefault(row.arm, []).append((row.score, row.run_id))
    return completed


def prune_weights(
    rundir: RunDir,
    completed: Mapping[str, Iterable[tuple[float, str]]],
    mode: Literal["min", "max"],
) -> dict[str, list[tuple[float, str]]]:
    """Delete the weights of all but the best trials of each arm; of equal ones the first are kept.

    So the champion, the first of the best, is always among them.

    Returns:
        Those that are kept: whoever calls this after each trial need not go over all of them again.
    """
    kept = {}
    for arm, trials in completed.items():
        by_number = sorted(trials, key=lambda trial: int(trial[1].rsplit("-", 1)[1]))
        ranked = sorted(by_number, key=lambda trial: trial[0], reverse=mode == "max")
        for _, name in ranked[KEPT_PER_ARM:]:
            rundir.delete(rundir.weights(name))
        kept[arm] = ranked[:KEPT_PER_ARM]
    return kept


def _epochs_by_run(rundir: RunDir) -> dict[str, list[EpochRow]]:
    epochs: dict[str, list[EpochRow]] = {}
    for row in rundir.read_epochs():
        epochs.setdefault(row.run_id, []).append(row)
    return epochs


def _trial_row(
    trial: FrozenTrial,
    state: State,
    name: str,
    arm: str,
    hyperparameters: dict[str, Value],
    seed: int,
    epochs: list[EpochRow],
) -> TrialRow:
    reached = [row for row in epochs if row.score == epochs[-1].score]
    # The score is the best so far, so the first epoch that has it is the best epoch.
    best = reached[0] if reached else None
    return TrialRow(
        run_id=name,
        arm=arm,
        hyperparameters=hyperparameters,
        seed=seed,
        state=state,
        epochs=len(epochs),
        best_epoch=best.epoch if best else 0,
        score=best.score if best else math.nan,
        train_loss=best.train_loss if best else math.nan,
        train_accuracy=best.train_accuracy if best else math.nan,
        val_loss=best.val_loss if best else math.nan,
        val_accuracy=best.val_accuracy if best else math.nan,
        start=epochs[0].start if best else math.nan,
        end=epochs[-1].end if best else math.nan,
        attempts=trial.user_attrs["attempts"],
        error=trial.user_attrs.get("error", ""),
        val_balanced_accuracy=best.val_balanced_accuracy if best else math.nan,
    )
