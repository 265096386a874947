"""The confirmation phase: train the missing confirmation runs and write confirm.csv."""

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from analysis.rundir import ConfirmRow, EpochRow, RunDir, RunDirError
from analysis.rundir.metric import Metric, is_better
from analysis.rundir.predictions import read_predictions
from study.confirm.design import PlannedRun, cross_recipes, planned_runs
from study.errors import StorageError, StudyStoppedError, storage_error
from study.models.state_dict import is_readable, save_safetensors
from study.runs.context import RunContext
from study.runs.failures import failure_of
from study.runs.hang_reports import find_hang
from study.runs.retry import FailureStreak, Retry, choose_retry
from study.runs.worker import Attempt, ConfirmationResult, ConfirmationWorker, run_confirmation
from study.screen import EndedRun, Screen
from study.search.champions import Champion
from study.study import Study
from study.system import signals
from study.training.checkpoint import epochs_in_checkpoint
from study.training.data import PartArrays
from study.training.loop import EpochMetrics


def run_confirmations(
    study: Study,
    champions: Sequence[Champion],
    context: RunContext,
    test: "ray.ObjectRef[PartArrays]",
) -> None:
    """Train the missing confirmation runs, then write confirm.csv.

    Failed runs are reported and skipped. A run that ran out of memory next to others is retried
    alone at the end.

    Args:
        study: The study; its run directory may hold results of earlier starts.
        champions: The arms' champions.
        context: Data and settings shared by all runs, and the screen.
        test: The test split; this is the only phase that reads it.

    Raises:
        UserError: No run succeeded, too many failed in a row, or the run directory cannot be
            written to.
    """
    config, rundir, screen = study.config, study.rundir, context.screen
    crossed = cross_recipes(study.space, champions)
    planned = planned_runs(crossed, config.seed, config.seeds)
    done = recover_finished_runs(rundir, config.metric, planned, screen)
    if rundir.confirm_holds(_in_order(planned, done)):
        return
    groups = {cell.name: config.seeds for cell in crossed}
    with screen.phase("Confirmation", config.metric, config.epochs, groups) as view:
        for run in planned:
            if run.run_id in done:
                view.count(_ended(run, done[run.run_id]))
        view.already = view.ended
        streak = FailureStreak(config.stop_after_failures)
        phase = _Phase(study, screen, planned, [context.training, test], done, streak)
        while waiting := [r for r in planned if r.run_id not in {*phase.done, *phase.failed}]:
            set_aside = _run_all(phase, waiting, context)
            if set_aside:
                _run_all(phase, set_aside, context.one_at_a_time())
            # A retrained run may turn out worse than one whose weights were not kept.
            phase.done = done = recover_finished_runs(
                rundir, config.metric, planned, screen, phase.failed
            )
    if not done:
        raise StudyStoppedError(
            "every confirmation run failed; fix the cause: the errors are above, with tracebacks in"
            " failures/ in the run directory."
        )
    rundir.write_confirm(_in_order(planned, done))


def recover_finished_runs(
    rundir: RunDir,
    metric: Metric,
    planned: Sequence[PlannedRun],
    screen: Screen,
    failed: Collection[str] = (),
) -> dict[str, ConfirmRow]:
    """Return the planned runs that are finished, by run id; delete damaged ones.

    Runs from before the study was extended that are no longer planned, because a champion has
    changed, are archived.

    Args:
        rundir: The study's run directory.
        metric: Metric that determines the best run of a cell.
        planned: All runs of the confirmation.
        screen: Shows which runs are damaged.
        failed: Run ids of runs that have failed and are not retried.
    """
    wanted = {run.run_id: run for run in planned}
    written = Counter(row.run_id for row in rundir.read_epochs())
    done: dict[str, ConfirmRow] = {}
    for file in sorted(rundir.confirm_dir.glob("*.json")):
        run_id = file.stem
        try:
            row = rundir.read_confirmation(run_id)
            read_predictions(rundir.predictions(run_id))
            if written[run_id] < row.epochs:
                raise RunDirError(f"{rundir.epochs} lacks epochs of {run_id}")
        except RunDirError as error:
            screen.print(f"{error}; this confirmation run will be retrained.")
            rundir.delete_confirmation(run_id)
            continue
        run = wanted.get(run_id)
        if run and (row.seed, row.hyperparameters) == (run.seed, run.cell.hyperparameters):
            done[run_id] = row
        else:
            rundir.archive_confirmation(run_id)
    for name in {run.cell.name: None for run in planned}:
        cell = [run for run in planned if run.cell.name == name]
        rows = _in_order(cell, done)
        ended = len(rows) + sum(run.run_id in failed for run in cell)
        # The best run is known only once no run of the cell is missing.
        best = best_row(rows, metric) if rows and ended == len(cell) else None
        if best:
            rundir.fetch(rundir.weights(best.run_id))
        if best and not is_readable(rundir.weights(best.run_id)):
            screen.print(
                f"{rundir.weights(best.run_id)} is missing or damaged; retraining the run."
            )
            rundir.delete_confirmation(best.run_id)
            del done[best.run_id]
    for run_id in done:
        rundir.delete(rundir.state(run_id))
    return done


