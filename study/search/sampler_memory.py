"""The trials of an arm as its sampler sees them: in memory, and subsampled if there are many.

For each new trial, TPE iterates over all trials it sees and requests them several times. The time
for this would grow with the study, both for reading optuna.db and for TPE itself.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Container, Sequence
from copy import deepcopy as deep_copy
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from study.seeds import derive_seed

#: At most this many ended trials of an arm are shown. TPE takes 7 ms for them, 50 ms for 5,000.
SHOWN = 500

#: TPE treats at most this many trials as good ones, however many there are.
GOOD = 25


class SamplerMemory(optuna.storages.InMemoryStorage):
    """An Optuna storage for one study that shows at most `SHOWN` ended trials.

    TPE compares the density of the good trials with that of the others. The best `GOOD` are
    always shown, so the first density is unchanged. Of the others a uniform sample is shown, so
    the second keeps its shape. The sample depends on the trials alone, not on the order in which
    they ended, so a resumed study sees the same one.

    Running trials are always shown. Failed ones never are: they tell a sampler nothing.
    """

    def __init__(self, mode: Literal["min", "max"], seed: int, shown: int = SHOWN) -> None:
        """Start without trials.

        Args:
            mode: Whether smaller ("min") or larger ("max") values are better.
            seed: Seed of the sample.
            shown: Maximum number of ended trials to show.
        """
        super().__init__()
        self._sign = 1.0 if mode == "min" else -1.0
        self._seed = seed
        self._limit = shown
        self._good: list[tuple[tuple[int, float, float], int]] = []
        self._others: list[tuple[int, int]] = []
        self._visible: list[int] = []

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial, running or ended."""
        trial_id = super().create_new_trial(study_id, template_trial)
        trial = self.get_trial(trial_id)
        if trial.state != TrialState.FAIL:
            insort(self._visible, trial_id)
        if trial.state.is_finished():
            self._sort_in(trial)
        return trial_id

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """End a trial."""
        done = super().set_trial_state_values(trial_id, state, values)
        if state == TrialState.FAIL:
            self._hide(trial_id)
        elif state.is_finished():
            self._sort_in(self.get_trial(trial_id))
        return done

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials that are shown, ordered by number."""
        trials = [self.get_trial(trial_id) for trial_id in self._visible]
        if states is not None:
            trials = [trial for trial in trials if trial.state in states]
        return deep_copy(trials) if deepcopy else trials

    def _sort_in(self, trial: FrozenTrial) -> None:
        """Sort an ended trial into the good or the others; hide one if there are too many."""
        if trial.state == TrialState.FAIL:
            return
        insort(self._good, (self._rank(trial), trial._trial_id))
        if len(self._good) <= GOOD:
            return
        _, other = self._good.pop()
        heapq.heappush(self._others, (derive_seed(self._seed, "shown", other), other))
        if len(self._others) > self._limit - GOOD:
            self._hide(heapq.heappop(self._others)[1])

    def _rank(self, trial: FrozenTrial) -> tuple[int, float, float]:
        """Return TPE's sort key: full trials by value, then pruned ones by epoch and value."""
        if trial.state == TrialState.COMPLETE:
            return 0, 0.0, self._sign * trial.values[0]
        step, value = max(trial.intermediate_values.items(), default=(-1, 0.0))
        return 1, -step, math.inf if math.isnan(value) else self._sign * value

    def _hide(self, trial_id: int) -> None:
        del self._visible[bisect_left(self._visible, trial_id)]
