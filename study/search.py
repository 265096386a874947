"""The search phase: Ray Tune runs the trials of all arms, and every epoch is written down.

A first start, a resumed one and an extended one are the same thing: a new Tuner, built from
optuna.db and epochs.jsonl, that runs the trials which are missing.
"""

import math
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import optuna
import ray
from optuna.trial import FrozenTrial
from ray import tune
from ray.tune.experiment import Trial

from analysis.rundir import EpochRow, TrialRow
from search_spaces import Arm, Value
from study.arrays import TrainingArrays
from study.config import Study
from study.errors import storage_error
from study.failures import EmergencyStop
from study.packing import Resources
from study.recorder import SearchRecorder, completed_by_arm, delete_worse
from study.scheduler import SCORE, ArmScheduler
from study.screen import EndedRun, Screen
from study.searcher import (
    ArmSearch,
    State,
    StudySearch,
    open_storage,
    open_study,
    run_id,
    settle,
    state_of,
    trial_seed,
)
from study.worker import RunSettings, run_trial


def search(
    study: Study,
    training: "ray.ObjectRef[TrainingArrays]",
    settings: RunSettings,
    resources: Resources,
    screen: Screen,
) -> None:
    """Run the trials that are missing, then write trials.csv.

    A trial that ran out of memory beside others is set aside; these run last, one by one.

    Args:
        study: Its run directory holds what earlier starts left.
        training: The data without `test`, in Ray's object store.
        settings: What all runs have in common.
        resources: Of one trial.
        screen: Shows the progress.

    Raises:
        UserError: The run directory cannot be written to, or trial after trial has failed.
    """
    searched = [arm for arm in study.space.arms if study.space.searches(arm)]
    if not searched:
        return
    config = study.config
    storage = open_storage(study.rundir.optuna_db)
    if not study.rundir.confirm.exists():
        deadline = None if config.time_budget is None else time.time() + 60 * config.time_budget
        tidy(study, storage)
        groups = {arm.name: study.trials_per_arm[arm.name] for arm in searched}
        with screen.phase("Search", config.metric, config.epochs, groups) as view:
            for row in trial_rows(study, storage):
                view.count(_ended_run(row))
            view.already = view.ended
            interrupted = _count_interrupted(study, storage)
            if view.already or interrupted:
                screen.say(
                    f"Search: {view.already} of {view.total} trials have ended, {interrupted} were"
                    " interrupted and go on from their last states"
                )
            _run_missing(study, storage, training, settings, resources, screen, deadline)
    study.rundir.write_trials(trial_rows(study, storage))


def tidy(study: Study, storage: optuna.storages.RDBStorage) -> None:
    """Finish what an earlier start was doing when it died: ends not yet told, files not deleted."""
    rundir = study.rundir
    epochs = _epochs_by_run(study)
    for arm in study.space.arms:
        if not study.space.searches(arm):
            continue
        ot_study = open_study(storage, arm.name, study.mode)
        for trial in ot_study.get_trials(deepcopy=False):
            name = run_id(arm.name, trial.number)
            rows = epochs.get(name)
            if trial.state.is_finished() or not rows:
                continue
            reached_end = rows[-1].epoch >= study.config.epochs and rundir.weights(name).exists()
            if rows[-1].rung == "stop" or reached_end:
                settle(ot_study, trial, rows, study.config.epochs)
    ended = trial_rows(study, storage)
    for row in ended:
        rundir.state(row.run_id).unlink(missing_ok=True)
        if row.state != "completed":
            rundir.weights(row.run_id).unlink(missing_ok=True)
    delete_worse(rundir, completed_by_arm(ended), study.mode)


def _run_missing(
    study: Study,
    storage: optuna.storages.RDBStorage,
    training: "ray.ObjectRef[TrainingArrays]",
    settings: RunSettings,
    resources: Resources,
    screen: Screen,
    deadline: float | None,
) -> None:
    """Run the trials that are missing, at last and one by one those that were set aside."""
    searched = [arm for arm in study.space.arms if study.space.searches(arm)]
    for alone in (False, True):
        arms = _arm_searches(study, searched, storage, alone=alone)
        if all(arm.exhausted for arm in arms.values()):
            continue
        if alone:
            resources = replace(resources, gpus=float(resources.gpus > 0), at_once=1)
            settings = replace(settings, gpu_share=resources.gpus)
        searcher, stop = StudySearch(arms, study.mode, deadline), EmergencyStop()
        recorder = SearchRecorder(
            study,
            searcher,
            screen,
            stop,
            trial_rows(study, storage),
            alone=resources.at_once == 1,
        )
        scheduler = ArmScheduler(
            [arm.name for arm in study.space.arms],
            study.mode,
            study.config.epochs,
            study.rundir.read_epochs(),
        )
        tuner = _tuner(study, training, settings, resources, searcher, scheduler, recorder, stop)
        try:
            tuner.fit()
        except Exception as error:  # whatever broke under Ray: what is known of it goes first
            known = stop.reason or storage_error(_whole_text(error), study.rundir.path)
            raise known or error from error
        if stop.reason is not None:
            raise stop.reason


def trial_rows(study: Study, storage: optuna.storages.RDBStorage) -> list[TrialRow]:
    """Every trial that has ended, arm by arm, from optuna.db and epochs.jsonl."""
    epochs = _epochs_by_run(study)
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


def _count_interrupted(study: Study, storage: optuna.storages.RDBStorage) -> int:
    searched = [arm for arm in study.space.arms if study.space.searches(arm)]
    studies = [open_study(storage, arm.name, study.mode) for arm in searched]
    return sum(not trial.state.is_finished() for ot in studies for trial in ot.get_trials(False))


def _epochs_by_run(study: Study) -> dict[str, list[EpochRow]]:
    epochs: dict[str, list[EpochRow]] = {}
    for row in study.rundir.read_epochs():
        epochs.setdefault(row.run_id, []).append(row)
    return epochs


def _whole_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


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
            alone=alone,
        )
        for arm in arms
    }


def _tuner(
    study: Study,
    training: "ray.ObjectRef[TrainingArrays]",
    settings: RunSettings,
    resources: Resources,
    searcher: StudySearch,
    scheduler: ArmScheduler,
    recorder: SearchRecorder,
    stop: EmergencyStop,
) -> tune.Tuner:
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
            max_concurrent_trials=resources.at_once,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["run_id"],
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name=_next_part(study.rundir.search),
            storage_path=str(study.rundir.search.resolve()),
            callbacks=[recorder],
            stop=stop,
            verbose=2 if study.config.verbose else 0,
        ),
    )


def _folder_name(trial: Trial) -> str:
    """The folder of a trial in Ray's experiment directory; each attempt has its own."""
    attempt = trial.config["attempt"]
    return f"{trial.config['run_id']}{f'-attempt-{attempt}' if attempt > 1 else ''}"


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
