"""What happens in the search, written down and shown while it happens."""

import shutil
from pathlib import Path
from typing import Any, Literal

from ray.tune import Callback
from ray.tune.experiment import Trial

from analysis.rundir import EpochRow
from study.config import Study
from study.scheduler import EPOCH, SCORE, rung_decision
from study.screen import EndedRun, Screen
from study.searcher import StudySearch
from study.training import NonFiniteLossError
from study.worker import worker_name

#: Per arm, the weights of so many of the best trials are kept.
KEPT_PER_ARM = 3


class SearchRecorder(Callback):
    """Writes down what happens in the search, and shows it."""

    def __init__(self, study: Study, searcher: StudySearch, screen: Screen) -> None:
        self._study = study
        self._searcher = searcher
        self._screen = screen
        self._kept: dict[str, list[Trial]] = {arm.name: [] for arm in study.space.arms}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: object
    ) -> None:
        """Show that a trial runs."""
        self._screen.run_goes_on(trial.config["run_id"], 0, None)

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
        self._study.rundir.append_epochs([row])
        self._screen.run_goes_on(row.run_id, row.epoch, row.score)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: object
    ) -> None:
        """Show that a trial has ended; keep its weights if it is among the best of its arm."""
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
            self._keep_best(trial)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: object
    ) -> None:
        """Tell Optuna why a trial ended, and show it."""
        state, reason = _why_it_failed(trial)
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
        kept.append(trial)
        kept.sort(key=lambda t: t.last_result[SCORE], reverse=self._study.mode == "max")
        for worse in kept[KEPT_PER_ARM:]:
            if worse.checkpoint:
                shutil.rmtree(worse.checkpoint.path, ignore_errors=True)
        del kept[KEPT_PER_ARM:]


def _why_it_failed(trial: Trial) -> tuple[Literal["diverged", "failed"], str]:
    """The state of a trial that raised, and the last line of what it raised."""
    # Ray copies the file to its storage only later, so `trial.get_error()` has nothing yet.
    lines = Path(trial.error_file).read_text().strip().splitlines()
    kind, _, reason = lines[-1].partition(": ")
    if kind.endswith(NonFiniteLossError.__name__):
        return "diverged", reason
    return "failed", lines[-1]
