"""Train in several processes on one GPU at once, for tests/benchmarks/finetune.py.

They share the GPU like the runs of a study, each with its share of the memory, but without Ray.
"""

import multiprocessing
import pickle
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from search_spaces import Value
from study.runs.gpu_load import memory_share
from study.training.data import TrainingData
from study.training.step import own_stream
from tests.benchmarks.finetune_loops import OwnLoop, short_run, synchronize

#: Seconds to wait for the answer of a process.
TIMEOUT = 150

#: Steps between two readings of the clock.
STRIDE = 20


@dataclass(frozen=True)
class Job:
    """Work of one process."""

    arrays: Path
    """File with a pickled `TrainingArrays`."""
    device: str
    """"cuda" or "cpu"."""
    share: float
    """Share of the GPU, as in `study.runs.gpu_load.memory_share`."""
    values: Mapping[str, Value]
    """Hyperparameters."""
    windows: int
    """Number of windows in which the rate is measured."""
    seconds: float
    """Length of a window in seconds."""
    stride: int
    """Steps between two readings of the clock."""
    steps: int
    """Steps of the run whose weights are compared."""
    role: str
    """What it does while others run: "train", "go on" or "ask for too much"."""


@dataclass(frozen=True)
class Answer:
    """Result of a process."""

    rates: tuple[float, ...] = ()
    """Images per second in each window."""
    weights: tuple[np.ndarray, ...] = ()
    """Weights after each run of the same steps."""
    error: str = ""
    """Type of the error that ended the run; empty if none did."""


Meet = Callable[[], Any]
J = TypeVar("J")
A = TypeVar("A")


def work(job: Job, meet: Meet) -> Answer:
    """Do a job; `meet` is a barrier for all processes."""
    torch.set_num_threads(1)
    if job.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory_share(job.share))
    data: TrainingData = pickle.loads(job.arrays.read_bytes()).to(torch.device(job.device))
    return {"train": _train, "go on": _go_on, "ask for too much": _ask_for_too_much}[job.role](
        job, data, meet
    )


def _train(job: Job, data: TrainingData, meet: Meet) -> Answer:
    """Train at full speed in windows common to all, then do the compared run twice."""
    torch.backends.cudnn.benchmark = True
    rates = []
    with own_stream(data.device):
        loop = OwnLoop(job.values, data)
        loop.run(job.stride)
        for _ in range(job.windows):
            meet()
            start, taken = time.perf_counter(), 0
            while (passed := time.perf_counter() - start) < job.seconds:
                loop.run(job.stride)
                synchronize(data.device)
                taken += job.stride
            passed = time.perf_counter() - start
            rates.append(taken * int(job.values["batch_size"]) / passed)
    # Autotuned kernels may differ between processes, and so would their rounding.
    torch.backends.cudnn.benchmark = False
    meet()
    return Answer(tuple(rates), tuple(short_run(job.values, data, job.steps) for _ in range(2)))


def _go_on(job: Job, data: TrainingData, meet: Meet) -> Answer:
    """Do the compared run twice alone, then once more while the other process fails."""
    alone = [short_run(job.values, data, job.steps) for _ in range(2)]
    meet()
    return Answer(weights=(*alone, short_run(job.values, data, job.steps)))


def _ask_for_too_much(job: Job, data: TrainingData, meet: Meet) -> Answer:
    meet()
    try:
        short_run(job.values, data, job.steps)
    except torch.OutOfMemoryError:
        return Answer(error="OutOfMemoryError")
    return Answer()


def in_processes(function: Callable[[J, Meet], A], jobs: list[J]) -> list[A]:
    """Run a function on each job, each in its own process, all at once.

    Raises:
        RuntimeError: A process failed; the message contains its error.
        TimeoutError: A process did not answer.
    """
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(len(jobs)), context.Queue()
    processes = [
        context.Process(
            target=_process, args=(function, number, job, barrier, answers), daemon=True
        )
        for number, job in enumerate(jobs)
    ]
    for process in processes:
        process.start()
    found: dict[int, A] = {}
    until = time.monotonic() + TIMEOUT
    try:
        while len(found) < len(jobs):
            number, answer, error = answers.get(timeout=max(until - time.monotonic(), 0.1))
            if error:
                raise RuntimeError(f"process {number}: {error}")
            found[number] = answer
    except queue.Empty:
        raise TimeoutError(f"{len(jobs) - len(found)} of {len(jobs)} gave no answer") from None
    finally:
        for process in processes:
            # Processes that have answered are about to exit.
            process.join(timeout=10 if len(found) == len(jobs) else 0)
            if process.is_alive():
                process.terminate()
    return [found[number] for number in range(len(jobs))]


def _process(
    function: Callable[[J, Meet], A], number: int, job: J, barrier: Any, answers: Any
) -> None:
    try:
        answers.put((number, function(job, lambda: barrier.wait(timeout=TIMEOUT)), ""))
    except BaseException as error:
        # Release the others, which would wait for this process.
        barrier.abort()
        answers.put((number, None, f"{type(error).__name__}: {error}"))
