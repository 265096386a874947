"""Scaling: the driver's work per trial is constant, however many trials there have been.

The work is counted here, not timed; `python -m tests.benchmarks.scale` measures the time.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal, cast

import optuna
import pytest
import sqlalchemy
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from analysis.rundir.optuna_db import open_storage
from search_spaces import find_space
from study.screen import Screen
from study.search.callback import EmergencyStop, SearchCallback
from study.search.sampler_memory import GOOD, SamplerMemory
from study.search.scheduler import ArmScheduler
from study.search.searcher import ArmSearch, StudySearch, open_study
from study.seeds import derive_seed
from study.study import Study
from tests.study.search.test_searcher import CONTROLLER
from tests.support.tiny_study import make_study

SPACE = find_space("dropout")
ARM = SPACE.arms[1]
EPOCHS = 4


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(verbosity)


def arm_search(
    storage: optuna.storages.BaseStorage, mode: Literal["min", "max"] = "max"
) -> ArmSearch:
    return ArmSearch(SPACE, ARM, storage=storage, mode=mode, epochs=EPOCHS, trials=9999, seed=7)


def result(epoch: int, score: float) -> dict[str, Any]:
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "score")
    return {
        "training_iteration": epoch,
        **dict.fromkeys(names, score),
        "start": 0.0,
        "end": 1.0,
        "node_ip": "127.0.0.1",
        "pid": 1,
        "time_total_s": 1.0,
    }


@contextmanager
def counting_calls() -> Iterator[Counter[str]]:
    """Count calls of Python and C functions, and deleted files."""
    calls: Counter[str] = Counter()

    def count(_: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            calls["all"] += 1
            calls["unlink"] += getattr(argument, "__name__", "") == "unlink"

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@pytest.mark.integration
def test_cost_per_trial_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Function calls, SQL statements and deletions per trial, after 100 trials and after 500."""
    # Few enough that TPE sees the same number of trials in both counts.
    monkeypatch.setattr("study.search.searcher.SamplerMemory", partial(SamplerMemory, shown=40))
    study = make_study(tmp_path, trials=1000, epochs=EPOCHS, space="dropout")
    storage = open_storage(study.rundir.optuna_db)
    statements: list[str] = []
    sqlalchemy.event.listen(
        storage.engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )
    costs = []
    with driver(study, storage) as run_one:
        for _ in range(540):
            statements.clear()
            with counting_calls() as calls:
                run_one()
            costs.append((calls["all"], len(statements), calls["unlink"]))
    early, late = costs[100:140], costs[500:540]
    for kind in range(3):
        before, after = (median(cost[kind] for cost in part) for part in (early, late))
        assert after <= 1.03 * before


@dataclass(eq=False)
class FakeTrial:
    """The part of a Ray trial that the driver reads; reading its state counts as a call."""

    trial_id: str
    config: dict[str, Any]
    state: str = Trial.PENDING
    last_result: dict[str, Any] | None = None

    @property
    def status(self) -> str:
        return self.state


@contextmanager
def driver(study: Study, storage: optuna.storages.RDBStorage) -> Iterator[Callable[[], None]]:
    """Yield a function that takes one trial through the driver, in the order of Ray's calls."""
    arms = [arm.name for arm in study.space.arms]
    searches = {
        arm.name: ArmSearch(
            SPACE, arm, storage=storage, mode="max", epochs=EPOCHS, trials=500, seed=0
        )
        for arm in SPACE.arms
    }
    search, screen = StudySearch(searches, "max"), Screen()
    scheduler = ArmScheduler(arms, "max", EPOCHS)
    rng = random.Random(0)
    screen.start_log(study.rundir.log)
    with screen.phase("Search", "val_accuracy", EPOCHS, dict.fromkeys(arms, 500)):
        recorder = SearchCallback(study, search, screen, EmergencyStop(), [], exclusive=False)

        every: list[FakeTrial] = []
        live: set[FakeTrial] = set()
        controller = cast(
            TuneController,
            SimpleNamespace(get_trials=lambda: every, get_live_trials=lambda: live),
        )

        def run_one() -> None:
            name = f"ray-{rng.random()}"
            config = search.suggest(name)
            assert isinstance(config, dict)
            fake = FakeTrial(name, config)
            trial = cast(Trial, fake)
            every.append(fake)
            live.add(fake)
            scheduler.on_trial_add(CONTROLLER, trial)
            assert scheduler.choose_trial_to_run(controller) is trial
            fake.state = Trial.RUNNING
            assert scheduler.choose_trial_to_run(controller) is None
            recorder.on_trial_start(0, [], trial)
            score = rng.random()
            for epoch in range(1, EPOCHS + 1):
                last = result(epoch, score)
                fake.last_result = last
                scheduler.on_trial_result(CONTROLLER, trial, last)
                if epoch < EPOCHS:
                    search.on_trial_result(name, last)
                recorder.on_trial_result(0, [], trial, last)
            scheduler.on_trial_complete(CONTROLLER, trial, last)
            search.on_trial_complete(name, last)
            recorder.on_trial_complete(0, [], trial)
            fake.state = Trial.TERMINATED
            live.remove(fake)

        yield run_one