def best_row(rows: Sequence[ConfirmRow], metric: Metric) -> ConfirmRow:
    """Return the run with the best score; the first if several are equal."""
    best = rows[0]
    for row in rows[1:]:
        if is_better(row.score, best.score, metric):
            best = row
    return best


@dataclass
class _Phase:
    """Shared state of the confirmation runs while the phase is running."""

    study: Study
    screen: Screen
    planned: Sequence[PlannedRun]
    shared: list[Any]
    """References to training data and test split; in a list, Ray passes them as references."""
    done: dict[str, ConfirmRow]
    streak: FailureStreak
    failed: set[str] = field(default_factory=set)
    losses: Counter[str] = field(default_factory=Counter)
    """Losses since the run last progressed, by run id."""
    saved: Counter[str] = field(default_factory=Counter)
    """Epochs in the checkpoint when the run was last lost, by run id."""


def _run_all(phase: _Phase, runs: Sequence[PlannedRun], context: RunContext) -> list[PlannedRun]:
    """Train the given runs; return those that ran out of memory next to others."""
    study, screen, resources = phase.study, phase.screen, context.resources
    new_process = ray.remote(ConfirmationWorker).options(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        label_selector=resources.label_selector,
    )
    attempts = Counter({row.run_id: row.attempt for row in study.rundir.read_epochs()})
    attempts.update(run.run_id for run in runs if study.rundir.has(study.rundir.state(run.run_id)))
    waiting = deque(runs)
    running: dict[ray.ObjectRef[ConfirmationResult], tuple[PlannedRun, Any]] = {}
    free: list[Any] = []
    set_aside: list[PlannedRun] = []
    while waiting or running:
        while waiting and len(running) < resources.at_once:
            run = waiting.popleft()
            attempts[run.run_id] += 1
            attempt = Attempt(run.run_id, attempts[run.run_id], run.cell.hyperparameters, run.seed)
            process: Any = free.pop() if free else new_process.remote()
            result = process.call.remote(run_confirmation, attempt, phase.shared, context.settings)
            running[result] = run, process
            screen.run_progressed(run.run_id, 0, None)
        signals.raise_if_received()
        study.rundir.tick()
        ended, _ = ray.wait(list(running), num_returns=1, timeout=1)
        if not ended:
            continue
        run, process = running.pop(ended[0])
        try:
            row = _record_run(phase, run, ray.get(ended[0]), attempts[run.run_id])
        except RayError as error:
            ray.kill(process)  # if still alive, it may hold memory that the run left behind
            match _decide_retry(
                phase, run, attempts[run.run_id], error, exclusive=resources.exclusive
            ):
                case "now":
                    waiting.appendleft(run)
                case "alone":
                    set_aside.append(run)
        else:
            phase.streak.end()
            screen.run_ended(_ended(run, row))
            if waiting:
                free.append(process)
        del process  # unless it is reused, it ends here and frees its cores
    return set_aside


def _decide_retry(
    phase: _Phase, run: PlannedRun, attempt: int, error: RayError, *, exclusive: bool
) -> Retry:
    """Decide whether a run that was lost or raised is retried.

    Raises:
        StudyStoppedError: The study must stop.
    """
    rundir, screen = phase.study.rundir, phase.screen
    failure = failure_of(error)
    kind = failure.kind
    if kind == "lost":
        failure = find_hang(phase.study, run.run_id, attempt) or failure
        epochs = _epochs_saved(rundir, run.run_id)
        # Preemptible machines may be lost often, so only losses without progress are counted.
        progressed = epochs > phase.saved[run.run_id]
        phase.losses[run.run_id] = 1 if progressed else phase.losses[run.run_id] + 1
        phase.saved[run.run_id] = epochs
    max_failures = phase.study.config.max_failures
    losses = phase.losses[run.run_id]
    retry = choose_retry(kind, losses=losses, max_failures=max_failures, exclusive=exclusive)
    match retry:
        case "stop":
            raise StorageError(failure.reason) from error
        case "now":
            screen.run_will_be_retried(
                run.run_id, f"{failure.reason}; resuming from its last checkpoint"
            )
            return retry
        case "alone":
            screen.run_will_be_retried(
                run.run_id, f"{failure.reason}; will be retried alone at the end"
            )
            return retry
    rundir.write_failure(run.run_id, attempt, failure.traceback)
    phase.failed.add(run.run_id)
    screen.run_ended(_failed(run, failure.reason))
    if stop := phase.streak.add(failure.reason):
        raise stop from error
    return retry


