"""Trials written to optuna.db directly equal those that Optuna itself writes."""

import math
from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from analysis.rundir.optuna_db import open_storage
from study.search.optuna_rows import write_begin, write_end
from study.search.searcher import open_study

RANGES = {
    "dropout": FloatDistribution(0.1, 0.6),
    "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "head": CategoricalDistribution(("64", "512-256")),
}


def written(
    storage: optuna.storages.BaseStorage,
    state: TrialState,
    value: float | None,
    scores: Mapping[int, float],
) -> FrozenTrial:
    """Write a trial from start to end, and read it back from the storage."""
    study = open_study(storage, "dropout", "max")
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask(RANGES)
    begun = storage_trial(drawn, {"attempts": 1})
    trial_id = write_begin(study, begun)
    # All epochs but the last are reported as they finish.
    *first, last = scores.items()
    for epoch, score in first:
        study._storage.set_trial_intermediate_value(trial_id, epoch, score)
    # An earlier start may have died right after writing this.
    study._storage.set_trial_user_attr(trial_id, "state", "as it nearly ended")
    ended = optuna.trial.create_trial(
        state=state, value=value, params=begun.params, distributions=RANGES
    )
    write_end(study, trial_id, ended, {"state": "as it ended", "error": "Öl\n'"}, dict([last]))
    (trial,) = open_study(storage, "dropout", "max").get_trials()
    return trial


def storage_trial(trial: optuna.Trial, attrs: Mapping[str, object]) -> FrozenTrial:
    frozen = trial.study.get_trials()[trial.number]
    frozen.user_attrs = dict(attrs)
    return frozen


@pytest.mark.parametrize(
    ("state", "value", "scores"),
    [
        (TrialState.COMPLETE, 0.75, {1: 0.5, 2: 0.75}),
        (TrialState.COMPLETE, math.inf, {1: math.inf}),
        (TrialState.PRUNED, None, {1: 0.5, 2: -math.inf, 3: math.nan}),
        (TrialState.FAIL, None, {1: 0.25}),
    ],
)
def test_a_trial_equals_the_one_that_optuna_writes(
    tmp_path: Path, state: TrialState, value: float | None, scores: Mapping[int, float]
) -> None:
    ours = written(open_storage(tmp_path / "ours.db"), state, value, scores)
    # Not a database: written by Optuna's own methods.
    plain = written(optuna.storages.InMemoryStorage(), state, value, scores)
    assert ours.state == plain.state == state
    assert ours.values == plain.values
    assert ours.params == plain.params
    assert ours.distributions == plain.distributions == RANGES
    assert ours.user_attrs == plain.user_attrs
    assert str(ours.intermediate_values) == str(plain.intermediate_values)
    assert ours.datetime_start is not None
    assert ours.datetime_complete is not None
    assert ours.number == plain.number == 0


def test_a_trial_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    study = open_study(open_storage(tmp_path / "optuna.db"), "dropout", "max")
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask(RANGES)
    unwritable = storage_trial(drawn, {"attempts": {1, 2}})
    with pytest.raises(TypeError):
        write_begin(study, unwritable)
    assert study.get_trials() == []
