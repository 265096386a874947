"""Search: accurate states, one bracket and one Optuna study per arm, and resuming.

The tests call the searcher and the scheduler in the order in which Ray Tune's controller does;
test_end_to_end.py uses a real Ray.
"""

import errno
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from analysis.rundir import EpochRow, RunDir
from analysis.rundir.optuna_db import open_storage
from search_spaces import find_space
from study.config import StudyConfig
from study.screen import Screen
from study.search.callback import EmergencyStop, SearchCallback
from study.search.scheduler import ArmScheduler, rung_decision
from study.search.searcher import (
    ArmSearch,
    StudySearch,
    finish_interrupted_trial,
    open_study,
    state_of,
)
from study.study import resolve_study

SPACE = find_space("dropout")
CONTROLLER = cast(TuneController, None)
EPOCHS = 15


def make_search(
    storage: optuna.storages.RDBStorage, trials: int = 3, seed: int = 0, **options: Any
) -> StudySearch:
    deadline = options.pop("deadline", None)
    arms = {
        arm.name: ArmSearch(
            SPACE,
            arm,
            storage=storage,
            mode="max",
            epochs=EPOCHS,
            trials=trials,
            seed=seed,
            **options,
        )
        for arm in SPACE.arms
    }
    return StudySearch(arms, "max", deadline)


@pytest.fixture
def storage(tmp_path: Path) -> optuna.storages.RDBStorage:
    return open_storage(tmp_path / "optuna.db")


@dataclass
class FakeTrial:
    """The part of a Ray trial that the scheduler reads; Ray's own ids are arbitrary."""

    run_id: str
    arm: str
    trial_id: str = field(init=False)
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.trial_id = f"ray-{id(self)}"
        self.config = {"arm": self.arm, "run_id": self.run_id}


def suggest(search: StudySearch, trial_id: str) -> dict[str, Any]:
    suggested = search.suggest(trial_id)
    assert isinstance(suggested, dict)
    return suggested


def finish(search: StudySearch, trial_id: str, scores: list[float]) -> None:
    """Report as Ray does: the last result reaches the searcher on completion only."""
    for epoch, score in enumerate(scores[:-1], start=1):
        search.on_trial_result(trial_id, {"training_iteration": epoch, "score": score})
    last = {"training_iteration": len(scores), "score": scores[-1]}
    search.on_trial_complete(trial_id, last)


def test_arms_take_turns_and_get_equal_shares(storage: optuna.storages.RDBStorage) -> None:
    search = make_search(storage, trials=3)
    arms = [suggest(search, f"t{i}")["arm"] for i in range(6)]
    assert arms == ["no-dropout", "dropout"] * 3
    assert search.suggest("t6") is None
    for i in range(6):
        finish(search, f"t{i}", [0.5] * EPOCHS)
    assert search.suggest("t7") == Searcher.FINISHED


def test_hyperparameters_are_within_arm_and_recipe(storage: optuna.storages.RDBStorage) -> None:
    search = make_search(storage, trials=10)
    for i in range(20):
        suggested = suggest(search, f"t{i}")
        values = suggested["hyperparameters"]
        if suggested["arm"] == "no-dropout":
            assert values["dropout"] == 0.0
        else:
            assert 0.05 <= values["dropout"] <= 0.6
        assert values["batch_size"] in (256, 512, 1024)
        assert values["optimizer"] == "adamw"


def test_a_stopped_trial_is_pruned_with_all_its_values(
    storage: optuna.storages.RDBStorage,
) -> None:
    search = make_search(storage)
    suggest(search, "stopped")
    finish(search, "stopped", [0.5, 0.6, 0.61])
    (trial,) = open_study(storage, "no-dropout", "max").trials
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {1: 0.5, 2: 0.6, 3: 0.61}
    assert state_of(trial) == "pruned"


def test_a_full_trial_is_complete_with_its_score(storage: optuna.storages.RDBStorage) -> None:
    search = make_search(storage)
    suggest(search, "full")
    finish(search, "full", [0.5] * 14 + [0.7])
    (trial,) = open_study(storage, "no-dropout", "max").trials
    assert (trial.state, trial.value, state_of(trial)) == (TrialState.COMPLETE, 0.7, "completed")
    assert len(trial.intermediate_values) == EPOCHS


