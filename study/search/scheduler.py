"""ASHA with one bracket per arm, so that trials compete only within their arm."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, cast

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from analysis.rundir import EpochRow
from study.config import GRACE_PERIOD, REDUCTION_FACTOR

#: Keys of a reported result: the objective and the time attribute.
SCORE, EPOCH = "score", "training_iteration"


class ArmScheduler(FIFOScheduler):
    """Sends each trial to the ASHA bracket of its arm.

    Dropout slows the first epochs; in a common bracket, trials with it would be stopped for that.
    """

    def __init__(
        self,
        arms: Iterable[str],
        mode: Literal["min", "max"],
        epochs: int,
        history: Iterable[EpochRow] = (),
    ) -> None:
        """Create the brackets and replay the epochs of earlier starts into them.

        Args:
            arms: Names of the arms.
            mode: Whether smaller ("min") or larger ("max") scores are better.
            epochs: Epochs of a full trial.
            history: Epoch rows of the search written so far.
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
        """Order in which trials were added, by Ray's trial id."""
        self._replay(history)

    @property
    def metric(self) -> str:
        """Key of the result that trials are compared by."""
        return SCORE

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: object) -> bool:
        """Accept Tune's metric; the brackets already have theirs."""
        return True

    def rungs(self, arm: str) -> dict[int, dict[str, float]]:
        """Return the scores recorded in an arm's bracket, by rung (epoch), then trial."""
        (bracket,) = self._arms[arm]._brackets
        return {
            int(epoch): {trial: self._sign * float(score) for trial, score in recorded.items()}
            for epoch, recorded in bracket._rungs
        }

    def _replay(self, history: Iterable[EpochRow]) -> None:
        for row in history:
            (bracket,) = self._arms[row.arm]._brackets
            bracket.on_result(_stub(row.run_id), row.epoch, self._sign * row.score)

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Add a trial to its arm's bracket."""
        self._order[trial.trial_id] = len(self._order)
        self._of(trial).on_trial_add(tune_controller, _by_run(trial))

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        """Let the arm's bracket decide whether the trial continues.

        Rungs that a resumed trial had passed before its interruption are not decided again.
        """
        return self._of(trial).on_trial_result(tune_controller, _by_run(trial), result)

    def on_trial_complete(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> None:
        """Tell the arm's bracket that a trial has ended."""
        self._of(trial).on_trial_complete(tune_controller, _by_run(trial), result)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Remove a trial that has not started from its arm's bracket."""
        self._of(trial).on_trial_remove(tune_controller, _by_run(trial))

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """Return the trial that has waited longest, looking at live trials only, unlike Ray."""
        waiting = [
            trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING
        ]
        return min(waiting, key=lambda trial: self._order[trial.trial_id], default=None)

    def _of(self, trial: Trial) -> AsyncHyperBandScheduler:
        return self._arms[trial.config["arm"]]


def _by_run(trial: Trial) -> Trial:
    """Return a stand-in for a trial, named by its run id, which a retry keeps."""
    return _stub(trial.config["run_id"])


def _stub(run_id: str) -> Trial:
    return cast(Trial, SimpleNamespace(trial_id=run_id))


def rung_decision(
    rungs: Iterable[int], result: Mapping[str, Any]
) -> Literal["", "continue", "stop"]:
    """Return ASHA's decision at an epoch: "stop", "continue", or "" if there is no rung."""
    if result[EPOCH] not in rungs:
        return ""
    return "stop" if result.get("done") else "continue"
