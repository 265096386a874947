"""What Optuna's storage of a run directory holds that the rows do not: ranges and studies."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna

from analysis.rundir import RunDir
from analysis.rundir.errors import RunDirError


@dataclass(frozen=True)
class SearchedRange:
    """A numeric hyperparameter's range in the search.

    Attributes:
        low: Its lower end.
        high: Its upper end.
        log: Whether it was searched on a logarithmic scale.
    """

    low: float
    high: float
    log: bool


def load_searches(path: Path) -> Mapping[str, optuna.Study]:
    """The Optuna study of each arm that was searched; none without a storage that can be read.

    Args:
        path: The run directory.
    """
    file = RunDir(path).optuna_db
    try:
        return read_searches(file) if file.is_file() else {}
    except RunDirError:
        return {}


def read_searches(file: Path) -> Mapping[str, optuna.Study]:
    """Read an Optuna storage: its studies by name.

    Raises:
        RunDirError: It is damaged.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = open_storage(file)
        names = optuna.study.get_all_study_names(storage)
        return {name: optuna.load_study(study_name=name, storage=storage) for name in names}
    except Exception as error:  # SQLAlchemy, Alembic and Optuna each have errors of their own
        reason = str(error).strip().splitlines()[0]
        raise RunDirError(f"{file} cannot be read: {reason}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def open_storage(file: Path) -> optuna.storages.RDBStorage:
    """The Optuna storage in a file; made where it is not there."""
    # In a URL some characters of a path would mean something.
    connect = partial(sqlite3.connect, file.resolve())
    return optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": connect})


def searched_ranges(path: Path) -> Mapping[str, Mapping[str, SearchedRange]]:
    """By arm and hyperparameter, the ranges that were searched; those of numbers only."""
    found: dict[str, dict[str, SearchedRange]] = {}
    for arm, study in load_searches(path).items():
        ranges = found.setdefault(arm, {})
        for trial in study.get_trials(deepcopy=False):
            for name, distribution in trial.distributions.items():
                if isinstance(distribution, optuna.distributions.FloatDistribution):
                    low, high = distribution.low, distribution.high
                    ranges[name] = SearchedRange(low, high, distribution.log)
    return found
