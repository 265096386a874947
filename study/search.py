"""The search phase: Ray Tune runs the trials of all arms, and every epoch is written down.

A first start, a resumed one and an extended one are the same thing: a new Tuner, built from
optuna.db and epochs.jsonl, that runs the trials which are missing.
"""

import math
import time
from pathlib import Path

import optuna
import ray
from optuna.trial import FrozenTrial
from ray import tune

from analysis.rundir import EpochRow, TrialRow
from search_spaces import Value
from study.arrays import TrainingArrays
from study.config import Study
from study.recorder import SearchRecorder
from study.scheduler import SCORE, ArmScheduler
from study.screen import EndedRun, Screen
from study.searcher import (
    ArmSearch,
    State,
    StudySearch,
    open_storage,
    open_study,
    run_id,
    state_of,
    trial_seed,
)
from study.worker import HEAD_FILE, RunSettings, run_trial


def search(
    study: Study,
    training: "ray.ObjectRef[TrainingArrays]",
    settings: RunSettings,
    screen: Screen,
) -> None:
    """Run the trials that are missing, then write trials.csv.

    Args:
        study: Its run directory holds what earlier starts left.
        training: The data without `test`, in Ray's object store.
        settings: What all runs have in common.
        screen: Shows the progress.
    """
    searched = [arm for arm in study.space.arms if study.space.searches(arm)]
    if not searched or _finished(study):
        return
    config = study.config
    storage = open_storage(study.rundir.optuna_db)
    arms = {
        arm.name: ArmSearch(
            study.space,
            arm,
            storage=storage,
            mode=study.mode,
            epochs=config.epochs,
            trials=study.trials_per_arm[arm.name],
            seed=config.seed,
        )
        for arm in searched
    }
    deadline = None if config.time_budget is None else time.time() + 60 * config.time_budget
    searcher = StudySearch(arms, study.mode, deadline)
    earlier = trial_rows(study, storage)
    ended = {row.run_id for row in earlier}
    history = [row for row in study.rundir.read_epochs() if row.run_id in ended]
    scheduler = ArmScheduler(arms, study.mode, config.epochs, history)

    groups = {name: study.trials_per_arm[name] for name in arms}
    with screen.phase("Search", config.metric, config.epochs, groups) as view:
        for row in earlier:
            view.count(_ended_run(row))
        view.already = view.ended
        if any(not arm.exhausted for arm in arms.values()):
            _tuner(study, training, settings, searcher, scheduler, screen).fit()
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


def find_head(study: Study, run: str) -> Path:
    """The file that holds the best weights of a trial; the latest attempt's.

    Raises:
        FileNotFoundError: They were not among the arm's best and are not kept.
    """
    found = sorted(study.rundir.search.glob(f"part-*/{run}/checkpoint_*/{HEAD_FILE}"))
    if not found:
        raise FileNotFoundError(f"{study.rundir.search} holds no weights of {run}")
    return found[-1]


def _tuner(
    study: Study,
    training: "ray.ObjectRef[TrainingArrays]",
    settings: RunSettings,
    searcher: StudySearch,
    scheduler: ArmScheduler,
    screen: Screen,
) -> tune.Tuner:
    config = study.config
    # The reference travels in a list so that Ray hands on the reference, not the arrays.
    trainable = tune.with_parameters(run_trial, shared=[training], settings=settings)
    return tune.Tuner(
        tune.with_resources(
            trainable, {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
        ),
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
            callbacks=[SearchRecorder(study, searcher, screen)],
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
