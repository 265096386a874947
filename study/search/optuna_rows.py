"""Write the start and the end of a trial to optuna.db, each in one transaction.

Optuna's own storage API writes the same rows in up to twelve transactions of several queries each,
which was half of the driver's work per trial. It is still used for other storages, and as the
reference in the tests.
"""

import json
from collections.abc import Mapping
from datetime import datetime

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, Engine, Table, delete, insert, update

_TRIALS: Table = models.TrialModel.__table__
_PARAMS: Table = models.TrialParamModel.__table__
_ATTRS: Table = models.TrialUserAttributeModel.__table__
_SCORES: Table = models.TrialIntermediateValueModel.__table__
_VALUES: Table = models.TrialValueModel.__table__


def write_begin(ot_study: optuna.Study, trial: FrozenTrial) -> int:
    """Write a running trial with hyperparameters and user attributes; return its storage id."""
    engine = _engine(ot_study)
    if engine is None:
        ot_study.add_trial(trial)
        return ot_study._storage.get_trial_id_from_study_id_trial_number(
            ot_study._study_id, trial.number
        )
    with engine.begin() as connection:
        row = {
            "study_id": ot_study._study_id,
            "number": trial.number,
            "state": trial.state,
            "datetime_start": trial.datetime_start,
        }
        key = connection.execute(insert(_TRIALS), row).inserted_primary_key
        assert key is not None
        trial_id = int(key[0])
        params = [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": trial.distributions[name].to_internal_repr(value),
                "distribution_json": distribution_to_json(trial.distributions[name]),
            }
            for name, value in trial.params.items()
        ]
        _insert(connection, _PARAMS, params)
        _insert(connection, _ATTRS, _attr_rows(trial_id, trial.user_attrs))
    return trial_id


def write_end(
    ot_study: optuna.Study,
    trial_id: int,
    ended: FrozenTrial,
    attrs: Mapping[str, object],
    scores: Mapping[int, float],
) -> None:
    """Write how a trial ended.

    Args:
        ot_study: The Optuna study in the storage.
        trial_id: Storage id of the trial.
        ended: The trial with its final state and values.
        attrs: User attributes; existing ones are replaced.
        scores: Intermediate values that the storage lacks, by epoch.
    """
    engine = _engine(ot_study)
    if engine is None:
        for epoch, score in scores.items():
            ot_study._storage.set_trial_intermediate_value(trial_id, epoch, score)
        for key, value in attrs.items():
            ot_study._storage.set_trial_user_attr(trial_id, key, value)
        ot_study._storage.set_trial_state_values(trial_id, ended.state, ended.values)
        return
    with engine.begin() as connection:
        _insert(connection, _SCORES, [_score_row(trial_id, *score) for score in scores.items()])
        old = (_ATTRS.c.trial_id == trial_id) & _ATTRS.c.key.in_(attrs)
        connection.execute(delete(_ATTRS).where(old))
        _insert(connection, _ATTRS, _attr_rows(trial_id, attrs))
        values = [_value_row(trial_id, *value) for value in enumerate(ended.values or ())]
        _insert(connection, _VALUES, values)
        end = {"state": ended.state, "datetime_complete": datetime.now()}
        connection.execute(update(_TRIALS).where(_TRIALS.c.trial_id == trial_id), end)


def _insert(connection: Connection, table: Table, rows: list[dict[str, object]]) -> None:
    if rows:
        connection.execute(insert(table), rows)


def _attr_rows(trial_id: int, attrs: Mapping[str, object]) -> list[dict[str, object]]:
    return [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attrs.items()
    ]


def _score_row(trial_id: int, epoch: int, score: float) -> dict[str, object]:
    kept, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(score)
    return {
        "trial_id": trial_id,
        "step": epoch,
        "intermediate_value": kept,
        "intermediate_value_type": kind,
    }


def _value_row(trial_id: int, objective: int, reached: float) -> dict[str, object]:
    kept, kind = models.TrialValueModel.value_to_stored_repr(reached)
    return {"trial_id": trial_id, "objective": objective, "value": kept, "value_type": kind}


def _engine(ot_study: optuna.Study) -> Engine | None:
    """Return the engine of the study's database; None for other kinds of storage."""
    storage = getattr(ot_study._storage, "_backend", None)
    return storage.engine if isinstance(storage, optuna.storages.RDBStorage) else None
