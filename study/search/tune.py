"""The search phase: Ray Tune runs the trials of all arms, and every epoch is recorded.

A first start, a resumed one and an extended one all do the same: they build a new Tuner from
optuna.db and epochs.jsonl that runs the missing trials.
"""

import math
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from ray import tune
from ray.air._internal import usage
from ray.tune.experiment import Trial

from analysis.rundir import TrialRow
from analysis.rundir.optuna_db import open_storage
from study.cluster.resources import Resources
from study.errors import UserError, storage_error
from study.runs.context import RunContext
from study.runs.failures import Failure, failure_of
from study.runs.worker import run_trial
from study.screen import EndedRun, Screen
from study.search.callback import EmergencyStop, SearchCallback
from study.search.scheduler import SCORE, ArmScheduler
from study.search.searcher import ArmSearch, StudySearch
from study.search.trials import count_interrupted, recover, trial_rows
from study.study import Study

if TYPE_CHECKING:
    from study.search.mlflow_tracking import TrialTracker


def run_search(study: Study, context: RunContext) -> None:
    """Run the missing trials, then write trials.csv.

    A trial that ran out of memory next to others is set aside and retried alone at the end.

    Args:
        study: The study; its run directory may hold results of earlier starts.
        context: Data and settings shared by all trials, and the screen.

    Raises:
        UserError: The run directory cannot be written to, or too many trials in a row failed.
    """
    if not study.searched_arms:
        return
    config, screen = study.config, context.screen
    storage = open_storage(study.rundir.optuna_db)
    tracker = _make_tracker(study, screen)
    if not study.rundir.confirm.exists():
        deadline = None if config.time_budget is None else time.time() + 60 * config.time_budget
        recover(study, storage)
        study.rundir.snapshot()
        groups = {arm.name: study.trials_per_arm[arm.name] for arm in study.searched_arms}
        with screen.phase("Search", config.metric, config.epochs, groups) as view:
            for row in trial_rows(study, storage):
                view.count(_ended_run(row))
            view.already = view.ended
            interrupted = count_interrupted(study, storage)
            if interrupted or 0 < view.already < view.total:
                screen.print(
                    f"Search: {view.already} of {view.total} trials have ended; interrupted trials"
                    f" to resume from their last checkpoint: {interrupted or 'none'}"
                )
            try:
                _run_missing(study, storage, context, deadline, tracker)
            except BaseException:
                if tracker:
                    tracker.interrupt()
                raise
    study.rundir.snapshot()
    ended = trial_rows(study, storage)
    study.rundir.write_trials(ended)
    if tracker:
        tracker.catch_up(ended)


def check_tracking(study: Study) -> None:
    """Check, before anything is written, that MLflow is available if `--mlflow` is given.

    Raises:
        UserError: MLflow is not installed, or `check_server` failed.
    """
    uri = study.config.mlflow
    if uri is None:
        return
    try:
        # Optional, and slow to import.
        from study.search.mlflow_tracking import check_server
    except ImportError as error:
        raise UserError(
            f"--mlflow: MLflow cannot be imported ({error}); install it with `pip install -e"
            " .[mlflow]`, or run `uv run --extra mlflow run_study.py`."
        ) from error
    name = str(study.config.name)
    check_server(uri, name, is_new=not study.location.holds(name))


def _make_tracker(study: Study, screen: Screen) -> "TrialTracker | None":
    """Return the MLflow tracker if `--mlflow` is given."""
    if study.config.mlflow is None:
        return None
    # MLflow is optional, and slow to import.
    from study.search.mlflow_tracking import TrialTracker

    return TrialTracker(study, screen)


