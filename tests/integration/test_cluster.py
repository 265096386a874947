"""The command on a real Ray cluster of several nodes, all on this machine."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from analysis.rundir import ConfirmRow, RunDir, TrialRow
from analysis.rundir.optuna_db import read_searches
from study.cluster import session
from study.cluster.machines import GPU_TYPE_LABEL, Machines
from study.cluster.resources import Resources
from study.data.dataset import Dataset
from study.errors import UserError
from study.features import distributed
from study.features.extract import compute_here
from study.models.backbone import build_backbone
from study.models.weights import Weights
from study.runs import gpu_sharing
from study.runs.preflight import inspect_nodes
from study.screen import Screen
from study.search.searcher import run_id
from study.storage.object_store import Remote
from study.system.cache import cache_dir
from tests.support.command import SMALL, command, run
from tests.support.faults import (
    VICTIM,
    kill_the_node,
    measure_load_on_big_only,
    part_whose_node_dies_once,
    run_confirmation_on_big_only,
    run_trial_on_big_only,
    trial_with,
)
from tests.support.servers.clusters import ray_cluster
from tests.support.tiny_study import TRAINING, confirm_study, make_study, search_study

TINY = f"{SMALL} --space tests.support.spaces:TINY"


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[Cluster]:  # noqa: ARG001 - nodes inherit its environment
    with ray_cluster(4) as started:
        yield started


@pytest.fixture
def machines(cluster: Cluster) -> Iterator[Machines]:
    """The cluster, joined by this process."""
    ray.init(address=cluster.address, log_to_driver=False)
    yield session.find_machines(cluster.address)
    ray.shutdown()


def trials_without_times(rundir: Path) -> list[TrialRow]:
    return [replace(row, start=0, end=0) for row in RunDir(rundir).read_trials()]


def confirm_without_times(rundir: Path) -> list[ConfirmRow]:
    return [replace(row, seconds=0) for row in RunDir(rundir).read_confirm()]


def test_four_nodes_find_what_one_machine_finds(cluster: Cluster, tmp_path: Path) -> None:
    """With fewer trials than TPE's random ones and no ASHA rung, nothing depends on timing."""
    options = f"{TINY} --trials 6 --epochs 3 --seeds 2"
    alone = run(options, tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    distributed = run(f"{options} --address {cluster.address}", tmp_path / "spread")
    assert distributed.returncode == 0, distributed.stderr
    assert distributed.stderr == ""
    assert "4 at once (4 CPUs, 0 GPUs on 5 nodes)" in distributed.stdout
    assert trials_without_times(tmp_path / "spread") == trials_without_times(tmp_path / "alone")
    assert confirm_without_times(tmp_path / "spread") == confirm_without_times(tmp_path / "alone")
    (start_record,) = RunDir(tmp_path / "spread").read_study()["starts"]
    assert [node["cpus"] for node in start_record["nodes"]].count(1) == 4


def test_nodes_that_lack_a_package_are_refused_by_address(cluster: Cluster, tmp_path: Path) -> None:
    """This includes packages that only the project's own modules import."""
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError('no tyro here')\n")
    lacking = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=lacking)
    try:
        nodes = [node for node in session.find_machines(cluster.address).nodes if node.cpus]
        with pytest.raises(UserError) as refused:
            inspect_nodes(nodes, tmp_path)
    finally:
        ray.shutdown()
    why = f"{nodes[0].address}: the code of runs cannot be imported there (no tyro here)"
    assert f"{len(nodes)} of {len(nodes)} nodes cannot run trials: {why}" in str(refused.value)
    assert str(refused.value).endswith(
        "; install there what pyproject.toml pins, or remove the node from the cluster."
    )


