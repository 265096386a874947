"""What runs in Ray's worker processes: one search trial, or one confirmation run."""

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
from study.models.state_dict import save_whole
from study.runs.gpu_load import Load, measure_load, memory_share
from study.runs.hang_reports import hang_file
from study.runs.watchdog import Watch, watched
from study.storage.mirror import worker_copy
from study.storage.object_store import Remote
from study.system.malloc import give_back_freed, keep_freed
from study.training.checkpoint import load_state, save_state
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

#: Saving states takes at most this part of a trial's time: where epochs are shorter than a few
#: seconds, not every epoch's state is saved.
SAVING_SHARE = 0.05

T = TypeVar("T")

#: In a reported result, the mark of an epoch that an earlier attempt has trained.
AGAIN = "again"


@dataclass(frozen=True)
class RunSettings:
    """What all runs of a study have in common."""

    epochs: int
    metric: Metric
    threads: int
    """CPU threads of one run."""
    rundir: RunDir
    """Its path absolute: runs save their states there."""
    remote: Remote | None = None
    """The run directory in a store: runs save their states there instead."""
    gpu_share: float = 0.0
    """The part of a GPU that one run may use; 0 for the CPU."""
    timeout: float | None = None
    """Seconds without an epoch after which a run is taken to hang; None: it may take its time."""


@dataclass(frozen=True)
class PartMetrics:
    """Loss (nats) and accuracies (fractions) of a model on each part, in evaluation mode."""

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
class Confirmation:
    """What a confirmation run brings home."""

    epochs: tuple[EpochMetrics, ...]
    best: EpochWeights
    selected: PartMetrics
    """At the best epoch, on the whole of train, val and test."""
    last: PartMetrics
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
    """From 1; a run that was interrupted and taken up again has several."""
    hyperparameters: Mapping[str, Value]
    seed: int

    @property
    def fingerprint(self) -> str:
        """What a state must come from for this run to go on from it."""
        return json.dumps([self.seed, dict(self.hyperparameters)], sort_keys=True)


