"""Planned resources: runs per GPU, disk space, and the printed plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_spaces import find_space
from study.cluster.machines import Machines, Node
from study.cluster.resources import plan_cores, plan_resources
from study.config import StudyConfig
from study.errors import UserError
from study.models.head import head_parameters
from study.plan import DiskUse, check_disk, plan_disk, plan_table
from study.runs import gpu_sharing
from study.runs.gpu_load import Load, largest_run, runs_per_gpu
from study.runs.gpu_sharing import describe_load
from study.screen import Screen
from study.study import resolve_study

GIB = 2**30
LOAD = Load(
    "NVIDIA Example",
    memory=80 * GIB,
    peak=4 * GIB,
    step_seconds=0.004,
    busy=0.3,
    images_per_second=25_000.0,
)


@pytest.mark.parametrize(
    ("change", "cpus", "expected"),
    [
        ({}, 16, 3),  # as many as keep it busy
        ({"busy": 0.01}, 16, 16),  # as many as there are CPU cores
        ({"busy": 0.01}, 99, 16),  # as many as fit: 73.6 / 4.6
        ({"busy": 1.0}, 16, 1),
        ({"peak": 79 * GIB}, 16, 1),
        ({"memory": 0, "peak": 0}, 16, 1),  # a CPU
    ],
)
def test_runs_share_a_gpu_up_to_its_capacity(
    change: dict[str, float], cpus: int, expected: int
) -> None:
    assert runs_per_gpu(replace(LOAD, **change), cpus) == expected  # type: ignore[arg-type]


def test_the_measured_load_is_described() -> None:
    assert describe_load(LOAD, 3) == (
        "NVIDIA Example: the largest run takes 4.0 of 80 GiB and 4.0 ms a step (25,000 images/s),"
        " and keeps the GPU 30 % busy: 3 runs at once per GPU."
    )


def test_the_largest_run_has_the_largest_of_everything() -> None:
    values = largest_run(find_space("finetune"))
    assert (values["head"], values["batch_size"]) == ("1024", 256)
    assert (values["frozen_layers"], values["dropout"]) == ("none", 0.6)
    assert head_parameters("1024", 10) == 2048 * 1024 + 1024 + 1024 * 10 + 10
    assert largest_run(find_space("article"))["backbone_warmup_epochs"] == 0


@pytest.mark.parametrize(
    ("asked", "packed", "gpus", "at_once"),
    [
        ("auto", None, 1.0, 2),
        ("auto", 3, 1 / 3, 6),
        (0.5, None, 0.5, 4),
        (0, None, 0, 16),
        ("auto", 49, 1 / 49, 98),  # 1 / (1 / 49) is a little less than 49
    ],
)
def test_resources_on_two_gpus(asked: float, packed: int | None, gpus: float, at_once: int) -> None:
    """On a stand-in for a machine with GPUs."""
    machines = Machines((Node("localhost", 16 if packed != 49 else 200, 2),), is_cluster=False)
    study = resolve_study(StudyConfig(transfer="finetune", gpus_per_trial=asked))
    resources = plan_resources(study.config, machines, packed)
    assert (resources.gpus, resources.at_once) == (gpus, at_once)
    one = resolve_study(StudyConfig(transfer="frozen", max_concurrent=1))
    assert plan_resources(one.config, machines).at_once == 1


@pytest.mark.parametrize(
    ("options", "gpus", "cores"),
    [
        ({}, 0, 64),
        ({"max_concurrent": 3, "cpus_per_trial": 1.5}, 0, 5),
        ({"max_concurrent": 99}, 0, 64),
        ({"cpus_per_trial": 10}, 0, 60),
        ({"gpus_per_trial": 0.5}, 2, 4),
        ({}, 2, 64),  # runs per GPU are not known yet
        ({"max_concurrent": 3}, 2, 3),
    ],
)
def test_cores_that_a_study_can_use(options: dict[str, Any], gpus: int, cores: int) -> None:
    """On a stand-in for a machine with many cores."""
    machines = Machines((Node("localhost", 64, gpus),), is_cluster=False)
    assert plan_cores(StudyConfig(**options), machines) == cores


SPREAD = Machines(
    (Node("head", 0, 0), Node("a", 3, 1), Node("b", 8, 2), Node("c", 5, 0)), is_cluster=True
)


@pytest.mark.parametrize(
    ("cpus", "gpus", "capacity"),
    [(1, 0, 16), (2, 0, 7), (4, 0, 3), (1, 1, 3), (1, 0.5, 6), (4, 1, 2)],
)
def test_runs_are_counted_by_machine(cpus: float, gpus: float, capacity: int) -> None:
    """A run needs its cores and its GPU on the same machine."""
    study = resolve_study(StudyConfig(transfer="frozen", cpus_per_trial=cpus, gpus_per_trial=gpus))
    assert plan_resources(study.config, SPREAD).at_once == capacity


def test_cores_of_nodes_without_a_gpu_do_not_increase_runs_per_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in for the measurement: a run that leaves its GPU nearly idle."""
    load = replace(LOAD, busy=0.05, peak=GIB)
    monkeypatch.setattr(gpu_sharing, "measure_loads", lambda *_: {"A": load})
    gpu = Node("gpu", 4, 2, "A")
    study = resolve_study(StudyConfig(transfer="finetune"))
    for machines in ((gpu,), (gpu, Node("cpu", 100, 0))):
        cluster = Machines(machines, is_cluster=True)
        resources = gpu_sharing.choose_resources(study, cluster, object(), Screen())  # type: ignore[arg-type]
        assert (resources.gpus, resources.at_once) == (1 / 2, 4)


