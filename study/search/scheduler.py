"""ASHA with one bracket per arm, so that a trial competes within its arm only."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, cast

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from analysis.rundir import EpochRow
from study.config import GRACE_PERIOD, REDUCTION_FACTOR

#: The keys of a reported result that the search goes by.
SCORE, EPOCH = "score", "training_iteration"


class ArmScheduler(FIFOScheduler):
    """Sends each trial to the ASHA bracket of its arm.

    Dropout slows the first epochs; in one bracket for all arms it would be stopped for that.
    """

    def __init__(
        self,
        arms: Iterable[str],
        mode: Literal["min", "max"],
        epochs: int,
        history: Iterable[EpochRow] = (),
    ) -> None:
        """Start with empty brackets, or with what a study's earlier trials left in them.

        Args:
            arms: Names of the arms.
            mode: Whether a better score is smaller or larger.
            epochs: Epochs of a full run.
            history: Rows of the search written so far.
        """
        super().__init__()
        self._sign = 1.0 if mode == "max" else -1.0
        self._arms = {
            arm: AsyncHyperBandScheduler(
                time_attr=EPOCH,
                metric=SCORE,
                mode=mode,
                max_t=epochs,
                grace_period=min(GRACE_PERIOD, epochs),
                reduction_factor=REDUCTION_FACTOR,
            )
            for arm in arms
        }
        self._order: dict[str, int] = {}
        """By Ray's id of a trial, its place among those added."""
        self._replay(history)

    @property
    def metric(self) -> str:
        """The key of the result that trials compete by."""
        return SCORE

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: object) -> bool:
        """Accept Tune's metric: the brackets have theirs from the start."""
        return True

    def rungs(self, arm: str) -> dict[int, dict[str, float]]:
        """The scores that an arm's bracket has recorded, by rung (epoch), then trial."""
        (bracket,) = self._arms[arm]._brackets
        return {
            int(epoch): {trial: self._sign * float(score) for trial, score in recorded.items()}
            for epoch, recorded in bracket._rungs
        }

    def _replay(self, history: Iterable[EpochRow]) -> None:
        for row in history:
            (bracket,) = self._arms[row.arm]._brackets
            bracket.on_result(_named(row.run_id), row.epoch, self._sign * row.score)

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Enter a trial into its arm's bracket."""
        self._order[trial.trial_id] = len(self._order)
        self._of(trial).on_trial_add(tune_controller, _run_of(trial))

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        """Let the arm's bracket decide whether the trial goes on.

        A rung that the run is in already, from before it was interrupted, is not decided anew.
        """
        return self._of(trial).on_trial_result(tune_controller, _run_of(trial), result)

    def on_trial_complete(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> None:
        """Tell the arm's bracket that a trial has ended."""
        self._of(trial).on_trial_complete(tune_controller, _run_of(trial), result)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Take a trial that has not started out of its arm's bracket."""
        self._of(trial).on_trial_remove(tune_controller, _run_of(trial))

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """The trial that has waited longest; Ray's own way goes over all that there ever were."""
        waiting = [
            trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING
        ]
        return min(waiting, key=lambda trial: self._order[trial.trial_id], default=None)

    def _of(self, trial: Trial) -> AsyncHyperBandScheduler:
        return self._arms[trial.config["arm"]]


def _run_of(trial: Trial) -> Trial:
    """What the brackets know a trial by: its run, which several of Ray's trials may carry on."""
    return _named(trial.config["run_id"])


def _named(run_id: str) -> Trial:
    return cast(Trial, SimpleNamespace(trial_id=run_id))


def rung_decision(
    rungs: Iterable[int], result: Mapping[str, Any]
) -> Literal["", "continue", "stop"]:
    """What ASHA decided at an epoch: "stop", "continue", or "" where there is no rung."""
    if result[EPOCH] not in rungs:
        return ""
    return "stop" if result.get("done") else "continue"
