"""Optuna's search with one Optuna study per arm, and states that tell the truth.

Ray's `OptunaSearch` is the engine. Three things are added to it, each because it must be:

- A trial that ASHA stops is told PRUNED, with its last score among the intermediate values. Ray
  would tell COMPLETE, and TPE would take a score after 3 epochs for one after 15.
- Every arm has its own sampler and its own share of the trials, taken in turn.
- A start takes over what an earlier start of the same study left in optuna.db: trials that were
  interrupted go first, and the sampler's seed moves on with the number of trials.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from analysis.rundir import EpochRow
from search_spaces import Arm, Choice, Fixed, Float, Range, Space
from study.scheduler import EPOCH, SCORE
from study.streams import derive_seed

State = Literal["completed", "pruned", "diverged", "failed"]


def run_id(arm: str, number: int) -> str:
    """A trial's name wherever it appears, from Optuna's number within the arm."""
    return f"{arm}-{number:03d}"


def trial_seed(seed: int, arm: str, number: int) -> int:
    """The seed of a trial, from the study's."""
    return derive_seed(seed, "trial", arm, number)


def open_study(
    storage: optuna.storages.BaseStorage, arm: str, mode: Literal["min", "max"]
) -> optuna.Study:
    """The Optuna study of an arm; made where it is not there."""
    return optuna.create_study(
        storage=storage,
        study_name=arm,
        direction="minimize" if mode == "min" else "maximize",
        load_if_exists=True,
    )


def state_of(trial: FrozenTrial) -> State | None:
    """The state of a trial in the study's words; None while it runs or where it was interrupted."""
    return trial.user_attrs.get("state") if trial.state.is_finished() else None


