"""Training functions with injected faults; workers import them from here."""

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
import torch
from ray import tune

from study.cluster.machines import GPU_TYPE_LABEL
from study.features.distributed import _compute_chunk
from study.runs.gpu_load import Load
from study.runs.worker import (
    REPLAYED,
    Attempt,
    ConfirmationResult,
    RunSettings,
    run_confirmation,
    run_trial,
)
from study.training.data import TrainingArrays
from study.training.loop import EpochMetrics, NonFiniteLossError, TrainingResult, train

#: The run that the fault hits, and the epoch after which it does.
VICTIM, AFTER_EPOCH = "dropout-001", 2


def run_trial_short_of_memory(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """Simulate a GPU on which some trials fit only alone, and one does not fit at all.

    Raises the exception of CUDA's allocator; trains on the CPU.
    """
    assert ray.get_gpu_ids(), "Ray has not assigned a GPU to the trial"
    alone = settings.gpu_share == 1
    if config["run_id"].endswith("-001") and not (alone and config["arm"] == "dropout"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    with patch("ray.get_gpu_ids", return_value=[]):
        run_trial(config, shared, settings)


def run_confirmation_short_of_memory(
    attempt: Attempt, shared: list[Any], settings: RunSettings
) -> ConfirmationResult:
    """The same for confirmation runs: those of one setting fit only on a whole GPU."""
    assert ray.get_gpu_ids(), "Ray has not assigned a GPU to the run"
    if "-recipe-dropout" in attempt.run_id and settings.gpu_share < 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    with patch("ray.get_gpu_ids", return_value=[]):
        return run_confirmation(attempt, shared, settings)


def trial_with(
    fault: Callable[[], None], *, attempts: int = 1, victim: str = VICTIM
) -> Callable[..., None]:
    """Return `run_trial` with a fault after a trial's second epoch.

    Args:
        fault: Called in the trial's own process.
        attempts: Number of attempts that it hits.
        victim: Run ids of the trials that it hits, a regular expression.
    """

    def run(
        config: dict[str, Any],
        shared: "list[ray.ObjectRef[TrainingArrays]]",
        settings: RunSettings,
    ) -> None:
        report = tune.report

        def report_and_fail(metrics: dict[str, Any]) -> None:
            report(metrics)
            if metrics["epoch"] == AFTER_EPOCH:
                fault()

        hit = re.fullmatch(victim, config["run_id"]) and config["attempt"] <= attempts
        with _reporting_to(report_and_fail if hit else report):
            run_trial(config, shared, settings)

    return run


def trial_that_dies_with_every_epoch(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """`run_trial`, but one trial's worker dies after the first epoch that each attempt trains."""
    report = tune.report

    def report_or_die(metrics: dict[str, Any]) -> None:
        if REPLAYED not in metrics:
            kill_the_worker()
        report(metrics)

    hit = config["run_id"] == VICTIM
    with _reporting_to(report_or_die if hit else report):
        run_trial(config, shared, settings)


@contextmanager
def _reporting_to(report: Callable[..., None]) -> Iterator[None]:
    """Redirect trials' reports to a function, and save every epoch, however short."""
    with patch("ray.tune.report", report), patch("study.runs.worker.SAVING_SHARE", 1e9):
        yield


def hanging_trial(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """`run_trial`, but the first attempt at a trial hangs after its second epoch."""

    def train_and_hang(*arguments: Any, report: Any, **options: Any) -> TrainingResult:
        def report_and_hang(metrics: EpochMetrics) -> None:
            report(metrics)
            if metrics.epoch == AFTER_EPOCH:
                hang_for_good()

        return train(*arguments, report=report_and_hang, **options)

    hit = config["run_id"] == VICTIM and config["attempt"] == 1
    with patch("study.runs.worker.train", train_and_hang if hit else train):
        run_trial(config, shared, settings)


def confirmation_with(fault: Callable[[], None], victim: str) -> Callable[..., ConfirmationResult]:
    """Return `run_confirmation` with a fault at the end of the first attempt at a run."""

    def run(attempt: Attempt, shared: list[Any], settings: RunSettings) -> ConfirmationResult:
        confirmation = run_confirmation(attempt, shared, settings)
        if attempt.run_id == victim and attempt.number == 1:
            fault()
        return confirmation

    return run


def kill_the_worker() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_node() -> None:
    """Kill the node's main process, and its children with it."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def raise_an_error() -> None:
    raise RuntimeError(f"nothing works at address 0x{os.getpid():x}\nand a second line")


def import_nothing_of_mlflow() -> None:
    assert "mlflow" not in sys.modules


def raise_or_diverge() -> None:
    """Raise in trials of one arm, diverge in those of the other."""
    if tune.get_context().get_trial_name().startswith("no-"):
        raise_an_error()
    raise NonFiniteLossError("the loss is not finite after epoch 2")


def hang_for_good() -> None:
    """Hang in C code that holds the GIL, so that no Python code can run."""
    ctypes.PyDLL(None).sleep(3600)


def eat_memory() -> None:
    """Allocate memory until killed."""
    eaten = []
    while True:
        eaten.append(bytearray(os.urandom(1 << 20)) * 100)


def part_whose_node_dies_once(marker: Path) -> Callable[..., np.ndarray]:
    """Return a function that computes a part of the features, but first kills its node once.

    Args:
        marker: File that records that the node was killed.
    """

    def compute(*arguments: Any) -> np.ndarray:
        if not marker.exists():
            marker.touch()
            kill_the_node()
        return _compute_chunk(*arguments)

    return compute


def measure_load_on_big_only(*_: object) -> Load:
    """Return a fake load: two runs fit on a GPU of the type BIG, none on others."""
    if not _is_on_big():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return Load("Big GPU", 80 * 2**30, 4 * 2**30, 0.004, 0.5, 25_000.0)


def run_trial_on_big_only(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """`run_trial` on the CPU of a node with GPUs of the type BIG; elsewhere it fails."""
    assert _is_on_big(), "the trial does not fit here"
    with patch("ray.get_gpu_ids", return_value=[]):
        run_trial(config, shared, settings)


def run_confirmation_on_big_only(*arguments: Any) -> ConfirmationResult:
    """`run_confirmation` on the CPU of a node with GPUs of the type BIG; elsewhere it fails."""
    assert _is_on_big(), "the run does not fit here"
    with patch("ray.get_gpu_ids", return_value=[]):
        return run_confirmation(*arguments)


def _is_on_big() -> bool:
    assert ray.get_gpu_ids(), "Ray has not assigned a GPU to the run"
    return str(ray.get_runtime_context().get_node_labels()[GPU_TYPE_LABEL]) == "BIG"
