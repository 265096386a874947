"""Optuna's search with one Optuna study per arm, and states that tell the truth.

Ray's `OptunaSearch` is the engine. Three things are added to it, each because it must be:

- A trial that ASHA stops is told PRUNED, with its last score among the intermediate values. Ray
  would tell COMPLETE, and tables and Optuna's plots would show a score after 3 epochs for one after
  15. (What TPE suggests is the same either way: tests/benchmarks/search_quality.py.)
- Every arm has its own sampler and its own share of the trials, taken in turn.
- A start takes over what an earlier start of the same study left in optuna.db: trials that were
  interrupted go first, and the sampler's seed moves on with the number of trials.

The sampler works on a copy of the arm's trials in memory (study/search/sampler_memory.py), and
optuna.db is written, not read, while trials run: one transaction when a trial starts, one per
epoch, and one when it ends, however many there are.
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
        self._memory = SamplerMemory(mode, derive_seed(seed, "memory", arm.name))
        super().__init__(
            space=self._distributions,
            metric=SCORE,
            mode=mode,
            sampler=sampler,
            storage=self._memory,
            study_name=arm.name,
        )
        self._drawn = cast(optuna.Study, self._ot_study)
        for trial in earlier:
            self._drawn.add_trial(trial)
        self._epochs = epochs
        self._numbers: dict[str, int] = {}
        self._ids = {trial.number: trial._trial_id for trial in earlier}
        unfinished = [trial for trial in earlier if not trial.state.is_finished()]
        set_aside = [trial for trial in unfinished if trial.user_attrs.get("alone")]
        self._interrupted = deque(
            trial.number for trial in unfinished if (trial in set_aside) == alone
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
        number = self._interrupted.popleft() if self._interrupted else None
        if number is None:
            super().suggest(trial_id)
            number = self._ot_trials[trial_id].number
            self._memory.set_trial_user_attr(number, "attempts", 1)
            drawn = copy(self._memory.get_trial(number))
            # Another copy of the hyperparameters, for samplers that see a trial half drawn.
            drawn.system_attrs = {}
            self._ids[number] = write_begin(self._study, drawn)
        else:
            self._draw_to_the_end(number)
            attempts = self._memory.get_trial(number).user_attrs.get("attempts", 0)
            self._set_attr(number, "attempts", attempts + 1)
        self._numbers[trial_id] = number
        self._left -= 1
        self.started += 1
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
        """Tell Optuna how a trial ended; one that raised is told by `fail`, which knows why."""
        if error or result is None:
            return
        number, epoch, score = self._numbers[trial_id], result[EPOCH], result[SCORE]
        # Ray does not pass the last result on to the searcher, only to this method.
        new = epoch not in self._memory.get_trial(number).intermediate_values
        state: State = "completed" if epoch >= self._epochs else "pruned"
        self._end(number, state, {"state": state}, score, {epoch: score} if new else {})

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Add an epoch's score to the intermediate values."""
        number, epoch = self._numbers[trial_id], result[EPOCH]
        # A trial run again after an interruption repeats epochs that Optuna has already.
        if epoch not in self._memory.get_trial(number).intermediate_values:
            for storage, of_storage in self._places(number):
                storage.set_trial_intermediate_value(of_storage, epoch, result[SCORE])

    def fail(self, trial_id: str, state: Literal["diverged", "failed"], error: str) -> str:
        """Tell Optuna that a trial raised; its run id."""
        number = self._numbers[trial_id]
        self._end(number, state, {"error": error, "state": state})
        return run_id(self.arm, number)

    def end_of(self, trial_id: str) -> tuple[State, str] | None:
        """How a trial ended, and why if it raised; None while it has not, or is to go on."""
        trial = self._memory.get_trial(self._numbers[trial_id])
        state = state_of(trial)
        return state and (state, trial.user_attrs.get("error", ""))

    def set_aside(self, trial_id: str) -> None:
        """Leave a trial to be run again later, without others beside it."""
        self._set_attr(self._numbers[trial_id], "alone", True)

    def count_loss(self, trial_id: str, *, came_further: bool) -> int:
        """How often a trial was lost since it last came further, this time included.

        A machine that comes and goes may be lost often: what counts are losses without progress.
        """
        number = self._numbers[trial_id]
        attrs = self._memory.get_trial(number).user_attrs
        losses: int = 1 if came_further else attrs.get("losses", 0) + 1
        self._set_attr(number, "losses", losses)
        return losses

    def put_back(self, trial_id: str) -> None:
        """Let a trial that was lost go on as soon as there is room."""
        self._interrupted.append(self._numbers[trial_id])
        self._left += 1
        self.started -= 1

    def _draw_to_the_end(self, number: int) -> None:
        """Draw what a trial lacks that was interrupted while its hyperparameters were drawn."""
        trial = self._memory.get_trial(number)
        if self._distributions.keys() <= trial.params.keys():
            return
        (_, (storage, in_storage)) = self._places(number)
        taken_up = optuna.Trial(self._study, in_storage)
        for name, distribution in self._distributions.items():
            taken_up._suggest(name, distribution)
            if name not in trial.params:
                value = storage.get_trial_param(in_storage, name)
                self._memory.set_trial_param(number, name, value, distribution)

    def _set_attr(self, number: int, key: str, value: object) -> None:
        for storage, in_storage in self._places(number):
            storage.set_trial_user_attr(in_storage, key, value)

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
        ended = _tell(self._drawn, number, state, value)
        write_end(self._study, self._ids[number], ended, attrs, scores or {})

    def _places(self, number: int) -> tuple[tuple[optuna.storages.BaseStorage, int], ...]:
        """Where a trial is kept, in memory and in optuna.db, with its id there."""
        # In a storage of one study, the first trial has number and id 0.
        return (self._memory, number), (self._study._storage, self._ids[number])


def finish_interrupted_trial(
    study: optuna.Study, trial: FrozenTrial, rows: Sequence[EpochRow], epochs: int
) -> None:
    """Tell Optuna how a trial ended whose end it has not heard of, since the driver died.

    Args:
        study: Of the trial's arm.
        trial: Unfinished, as far as Optuna knows.
        rows: All its epochs; the last one was ASHA's stop, or the last of a full run.
        epochs: Of a full run.
    """
    taken_up = optuna.Trial(study, trial._trial_id)
    for row in rows:
        # It may have heard of the epoch.
        if row.epoch not in trial.intermediate_values:
            taken_up.report(row.score, row.epoch)
    full = rows[-1].epoch >= epochs
    state: State = "completed" if full else "pruned"
    taken_up.set_user_attr("state", state)
    _tell(study, trial.number, state, value=rows[-1].score)


def _tell(study: optuna.Study, number: int, state: State, value: float | None) -> FrozenTrial:
    ot_state = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    # Optuna takes a pruned trial's value from its intermediate values.
    return study.tell(
        number,
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

    def end_of(self, trial_id: str) -> tuple[State, str] | None:
        """How a trial ended, and why if it raised; None while it has not, or is to go on."""
        return self._of[trial_id].end_of(trial_id)

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
