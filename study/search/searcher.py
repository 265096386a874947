"""Optuna search with one Optuna study per arm and accurate trial states.

This extends Ray's `OptunaSearch` in three ways:

- A trial stopped by ASHA is reported as PRUNED, with its last score among the intermediate values.
  Ray would report COMPLETE, and tables and Optuna's plots would show a score after 3 epochs as one
  after 15. (TPE suggests the same either way: tests/benchmarks/search_quality.py.)
- Each arm has its own sampler and its own share of the trials, and the arms take turns.
- A start continues from what earlier starts of the same study left in optuna.db: interrupted
  trials go first, and the sampler's seed changes with the number of trials.

The sampler works on a copy of the arm's trials in memory (study/search/sampler_memory.py). While
trials run, optuna.db is only written, never read: one transaction when a trial starts, one per
epoch, and one when it ends, however many trials there are.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Literal, cast

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
from study.search.optuna_rows import write_begin, write_end
from study.search.sampler_memory import SamplerMemory
from study.search.scheduler import EPOCH, SCORE
from study.seeds import derive_seed

State = Literal["completed", "pruned", "diverged", "failed"]


def run_id(arm: str, number: int) -> str:
    """Return a trial's run id, from Optuna's number of the trial within the arm."""
    return f"{arm}-{number:03d}"


def trial_seed(seed: int, arm: str, number: int) -> int:
    """Derive the seed of a trial from the study's seed."""
    return derive_seed(seed, "trial", arm, number)


def open_study(
    storage: optuna.storages.BaseStorage, arm: str, mode: Literal["min", "max"]
) -> optuna.Study:
    """Return the Optuna study of an arm, creating it if needed."""
    return optuna.create_study(
        storage=storage,
        study_name=arm,
        direction="minimize" if mode == "min" else "maximize",
        load_if_exists=True,
    )


