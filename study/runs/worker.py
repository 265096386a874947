"""Code that runs in Ray's worker processes: search trials and confirmation runs."""

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray import tune

from analysis.rundir import RunDir
from analysis.rundir.metric import Metric
from search_spaces import Value
from study.models.state_dict import save_safetensors
from study.runs.gpu_load import Load, measure_load, memory_share
from study.runs.hang_reports import hang_file
from study.runs.watchdog import Watchdog, watched
from study.storage.mirror import worker_copy
from study.storage.object_store import Remote
from study.system.malloc import give_back_freed, keep_freed
from study.training.checkpoint import load_checkpoint, save_checkpoint
from study.training.data import Part, PartArrays, TrainingArrays, TrainingData
from study.training.evaluate import balanced_accuracy, compute_logits, loss_and_accuracy
from study.training.loop import (
    EpochMetrics,
    EpochWeights,
    Save,
    TakeState,
    TrainingState,
    build_model,
    train,
)

#: Maximum fraction of a run's time spent saving checkpoints; if epochs are shorter than a few
#: seconds, not every epoch is saved.
SAVING_SHARE = 0.05

T = TypeVar("T")

#: Key in a reported result that marks an epoch trained by an earlier attempt.
REPLAYED = "again"


@dataclass(frozen=True)
class RunSettings:
    """Settings shared by all runs of a study."""

    epochs: int
    metric: Metric
    threads: int
    """CPU threads of one run."""
    rundir: RunDir
    """With an absolute path; runs save their checkpoints there."""
    remote: Remote | None = None
    """The run directory in an object store; runs then save their checkpoints there instead."""
    gpu_share: float = 0.0
    """Fraction of a GPU that one run may use; 0 for the CPU."""
    timeout: float | None = None
    """Seconds without a finished epoch after which a run counts as hung; None: no limit."""


@dataclass(frozen=True)
class SplitMetrics:
    """Loss (nats) and accuracies (fractions) of a model on all splits, in evaluation mode."""

    train_loss: float
    train_accuracy: float
    train_balanced_accuracy: float
    val_loss: float
    val_accuracy: float
    val_balanced_accuracy: float
    test_loss: float
    test_accuracy: float
    test_balanced_accuracy: float


@dataclass(frozen=True)
class ConfirmationResult:
    """Result of a confirmation run."""

    epochs: tuple[EpochMetrics, ...]
    best: EpochWeights
    selected: SplitMetrics
    """At the best epoch, on all of train, val and test."""
    last: SplitMetrics
    """The same at the last epoch."""
    val_logits: np.ndarray
    """float16 [n, classes], at the best epoch."""
    test_logits: np.ndarray
    val_labels: np.ndarray
    test_labels: np.ndarray
    seconds: float
    worker: str


@dataclass(frozen=True)
class Attempt:
    """An attempt at a run of the study."""

    run_id: str
    number: int
    """From 1; each resume of an interrupted run is a new attempt."""
    hyperparameters: Mapping[str, Value]
    seed: int

    @property
    def fingerprint(self) -> str:
        """Identifies checkpoints that this run can resume from."""
        return json.dumps([self.seed, dict(self.hyperparameters)], sort_keys=True)