class ArmSearch(OptunaSearch):
    """The search of one arm."""

    def __init__(
        self,
        space: Space,
        arm: Arm,
        *,
        storage: optuna.storages.BaseStorage,
        mode: Literal["min", "max"],
        epochs: int,
        trials: int,
        seed: int,
        alone: bool = False,
    ) -> None:
        """Take up the arm's Optuna study where it stands.

        Args:
            space: The space that the arm belongs to.
            arm: The arm to search; its fixed hyperparameters are passed through.
            storage: Of the run directory; in a simulation, any other.
            mode: Whether a better score is smaller or larger.
            epochs: Epochs of a full run: a trial that ends before them was stopped by ASHA.
            trials: Trials wanted in all, those of earlier starts included.
            seed: The study's seed.
            alone: Run the trials that were set aside, and no others; else all but these.
        """
        self._study = open_study(storage, arm.name, mode)
        earlier = self._study.get_trials(deepcopy=False)
        sampler = optuna.samplers.TPESampler(
            multivariate=True,
            constant_liar=True,
            # The same seed on a study that has trials would draw their points again.
            seed=derive_seed(seed, "sampler", arm.name, len(earlier)),
        )
        self._fixed = space.fixed_values(arm)
        self._distributions = _distributions(space.ranges(arm))
        self._study_seed = seed
        super().__init__(
            space=self._distributions,
            metric=SCORE,
            mode=mode,
            sampler=sampler,
            storage=storage,
            study_name=arm.name,
        )
        self._epochs = epochs
        unfinished = [trial for trial in earlier if not trial.state.is_finished()]
        set_aside = [trial for trial in unfinished if trial.user_attrs.get("alone")]
        self._interrupted = deque(
            set_aside if alone else (trial for trial in unfinished if trial not in set_aside)
        )
        ended = len(earlier) - len(unfinished)
        self._left = len(set_aside) if alone else trials - ended - len(set_aside)
        self.arm = arm.name
        self.started = len(earlier) - len(self._interrupted)

    @property
    def exhausted(self) -> bool:
        """Whether every trial wanted has been started."""
        return self._left <= 0

    @property
    def interrupted(self) -> bool:
        """Whether a trial that was interrupted waits to go on."""
        return bool(self._interrupted)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next trial: one that was interrupted, else a new one."""
        if self._interrupted:
            frozen = self._interrupted.popleft()
            taken_up = optuna.Trial(self._study, frozen._trial_id)
            # It may have been interrupted while its hyperparameters were drawn.
            for name, distribution in self._distributions.items():
                taken_up._suggest(name, distribution)
            self._ot_trials[trial_id] = taken_up
        drawn = super().suggest(trial_id)
        self._left -= 1
        self.started += 1
        ot_trial = self._ot_trials[trial_id]
        attempt = ot_trial.user_attrs.get("attempts", 0) + 1
        ot_trial.set_user_attr("attempts", attempt)
        return {
            "arm": self.arm,
            "run_id": run_id(self.arm, ot_trial.number),
            "attempt": attempt,
            "seed": trial_seed(self._study_seed, self.arm, ot_trial.number),
            "hyperparameters": {**self._fixed, **(drawn or {})},
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna how a trial ended; one that raised is told by `fail`, which knows why."""
        if error or result is None:
            return
        # Ray does not pass the last result on to the searcher, only to this method.
        self._report(trial_id, result)
        full = result[EPOCH] >= self._epochs
        _tell(
            self._study,
            self._ot_trials[trial_id],
            "completed" if full else "pruned",
            value=result[SCORE],
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Add an epoch's score to the intermediate values."""
        self._report(trial_id, result)

    def fail(self, trial_id: str, state: Literal["diverged", "failed"], error: str) -> str:
        """Tell Optuna that a trial raised; its run id."""
        ot_trial = self._ot_trials[trial_id]
        ot_trial.set_user_attr("error", error)
        _tell(self._study, ot_trial, state, value=None)
        return run_id(self.arm, ot_trial.number)

    def set_aside(self, trial_id: str) -> None:
        """Leave a trial to be run again later, without others beside it."""
        self._ot_trials[trial_id].set_user_attr("alone", True)

    def count_loss(self, trial_id: str, *, came_further: bool) -> int:
        """How often a trial was lost since it last came further, this time included.

        A machine that comes and goes may be lost often: what counts are losses without progress.
        """
        before = 0 if came_further else self._ot_trials[trial_id].user_attrs.get("losses", 0)
        losses: int = before + 1
        self._ot_trials[trial_id].set_user_attr("losses", losses)
        return losses

    def put_back(self, trial_id: str) -> None:
        """Let a trial that was lost go on as soon as there is room."""
        storage_id = self._ot_trials[trial_id]._trial_id
        self._interrupted.append(self._study._storage.get_trial(storage_id))
        self._left += 1
        self.started -= 1

    def _report(self, trial_id: str, result: dict[str, Any]) -> None:
        _report(self._study, self._ot_trials[trial_id], result[EPOCH], result[SCORE])


def settle(study: optuna.Study, trial: FrozenTrial, rows: Sequence[EpochRow], epochs: int) -> None:
    """Tell Optuna how a trial ended whose end it has not heard of, since the driver died.

    Args:
        study: Of the trial's arm.
        trial: Unfinished, as far as Optuna knows.
        rows: All its epochs; the last one was ASHA's stop, or the last of a full run.
        epochs: Of a full run.
    """
    taken_up = optuna.Trial(study, trial._trial_id)
    for row in rows:
        _report(study, taken_up, row.epoch, row.score)
    full = rows[-1].epoch >= epochs
    _tell(study, taken_up, "completed" if full else "pruned", value=rows[-1].score)


def _report(study: optuna.Study, trial: optuna.Trial, epoch: int, score: float) -> None:
    # A trial run again after an interruption repeats epochs that Optuna has already.
    if epoch not in study._storage.get_trial(trial._trial_id).intermediate_values:
        trial.report(score, epoch)


def _tell(study: optuna.Study, trial: optuna.Trial, state: State, value: float | None) -> None:
    trial.set_user_attr("state", state)
    ot_state = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    # Optuna takes a pruned trial's value from its intermediate values.
    study.tell(
        trial,
        value if state == "completed" else None,
        state=ot_state.get(state, TrialState.FAIL),
    )


class StudySearch(Searcher):
    """Takes the arms' searches in turn: the next trial goes to the arm with the fewest."""

    def __init__(
        self, arms: Mapping[str, ArmSearch], mode: str, deadline: float | None = None
    ) -> None:
        """Combine the searches of the arms.

        Args:
            arms: By name, in the order that breaks ties.
            mode: Whether a better score is smaller or larger.
            deadline: Unix time after which no trial is started.
        """
        super().__init__(metric=SCORE, mode=mode)
        self._arms = arms
        self._deadline = deadline
        self._of: dict[str, ArmSearch] = {}
        self.running: set[str] = set()
        """Ray's ids of the trials under way."""

    def suggest(  # type: ignore[override]  # Searcher.FINISHED is a str
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        """The next trial; None while one that runs may still be lost; or that there is none."""
        late = self._deadline is not None and time.time() > self._deadline
        waiting = [
            arm for arm in self._arms.values() if arm.interrupted or not (late or arm.exhausted)
        ]
        if not waiting:
            return None if self.running else str(Searcher.FINISHED)
        arm = min(waiting, key=lambda arm: (not arm.interrupted, arm.started))
        self._of[trial_id] = arm
        suggested = arm.suggest(trial_id)
        self.running.add(trial_id)
        return suggested

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an epoch's result on to the arm."""
        self._of[trial_id].on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass the end of a trial on to the arm."""
        self._of[trial_id].on_trial_complete(trial_id, result, error)
        if not error:
            self.running.discard(trial_id)

    def fail(self, trial_id: str, state: Literal["diverged", "failed"], error: str) -> str:
        """Pass on to the arm that a trial raised, and why; its run id."""
        self.running.discard(trial_id)
        return self._of[trial_id].fail(trial_id, state, error)

    def set_aside(self, trial_id: str) -> None:
        """Pass on to the arm that a trial is to be run again later, alone."""
        self._of[trial_id].set_aside(trial_id)
        self.running.discard(trial_id)

    def count_loss(self, trial_id: str, *, came_further: bool) -> int:
        """How often a trial was lost since it last came further, this time included."""
        return self._of[trial_id].count_loss(trial_id, came_further=came_further)

    def put_back(self, trial_id: str) -> None:
        """Pass on to the arm that a trial was lost and is to go on."""
        self._of[trial_id].put_back(trial_id)
        self.running.discard(trial_id)

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: object
    ) -> bool:
        """Accept Tune's settings: the arms have theirs from the start."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: optuna.db holds the state, and `Tuner.restore` is not used."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


def _distributions(ranges: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """The hyperparameters that there are to search, in Optuna's terms."""
    found: dict[str, BaseDistribution] = {}
    for name, values in ranges.items():
        match values:
            case Float(low, high, log):
                found[name] = FloatDistribution(low, high, log=log)
            case Choice(options):
                found[name] = CategoricalDistribution(options)
            case Fixed():
                pass
    return found