def features_here_and_there(
    machines: Machines, dataset: Dataset, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features from one process with one thread, like a worker, and from the cluster."""
    backbone = build_backbone(weights.state, weights.architecture)
    preprocess = replace(weights.preprocess, image_size=32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = compute_here(torch.device("cpu"), "fp32").run(
            backbone, dataset.pixels, preprocess
        )
    finally:
        torch.set_num_threads(threads)
    found = distributed.compute_on_cluster(machines, "fp32").run(
        backbone, dataset.pixels, preprocess
    )
    return expected.bfloat16(), found


def test_features_of_a_cluster_equal_those_of_one_process(
    machines: Machines, small_dataset: Dataset, random_weights: Weights
) -> None:
    expected, found = features_here_and_there(machines, small_dataset, random_weights)
    assert torch.equal(found, expected)


def test_a_node_failure_costs_a_trial_at_most_one_epoch(
    machines: Machines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("study.search.tune.run_trial", trial_with(kill_the_node))
    study = make_study(tmp_path, address="auto")
    trials = search_study(study, Resources(1, 0.0, machines.capacity(1, 0)))
    assert trials.pop(VICTIM)[1] == 2
    assert set(trials.values()) <= {("completed", 1), ("pruned", 1)}
    lines = study.rundir.epochs.read_text().splitlines()
    assert len(lines) == len(study.rundir.read_epochs()), "an epoch was trained twice"
    # Ray may notice the end of the process before that of the machine.
    lost = rf"{VICTIM}  (its process died|its machine was lost); resuming from its last checkpoint"
    assert re.search(lost, capsys.readouterr().out)


def test_features_survive_a_node_failure(
    machines: Machines,
    small_dataset: Dataset,
    random_weights: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "died"
    monkeypatch.setattr(distributed, "_compute_chunk", part_whose_node_dies_once(marker))
    expected, found = features_here_and_there(machines, small_dataset, random_weights)
    assert marker.exists()
    assert torch.equal(found, expected)


def test_another_machine_resumes_after_the_driver_died(
    cluster: Cluster, bucket: str, tmp_path: Path
) -> None:
    """It has a different working directory and cache; only the storage is shared."""
    place = f"--address {cluster.address} --storage {bucket} --name study"
    store = Remote(bucket).child("study")
    options = f"{TINY} --trials 8 --epochs 30 --seeds 1 {place}"
    driver = on_machine(tmp_path / "first", options)
    deadline = time.monotonic() + 240
    while len((store.read("epochs.jsonl") or b"").splitlines()) < 60:
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "the study is too slow"
        time.sleep(0.1)
    driver.kill()
    driver.communicate()
    left = RunDir(tmp_path / "left")
    for name in ("optuna.db", "epochs.jsonl"):
        assert store.download(name, left.path / name)
    ended = {
        (arm, trial.number)
        for arm, study in read_searches(left.optuna_db).items()
        for trial in study.get_trials()
        if trial.state.is_finished()
    }

    second = on_machine(tmp_path / "second", f"--resume {place}")
    output, errors = second.communicate(timeout=400)
    assert second.returncode == 0, errors
    assert "was working on this study a moment ago" in output
    for name in ("optuna.db", "epochs.jsonl", "trials.csv", "report/verdict.json"):
        assert store.download(name, tmp_path / "end" / name)
    rundir = RunDir(tmp_path / "end")
    trials = {row.run_id: row for row in rundir.read_trials()}
    assert len(trials) == 8
    assert {row.state for row in trials.values()} <= {"completed", "pruned"}
    assert all(trials[run_id(*trial)].attempts == 1 for trial in ended)
    before = {row for row in left.read_epochs() if row.run_id in {run_id(*t) for t in ended}}
    assert before <= set(rundir.read_epochs())


def on_machine(folder: Path, options: str) -> "subprocess.Popen[str]":
    """Start the command in a separate folder, with a cache that holds only downloads."""
    cache = folder / "cache" / "dropout-study"
    cache.mkdir(parents=True)
    for entry in cache_dir().iterdir():
        if entry.name != "studies":
            (cache / entry.name).symlink_to(entry)
    return subprocess.Popen(
        command(options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
    )


@pytest.fixture
def two_kinds_of_gpu() -> Iterator[None]:
    """A cluster of two nodes that each pretend to have a GPU, of different sizes."""
    with ray_cluster(0) as cluster:
        for kind in ("BIG", "SMALL"):
            cluster.add_node(num_cpus=2, num_gpus=1, labels={GPU_TYPE_LABEL: kind})
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield
        ray.shutdown()


def test_runs_are_placed_on_gpus_where_they_fit(
    two_kinds_of_gpu: None,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measuring and training are replaced, since the nodes only pretend to have a GPU."""
    monkeypatch.setattr(gpu_sharing, "run_load_measurement", measure_load_on_big_only)
    monkeypatch.setattr("study.search.tune.run_trial", run_trial_on_big_only)
    monkeypatch.setattr("study.confirm.run.run_confirmation", run_confirmation_on_big_only)
    study = make_study(tmp_path, seeds=1, stop_after_failures=1, address="auto")
    machines = session.find_machines(study.config.address)
    screen = Screen()
    resources = gpu_sharing.choose_resources(study, machines, ray.put(TRAINING), screen)
    assert (resources.gpu_types, resources.gpus, resources.at_once) == (("BIG",), 0.5, 2)
    assert set(search_study(study, resources).values()) <= {("completed", 1), ("pruned", 1)}
    confirm_study(study, resources)
    assert len(study.rundir.read_confirm()) == 4