def test_a_partially_drawn_trial_is_completed(
    storage: optuna.storages.RDBStorage,
) -> None:
    cut_short = open_study(storage, "no-dropout", "max").ask()
    rate = cut_short.suggest_float("learning_rate", 3e-5, 3e-3, log=True)
    suggested = suggest(make_search(storage), "again")
    assert suggested["run_id"] == "no-dropout-000"
    assert suggested["hyperparameters"].keys() == SPACE.ranges(SPACE.arms[0]).keys()
    assert suggested["hyperparameters"]["learning_rate"] == rate


@pytest.mark.parametrize("state", ["diverged", "failed"])
def test_a_trial_that_raised_is_failed_with_the_reason(
    storage: optuna.storages.RDBStorage, state: Literal["diverged", "failed"]
) -> None:
    search = make_search(storage)
    suggest(search, "broken")
    search.on_trial_complete("broken", error=True)
    search.fail("broken", state, "the loss is not finite after epoch 2")
    (trial,) = open_study(storage, "no-dropout", "max").trials
    assert trial.state == TrialState.FAIL
    assert state_of(trial) == state
    assert trial.user_attrs["error"] == "the loss is not finite after epoch 2"


def test_a_new_start_continues_where_the_last_one_stopped(
    storage: optuna.storages.RDBStorage,
) -> None:
    first = make_search(storage, trials=5)
    drawn = [suggest(first, f"a{i}") for i in range(4)]
    finish(first, "a0", [0.5] * EPOCHS)
    finish(first, "a1", [0.4] * 3)
    # a2 and a3 are running when the driver dies.
    second = make_search(storage, trials=5)
    again = [suggest(second, f"b{i}") for i in range(8)]
    assert [trial["run_id"] for trial in again[:2]] == ["no-dropout-001", "dropout-001"]
    for before, after in zip(drawn[2:], again[:2], strict=True):
        assert after["hyperparameters"] == before["hyperparameters"]
        assert (before["attempt"], after["attempt"]) == (1, 2)
        assert after["seed"] == before["seed"]
    assert second.suggest("b8") is None
    everything = [*drawn[:2], *again]
    assert len({trial["run_id"] for trial in everything}) == 10
    # A sampler with the first start's seed would draw the first start's points again.
    assert len({str(trial["hyperparameters"]) for trial in everything}) == 10


def test_a_lost_trial_is_resumed_at_once(storage: optuna.storages.RDBStorage) -> None:
    search = make_search(storage, trials=2)
    drawn = [suggest(search, f"t{i}") for i in range(4)]
    # All trials have started, but the running ones may still be lost.
    assert search.suggest("none yet") is None
    finish(search, "t1", [0.5] * EPOCHS)
    search.on_trial_complete("t0", error=True)
    assert search.count_loss("t0", progressed=True) == 1
    search.requeue("t0")
    again = suggest(search, "t4")
    assert again["run_id"] == drawn[0]["run_id"]
    assert again["hyperparameters"] == drawn[0]["hyperparameters"]
    assert (again["seed"], again["attempt"]) == (drawn[0]["seed"], 2)
    search.on_trial_complete("t4", error=True)
    assert search.count_loss("t4", progressed=False) == 2
    search.fail("t4", "failed", "lost 2 times")
    finish(search, "t2", [0.5] * EPOCHS)
    finish(search, "t3", [0.5] * EPOCHS)
    assert search.suggest("t5") == Searcher.FINISHED


def test_started_trials_are_resumed_after_the_deadline(storage: optuna.storages.RDBStorage) -> None:
    suggest(make_search(storage), "a0")
    late = make_search(storage, deadline=0.0)
    assert suggest(late, "b0")["run_id"] == "no-dropout-000"
    assert late.suggest("b1") is None
    finish(late, "b0", [0.5] * EPOCHS)
    assert late.suggest("b2") == Searcher.FINISHED


@pytest.mark.parametrize(
    ("scores", "state"), [([0.5, 0.6, 0.61], "pruned"), ([0.5] * 15, "completed")]
)
def test_an_end_that_optuna_missed_is_reported(
    storage: optuna.storages.RDBStorage, scores: list[float], state: str
) -> None:
    """The driver died after writing the last epoch, before reporting the end to Optuna."""
    search = make_search(storage)
    suggest(search, "a")
    search.on_trial_result("a", {"training_iteration": 1, "score": scores[0]})
    study = open_study(storage, "no-dropout", "max")
    (unfinished,) = study.trials
    rows = [make_row("no-dropout-000", i, score) for i, score in enumerate(scores, start=1)]
    finish_interrupted_trial(study, unfinished, rows, EPOCHS)
    (trial,) = study.trials
    assert state_of(trial) == state
    assert trial.value == scores[-1]
    assert trial.intermediate_values == dict(enumerate(scores, start=1))
    assert trial.state == (TrialState.PRUNED if state == "pruned" else TrialState.COMPLETE)
    assert suggest(make_search(storage), "b")["run_id"] != "no-dropout-000"