def _run_missing(
    study: Study,
    storage: optuna.storages.RDBStorage,
    context: RunContext,
    deadline: float | None,
    tracker: "TrialTracker | None",
) -> None:
    """Run the missing trials; at the end, one at a time, those that were set aside."""
    screen = context.screen
    for only_set_aside in (False, True):
        if only_set_aside:
            context = context.one_at_a_time()
        while True:
            arms = _arm_searches(study, storage, only_set_aside=only_set_aside)
            if all(arm.exhausted for arm in arms.values()):
                break
            searcher, stop = StudySearch(arms, study.mode, deadline), EmergencyStop()
            try:
                _tuner(study, storage, context, searcher, stop, tracker).fit()
            except Exception as error:  # whatever broke under Ray; a known cause goes first
                known = stop.reason or storage_error(_whole_text(error), study.rundir.path)
                failure = failure_of(error.__cause__ or error)
                if known or failure.kind not in ("memory", "lost"):
                    raise known or error from error
                # Ray Tune gives up when Ray's memory monitor kills a worker. Which trial used
                # too much memory is unknown.
                if failure.kind == "memory":
                    half = max(1, context.resources.at_once // 2)
                    context = context.with_resources(replace(context.resources, at_once=half))
                _count_losses(study, searcher, failure, screen)
                screen.print(
                    f"{failure.reason}; resuming the running trials from their last checkpoints,"
                    f" {context.resources.at_once} at once"
                )
                continue
            if stop.reason is not None:
                raise stop.reason
            break


def _count_losses(study: Study, searcher: StudySearch, failure: Failure, screen: Screen) -> None:
    """Count a loss for every running trial; fail those that were lost too often."""
    for trial_id in sorted(searcher.running):
        losses = searcher.count_loss(trial_id, progressed=False)
        if losses > study.config.max_failures:
            reason = f"lost {losses} times; last cause: {failure.reason}"
            run = searcher.fail(trial_id, "failed", reason)
            study.rundir.write_failure(run, losses, failure.traceback)
            screen.print(f"{run}  failed  {reason}")


def _whole_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _arm_searches(
    study: Study, storage: optuna.storages.RDBStorage, *, only_set_aside: bool
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
            only_set_aside=only_set_aside,
        )
        for arm in study.searched_arms
    }


def _tuner(
    study: Study,
    storage: optuna.storages.RDBStorage,
    context: RunContext,
    searcher: StudySearch,
    stop: EmergencyStop,
    tracker: "TrialTracker | None",
) -> tune.Tuner:
    ended, resources = trial_rows(study, storage), context.resources
    callback = SearchCallback(
        study, searcher, context.screen, stop, ended, exclusive=resources.exclusive
    )
    skip_logger_imports()
    arms = [arm.name for arm in study.space.arms]
    epochs = study.rundir.read_epochs()
    scheduler = ArmScheduler(arms, study.mode, study.config.epochs, epochs)
    # The reference is wrapped in a list so that Ray passes the reference, not the arrays.
    trainable = tune.with_parameters(
        run_trial, shared=[context.training], settings=context.settings
    )
    return tune.Tuner(
        tune.with_resources(trainable, _placement(resources)),
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
            # SearchCallback comes first: it decides what happens to trials that raise.
            callbacks=[callback, *([tracker.following(searcher)] if tracker else [])],
            stop=stop,
            verbose=2 if study.config.verbose else 0,
        ),
    )


def skip_logger_imports() -> None:
    """Keep Ray Tune from importing MLflow and other loggers just for its usage statistics.

    This saves 0.8 s per start if MLflow is installed.
    """

    def tag_callbacks(callbacks: list[tune.Callback] | None) -> bool:  # noqa: ARG001
        return False

    usage.tag_callbacks = tag_callbacks


def _placement(resources: Resources) -> tune.PlacementGroupFactory:
    bundle = {"CPU": resources.cpus, "GPU": resources.gpus}
    if not resources.label_selector:
        return tune.PlacementGroupFactory([bundle])
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[resources.label_selector])


def _folder_name(trial: Trial) -> str:
    """Return the folder of a trial in Ray's experiment directory, one per attempt."""
    attempt = trial.config["attempt"]
    return f"{trial.config['run_id']}{f'-attempt-{attempt}' if attempt > 1 else ''}"


def _next_part(search: Path) -> str:
    numbers = [int(path.name.removeprefix("part-")) for path in search.glob("part-*")]
    return f"part-{max(numbers, default=0) + 1}"


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