def state_of(trial: FrozenTrial) -> State | None:
    """Return the final state of a trial; None if it is running or was interrupted."""
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
        only_set_aside: bool = False,
    ) -> None:
        """Create or continue the arm's Optuna study.

        Args:
            space: The space that the arm belongs to.
            arm: The arm to search; its fixed hyperparameters are passed through.
            storage: The run directory's storage, or any other in a simulation.
            mode: Whether smaller ("min") or larger ("max") scores are better.
            epochs: Epochs of a full trial; a trial that ends earlier was stopped by ASHA.
            trials: Total number of trials, including those of earlier starts.
            seed: The study's seed.
            only_set_aside: Run only the trials that were set aside; by default, all others.
        """
        self._db_study = open_study(storage, arm.name, mode)
        earlier = self._db_study.get_trials(deepcopy=False)
        sampler = optuna.samplers.TPESampler(
            multivariate=True,
            constant_liar=True,
            # With the same seed, a resumed study would draw the same points again.
            seed=derive_seed(seed, "sampler", arm.name, len(earlier)),
        )
        self._fixed = space.fixed_values(arm)
        self._distributions = _distributions(space.ranges(arm))
        self._study_seed = seed
        self._memory = SamplerMemory(mode, derive_seed(seed, "memory", arm.name))
        super().__init__(
            space=self._distributions,
            metric=SCORE,
            mode=mode,
            sampler=sampler,
            storage=self._memory,
            study_name=arm.name,
        )
        self._memory_study = cast(optuna.Study, self._ot_study)
        for trial in earlier:
            self._memory_study.add_trial(trial)
        self._epochs = epochs
        self._numbers: dict[str, int] = {}
        self._ids = {trial.number: trial._trial_id for trial in earlier}
        unfinished = [trial for trial in earlier if not trial.state.is_finished()]
        set_aside = [trial for trial in unfinished if trial.user_attrs.get("alone")]
        self._interrupted = deque(
            trial.number for trial in unfinished if (trial in set_aside) == only_set_aside
        )
        ended = len(earlier) - len(unfinished)
        self._left = len(set_aside) if only_set_aside else trials - ended - len(set_aside)
        self.arm = arm.name
        self.started_count = len(earlier) - len(self._interrupted)

    @property
    def exhausted(self) -> bool:
        """True if all requested trials have been started."""
        return self._left <= 0

    @property
    def interrupted(self) -> bool:
        """True if an interrupted trial is waiting to be resumed."""
        return bool(self._interrupted)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the next trial: an interrupted one if there is any, else a new one."""
        number = self._interrupted.popleft() if self._interrupted else None
        if number is None:
            super().suggest(trial_id)
            number = self._ot_trials[trial_id].number
            self._memory.set_trial_user_attr(number, "attempts", 1)
            drawn = copy(self._memory.get_trial(number))
            # A second copy of the hyperparameters, only used for partially drawn trials.
            drawn.system_attrs = {}
            self._ids[number] = write_begin(self._db_study, drawn)
        else:
            self._complete_draw(number)
            attempts = self._memory.get_trial(number).user_attrs.get("attempts", 0)
            self._set_attr(number, "attempts", attempts + 1)
        self._numbers[trial_id] = number
        self._left -= 1
        self.started_count += 1
        trial = self._memory.get_trial(number)
        return {
            "arm": self.arm,
            "run_id": run_id(self.arm, number),
            "attempt": trial.user_attrs["attempts"],
            "seed": trial_seed(self._study_seed, self.arm, number),
            "hyperparameters": {**self._fixed, **trial.params},
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Report the end of a trial to Optuna; trials that raised are reported by `fail`."""
        if error or result is None:
            return
        number, epoch, score = self._numbers[trial_id], result[EPOCH], result[SCORE]
        # Ray passes the last result to this method only, not to `on_trial_result`.
        new = epoch not in self._memory.get_trial(number).intermediate_values
        state: State = "completed" if epoch >= self._epochs else "pruned"
        self._end(number, state, {"state": state}, score, {epoch: score} if new else {})

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record an epoch's score as an intermediate value."""
        number, epoch = self._numbers[trial_id], result[EPOCH]
        # A resumed trial repeats epochs that Optuna already has.
        if epoch not in self._memory.get_trial(number).intermediate_values:
            for storage, storage_id in self._locations(number):
                storage.set_trial_intermediate_value(storage_id, epoch, result[SCORE])

    def fail(self, trial_id: str, state: Literal["diverged", "failed"], error: str) -> str:
        """Report to Optuna that a trial raised; return its run id."""
        number = self._numbers[trial_id]
        self._end(number, state, {"error": error, "state": state})
        return run_id(self.arm, number)

    def end_of(self, trial_id: str) -> tuple[State, str] | None:
        """Return a trial's final state and error message; None if it has not ended for good."""
        trial = self._memory.get_trial(self._numbers[trial_id])
        state = state_of(trial)
        return state and (state, trial.user_attrs.get("error", ""))

    def set_aside(self, trial_id: str) -> None:
        """Set a trial aside, to be retried alone at the end."""
        self._set_attr(self._numbers[trial_id], "alone", True)

    def count_loss(self, trial_id: str, *, progressed: bool) -> int:
        """Count a lost trial; return its losses since it last progressed, including this one.

        Preemptible machines may be lost often, so only losses without progress are counted.
        """
        number = self._numbers[trial_id]
        attrs = self._memory.get_trial(number).user_attrs
        losses: int = 1 if progressed else attrs.get("losses", 0) + 1
        self._set_attr(number, "losses", losses)
        return losses

    def requeue(self, trial_id: str) -> None:
        """Queue a lost trial, to be resumed as soon as a slot is free."""
        self._interrupted.append(self._numbers[trial_id])
        self._left += 1
        self.started_count -= 1

    def _complete_draw(self, number: int) -> None:
        """Draw the remaining hyperparameters of a trial that was interrupted while being drawn."""
        trial = self._memory.get_trial(number)
        if self._distributions.keys() <= trial.params.keys():
            return
        (_, (storage, storage_id)) = self._locations(number)
        resumed = optuna.Trial(self._db_study, storage_id)
        for name, distribution in self._distributions.items():
            resumed._suggest(name, distribution)
            if name not in trial.params:
                value = storage.get_trial_param(storage_id, name)
                self._memory.set_trial_param(number, name, value, distribution)

    def _set_attr(self, number: int, key: str, value: object) -> None:
        for storage, storage_id in self._locations(number):
            storage.set_trial_user_attr(storage_id, key, value)

    def _end(
        self,
        number: int,
        state: State,
        attrs: Mapping[str, str],
        value: float | None = None,
        scores: Mapping[int, float] | None = None,
    ) -> None:
        for epoch, score in (scores or {}).items():
            self._memory.set_trial_intermediate_value(number, epoch, score)
        for key, text in attrs.items():
            self._memory.set_trial_user_attr(number, key, text)
        ended = _tell(self._memory_study, number, state, value)
        write_end(self._db_study, self._ids[number], ended, attrs, scores or {})

    def _locations(self, number: int) -> tuple[tuple[optuna.storages.BaseStorage, int], ...]:
        """Return the two storages of a trial, memory and optuna.db, each with its id there."""
        # In a storage with a single study, ids equal numbers.
        return (self._memory, number), (self._db_study._storage, self._ids[number])