def test_a_trial_set_aside_runs_last_and_alone(storage: optuna.storages.RDBStorage) -> None:
    search = make_search(storage, trials=2)
    drawn = [suggest(search, f"t{i}") for i in range(4)]
    search.on_trial_complete("t0", error=True)
    search.set_aside("t0")
    for i in (1, 2, 3):
        finish(search, f"t{i}", [0.5] * EPOCHS)
    assert search.suggest("t4") == Searcher.FINISHED
    # A new start does not offer it before its turn either.
    assert make_search(storage, trials=2).suggest("t5") == Searcher.FINISHED
    larger = make_search(storage, trials=3)
    assert [suggest(larger, name)["run_id"][-3:] for name in ("u0", "u1")] == ["002", "002"]
    assert larger.suggest("u2") is None
    finish(larger, "u0", [0.5] * EPOCHS)
    finish(larger, "u1", [0.5] * EPOCHS)
    last = make_search(storage, trials=3, only_set_aside=True)
    again = suggest(last, "t6")
    assert again["run_id"] == drawn[0]["run_id"]
    assert again["hyperparameters"] == drawn[0]["hyperparameters"]
    assert again["attempt"] == 2
    assert last.suggest("t7") is None
    finish(last, "t6", [0.5] * EPOCHS)
    assert last.suggest("t8") == Searcher.FINISHED


def test_a_repeated_epoch_is_reported_once(storage: optuna.storages.RDBStorage) -> None:
    first = make_search(storage)
    suggest(first, "a")
    first.on_trial_result("a", {"training_iteration": 1, "score": 0.5})
    second = make_search(storage)
    suggest(second, "b")
    finish(second, "b", [0.5, 0.6, 0.7])
    (trial,) = open_study(storage, "no-dropout", "max").trials
    assert trial.intermediate_values == {1: 0.5, 2: 0.6, 3: 0.7}


def test_the_same_seed_draws_the_same_trials(tmp_path: Path) -> None:
    def draws(name: str, seed: int) -> list[dict[str, Any]]:
        search = make_search(open_storage(tmp_path / f"{name}.db"), seed=seed)
        return [suggest(search, f"t{i}")["hyperparameters"] for i in range(6)]

    assert draws("a", 1) == draws("b", 1) != draws("c", 2)


def test_after_the_deadline_no_trial_starts(storage: optuna.storages.RDBStorage) -> None:
    assert make_search(storage, deadline=0.0).suggest("t0") == Searcher.FINISHED


def run_through(
    scheduler: ArmScheduler,
    arm: str,
    trial_id: str,
    scores: list[float],
) -> int:
    """Run a trial until ASHA stops it or the scores end; return the epoch it reached."""
    trial = cast(Trial, FakeTrial(trial_id, arm))
    scheduler.on_trial_add(CONTROLLER, trial)
    for epoch, score in enumerate(scores, start=1):
        result = {"training_iteration": epoch, "score": score}
        if scheduler.on_trial_result(CONTROLLER, trial, result) == "STOP":
            break
    scheduler.on_trial_complete(CONTROLLER, trial, result)
    return epoch


@pytest.fixture
def scheduler() -> ArmScheduler:
    return ArmScheduler(["no-dropout", "dropout"], "max", EPOCHS)


def test_trials_compete_only_within_their_arm(scheduler: ArmScheduler) -> None:
    """Slow starters of one arm are not stopped in favour of fast ones of the other."""
    for i in range(6):
        run_through(scheduler, "no-dropout", f"fast{i}", [0.8 + i / 100] * EPOCHS)
    assert run_through(scheduler, "dropout", "slow", [0.5] * EPOCHS) == EPOCHS
    assert run_through(scheduler, "dropout", "slower", [0.4] * EPOCHS) == 3
    assert run_through(scheduler, "no-dropout", "too slow", [0.5] * EPOCHS) == 3