def run_trial(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """Train one search trial, reporting to Ray Tune after each epoch.

    With the last epoch, the weights of the best one are saved: only a trial that reaches it can
    become a champion.

    Args:
        config: What `ArmSearch.suggest` made.
        shared: The data's one reference in Ray's object store.
        settings: Of the study.
    """
    attempt = Attempt(
        config["run_id"], config["attempt"], config["hyperparameters"], config["seed"]
    )
    rundir = worker_rundir(settings)
    weights = rundir.weights(attempt.run_id)

    def keep(best: EpochWeights) -> None:
        save_whole(weights, best.weights)
        rundir.wrote(weights)

    def report(metrics: EpochMetrics) -> None:
        # The process of a trial that ASHA stops waits in here for its next trial.
        watch.pause()
        tune.report(asdict(metrics))
        watch.alive()

    with _device(settings) as device, _watched(attempt, settings) as watch:
        resume = _find_state(attempt, settings)
        save_state_now_and_then = _saver(attempt, settings)

        def save(epoch: int, take: TakeState) -> None:
            watch.alive()
            save_state_now_and_then(epoch, take)
            if epoch == settings.epochs:
                keep(take().best)

        # Tune counts epochs by reports, so those of the interrupted attempt are reported again.
        for metrics in resume.history if resume and not resume.warmup else ():
            if resume and metrics.epoch == settings.epochs:
                keep(resume.best)
            watch.pause()
            tune.report({**asdict(metrics), AGAIN: True})
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


class Process:
    """A process that does one run after another, as an actor.

    For tasks, Ray starts processes ahead of need: one more than there are runs at once.
    """

    def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do a run, and return what it returns."""
        return work(*arguments)


def run_confirmation(
    attempt: Attempt,
    shared: "list[ray.ObjectRef[Any]]",
    settings: RunSettings,
) -> Confirmation:
    """Train one confirmation run in full, then measure it on every part, test among them.

    Args:
        attempt: It goes on from the state that an earlier one has left.
        shared: References to the training data and to the test part.
        settings: Of the study.
    """
    start = time.monotonic()
    with _device(settings) as device, _watched(attempt, settings) as watch:
        data, test = _training_data(shared[0], device), _test_part(shared[1], device)
        save_state_now_and_then = _saver(attempt, settings)

        def save(epoch: int, take: TakeState) -> None:
            watch.alive()
            save_state_now_and_then(epoch, take)

        run = train(
            attempt.hyperparameters,
            data,
            seed=attempt.seed,
            epochs=settings.epochs,
            metric=settings.metric,
            save=save,
            resume=_find_state(attempt, settings),
        )
        selected, val_logits, test_logits = _measure(run.best, attempt.hyperparameters, data, test)
        last = selected
        if run.last.epoch != run.best.epoch:
            last, _, _ = _measure(run.last, attempt.hyperparameters, data, test)
        return Confirmation(
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
    """What one run asks of a GPU; see `packing.measure`."""
    with _device(settings) as device:
        return measure_load(hyperparameters, _training_data(shared[0], device))


def worker_rundir(settings: RunSettings) -> RunDir:
    """The run directory as a worker process has it: shared by all, or its own way to the store."""
    return settings.rundir if settings.remote is None else worker_copy(settings.remote)


def worker_name(node: str, pid: int) -> str:
    """A worker process as epochs.jsonl names it."""
    return f"{node}:{pid}"


def _saver(attempt: Attempt, settings: RunSettings) -> Save:
    """What saves a run's state after an epoch, unless that would take too much of its time.

    The last epoch's is saved in any case.
    """
    rundir = worker_rundir(settings)
    path = rundir.state(attempt.run_id)
    next_save = 0.0

    def save(epoch: int, take: TakeState) -> None:
        nonlocal next_save
        start = time.monotonic()
        if start < next_save and epoch < settings.epochs:
            return
        save_state(path, take(), attempt.fingerprint)
        rundir.wrote(path)
        next_save = time.monotonic() + (time.monotonic() - start) / SAVING_SHARE

    return save


def _find_state(attempt: Attempt, settings: RunSettings) -> TrainingState | None:
    """What an earlier attempt has left; None where the run must begin anew."""
    rundir = worker_rundir(settings)
    path = rundir.state(attempt.run_id)
    rundir.fetch(path)
    try:
        return load_state(path, attempt.fingerprint)
    except ValueError:
        return None


@contextmanager
def _watched(attempt: Attempt, settings: RunSettings) -> Iterator[Watch]:
    """End this process if the block hangs."""
    run_id, number = attempt.run_id, attempt.number
    if settings.remote is None:
        file = settings.rundir.failure(run_id, number)
    else:
        file = hang_file(settings.remote, run_id, number)
    with watched(file, settings.timeout) as watch:
        yield watch


def _measure(
    snapshot: EpochWeights, hyperparameters: Mapping[str, Value], data: TrainingData, test: Part
) -> tuple[PartMetrics, np.ndarray, np.ndarray]:
    model = build_model(hyperparameters, data, seed=0)
    model.load_state_dict(snapshot.weights)
    figures: dict[str, float] = {}
    logits = []
    for name, part in (("train", data.train), ("val", data.val), ("test", test)):
        values = compute_logits(model, part.inputs)
        loss, accuracy = loss_and_accuracy(values, part.labels)
        figures[f"{name}_loss"], figures[f"{name}_accuracy"] = loss, accuracy
        figures[f"{name}_balanced_accuracy"] = balanced_accuracy(values, part.labels)
        logits.append(values.half().cpu().numpy())
    return PartMetrics(**figures), logits[1], logits[2]


@contextmanager
def _device(settings: RunSettings) -> Iterator[torch.device]:
    """The device that Ray has given this process, set up; its memory is free again afterwards."""
    torch.set_num_threads(settings.threads)
    give_back_freed()  # of the run before: this one may need less
    keep_freed()
    if not ray.get_gpu_ids():
        yield torch.device("cpu")
        return
    torch.backends.cudnn.benchmark = True
    # A run that wants more than its share fails alone, and leaves its neighbours theirs.
    torch.cuda.set_per_process_memory_fraction(memory_share(settings.gpu_share))
    # What a run that raised held is not free before its traceback is gone.
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
    """The data, put on the device once per process."""
    return ray.get(reference).to(device)


@lru_cache(maxsize=1)
def _test_part(reference: "ray.ObjectRef[PartArrays]", device: torch.device) -> Part:
    return ray.get(reference).to(device)
