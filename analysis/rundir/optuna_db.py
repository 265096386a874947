"""Read Optuna's storage in a run directory: its studies and the ranges searched."""

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
        low: Lower end.
        high: Upper end.
        log: True if it was searched on a logarithmic scale.
    """

    low: float
    high: float
    log: bool


def load_searches(path: Path) -> Mapping[str, optuna.Study]:
    """Load the Optuna study of each arm that was searched; empty without a readable storage.

    Args:
        path: The run directory.
    """
    file = RunDir(path).optuna_db
    try:
        return read_searches(file) if file.is_file() else {}
    except RunDirError:
        return {}


def read_searches(file: Path) -> Mapping[str, optuna.Study]:
    """Read the studies in an Optuna storage, by name.

    Raises:
        RunDirError: The storage is damaged.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = open_storage(file)
        names = optuna.study.get_all_study_names(storage)
        return {name: optuna.load_study(study_name=name, storage=storage) for name in names}
    except Exception as error:  # SQLAlchemy, Alembic and Optuna each raise their own errors
        reason = str(error).strip().splitlines()[0]
        raise RunDirError(f"{file} cannot be read: {reason}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def open_storage(file: Path) -> optuna.storages.RDBStorage:
    """Open the Optuna storage in a file, creating it if missing."""
    # Some characters of a path have a meaning in a URL.
    connect = partial(sqlite3.connect, file.resolve())
    return optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": connect})


def searched_ranges(path: Path) -> Mapping[str, Mapping[str, SearchedRange]]:
    """Return the ranges that were searched, by arm and hyperparameter; floats only."""
    found: dict[str, dict[str, SearchedRange]] = {}
    for arm, study in load_searches(path).items():
        ranges = found.setdefault(arm, {})
        for trial in study.get_trials(deepcopy=False):
            for name, distribution in trial.distributions.items():
                if isinstance(distribution, optuna.distributions.FloatDistribution):
                    low, high = distribution.low, distribution.high
                    ranges[name] = SearchedRange(low, high, distribution.log)
    return found