def test_the_best_third_continues(scheduler: ArmScheduler) -> None:
    reached = [
        run_through(scheduler, "dropout", f"t{i}", [score] * EPOCHS)
        for i, score in enumerate([0.6, 0.5, 0.7, 0.65, 0.8, 0.1])
    ]
    # 0.65 competes with {0.6, 0.5, 0.7}, whose best third starts at 0.633.
    assert reached[:2] == [EPOCHS, 3]
    assert reached[2] == EPOCHS
    assert reached[3] == 9  # past the rung at 3, stopped at 9 by 0.6 and 0.7
    assert reached[4:] == [EPOCHS, 3]


def test_a_rung_is_not_decided_twice() -> None:
    """Before its interruption the trial passed the rung at 3; better ones have filled it since."""
    history = [make_row("resumed", epoch, 0.5) for epoch in range(1, 5)]
    history += [make_row(f"better{i}", epoch, 0.8) for i in range(6) for epoch in range(1, 16)]
    scheduler = ArmScheduler(["no-dropout", "dropout"], "max", EPOCHS, history)
    assert scheduler.rungs("dropout")[3]["resumed"] == 0.5
    before = scheduler.rungs("dropout")[3]
    assert run_through(scheduler, "dropout", "resumed", [0.5] * EPOCHS) == 9
    assert scheduler.rungs("dropout")[3] == before
    assert run_through(scheduler, "dropout", "new", [0.5] * EPOCHS) == 3


def test_a_rung_is_decided_after_the_driver_died_there() -> None:
    """The epoch was trained and its checkpoint saved, but the driver had not written its row."""
    history = [make_row("resumed", epoch, 0.5) for epoch in (1, 2)]
    history += [make_row(f"better{i}", epoch, 0.8) for i in range(6) for epoch in range(1, 16)]
    scheduler = ArmScheduler(["no-dropout", "dropout"], "max", EPOCHS, history)
    assert run_through(scheduler, "dropout", "resumed", [0.5] * EPOCHS) == 3


def test_replay_restores_the_rungs() -> None:
    scores = {"a": [0.6] * EPOCHS, "b": [0.5] * EPOCHS, "c": [0.7] * EPOCHS}
    live = ArmScheduler(["no-dropout", "dropout"], "min", EPOCHS)
    rows = []
    for name, values in scores.items():
        reached = run_through(live, "dropout", name, values)
        rows += [make_row(name, epoch, values[epoch - 1]) for epoch in range(1, reached + 1)]
    replayed = ArmScheduler(["no-dropout", "dropout"], "min", EPOCHS, rows)
    assert replayed.rungs("dropout") == live.rungs("dropout")
    assert set(live.rungs("dropout")) == {3, 9}
    assert live.rungs("dropout")[3] == {"a": 0.6, "b": 0.5, "c": 0.7}
    assert replayed.rungs("no-dropout") == {3: {}, 9: {}}


def make_row(run_id: str, epoch: int, score: float) -> EpochRow:
    return EpochRow(
        phase="search",
        run_id=run_id,
        attempt=1,
        arm="dropout",
        seed=1,
        epoch=epoch,
        train_loss=1.0,
        train_accuracy=0.5,
        val_loss=score,
        val_accuracy=0.5,
        score=score,
        rung="",
        start=0.0,
        end=1.0,
        worker="here:1",
    )


def test_rung_decisions_are_named() -> None:
    assert rung_decision((3, 9), {"training_iteration": 3, "done": True}) == "stop"
    assert rung_decision((3, 9), {"training_iteration": 9}) == "continue"
    assert rung_decision((3, 9), {"training_iteration": 15, "done": True}) == ""


def test_an_epoch_that_cannot_be_written_stops_the_search_before_optuna_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = resolve_study(StudyConfig(transfer="frozen", storage=str(tmp_path), name="study"))
    searcher = make_search(open_storage(tmp_path / "optuna.db"))
    stop = EmergencyStop()
    recorder = SearchCallback(study, searcher, Screen(), stop, [], exclusive=False)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunDir, "append_epochs", full)
    trial = cast(Trial, FakeTrial("dropout-000", "dropout"))
    trial.config |= {"attempt": 1, "seed": 1}
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "score", "start", "end")
    result = dict.fromkeys(names, 0.5) | {"training_iteration": 1, "node_ip": "here", "pid": 1}
    with pytest.raises(OSError, match="No space left"):
        recorder.on_trial_result(1, [trial], trial, result)
    assert stop.stop_all()
    assert "free some space" in str(stop.reason)