def run_trial(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """Train one search trial, reporting to Ray Tune after each epoch.

    After the last epoch, the weights of the best one are saved: only a trial that completes can
    become a champion.

    Args:
        config: Result of `ArmSearch.suggest`.
        shared: Single reference to the data in Ray's object store.
        settings: Settings of the study.
    """
    attempt = Attempt(
        config["run_id"], config["attempt"], config["hyperparameters"], config["seed"]
    )
    rundir = worker_rundir(settings)
    weights = rundir.weights(attempt.run_id)

    def keep(best: EpochWeights) -> None:
        save_safetensors(weights, best.weights)
        rundir.wrote(weights)

    def report(metrics: EpochMetrics) -> None:
        # If ASHA stops the trial, its process waits in here for the next one.
        watch.pause()
        tune.report(asdict(metrics))
        watch.alive()

    with _device(settings) as device, _watched(attempt, settings) as watch:
        resume = _load_checkpoint(attempt, settings)
        checkpoint = _saver(attempt, settings)

        def save(epoch: int, take: TakeState) -> None:
            watch.alive()
            checkpoint(epoch, take)
            if epoch == settings.epochs:
                keep(take().best)

        # Tune counts epochs by reports, so epochs of the interrupted attempt are reported again.
        for metrics in resume.history if resume and not resume.warmup else ():
            if resume and metrics.epoch == settings.epochs:
                keep(resume.best)
            watch.pause()
            tune.report({**asdict(metrics), REPLAYED: True})
        watch.alive()
        train(
            attempt.hyperparameters,
            _training_data(shared[0], device),
            seed=attempt.seed,
            epochs=settings.epochs,
            metric=settings.metric,
            report=report,
            save=save,
            resume=resume,
        )


class ConfirmationWorker:
    """Actor that runs one confirmation run after another.

    For tasks, Ray would prestart processes: one more than there are concurrent runs.
    """

    def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call a function and return its result."""
        return work(*arguments)


def run_confirmation(
    attempt: Attempt,
    shared: "list[ray.ObjectRef[Any]]",
    settings: RunSettings,
) -> ConfirmationResult:
    """Train one confirmation run in full, then evaluate it on every split, including test.

    Args:
        attempt: Resumes from the checkpoint of an earlier attempt if there is one.
        shared: References to the training data and to the test split.
        settings: Settings of the study.
    """
    start = time.monotonic()
    with _device(settings) as device, _watched(attempt, settings) as watch:
        data, test = _training_data(shared[0], device), _test_part(shared[1], device)
        checkpoint = _saver(attempt, settings)

        def save(epoch: int, take: TakeState) -> None:
            watch.alive()
            checkpoint(epoch, take)

        run = train(
            attempt.hyperparameters,
            data,
            seed=attempt.seed,
            epochs=settings.epochs,
            metric=settings.metric,
            save=save,
            resume=_load_checkpoint(attempt, settings),
        )
        selected, val_logits, test_logits = _evaluate_splits(
            run.best, attempt.hyperparameters, data, test
        )
        last = selected
        if run.last.epoch != run.best.epoch:
            last, _, _ = _evaluate_splits(run.last, attempt.hyperparameters, data, test)
        return ConfirmationResult(
            epochs=run.epochs,
            best=run.best,
            selected=selected,
            last=last,
            val_logits=val_logits,
            test_logits=test_logits,
            val_labels=data.val.labels.cpu().numpy(),
            test_labels=test.labels.cpu().numpy(),
            seconds=time.monotonic() - start,
            worker=worker_name(ray.util.get_node_ip_address(), os.getpid()),
        )


def run_load_measurement(
    hyperparameters: Mapping[str, Value],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> Load:
    """Measure the GPU load of one run; see `gpu_load.measure_load`."""
    with _device(settings) as device:
        return measure_load(hyperparameters, _training_data(shared[0], device))


def worker_rundir(settings: RunSettings) -> RunDir:
    """Return a worker's run directory: the shared one, or its working copy of an object store."""
    return settings.rundir if settings.remote is None else worker_copy(settings.remote)


def worker_name(node: str, pid: int) -> str:
    """Return the name of a worker process in epochs.jsonl."""
    return f"{node}:{pid}"


def _saver(attempt: Attempt, settings: RunSettings) -> Save:
    """Return a function that checkpoints a run after an epoch, unless that takes too much time.

    The last epoch is always saved.
    """
    rundir = worker_rundir(settings)
    path = rundir.state(attempt.run_id)
    next_save = 0.0

    def save(epoch: int, take: TakeState) -> None:
        nonlocal next_save
        start = time.monotonic()
        if start < next_save and epoch < settings.epochs:
            return
        save_checkpoint(path, take(), attempt.fingerprint)
        rundir.wrote(path)
        next_save = time.monotonic() + (time.monotonic() - start) / SAVING_SHARE

    return save


def _load_checkpoint(attempt: Attempt, settings: RunSettings) -> TrainingState | None:
    """Return the state that an earlier attempt saved; None to start from scratch."""
    rundir = worker_rundir(settings)
    path = rundir.state(attempt.run_id)
    rundir.fetch(path)
    try:
        return load_checkpoint(path, attempt.fingerprint)
    except ValueError:
        return None


@contextmanager
def _watched(attempt: Attempt, settings: RunSettings) -> Iterator[Watchdog]:
    """Exit this process if the block hangs."""
    run_id, number = attempt.run_id, attempt.number
    if settings.remote is None:
        file = settings.rundir.failure(run_id, number)
    else:
        file = hang_file(settings.remote, run_id, number)
    with watched(file, settings.timeout) as watch:
        yield watch


def _evaluate_splits(
    trained: EpochWeights, hyperparameters: Mapping[str, Value], data: TrainingData, test: Part
) -> tuple[SplitMetrics, np.ndarray, np.ndarray]:
    """Return the metrics on every split, and the logits on val and on test."""
    model = build_model(hyperparameters, data, seed=0)
    model.load_state_dict(trained.weights)
    figures: dict[str, float] = {}
    logits = []
    for name, part in (("train", data.train), ("val", data.val), ("test", test)):
        values = compute_logits(model, part.inputs)
        loss, accuracy = loss_and_accuracy(values, part.labels)
        figures[f"{name}_loss"], figures[f"{name}_accuracy"] = loss, accuracy
        figures[f"{name}_balanced_accuracy"] = balanced_accuracy(values, part.labels)
        logits.append(values.half().cpu().numpy())
    return SplitMetrics(**figures), logits[1], logits[2]


@contextmanager
def _device(settings: RunSettings) -> Iterator[torch.device]:
    """Set up the device that Ray assigned to this process; free its memory afterwards."""
    torch.set_num_threads(settings.threads)
    give_back_freed()  # memory of the previous run: this one may need less
    keep_freed()
    if not ray.get_gpu_ids():
        yield torch.device("cpu")
        return
    torch.backends.cudnn.benchmark = True
    # A run that exceeds its share fails without affecting its neighbours.
    torch.cuda.set_per_process_memory_fraction(memory_share(settings.gpu_share))
    # Memory of a run that raised is only freed once its traceback is gone.
    _free_gpu_memory()
    try:
        yield torch.device("cuda", torch.cuda.current_device())
    finally:
        _free_gpu_memory()


def _free_gpu_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def _training_data(
    reference: "ray.ObjectRef[TrainingArrays]", device: torch.device
) -> TrainingData:
    """Return the data, moved to the device once per process."""
    return ray.get(reference).to(device)


@lru_cache(maxsize=1)
def _test_part(reference: "ray.ObjectRef[PartArrays]", device: torch.device) -> Part:
    return ray.get(reference).to(device)
