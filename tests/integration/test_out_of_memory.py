"""Too little memory: of the GPU, the machine, and Ray's object store."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from study.cluster.resources import Resources
from study.runs.context import RunContext, run_settings
from study.runs.failures import as_user_error
from study.screen import Screen
from study.search.tune import run_search
from study.training.data import PartArrays, TrainingArrays
from tests.support.faults import (
    confirmation_with,
    eat_memory,
    run_confirmation_short_of_memory,
    run_trial_short_of_memory,
    trial_with,
)
from tests.support.tiny_study import TRAINING, confirm_study, make_study, part, search_study


@pytest.fixture
def a_ray() -> Iterator[Callable[..., None]]:
    """Return a function that starts a Ray for a single test."""

    def start(**options: Any) -> None:
        ray.init(address="local", num_cpus=2, include_dashboard=False, **options)

    yield start
    ray.shutdown()


def test_a_trial_out_of_gpu_memory_is_retried_alone_and_the_others_continue(
    a_ray: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """This uses a real Ray that believes it has a GPU."""
    a_ray(num_gpus=1)
    monkeypatch.setattr("study.search.tune.run_trial", run_trial_short_of_memory)
    study = make_study(tmp_path, epochs=2, gpus_per_trial=0.5)
    search_study(study, Resources(1, 0.5, 2))

    trials = {row.run_id: row for row in study.rundir.read_trials()}
    states = {name: (row.state, row.attempts) for name, row in trials.items()}
    assert states == {
        "no-dropout-000": ("completed", 1),
        "no-dropout-001": ("failed", 2),
        "no-dropout-002": ("completed", 1),
        "dropout-000": ("completed", 1),
        "dropout-001": ("completed", 2),
        "dropout-002": ("completed", 1),
    }
    error = trials["no-dropout-001"].error
    assert error.startswith("even when run alone: out of memory: CUDA out of memory")
    printed = capsys.readouterr().out
    assert printed.count("; will be retried alone at the end") == 2
    assert [row.epoch for row in study.rundir.read_epochs() if row.run_id == "dropout-001"] == [
        1,
        2,
    ]


def test_a_single_run_with_a_share_of_a_gpu_is_retried_with_a_whole_one(
    a_ray: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--max-concurrent 1 --gpus-per-trial 0.25: alone on its GPU, but limited to a quarter."""
    a_ray(num_gpus=1)
    monkeypatch.setattr("study.search.tune.run_trial", run_trial_short_of_memory)
    monkeypatch.setattr("study.confirm.run.run_confirmation", run_confirmation_short_of_memory)
    study = make_study(tmp_path, epochs=2, seeds=1, gpus_per_trial=0.25, max_concurrent=1)
    lone = Resources(1, 0.25, 1)
    trials = search_study(study, lone)
    assert trials["dropout-001"] == ("completed", 2)
    assert trials["no-dropout-001"] == ("failed", 2)
    confirm_study(study, lone)
    assert len(study.rundir.read_confirm()) == 4


def test_a_trial_that_uses_all_memory_is_killed_and_resumed_with_fewer_at_once(
    a_ray: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray's memory monitor kills it before the kernel kills something else."""
    a_ray(_system_config=stop_at_four_gigabytes_more())
    monkeypatch.setattr("study.search.tune.run_trial", trial_with(eat_memory))
    study = make_study(tmp_path)
    trials = search_study(study)
    # Which one it was is unknown, so both running trials are resumed, one at a time.
    assert {attempts for _, attempts in trials.values()} == {1, 2}
    assert trials["dropout-001"][1] == 2
    assert {state for state, _ in trials.values()} <= {"completed", "pruned"}
    printed = capsys.readouterr().out
    assert "resuming the running trials from their last checkpoints, 1 at once" in printed
    rows = study.rundir.read_epochs()
    for row in study.rundir.read_trials():
        epochs = [epoch.epoch for epoch in rows if epoch.run_id == row.run_id]
        assert epochs == list(range(1, row.epochs + 1))


def test_a_confirmation_run_that_uses_all_memory_is_retried_alone(
    a_ray: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray's memory monitor kills its process; the others continue."""
    a_ray(_system_config=stop_at_four_gigabytes_more())
    victim = "dropout-recipe-no-dropout-1"
    monkeypatch.setattr("study.confirm.run.run_confirmation", confirmation_with(eat_memory, victim))
    study = make_study(tmp_path, seeds=2)
    confirm_study(study)
    assert len(study.rundir.read_confirm()) == 8
    assert "; will be retried alone at the end" in capsys.readouterr().out


def stop_at_four_gigabytes_more() -> dict[str, float]:
    """Return options with which Ray's memory monitor kills processes after 4 GB more are used."""
    total, available = memory()
    return {
        "memory_usage_threshold": (total - available + 4e9) / total,
        "memory_monitor_refresh_ms": 50,
    }


def memory() -> tuple[float, float]:
    """Return total and available bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {name: 1024.0 * int(rest.split()[0]) for name, rest in (x.split(":") for x in lines)}
    return values["MemTotal"], values["MemAvailable"]


def test_data_too_large_for_the_object_store_is_spilled_to_disk(
    a_ray: Callable[..., None], tmp_path: Path
) -> None:
    a_ray(object_store_memory=80 << 20, _system_config={"local_fs_capacity_threshold": 1.0})
    study = make_study(tmp_path, trials=2, epochs=1)
    reference = ray.put(more_than_80_megabytes())
    resources = Resources(1, 0.0, 2)
    run_search(study, RunContext(reference, run_settings(study, resources), resources, Screen()))
    assert [row.state for row in study.rundir.read_trials()] == ["completed"] * 2


def test_a_disk_too_full_for_spilling_is_named(a_ray: Callable[..., None], tmp_path: Path) -> None:
    """Ray is configured to consider the disk full once a thousandth of it is used."""
    a_ray(object_store_memory=80 << 20, _system_config={"local_fs_capacity_threshold": 0.001})
    with pytest.raises(ray.exceptions.OutOfDiskError) as raised:
        ray.put(more_than_80_megabytes())
    message = str(as_user_error(raised.value, tmp_path))
    assert "the disk that it spills to (RAY_TMPDIR, by default /tmp) is too full" in message


def more_than_80_megabytes() -> TrainingArrays:
    train = TRAINING.train
    wide = PartArrays(np.tile(train.inputs, 8000), train.labels)
    assert wide.inputs.nbytes > 120 << 20
    small = PartArrays(np.tile(part(100).inputs, 8000), part(100).labels)
    return TrainingArrays(wide, small, small, 10)