def _epochs_saved(rundir: RunDir, run_id: str) -> int:
    """Return the number of epochs in the checkpoint of a run."""
    path = rundir.state(run_id)
    rundir.fetch(path)
    epochs = epochs_in_checkpoint(path)
    if rundir.mirror:  # fetch the newer checkpoint next time
        path.unlink(missing_ok=True)
    return epochs


def _record_run(
    phase: _Phase, run: PlannedRun, confirmation: ConfirmationResult, attempt: int
) -> ConfirmRow:
    """Record a finished run, with its weights if it is the best of its cell so far."""
    rundir, metric = phase.study.rundir, phase.study.config.metric
    row = _row(run, confirmation)
    known = {**phase.done, run.run_id: row}
    cell = _in_order([other for other in phase.planned if other.cell == run.cell], known)
    best = best_row(cell, metric)
    try:
        # Heads are small, and all are kept for an ensemble; whole networks are too large.
        if best is row or not phase.study.finetunes:
            save_safetensors(rundir.weights(run.run_id), confirmation.best.weights)
            rundir.wrote(rundir.weights(run.run_id))
        rundir.append_epochs(
            _epoch_row(run, epoch, attempt, confirmation.worker) for epoch in confirmation.epochs
        )
        rundir.write_confirmation(
            run.run_id,
            row,
            val_logits=confirmation.val_logits,
            test_logits=confirmation.test_logits,
            val_labels=confirmation.val_labels,
            test_labels=confirmation.test_labels,
        )
    except OSError as error:
        raise storage_error(error, rundir.path) or error from error
    phase.done[run.run_id] = row
    for other in cell:
        if other is not best and phase.study.finetunes:
            rundir.delete(rundir.weights(other.run_id))
    rundir.delete(rundir.state(run.run_id))
    return row


def _in_order(planned: Sequence[PlannedRun], done: Mapping[str, ConfirmRow]) -> list[ConfirmRow]:
    return [done[run.run_id] for run in planned if run.run_id in done]


def _epoch_row(run: PlannedRun, epoch: EpochMetrics, attempt: int, worker: str) -> EpochRow:
    return EpochRow(
        phase="confirm",
        run_id=run.run_id,
        attempt=attempt,
        arm=run.cell.setting,
        seed=run.seed,
        epoch=epoch.epoch,
        train_loss=epoch.train_loss,
        train_accuracy=epoch.train_accuracy,
        val_loss=epoch.val_loss,
        val_accuracy=epoch.val_accuracy,
        score=epoch.score,
        rung="",
        start=epoch.start,
        end=epoch.end,
        worker=worker,
        val_balanced_accuracy=epoch.val_balanced_accuracy,
    )


def _row(run: PlannedRun, confirmation: ConfirmationResult) -> ConfirmRow:
    last = {f"last_{name}": value for name, value in asdict(confirmation.last).items()}
    return ConfirmRow(
        run_id=run.run_id,
        recipe=run.cell.recipe,
        setting=run.cell.setting,
        hyperparameters=run.cell.hyperparameters,
        seed=run.seed,
        best_epoch=confirmation.best.epoch,
        score=confirmation.epochs[-1].score,
        **asdict(confirmation.selected),
        **last,
        epochs=len(confirmation.epochs),
        seconds=confirmation.seconds,
    )


def _ended(run: PlannedRun, row: ConfirmRow) -> EndedRun:
    return EndedRun(
        run.run_id,
        run.cell.name,
        "completed",
        row.epochs,
        row.score,
        row.hyperparameters,
        row.seconds,
    )


def _failed(run: PlannedRun, reason: str) -> EndedRun:
    return EndedRun(
        run.run_id, run.cell.name, "failed", 0, None, run.cell.hyperparameters, 0.0, reason
    )
