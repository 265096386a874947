"""The search phase: Ray Tune runs the trials of all arms, and every epoch is written down.

A first start, a resumed one and an extended one are the same thing: a new Tuner, built from
optuna.db and epochs.jsonl, that runs the trials which are missing.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import ray
from optuna.trial import FrozenTrial
from ray import tune

from analysis.rundir import EpochRow, TrialRow
from search_spaces import Arm, Value
from study.arrays import TrainingArrays
from study.checkpoint import read_epochs
from study.config import Study
from study.packing import Resources
from study.recorder import SearchRecorder
from study.scheduler import SCORE, ArmScheduler
from study.screen import EndedRun, Screen
from study.searcher import (
    ArmSearch,
    SavedState,
    State,
    StudySearch,
    open_storage,
    open_study,
    run_id,
    state_of,
    trial_seed,
)
from study.worker import STATE_FILE, WEIGHTS_FILE, RunSettings, run_trial


def search(
    study: Study,
    training: "ray.ObjectRef[TrainingArrays]",
    settings: RunSettings,
    resources: Resources,
    screen: Screen,
) -> None:
    """Run the trials that are missing, then write trials.csv.

    A trial that ran out of GPU memory among others is set aside; these run last, each with a GPU
    of its own.

    Args:
        study: Its run directory holds what earlier starts left.
        training: The data without `test`, in Ray's object store.
        settings: What all runs have in common.
        resources: Of one trial.
        screen: Shows the progress.
    """
    searched = [arm for arm in study.space.arms if study.space.searches(arm)]
    if not searched or _finished(study):
        return
    config = study.config
    storage = open_storage(study.rundir.optuna_db)
    deadline = None if config.time_budget is None else time.time() + 60 * config.time_budget
    groups = {arm.name: study.trials_per_arm[arm.name] for arm in searched}
    with screen.phase("Search", config.metric, config.epochs, groups) as view:
        for row in trial_rows(study, storage):
            view.count(_ended_run(row))
        view.already = view.ended
        for alone in (False, True):
            arms = _arm_searches(study, searched, storage, alone=alone)
            if all(arm.exhausted for arm in arms.values()):
                continue
            if alone:
                resources = replace(resources, gpus=1.0)
                settings = replace(settings, gpu_share=1.0)
            searcher = StudySearch(arms, study.mode, deadline)
            ended = trial_rows(study, storage)
            recorder = SearchRecorder(
                study, searcher, screen, ended, shared_gpu=0 < resources.gpus < 1
            )
            scheduler = _scheduler(study, ended)
            _tuner(study, training, settings, resources, searcher, scheduler, recorder).fit()
    study.rundir.write_trials(trial_rows(study, storage))


def trial_rows(study: Study, storage: optuna.storages.RDBStorage) -> list[TrialRow]:
    """Every trial that has ended, arm by arm, from optuna.db and epochs.jsonl."""
    epochs: dict[str, list[EpochRow]] = {}
    for row in study.rundir.read_epochs():
        epochs.setdefault(row.run_id, []).append(row)
    rows = []
    for arm in study.space.arms:
        if not study.space.searches(arm):
            continue
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


def find_weights(search: Path, run: str) -> Path:
    """The file that holds the best weights of a trial; the latest attempt's.

    Args:
        search: The folder search/ of a run directory.
        run: The trial's run id.

    Raises:
        FileNotFoundError: They were not among the arm's best and are not kept.
    """
    found = list(search.glob(f"part-*/{run}/checkpoint_*/{WEIGHTS_FILE}"))
    if not found:
        raise FileNotFoundError(f"{search} holds no weights of {run}")
    return max(found, key=lambda path: path.stat().st_mtime)


def find_state(search: Path, run: str) -> SavedState | None:
    """The state from which an interrupted trial can go on: the one with the most epochs.

    Args:
        search: The folder search/ of a run directory.
        run: The trial's run id.
    """
    found = [
        SavedState(path.resolve(), read_epochs(path))
        for path in search.glob(f"part-*/{run}/checkpoint_*/{STATE_FILE}")
    ]
    best = max(found, key=lambda state: state.epochs, default=None)
    return best if best and best.epochs else None


def _arm_searches(
    study: Study, arms: Iterable[Arm], storage: optuna.storages.RDBStorage, *, alone: bool
) -> dict[str, ArmSearch]:
    return {
        arm.name: ArmSearch(
            study.space,
            arm,
            storage=storage,
            mode=study.mode,
            epochs=study.config.epochs,
            trials=study.trials_per_arm[arm.name],
            seed=study.config.seed,
            find_state=partial(find_state, study.rundir.search),
            alone=alone,
        )
        for arm in arms
    }


def _scheduler(study: Study, ended: Iterable[TrialRow]) -> ArmScheduler:
    """ASHA with what the trials that have ended left in its rungs."""
    names = {row.run_id for row in ended}
    history = [row for row in study.rundir.read_epochs() if row.run_id in names]
    arms = [arm.name for arm in study.space.arms]
    return ArmScheduler(arms, study.mode, study.config.epochs, history)


def _tuner(
    study: Study,
    training: "ray.ObjectRef[TrainingArrays]",
    settings: RunSettings,
    resources: Resources,
    searcher: StudySearch,
    scheduler: ArmScheduler,
    recorder: SearchRecorder,
) -> tune.Tuner:
    config = study.config
    # The reference travels in a list so that Ray hands on the reference, not the arrays.
    trainable = tune.with_parameters(run_trial, shared=[training], settings=settings)
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            metric=SCORE,
            mode=study.mode,
            num_samples=-1,
            max_concurrent_trials=config.max_concurrent,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["run_id"],
            trial_dirname_creator=lambda trial: trial.config["run_id"],
        ),
        run_config=tune.RunConfig(
            name=_next_part(study.rundir.search),
            storage_path=str(study.rundir.search.resolve()),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            callbacks=[recorder],
            verbose=2 if config.verbose else 0,
        ),
    )


def _finished(study: Study) -> bool:
    """Whether the search is over: all trials have ended, or the study has moved on from it."""
    rows = len(study.rundir.read_trials())
    return study.rundir.confirm.exists() or rows >= sum(study.trials_per_arm.values())


def _next_part(search: Path) -> str:
    numbers = [int(path.name.removeprefix("part-")) for path in search.glob("part-*")]
    return f"part-{max(numbers, default=0) + 1}"


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
    )


def _ended_run(row: TrialRow) -> EndedRun:
    return EndedRun(
        row.run_id,
        row.arm,
        row.state,
        row.epochs,
        None if math.isnan(row.score) else row.score,
        row.hyperparameters,
        row.end - row.start,
        row.error,
    )
