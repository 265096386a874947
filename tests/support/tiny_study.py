"""Studies that train almost instantly, on made-up features, to test everything but training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from analysis.rundir import RunDir
from study.cluster.resources import Resources
from study.config import StudyConfig
from study.confirm.run import run_confirmations
from study.provenance import new_record
from study.runs.context import RunContext, run_settings
from study.screen import Screen
from study.search.champions import Champion
from study.search.tune import run_search
from study.storage.mirror import DriverMirror
from study.study import Study, resolve_study
from study.training.data import PartArrays, TrainingArrays

EPOCHS = 5
AT_ONCE = Resources(1, 0.0, 2)


def start_ray() -> None:
    """Start Ray with two cores for the tests of a module."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, as a worker does: with more, sums have another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def part(rows: int) -> PartArrays:
    """Return made-up features of ten separable classes."""
    random = np.random.default_rng(rows)
    labels = np.arange(rows) % 10
    values = random.normal(size=(rows, 16)) + 3 * np.eye(10, 16)[labels]
    bits = values.astype(np.float32).view(np.uint32) >> 16
    return PartArrays(bits.astype(np.uint16), labels)


TRAINING = TrainingArrays(part(600), part(100), part(101), 10)


def make_study(folder: Path, **options: Any) -> Study:
    """Return a study whose run directory exists, with study.json as its start writes it."""
    defaults = {
        "trials": 6,
        "epochs": EPOCHS,
        "transfer": "frozen",
        "space": "tests.support.spaces:TINY",
    }
    study = resolve_study(StudyConfig(**{**defaults, **options}, storage=str(folder), name="study"))
    study.rundir.path.mkdir(exist_ok=True)
    study.rundir.write_study(new_record(study))
    return study


def in_store(study: Study, storage: str, **options: Any) -> tuple[Study, DriverMirror]:
    """Return the study with an object store as storage, and its mirror with these options."""
    study = replace(study, config=replace(study.config, storage=storage))
    assert study.remote is not None
    mirror = DriverMirror(study.rundir.path, study.remote, **options)
    mirrored = replace(study, rundir=RunDir(study.rundir.path, mirror))
    mirrored.rundir.write_study(study.rundir.read_study())
    return mirrored, mirror


def search_study(study: Study, resources: Resources = AT_ONCE) -> dict[str, tuple[str, int]]:
    """Run the search; return state and attempts of each trial."""
    run_search(study, context_of(study, resources))
    return {row.run_id: (row.state, row.attempts) for row in study.rundir.read_trials()}


def confirm_study(study: Study, resources: Resources = AT_ONCE) -> None:
    """Run the confirmation of two made-up champions."""
    values = study.space.fixed_values(study.space.arms[0])
    champions = [
        Champion("no-dropout", {**values, "learning_rate": 1e-3}, "no-dropout-000", 0.5),
        Champion("dropout", {**values, "learning_rate": 2e-3, "dropout": 0.3}, "dropout-000", 0.5),
    ]
    run_confirmations(study, champions, context_of(study, resources), ray.put(part(102)))


def context_of(study: Study, resources: Resources) -> RunContext:
    """Return the context of runs on the made-up features."""
    return RunContext(ray.put(TRAINING), run_settings(study, resources), resources, Screen())
