"""Record and display the search while it runs."""

import math
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial

from analysis.rundir import EpochRow, TrialRow
from study.errors import StorageError, StudyStoppedError, storage_error
from study.runs.failures import Failure, failure_from_text, failure_of
from study.runs.hang_reports import find_hang
from study.runs.retry import FailureStreak, choose_retry
from study.runs.worker import REPLAYED, worker_name
from study.screen import EndedRun, Screen
from study.search.scheduler import EPOCH, SCORE, rung_decision
from study.search.searcher import StudySearch
from study.search.trials import completed_by_arm, prune_weights
from study.study import Study
from study.system import signals


class EmergencyStop(tune.Stopper):
    """Stop the search early after a fatal error; running trials can be resumed later."""

    def __init__(self) -> None:
        self.reason: StudyStoppedError | None = None

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        """Return False: single trials are never stopped here."""
        return False

    def stop_all(self) -> bool:
        """Return whether to stop the whole search."""
        return self.reason is not None


class SearchCallback(Callback):
    """Record search events in the run directory and show them on the screen."""

    def __init__(
        self,
        study: Study,
        searcher: StudySearch,
        screen: Screen,
        stop: EmergencyStop,
        ended: Iterable[TrialRow],
        *,
        exclusive: bool,
    ) -> None:
        """Continue the records of earlier starts.

        Args:
            study: The study to record.
            searcher: Receives the outcome of trials that raise.
            screen: Shows the progress.
            stop: Receives the reason if the search must stop.
            ended: Trials that have already ended; their weights count towards those kept per arm.
            exclusive: Whether each trial runs alone, with its device to itself.
        """
        self._study = study
        self._searcher = searcher
        self._screen = screen
        self._stop = stop
        self._exclusive = exclusive
        self._streak = FailureStreak(study.config.stop_after_failures)
        self._written = {(row.run_id, row.epoch) for row in study.rundir.read_epochs()}
        self._completed = completed_by_arm(ended)
        self._progressed = set[str]()
        """Run ids of trials that have finished a new epoch since they were last lost."""

    def on_step_end(self, iteration: int, trials: list[Trial], **info: object) -> None:
        """Stop if the study was interrupted, and let the mirror sync; called ten times a second."""
        signals.raise_if_received()
        with self._stopping():
            self._study.rundir.tick()

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: object
    ) -> None:
        """Show that a trial is running, and sync its start."""
        self._screen.run_progressed(trial.config["run_id"], 0, None)
        with self._stopping():
            self._study.rundir.snapshot()

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: object,
    ) -> None:
        """Record an epoch."""
        names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", SCORE, "start", "end")
        row = EpochRow(
            phase="search",
            run_id=trial.config["run_id"],
            attempt=trial.config["attempt"],
            arm=trial.config["arm"],
            seed=trial.config["seed"],
            epoch=result[EPOCH],
            rung=rung_decision(self._study.rungs, result),
            worker=worker_name(result["node_ip"], result["pid"]),
            **{name: result[name] for name in names},
            val_balanced_accuracy=result.get("val_balanced_accuracy", math.nan),
        )
        # A resumed trial reports the epochs before its interruption again.
        if not (result.get(REPLAYED) and (row.run_id, row.epoch) in self._written):
            self._append(row)
        self._screen.run_progressed(row.run_id, row.epoch, row.score)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: object
    ) -> None:
        """Show that a trial has ended, and keep its weights if it is among the best of its arm.

        Its checkpoint is no longer needed and is deleted.
        """
        result = trial.last_result
        completed = result[EPOCH] >= self._study.config.epochs
        self._screen.run_ended(
            EndedRun(
                run_id=trial.config["run_id"],
                group=trial.config["arm"],
                state="completed" if completed else "pruned",
                epoch=result[EPOCH],
                score=result[SCORE],
                hyperparameters=trial.config["hyperparameters"],
                seconds=result["time_total_s"],
            )
        )
        self._streak.end()
        rundir = self._study.rundir
        if completed:
            ranked = self._completed.setdefault(trial.config["arm"], [])
            ranked.append((result[SCORE], trial.config["run_id"]))
        with self._stopping():
            rundir.snapshot()
            rundir.delete(rundir.state(trial.config["run_id"]))
            if completed:
                self._completed = prune_weights(rundir, self._completed, self._study.mode)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: object
    ) -> None:
        """Handle a trial that raised or was lost, as decided by `choose_retry`."""
        run_id, attempt = trial.config["run_id"], trial.config["attempt"]
        failure = _failure_of(trial)
        state: Literal["diverged", "failed"] = "failed"
        reason, traceback = failure.reason, failure.traceback
        losses = 0
        if failure.kind == "lost":
            if hang := find_hang(self._study, run_id, attempt):
                reason, traceback = hang.reason, hang.traceback
            losses = self._searcher.count_loss(
                trial.trial_id, progressed=run_id in self._progressed
            )
            self._progressed.discard(run_id)
        max_failures = self._study.config.max_failures
        match choose_retry(
            failure.kind, losses=losses, max_failures=max_failures, exclusive=self._exclusive
        ):
            case "stop":
                self._stop.reason = StorageError(reason)
                return
            case "now":
                self._searcher.requeue(trial.trial_id)
                self._screen.run_will_be_retried(
                    run_id, f"{reason}; resuming from its last checkpoint"
                )
                return
            case "alone":
                self._searcher.set_aside(trial.trial_id)
                self._screen.run_will_be_retried(
                    run_id, f"{reason}; will be retried alone at the end"
                )
                return
        if failure.kind == "lost":
            reason = f"lost {losses} times; last cause: {reason}"
        elif failure.kind == "memory":
            reason = f"even when run alone: {reason}"
        elif failure.kind == "diverged":
            state = "diverged"
        self._searcher.fail(trial.trial_id, state, reason)
        self._show_failed(trial, state, reason)
        rundir = self._study.rundir
        with self._stopping():
            # Delete the checkpoint only after the end of the trial is safely recorded.
            rundir.snapshot()
            rundir.delete(rundir.state(run_id))
            rundir.delete(rundir.weights(run_id))
            if state == "failed":
                rundir.write_failure(run_id, attempt, traceback)
        if state == "failed":
            self._stop.reason = self._stop.reason or self._streak.add(reason)

    def _show_failed(self, trial: Trial, state: Literal["diverged", "failed"], reason: str) -> None:
        result = trial.last_result or {}
        self._screen.run_ended(
            EndedRun(
                run_id=trial.config["run_id"],
                group=trial.config["arm"],
                state=state,
                epoch=result.get(EPOCH, 0),
                score=None,
                hyperparameters=trial.config["hyperparameters"],
                seconds=result.get("time_total_s", 0.0),
                error=reason,
            )
        )

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """End the search if the mirror raises; the local files are intact."""
        try:
            yield
        except StudyStoppedError as error:
            self._stop.reason = self._stop.reason or error

    def _append(self, row: EpochRow) -> None:
        try:
            with self._stopping():
                self._study.rundir.append_epochs([row])
        except OSError as error:
            self._stop.reason = storage_error(error, self._study.rundir.epochs)
            # Optuna must not be told of an end whose last epoch is not written.
            raise
        if (row.run_id, row.epoch) not in self._written:
            self._progressed.add(row.run_id)
        self._written.add((row.run_id, row.epoch))


def _failure_of(trial: Trial) -> Failure:
    # Ray copies the files to its storage later, so `trial.get_pickled_error()` returns nothing
    # yet. Unpickling is safe: this process wrote the file itself.
    if trial.pickled_error_file:
        return failure_of(pickle.loads(Path(trial.pickled_error_file).read_bytes()))  # noqa: S301
    return failure_from_text(Path(trial.error_file).read_text())
