"""What happens in the search, written down and shown while it happens."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from ray.tune import Callback
from ray.tune.experiment import Trial

from analysis.rundir import EpochRow, TrialRow
from study.config import Study
from study.scheduler import EPOCH, SCORE, rung_decision
from study.screen import EndedRun, Screen
from study.searcher import StudySearch
from study.training import NonFiniteLossError
from study.worker import STATE_FILE, worker_name

#: Per arm, the weights of so many of the best trials are kept.
KEPT_PER_ARM = 3


class SearchRecorder(Callback):
    """Writes down what happens in the search, and shows it."""

    def __init__(
        self,
        study: Study,
        searcher: StudySearch,
        screen: Screen,
        ended: Iterable[TrialRow],
        *,
        shared_gpu: bool,
    ) -> None:
        """Go on writing where an earlier start has stopped.

        Args:
            study: Its run directory is written to.
            searcher: Is told of trials that raise.
            screen: Shows what happens.
            ended: The trials that have ended, whose weights may have to make room.
            shared_gpu: Whether trials have others beside them on their GPU.
        """
        self._study = study
        self._searcher = searcher
        self._screen = screen
        self._shared_gpu = shared_gpu
        self._written = {(row.run_id, row.epoch) for row in study.rundir.read_epochs()}
        self._kept: dict[str, list[tuple[float, str]]] = {arm.name: [] for arm in study.space.arms}
        for row in ended:
            if row.state == "completed":
                self._kept[row.arm].append((row.score, row.run_id))

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: object
    ) -> None:
        """Show that a trial runs."""
        self._screen.run_goes_on(trial.config["run_id"], trial.config["resumed_epochs"], None)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: object,
    ) -> None:
        """Write down an epoch."""
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
        )
        # A trial that is taken up again reports the epochs before its interruption once more.
        again = row.epoch <= trial.config["resumed_epochs"]
        if not (again and (row.run_id, row.epoch) in self._written):
            self._study.rundir.append_epochs([row])
        self._screen.run_goes_on(row.run_id, row.epoch, row.score)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: object
    ) -> None:
        """Show that a trial has ended; keep its weights if it is among the best of its arm.

        Its state is of no more use, and is deleted.
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
        if completed:
            self._delete(trial.config["run_id"], STATE_FILE)
            self._keep_best(trial)
        else:
            self._delete(trial.config["run_id"])

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: object
    ) -> None:
        """Tell Optuna why a trial ended, and show it; or set it aside, to be run again alone."""
        self._delete(trial.config["run_id"])
        state, reason = _why_it_failed(trial)
        if state == "out of memory":
            if self._shared_gpu:
                self._searcher.set_aside(trial.trial_id)
                self._screen.run_set_aside(
                    trial.config["run_id"], "out of GPU memory; it runs again at the end, alone"
                )
                return
            state, reason = "failed", f"out of GPU memory, without another run beside it: {reason}"
        self._searcher.fail(trial.trial_id, state, reason)
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

    def _keep_best(self, trial: Trial) -> None:
        kept = self._kept[trial.config["arm"]]
        kept.append((trial.last_result[SCORE], trial.config["run_id"]))
        kept.sort(reverse=self._study.mode == "max")
        for _, worse in kept[KEPT_PER_ARM:]:
            self._delete(worse)
        del kept[KEPT_PER_ARM:]

    def _delete(self, run_id: str, name: str = "") -> None:
        """Delete a file of a trial's checkpoints, or all of them; earlier attempts' too."""
        for checkpoint in self._study.rundir.search.glob(f"part-*/{run_id}/checkpoint_*"):
            if name:
                (checkpoint / name).unlink(missing_ok=True)
            else:
                shutil.rmtree(checkpoint, ignore_errors=True)


def _why_it_failed(
    trial: Trial,
) -> tuple[Literal["diverged", "failed", "out of memory"], str]:
    """The kind of a trial's exception, and the last line of what it raised."""
    # Ray copies the file to its storage only later, so `trial.get_error()` has nothing yet.
    lines = Path(trial.error_file).read_text().strip().splitlines()
    kind, _, reason = lines[-1].partition(": ")
    if kind.endswith(NonFiniteLossError.__name__):
        return "diverged", reason
    if kind.endswith("OutOfMemoryError"):
        return "out of memory", reason
    return "failed", lines[-1]