def finish_interrupted_trial(
    study: optuna.Study, trial: FrozenTrial, rows: Sequence[EpochRow], epochs: int
) -> None:
    """Report the end of a trial that Optuna missed because the driver died.

    Args:
        study: The Optuna study of the trial's arm.
        trial: The trial, which Optuna considers unfinished.
        rows: All its epochs, up to ASHA's stop or the last epoch of a full trial.
        epochs: Epochs of a full trial.
    """
    resumed = optuna.Trial(study, trial._trial_id)
    for row in rows:
        # Optuna may already have the epoch.
        if row.epoch not in trial.intermediate_values:
            resumed.report(row.score, row.epoch)
    full = rows[-1].epoch >= epochs
    state: State = "completed" if full else "pruned"
    resumed.set_user_attr("state", state)
    _tell(study, trial.number, state, value=rows[-1].score)


def _tell(study: optuna.Study, number: int, state: State, value: float | None) -> FrozenTrial:
    ot_state = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    # Optuna derives a pruned trial's value from its intermediate values.
    return study.tell(
        number,
        value if state == "completed" else None,
        state=ot_state.get(state, TrialState.FAIL),
    )


class StudySearch(Searcher):
    """Alternate between the arms: the next trial goes to the arm with the fewest started."""

    def __init__(
        self, arms: Mapping[str, ArmSearch], mode: str, deadline: float | None = None
    ) -> None:
        """Combine the searches of the arms.

        Args:
            arms: Searches by arm name; ties are broken in this order.
            mode: Whether smaller ("min") or larger ("max") scores are better.
            deadline: Unix time after which no new trial is started.
        """
        super().__init__(metric=SCORE, mode=mode)
        self._arms = arms
        self._deadline = deadline
        self._of: dict[str, ArmSearch] = {}
        self.running: set[str] = set()
        """Ray's ids of the running trials."""

    def suggest(  # type: ignore[override]  # Searcher.FINISHED is a str
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        """Return the next trial, or FINISHED; None while one that is running may be lost."""
        late = self._deadline is not None and time.time() > self._deadline
        waiting = [
            arm for arm in self._arms.values() if arm.interrupted or not (late or arm.exhausted)
        ]
        if not waiting:
            return None if self.running else str(Searcher.FINISHED)
        arm = min(waiting, key=lambda arm: (not arm.interrupted, arm.started_count))
        self._of[trial_id] = arm
        suggested = arm.suggest(trial_id)
        self.running.add(trial_id)
        return suggested

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an epoch's result to the trial's arm."""
        self._of[trial_id].on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass the end of a trial to its arm."""
        self._of[trial_id].on_trial_complete(trial_id, result, error)
        if not error:
            self.running.discard(trial_id)

    def fail(self, trial_id: str, state: Literal["diverged", "failed"], error: str) -> str:
        """Report a trial that raised to its arm; return its run id."""
        self.running.discard(trial_id)
        return self._of[trial_id].fail(trial_id, state, error)

    def end_of(self, trial_id: str) -> tuple[State, str] | None:
        """Return a trial's final state and error message; None if it has not ended for good."""
        return self._of[trial_id].end_of(trial_id)

    def set_aside(self, trial_id: str) -> None:
        """Set a trial aside, to be retried alone at the end."""
        self._of[trial_id].set_aside(trial_id)
        self.running.discard(trial_id)

    def count_loss(self, trial_id: str, *, progressed: bool) -> int:
        """Count a lost trial; return its losses since it last progressed, including this one."""
        return self._of[trial_id].count_loss(trial_id, progressed=progressed)

    def requeue(self, trial_id: str) -> None:
        """Queue a lost trial, to be resumed as soon as a slot is free."""
        self._of[trial_id].requeue(trial_id)
        self.running.discard(trial_id)

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: object
    ) -> bool:
        """Accept Tune's settings; the arms already have theirs."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: optuna.db holds the state, and `Tuner.restore` is not used."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, for the same reason."""


def _distributions(ranges: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """Return the hyperparameters to search as Optuna distributions."""
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
