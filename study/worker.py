"""What runs in Ray's worker processes: one search trial, or one confirmation run."""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from safetensors.torch import save_file

from search_spaces import Value
from study.arrays import PartArrays, TrainingArrays
from study.checkpoint import load_state, save_state
from study.config import Metric
from study.packing import Load, measure, memory_share
from study.training import (
    EpochMetrics,
    Part,
    Snapshot,
    TrainingData,
    TrainingState,
    build_model,
    loss_and_accuracy,
    predict,
    train,
)

#: The files in a trial's checkpoint: its state after its latest epoch, and, once it has reached the
#: last one, the weights of its best epoch.
STATE_FILE, WEIGHTS_FILE = "state.safetensors", "best.safetensors"

#: Saving states takes at most this part of a trial's time: where epochs are shorter than a few
#: seconds, not every epoch's state is saved.
SAVING_SHARE = 0.05


@dataclass(frozen=True)
class RunSettings:
    """What all runs of a study have in common."""

    epochs: int
    metric: Metric
    threads: int
    """CPU threads of one run."""
    gpu_share: float = 0.0
    """The part of a GPU that one run may use; 0 for the CPU."""


@dataclass(frozen=True)
class Measured:
    """Loss (nats) and accuracy (fraction) of a model on each part, in evaluation mode."""

    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class Confirmation:
    """What a confirmation run brings home."""

    epochs: tuple[EpochMetrics, ...]
    best: Snapshot
    selected: Measured
    """At the best epoch, on the whole of train, val and test."""
    last: Measured
    """The same at the last epoch."""
    val_logits: np.ndarray
    """float16 [n, classes], at the best epoch."""
    test_logits: np.ndarray
    val_labels: np.ndarray
    test_labels: np.ndarray
    seconds: float
    worker: str


def run_trial(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """Train one search trial, reporting to Ray Tune after each epoch.

    A report carries the trial's state, of which Ray keeps the latest, unless the one before it is
    so fresh that saving would take too much of the time. The weights of the best epoch travel with
    the last epoch's report: only a trial that reaches it can become a champion.

    Args:
        config: What `ArmSearch.suggest` made, and the trial's seed.
        shared: The data's one reference in Ray's object store.
        settings: Of the study.
    """
    next_save = 0.0

    def report(metrics: EpochMetrics, take_state: Callable[[], TrainingState]) -> None:
        nonlocal next_save
        last, start = metrics.epoch == settings.epochs, time.monotonic()
        if start < next_save and not last:
            tune.report(asdict(metrics))
            return
        with tempfile.TemporaryDirectory() as folder:
            state = take_state()
            save_state(Path(folder) / STATE_FILE, state)
            if last:
                save_file(state.best.weights, Path(folder) / WEIGHTS_FILE)
            tune.report(asdict(metrics), checkpoint=tune.Checkpoint.from_directory(folder))
        next_save = time.monotonic() + (time.monotonic() - start) / SAVING_SHARE

    with _device(settings) as device:
        resume = load_state(Path(config["resume_from"])) if config["resume_from"] else None
        # Tune counts epochs by reports, so those of the interrupted attempt are reported again.
        for metrics in resume.history if resume else ():
            if metrics.epoch < settings.epochs:
                tune.report(asdict(metrics))
            else:
                report(metrics, lambda: resume)  # type: ignore[arg-type, return-value]
        train(
            config["hyperparameters"],
            _training_data(shared[0], device),
            seed=config["seed"],
            epochs=settings.epochs,
            metric=settings.metric,
            report=report,
            resume=resume,
        )


def run_confirmation(
    hyperparameters: Mapping[str, Value],
    seed: int,
    shared: "list[ray.ObjectRef[Any]]",
    settings: RunSettings,
) -> Confirmation:
    """Train one confirmation run in full, then measure it on every part, test among them.

    Args:
        hyperparameters: Of the run.
        seed: Of the run.
        shared: References to the training data and to the test part.
        settings: Of the study.
    """
    start = time.monotonic()
    with _device(settings) as device:
        data, test = _training_data(shared[0], device), _test_part(shared[1], device)
        run = train(
            hyperparameters, data, seed=seed, epochs=settings.epochs, metric=settings.metric
        )
        selected, val_logits, test_logits = _measure(run.best, hyperparameters, data, test)
        last, _, _ = _measure(run.last, hyperparameters, data, test)
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


def measure_load(
    hyperparameters: Mapping[str, Value],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> Load:
    """What one run asks of a GPU; see `packing.measure`."""
    with _device(settings) as device:
        return measure(hyperparameters, _training_data(shared[0], device))


def worker_name(node: str, pid: int) -> str:
    """A worker process as epochs.jsonl names it."""
    return f"{node}:{pid}"


def _measure(
    snapshot: Snapshot, hyperparameters: Mapping[str, Value], data: TrainingData, test: Part
) -> tuple[Measured, np.ndarray, np.ndarray]:
    model = build_model(hyperparameters, data, seed=0)
    model.load_state_dict(snapshot.weights)
    logits = [predict(model, part.inputs) for part in (data.train, data.val, test)]
    (train_loss, train_accuracy), (val_loss, val_accuracy), (test_loss, test_accuracy) = (
        loss_and_accuracy(values, part.labels)
        for values, part in zip(logits, (data.train, data.val, test), strict=True)
    )
    measured = Measured(
        train_loss, train_accuracy, val_loss, val_accuracy, test_loss, test_accuracy
    )
    val_logits, test_logits = (values.half().cpu().numpy() for values in logits[1:])
    return measured, val_logits, test_logits


@contextmanager
def _device(settings: RunSettings) -> Iterator[torch.device]:
    """The device that Ray has given this process, set up; its memory is free again afterwards."""
    torch.set_num_threads(settings.threads)
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
