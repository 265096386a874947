"""Too little memory: the GPU's, the machine's, and that of Ray's object store."""

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
    """A Ray of the test's own: a function that starts it."""

    def start(**options: Any) -> None:
        ray.init(address="local", num_cpus=2, include_dashboard=False, **options)

    yield start
    ray.shutdown()


def test_a_trial_out_of_gpu_memory_is_tried_again_alone_and_its_neighbours_go_on(
    a_ray: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under a real Ray that believes to have a GPU."""
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
    assert error.startswith("without another run beside it, out of memory: CUDA out of memory")
    said = capsys.readouterr().out
    assert said.count("; it runs again at the end, alone") == 2
    assert [row.epoch for row in study.rundir.read_epochs() if row.run_id == "dropout-001"] == [
        1,
        2,
    ]


def test_a_lone_run_with_a_share_of_a_gpu_is_tried_again_with_all_of_it(
    a_ray: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --max-concurrent 1 --gpus-per-trial 0.25: alone on its GPU, but held to a quarter."""
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


def test_a_trial_that_eats_all_memory_is_ended_and_goes_on_with_fewer_beside_it(
    a_ray: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray's memory monitor ends it, before the kernel ends something else."""
    a_ray(_system_config=stop_at_four_gigabytes_more())
    monkeypatch.setattr("study.search.tune.run_trial", trial_with(eat_memory))
    study = make_study(tmp_path)
    trials = search_study(study)
    # Which one it was is not known: both that ran went on, one by one.
    assert {attempts for _, attempts in trials.values()} == {1, 2}
    assert trials["dropout-001"][1] == 2
    assert {state for state, _ in trials.values()} <= {"completed", "pruned"}
    said = capsys.readouterr().out
    assert "the trials under way go on from their last states, 1 at once" in said
    rows = study.rundir.read_epochs()
    for row in study.rundir.read_trials():
        epochs = [epoch.epoch for epoch in rows if epoch.run_id == row.run_id]
        assert epochs == list(range(1, row.epochs + 1))


def test_a_confirmation_run_that_eats_all_memory_runs_again_alone(
    a_ray: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray's memory monitor ends its process; the others go on."""
    a_ray(_system_config=stop_at_four_gigabytes_more())
    victim = "dropout-recipe-no-dropout-1"
    monkeypatch.setattr("study.confirm.run.run_confirmation", confirmation_with(eat_memory, victim))
    study = make_study(tmp_path, seeds=2)
    confirm_study(study)
    assert len(study.rundir.read_confirm()) == 8
    assert "; it runs again at the end, alone" in capsys.readouterr().out


def stop_at_four_gigabytes_more() -> dict[str, float]:
    """Options that have Ray's memory monitor end processes once 4 GB more are in use than now."""
    total, available = memory()
    return {
        "memory_usage_threshold": (total - available + 4e9) / total,
        "memory_monitor_refresh_ms": 50,
    }


def memory() -> tuple[float, float]:
    """Bytes in all, and bytes available."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {name: 1024.0 * int(rest.split()[0]) for name, rest in (x.split(":") for x in lines)}
    return values["MemTotal"], values["MemAvailable"]


def test_data_that_the_object_store_cannot_hold_are_laid_on_the_disk(
    a_ray: Callable[..., None], tmp_path: Path
) -> None:
    a_ray(object_store_memory=80 << 20, _system_config={"local_fs_capacity_threshold": 1.0})
    study = make_study(tmp_path, trials=2, epochs=1)
    reference = ray.put(more_than_80_megabytes())
    resources = Resources(1, 0.0, 2)
    run_search(study, RunContext(reference, run_settings(study, resources), resources, Screen()))
    assert [row.state for row in study.rundir.read_trials()] == ["completed"] * 2


def test_a_disk_too_full_for_such_data_is_named(a_ray: Callable[..., None], tmp_path: Path) -> None:
    """Ray takes a disk to be full here as soon as a thousandth of it is used."""
    a_ray(object_store_memory=80 << 20, _system_config={"local_fs_capacity_threshold": 0.001})
    with pytest.raises(ray.exceptions.OutOfDiskError) as raised:
        ray.put(more_than_80_megabytes())
    said = str(as_user_error(raised.value, tmp_path))
    assert (
        "the disk that it lays the rest on (that of RAY_TMPDIR, else of /tmp) is too full" in said
    )


def more_than_80_megabytes() -> TrainingArrays:
    train = TRAINING.train
    wide = PartArrays(np.tile(train.inputs, 8000), train.labels)
    assert wide.inputs.nbytes > 120 << 20
    small = PartArrays(np.tile(part(100).inputs, 8000), part(100).labels)
    return TrainingArrays(wide, small, small, 10)