def test_max_concurrent_is_requested_from_a_cluster() -> None:
    """Runs that do not fit stay pending, so that an autoscaling cluster scales up."""
    study = resolve_study(StudyConfig(transfer="frozen", gpus_per_trial=0, max_concurrent=50))
    assert plan_resources(study.config, SPREAD).at_once == 50
    assert plan_resources(study.config, Machines(SPREAD.nodes, is_cluster=False)).at_once == 16


def test_a_run_that_fits_nowhere_is_refused() -> None:
    study = resolve_study(StudyConfig(transfer="frozen", gpus_per_trial=0, cpus_per_trial=9))
    with pytest.raises(UserError, match=r"no node of the cluster has 9 CPU for a run \(16 CPUs"):
        plan_resources(study.config, SPREAD)
    nothing_yet = Machines((Node("head", 0, 0),), is_cluster=True)
    with pytest.raises(UserError, match="if the cluster autoscales, set the number of runs"):
        plan_resources(StudyConfig(), nothing_yet)
    growing = resolve_study(StudyConfig(transfer="frozen", max_concurrent=4))
    assert plan_resources(growing.config, nothing_yet).at_once == 4


def test_disk_use_covers_running_and_kept_weights() -> None:
    weights = 4 * (23_561_152 + head_parameters("1024", 1000))
    use = plan_disk(resolve_study(StudyConfig(transfer="finetune")), at_once=2)
    assert use.running == 2 * 2 * 4 * weights
    assert use.kept == (2 * 3 + 2 * 2 + 3) * weights
    frozen = plan_disk(resolve_study(StudyConfig(transfer="frozen")), at_once=2)
    head = 4 * head_parameters("2048-512", 1000)
    assert frozen.running == 2 * 2 * 4 * head
    assert frozen.kept == (2 * 3 + 2 * 2 * 8) * head + 3 * (head + 4 * 23_561_152)
    ensemble = plan_disk(
        resolve_study(StudyConfig(transfer="frozen", export="ensemble")), at_once=2
    )
    assert ensemble.kept == frozen.kept + 3 * 7 * head
    article = plan_disk(resolve_study(StudyConfig(space="article", transfer="finetune")), 1)
    weights = 4 * (23_561_152 + head_parameters("512-256-512-128", 1000))
    assert article.running == 2 * 4 * weights
    assert article.kept == (3 + 3) * weights


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    study = resolve_study(StudyConfig(transfer="frozen", storage=str(tmp_path / "new")))
    check_disk(study.location, DiskUse(running=10**6, kept=10**6))
    with pytest.raises(UserError, match=r"the weights may take .* GB are free there; free some"):
        check_disk(study.location, DiskUse(running=10**18, kept=0))


@pytest.mark.parametrize(
    ("epochs", "row"),
    [
        (3, "3 epochs; too few for early stopping; by val_accuracy"),
        (4, "4 epochs; ASHA decides after epoch 3; by val_accuracy"),
    ],
)
def test_the_plan_shows_when_trials_are_stopped(epochs: int, row: str) -> None:
    study = resolve_study(StudyConfig(transfer="frozen", epochs=epochs))
    table = plan_table(study, Machines((Node("localhost", 2, 0),), is_cluster=False))
    assert row in table.columns[1].cells
