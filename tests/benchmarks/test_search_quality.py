"""The replays of tests/benchmarks/search_quality.py, and the recorded table they use."""

import csv
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler

from search_spaces import Choice, Fixed, Float, Value
from study.search.scheduler import ArmScheduler
from study.search.searcher import ArmSearch, StudySearch, open_study
from tests.benchmarks import search_quality as quality
from tests.benchmarks.record import draw
from tests.benchmarks.search_quality import (
    ARMS,
    CONTENDERS,
    EPOCHS,
    OWN,
    SPACE,
    OnRay,
    Replayed,
    Table,
    Values,
    found,
    load_table,
    nearest,
    replay,
    study_search,
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def table() -> Table:
    return load_table()


def test_table_is_complete(table: Table) -> None:
    assert {arm: len(recorded.sets) for arm, recorded in table.items()} == {
        "no-dropout": 192,
        "dropout": 189,
    }
    losses = load_table("val_loss")
    for arm, recorded in table.items():
        assert recorded.curves.shape == losses[arm].curves.shape == (len(recorded.sets), EPOCHS)
        assert recorded.curves.min() > 0
        assert recorded.curves.max() < 1
        # Guessing has a loss of ln 10; losses are negated here, so that larger is better.
        assert -2 * math.log(10) < losses[arm].curves.min() < losses[arm].curves.max() < 0
        assert len(set(map(str, recorded.sets))) == len(recorded.sets)


def test_every_set_is_within_its_arm(table: Table) -> None:
    for arm, recorded in table.items():
        ranges = SPACE.ranges(ARMS[arm])
        for values in recorded.sets:
            assert values.keys() == ranges.keys()
            for name, value in values.items():
                assert lies_in(value, ranges[name])


def lies_in(value: Value, values: Float | Choice | Fixed) -> bool:
    match values:
        case Float(low, high, _):
            return low <= float(value) <= high
        case Choice(options):
            return value in options
        case Fixed(only):
            return value == only


def test_recorded_sets_are_those_that_record_draws() -> None:
    """They are from seeds 1 and 2: those of the first 120 sets that were done in time."""
    with quality.FILE.open(newline="") as file:
        in_file = Counter(as_recorded(row["arm"], row) for row in csv.DictReader(file))
    drawn = {as_recorded(job.arm, job.values) for seed in (1, 2) for job in draw(SPACE, 120, seed)}
    assert in_file.keys() <= drawn


def as_recorded(arm: str, values: Values) -> tuple[str, ...]:
    numbers = ("learning_rate", "weight_decay", "dropout")
    rounded = (f"{float(values[name]):.6g}" for name in numbers)
    return (arm, str(values["head"]), str(values["batch_size"]), *rounded)


def test_nearest_set_to_a_recorded_one_is_itself(table: Table) -> None:
    for arm, recorded in table.items():
        for number, values in enumerate(recorded.sets):
            assert nearest(table, arm, values) == number


def test_close_set_maps_to_the_recorded_one_and_another_head_is_further_away(
    table: Table,
) -> None:
    values = table["dropout"].sets[0]
    beside = {**values, "learning_rate": float(values["learning_rate"]) * 1.001}
    assert nearest(table, "dropout", beside) == 0

    def away(**changed: Value) -> float:
        here, there = quality.places("dropout", [values, {**values, **changed}])
        return float(np.linalg.norm(here - there))

    assert away(head="256") == pytest.approx(quality.APART)
    assert away(head="512", batch_size=1024) == pytest.approx(quality.APART * math.sqrt(2))
    # The range spans two decades; this is one of them.
    lower, upper = ({**values, "learning_rate": rate} for rate in (3e-5, 3e-4))
    here, there = quality.places("dropout", [lower, upper])
    assert np.linalg.norm(here - there) == pytest.approx(0.5)


def test_score_is_the_best_so_far(table: Table) -> None:
    recorded = table["dropout"]
    scores = recorded.scores(0)
    assert scores == [recorded.curves[0, :epoch].max() for epoch in range(1, EPOCHS + 1)]
    assert scores[-1] == recorded.finals[0]


@pytest.mark.parametrize("name", CONTENDERS)
def test_replay_is_deterministic_and_its_regret_never_negative(name: str, table: Table) -> None:
    first, again, other = (replay(CONTENDERS[name](16, seed), table, 16) for seed in (1, 1, 2))
    assert first == again
    assert [trial.recorded for trial in first] != [trial.recorded for trial in other]
    assert len(first) == 16
    for number in range(17):
        assert found(table, first[:number]).regret >= 0
    assert all(1 <= trial.epochs <= EPOCHS for trial in first)
    stopped = [trial for trial in first if trial.epochs < EPOCHS]
    assert ("full runs" in name) == (not stopped)
    assert all(trial.epochs in range(3, EPOCHS) for trial in stopped)


class Knowing:
    """An oracle search, which tries only the best recorded set of each arm."""

    def __init__(self, table: Table) -> None:
        self._sets = [
            (arm, recorded.sets[recorded.finals.argmax()]) for arm, recorded in table.items()
        ]

    def start(self, name: str) -> tuple[str, Values]:
        return self._sets.pop()

    def report(self, name: str, epoch: int, score: float) -> bool:
        return epoch < EPOCHS


def test_oracle_has_no_regret(table: Table) -> None:
    trials = replay(Knowing(table), table, len(table))
    assert found(table, trials) == quality.Found(0.0, 0, EPOCHS * len(table))


def test_arm_without_champion_counts_as_a_random_set(table: Table) -> None:
    best = {arm: recorded.finals.max() for arm, recorded in table.items()}
    full = Replayed("dropout", 0, EPOCHS, best["dropout"] - 0.01)
    stopped = Replayed("no-dropout", 0, 9, best["no-dropout"])
    looked = found(table, [full, stopped])
    blind = best["no-dropout"] - table["no-dropout"].finals.mean()
    assert looked.regret == pytest.approx(100 * (0.01 + blind) / 2)
    assert (looked.without, looked.epochs) == (1, EPOCHS + 9)


def test_replay_runs_until_both_trials_and_epochs_are_spent(table: Table) -> None:
    trials = replay(CONTENDERS[quality.BLIND](9, 0), table, 2, epochs=5 * EPOCHS)
    # Trials run in pairs of 30 epochs, so 75 epochs need a third pair.
    assert len(trials) == 6
    assert [trial.ended for trial in trials] == [29, 30, 59, 60, 89, 90]


@pytest.mark.parametrize("truthful", [True, False])
def test_own_search_is_the_projects_and_tells_the_expected_states(
    truthful: bool, table: Table
) -> None:
    name = OWN if truthful else quality.TOLD_COMPLETE
    contender = CONTENDERS[name](20, 3)
    assert isinstance(contender, OnRay)
    assert type(contender.searcher) is StudySearch
    assert type(contender.scheduler) is ArmScheduler
    trials = replay(contender, table, 20)
    assert Counter(trial.arm for trial in trials) == dict.fromkeys(ARMS, 10)
    for arm, search in contender.searcher._arms.items():
        assert type(search) is ArmSearch
        told = open_study(search._db_study._storage, arm, "max").trials
        ran = [trial for trial in trials if trial.arm == arm]
        seen = [trial.state == TrialState.COMPLETE for trial in told]
        full = [trial.epochs == EPOCHS for trial in ran]
        assert not all(full)
        assert seen == (full if truthful else [True] * len(ran))
        assert [len(trial.intermediate_values) for trial in told] == [t.epochs for t in ran]
        # The search learns from its suggestion and the score of the recorded set nearest to it.
        for trial, answered in zip(told, ran, strict=True):
            values = {**SPACE.fixed_values(ARMS[arm]), **trial.params}
            assert nearest(table, arm, values) == answered.recorded
            assert trial.value == pytest.approx(answered.score)


def test_without_early_stopping_every_trial_runs_in_full(table: Table) -> None:
    trials = replay(OnRay(study_search(4, 0), FIFOScheduler()), table, 4)
    assert [trial.epochs for trial in trials] == [EPOCHS] * 4


def test_arm_is_a_categorical_choice_for_rays_searcher(table: Table) -> None:
    counts = Counter(
        trial.arm
        for seed in range(3)
        for trial in replay(CONTENDERS[quality.STOCK](20, seed), table, 20)
    )
    assert counts.keys() == ARMS.keys()
    assert counts["dropout"] != counts["no-dropout"]


def test_every_contender_is_evaluated_at_every_stage() -> None:
    stages = quality.Stages.of(8)
    looks = quality.compare(0, stages, "val_accuracy")
    assert stages == quality.Stages((2, 4, 8), (15, 30, 60))
    assert len(looks) == len(CONTENDERS) * 6
    for (name, kind, number), look in looks.items():
        if kind == "epochs":
            assert look.epochs <= number
        elif name == quality.BLIND:
            own = looks[OWN, "trials", number].epochs
            assert abs(look.epochs - own) <= EPOCHS / 2
    cells = list(quality.rows([looks, looks], "trials", stages.trials))
    assert [row[0] for row in cells] == list(CONTENDERS)
    assert cells[0][4] == ""