def test_the_sampler_draws_the_same_in_memory_and_from_a_file(tmp_path: Path) -> None:
    """Three trials run at a time; some are pruned, some fail."""
    search = arm_search(open_storage(tmp_path / "ours.db"))
    sampler = optuna.samplers.TPESampler(
        multivariate=True, constant_liar=True, seed=derive_seed(7, "sampler", ARM.name, 0)
    )
    plain = optuna.create_study(
        storage=open_storage(tmp_path / "plain.db"), sampler=sampler, direction="maximize"
    )
    rng, running = random.Random(0), []
    for number in range(60):
        ours, trial = search.suggest(f"t{number}"), plain.ask(search._distributions)
        assert ours["hyperparameters"].items() >= trial.params.items()
        running.append((f"t{number}", trial))
        if len(running) < 3:
            continue
        name, trial = running.pop(0)
        score, epochs = rng.random(), rng.choice([1, 2, EPOCHS])
        if score < 0.1:
            search.fail(name, "failed", "it broke")
            plain.tell(trial, state=TrialState.FAIL)
            continue
        for epoch in range(1, epochs + 1):
            trial.report(score, epoch)
            if epoch < epochs:
                search.on_trial_result(name, result(epoch, score))
        search.on_trial_complete(name, result(epochs, score))
        full = epochs == EPOCHS
        plain.tell(
            trial,
            score if full else None,
            state=TrialState.COMPLETE if full else TrialState.PRUNED,
        )
    # The file has the same trials as memory.
    kept = open_study(open_storage(tmp_path / "ours.db"), ARM.name, "max").get_trials()
    for there, plainly in zip(kept, plain.get_trials(), strict=True):
        assert (there.state, there.values, there.params, there.intermediate_values) == (
            plainly.state,
            plainly.values,
            plainly.params,
            plainly.intermediate_values,
        )


def random_trials(count: int, seed: int = 0) -> list[FrozenTrial]:
    """Return random trials in all final states."""
    rng = random.Random(seed)
    ranges: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1)}
    trials = []
    for _ in range(count):
        state = rng.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
        epochs = EPOCHS if state == TrialState.COMPLETE else rng.randrange(EPOCHS)
        # Few distinct values, so that many are equal.
        scores = {epoch: rng.randrange(20) / 20 for epoch in range(1, epochs + 1)}
        value = scores.get(epochs) if state != TrialState.FAIL else None
        trials.append(
            create_trial(
                state=state,
                value=value,
                params={"x": rng.random()},
                distributions=ranges,
                intermediate_values=scores,
            )
        )
    return trials


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("count", [30, 400, 2000])
def test_all_good_trials_are_shown(direction: Literal["minimize", "maximize"], count: int) -> None:
    """TPE splits off the same good trials as without subsampling."""
    memory = SamplerMemory("min" if direction == "minimize" else "max", seed=0, shown=300)
    study = optuna.create_study(storage=memory, direction=direction)
    everything = optuna.create_study(direction=direction)
    for trial in random_trials(count):
        study.add_trial(trial)
        everything.add_trial(trial)
    assert default_gamma(10**6) == GOOD
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    shown = study.get_trials(deepcopy=False, states=states)
    every = everything.get_trials(deepcopy=False, states=states)
    assert len(shown) == min(300, len(every))
    assert [trial.number for trial in shown] == sorted(trial.number for trial in shown)
    below, above = _split_trials(study, shown, default_gamma(len(shown)))
    expected, others = _split_trials(everything, every, default_gamma(len(every)))
    assert [trial.number for trial in below] == [trial.number for trial in expected]
    assert {trial.number for trial in above} <= {trial.number for trial in others}
    if len(every) <= 300:
        assert [trial.number for trial in shown] == [trial.number for trial in every]


def test_shown_trials_do_not_depend_on_when_trials_ended() -> None:
    """A resumed study sees the same trials as an uninterrupted one."""
    trials = [trial for trial in random_trials(900) if trial.state == TrialState.COMPLETE]
    at_once = SamplerMemory("max", seed=3, shown=100)
    study = optuna.create_study(storage=at_once, direction="maximize")
    for trial in trials:
        study.add_trial(trial)
    one_by_one = SamplerMemory("max", seed=3, shown=100)
    other = optuna.create_study(storage=one_by_one, direction="maximize")
    running = [other.ask() for _ in trials]
    assert len(other.get_trials(deepcopy=False)) == len(trials)
    for number in random.Random(0).sample(range(len(trials)), len(trials)):
        other.tell(running[number], trials[number].value)
    shown, again = (
        [trial.number for trial in each.get_trials(deepcopy=False)] for each in (study, other)
    )
    # Of equal trials, the first ranks higher.
    assert shown == again
    assert len(shown) == 100
    # A uniform sample has about as many from each half of the study.
    assert 30 <= sum(number < len(trials) / 2 for number in shown) <= 70
