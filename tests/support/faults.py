"""Training functions that do what a healthy machine does not; workers import them from here."""

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
from study.features.distributed import _compute_part
from study.runs.gpu_load import Load
from study.runs.worker import AGAIN, Attempt, Confirmation, RunSettings, run_confirmation, run_trial
from study.training.data import TrainingArrays
from study.training.loop import EpochMetrics, NonFiniteLossError, Run, train

#: The run that something happens to, and the epoch after which it happens.
VICTIM, AFTER_EPOCH = "dropout-001", 2


def run_trial_short_of_memory(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """A stand-in for a GPU on which some trials fit only alone, and one not even so.

    The exception is the one that CUDA's allocator raises; the training is done on the CPU.
    """
    assert ray.get_gpu_ids(), "Ray has given the trial no GPU"
    alone = settings.gpu_share == 1
    if config["run_id"].endswith("-001") and not (alone and config["arm"] == "dropout"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    with patch("ray.get_gpu_ids", return_value=[]):
        run_trial(config, shared, settings)


def run_confirmation_short_of_memory(
    attempt: Attempt, shared: list[Any], settings: RunSettings
) -> Confirmation:
    """The same for confirmation runs: those of one setting fit only with a whole GPU."""
    assert ray.get_gpu_ids(), "Ray has given the run no GPU"
    if "-recipe-dropout" in attempt.run_id and settings.gpu_share < 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    with patch("ray.get_gpu_ids", return_value=[]):
        return run_confirmation(attempt, shared, settings)


def trial_with(
    fault: Callable[[], None], *, attempts: int = 1, victim: str = VICTIM
) -> Callable[..., None]:
    """`run_trial`, but something happens to a trial after its second epoch.

    Args:
        fault: What happens, in the trial's own process.
        attempts: To so many attempts at the trial.
        victim: To trials with such a run id, a regular expression.
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
    """`run_trial`, but every attempt at a trial ends with the first epoch that it trains."""
    report = tune.report

    def report_or_die(metrics: dict[str, Any]) -> None:
        if AGAIN not in metrics:
            kill_the_worker()
        report(metrics)

    hit = config["run_id"] == VICTIM
    with _reporting_to(report_or_die if hit else report):
        run_trial(config, shared, settings)


@contextmanager
def _reporting_to(report: Callable[..., None]) -> Iterator[None]:
    """Let trials report to a function, every epoch of theirs saved, however short it is."""
    with patch("ray.tune.report", report), patch("study.runs.worker.SAVING_SHARE", 1e9):
        yield


def hanging_trial(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """`run_trial`, but the first attempt at a trial hangs in its third epoch."""

    def train_and_hang(*arguments: Any, report: Any, **options: Any) -> Run:
        def report_and_hang(metrics: EpochMetrics) -> None:
            report(metrics)
            if metrics.epoch == AFTER_EPOCH:
                hang_for_good()

        return train(*arguments, report=report_and_hang, **options)

    hit = config["run_id"] == VICTIM and config["attempt"] == 1
    with patch("study.runs.worker.train", train_and_hang if hit else train):
        run_trial(config, shared, settings)


def confirmation_with(fault: Callable[[], None], victim: str) -> Callable[..., Confirmation]:
    """`run_confirmation`, but something happens to the first attempt at a run, at its end."""

    def run(attempt: Attempt, shared: list[Any], settings: RunSettings) -> Confirmation:
        confirmation = run_confirmation(attempt, shared, settings)
        if attempt.run_id == victim and attempt.number == 1:
            fault()
        return confirmation

    return run


def kill_the_worker() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_node() -> None:
    """The node's own process, and what it started with it."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def raise_an_error() -> None:
    raise RuntimeError(f"nothing works at address 0x{os.getpid():x}\nand a second line")


def import_nothing_of_mlflow() -> None:
    assert "mlflow" not in sys.modules


def raise_or_diverge() -> None:
    """The trials of one arm raise, those of the other diverge."""
    if tune.get_context().get_trial_name().startswith("no-"):
        raise_an_error()
    raise NonFiniteLossError("the loss is not finite after epoch 2")


def hang_for_good() -> None:
    """Where Python itself cannot go on: in C code that holds the interpreter's lock."""
    ctypes.PyDLL(None).sleep(3600)


def eat_memory() -> None:
    """Until someone stops it."""
    eaten = []
    while True:
        eaten.append(bytearray(os.urandom(1 << 20)) * 100)


def part_whose_node_dies_once(marker: Path) -> Callable[..., np.ndarray]:
    """Computes a part of the features; the first one takes its whole node along.

    Args:
        marker: Tells whether that has happened.
    """

    def compute(*arguments: Any) -> np.ndarray:
        if not marker.exists():
            marker.touch()
            kill_the_node()
        return _compute_part(*arguments)

    return compute


def measure_load_on_big_only(*_: object) -> Load:
    """A stand-in for measuring a run: it fits on GPUs of the type BIG, twice."""
    if not _is_on_big():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return Load("Big GPU", 80 * 2**30, 4 * 2**30, 0.004, 0.5, 25_000.0)


def run_trial_on_big_only(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """`run_trial` on the CPU of a node whose GPUs are of the type BIG; elsewhere it fails."""
    assert _is_on_big(), "the trial does not fit here"
    with patch("ray.get_gpu_ids", return_value=[]):
        run_trial(config, shared, settings)


def run_confirmation_on_big_only(*arguments: Any) -> Confirmation:
    """`run_confirmation`, likewise."""
    assert _is_on_big(), "the run does not fit here"
    with patch("ray.get_gpu_ids", return_value=[]):
        return run_confirmation(*arguments)


def _is_on_big() -> bool:
    assert ray.get_gpu_ids(), "Ray has given the run no GPU"
    return str(ray.get_runtime_context().get_node_labels()[GPU_TYPE_LABEL]) == "BIG"
