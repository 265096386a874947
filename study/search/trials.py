"""The trials of a study, as recorded in optuna.db and epochs.jsonl by this and earlier starts."""

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

#: Number of best trials per arm whose weights are kept.
KEPT_PER_ARM = 3


def trial_rows(study: Study, storage: optuna.storages.RDBStorage) -> list[TrialRow]:
    """Return a row for each trial that has ended, arm by arm, from optuna.db and epochs.jsonl."""
    epochs = _epochs_by_run(study.rundir)
    rows = []
    for arm in study.searched_arms:
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
    """Count the trials that were started but have not ended."""
    studies = [open_study(storage, arm.name, study.mode) for arm in study.searched_arms]
    return sum(not trial.state.is_finished() for ot in studies for trial in ot.get_trials(False))


def recover(study: Study, storage: optuna.storages.RDBStorage) -> None:
    """Finish what an earlier start left undone: report ends of trials, delete obsolete files."""
    rundir = study.rundir
    epochs = _epochs_by_run(study.rundir)
    for arm in study.searched_arms:
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
    """Return score and run id of the completed trials of each arm."""
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
    """Delete the weights of all but the best `KEPT_PER_ARM` trials of each arm.

    Among equal trials the first are kept, so the champion, the first of the best, is always kept.

    Returns:
        The trials whose weights are kept, to be passed to the next call instead of all trials.
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
    # The score is the best value so far, so the first epoch with the final score is the best.
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
