"""All checks of fine-tuning that need a GPU, in one command and one table.

    python -m tests.benchmarks.finetune [--data PATH] [--weights PATH] [--only NAME ...]

Takes less than 8 minutes on one data-center GPU. Without a GPU it prints a note, runs the checks
`ceiling`, `throughput` and `graph` on a small scale, a minute or two, and exits with status 0; the
times are then not representative of a GPU. On a GPU the status is 1 if a check failed to run. Needs
neither Ray nor, with paths for data and weights, a network. The checks:

- `ceiling`: peak rates of the device (bf16 matrix product on random data, copy), the operations of
  a step of ResNet50 at 32 px, and the fraction of the peak that training reaches.
- `throughput`: this project's training loop against torchvision's reference loop (as reproduced by
  `finetune_loops.ReferenceLoop`): the same images, batch and image size, in the same process, in
  alternating repeats. Target: twice as fast or more.
- `graph`: steps replayed from the CUDA graph against plain ones, in time and in the final weights
  of a run with the same seed: the largest difference, and the distance relative to how far the
  weights have moved. Some sums on a GPU have no fixed order, so the distance is compared with that
  of two plain runs; a head on features has no such sums, and must end with identical weights.
- `packing`: what `study.runs.gpu_load` measures and decides; the speedup of 2 and 4 processes over
  one; and that a run among others ends like the same run alone.
- `memory`: a run that exceeds its share of the memory fails, and its neighbour ends as it does
  alone.
- `trial`: the article's run of 15 epochs, at 32 px. Target: 45 s or less.
- `trial-160`: a run of a modern recipe at 160 px. Target: 97 % on test.
- `compile`: plain steps of a backbone under torch.compile against the graph's steps, and the
  compile time.

Timings exclude the warm-up (choice of kernels, graph capture, start of worker processes).
"""

import argparse
import gc
import itertools
import json
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from search_spaces import Value, find_space
from study.config import Augment
from study.data.load import load_dataset
from study.data.split import make_split
from study.errors import UserError
from study.models.network import Network, Pretrained
from study.models.preprocess import PREPROCESSES, Preprocess
from study.models.weights import Weights, load_weights
from study.runs.gpu_load import largest_run, measure_load, runs_per_gpu
from study.system.hardware import cpu_count
from study.training.data import Part, TrainingArrays, TrainingData
from study.training.evaluate import compute_logits, loss_and_accuracy
from study.training.loop import build_model, train
from study.training.prepare import Prepared, prepare_images
from study.training.step import forward, own_stream
from tests.benchmarks.finetune_loops import (
    Capture,
    Difference,
    OwnLoop,
    PilImages,
    ReferenceLoop,
    alternate,
    compare,
    do_again,
    reference_batches,
    seconds_of,
    short_run,
)
from tests.benchmarks.finetune_processes import Answer, Job, in_processes, work

#: Time budget of the whole command, in seconds.
BUDGET = 450

#: Seconds reserved for `compile`.
COMPILING = 90

#: Maximum width of the table in characters.
WIDTH = 110

CPU = torch.device("cpu")

#: The article's settings, without dropout.
ARTICLE: Mapping[str, Value] = {
    name: values.ends[0]
    for name, values in find_space("article").ranges(find_space("article").arms[0]).items()
}

MODERN: Mapping[str, Value] = {
    "head": "512",
    "learning_rate": 1e-3,
    "backbone_lr_ratio": 0.1,
    "weight_decay": 1e-2,
    "batch_size": 128,
    "optimizer": "adamw",
    "lr_schedule": "cosine",
    "lr_warmup_epochs": 1,
    "dropout": 0.1,
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    """Measured quantity."""
    value: float | None = None
    """Median; None if it could not be measured."""
    unit: str = ""
    """Unit; "×" for a ratio."""
    n: int = 1
    """Number of repeats."""
    least: float | None = None
    most: float | None = None
    verdict: str = ""
    """Whether the target, if any, is met; or why there is no value."""
    check: str = ""
    """Name of the check."""


@dataclass(frozen=True)
class Scale:
    """Amount of work in the checks."""

    batch_sizes: tuple[int, ...]
    """Batch sizes of the timed loops."""
    augments: tuple[Augment, ...]
    """Augmentations of the timed loops."""
    steps: int
    """Steps per timing."""
    repeats: int
    matrix: int
    """Rows and columns of the multiplied matrices."""
    copied: int
    """Bytes per copy."""
    workers: int
    """Worker processes of the reference's DataLoader, whose default is 16."""
    drain: int
    """Untimed steps of the reference before each timing, to use up prefetched batches."""
    run_steps: int
    """Steps of the runs whose weights are compared; enough to capture and replay a graph."""
    run_batch: int
    """Batch size of these runs."""
    run_repeats: int


def scale_for(device: torch.device, options: argparse.Namespace) -> Scale:
    """Return the default scale for a device, overridden by the options."""
    if device.type == "cuda":
        workers = min(16, cpu_count())
        usual = Scale(
            (100, 256), ("none", "flip"), 50, 5, 8192, 2**31, workers, 2 * workers, 20, 100, 3
        )
    else:
        usual = Scale((32,), ("flip",), 1, 2, 512, 2**26, min(2, cpu_count()), 0, 5, 4, 1)
    return replace(
        usual,
        batch_sizes=(options.batch_size,) if options.batch_size else usual.batch_sizes,
        steps=options.steps or usual.steps,
        repeats=options.repeats or usual.repeats,
    )


@dataclass(frozen=True)
class Bench:
    """Shared inputs of the checks."""

    device: torch.device
    prepared: Prepared
    weights: Weights
    scale: Scale
    until: float
    """End of the time budget on the monotonic clock."""

    def arrays(
        self, image_size: int = 32, augment: Augment = "none", preprocess: Preprocess | None = None
    ) -> TrainingArrays:
        """Return the training data of a study with these options."""
        sized = replace(preprocess or self.weights.preprocess, image_size=image_size)
        pretrained = Pretrained(self.weights.state, self.weights.architecture, sized)
        return replace(self.prepared.training, pretrained=pretrained, augment=augment)

    def data(
        self, image_size: int = 32, augment: Augment = "none", preprocess: Preprocess | None = None
    ) -> TrainingData:
        """Return the same data on the device."""
        return self.arrays(image_size, augment, preprocess).to(self.device)

    def left(self) -> float:
        """Return the seconds left of the budget."""
        return self.until - time.monotonic()


def row(name: str, values: Sequence[float], unit: str, verdict: str = "") -> Row:
    """Return a row with median, extremes and number of values."""
    middle = statistics.median(values)
    return Row(name, middle, unit, len(values), min(values), max(values), verdict)


def judge(is_met: bool, target: str) -> str:
    """Return the text of a verdict."""
    return f"{'met' if is_met else 'missed'}: {target}"


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Divide pair by pair."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


# --- ceiling ----------------------------------------------------------------------------------


def ceiling(bench: Bench) -> list[Row]:
    """Measure peak rates of the device, operations per step, and what training reaches."""
    products = matrix_rates(bench)
    data, batch_size = bench.data(), bench.scale.batch_sizes[-1]
    flops = flops_per_image(data)
    with own_stream(bench.device):
        loop = OwnLoop({**ARTICLE, "batch_size": batch_size}, data)
        loop.run(warm_up(bench))
        seconds = alternate(
            {"own": lambda: loop.run(bench.scale.steps)}, bench.device, bench.scale.repeats
        )["own"]
    reached = [bench.scale.steps * batch_size * flops / s / 1e12 for s in seconds]
    return [
        row("bf16 matrix product, random data", products, "TFLOP/s"),
        row("copy on the device, read + written", copy_rates(bench), "GB/s"),
        Row("operations per image, forward + backward", flops / 1e9, "GFLOP"),
        row(f"training at 32 px, batch {batch_size}", reached, "TFLOP/s"),
        row(
            "training, part of the matrix product's rate",
            [100 * rate / statistics.median(products) for rate in reached],
            "%",
        ),
    ]


def warm_up(bench: Bench) -> int:
    """Return the number of untimed first steps: the CUDA graph is captured in the fourth."""
    return 10 if bench.device.type == "cuda" else 1


def matrix_rates(bench: Bench) -> list[float]:
    """Measure the TFLOP/s of a large bf16 matrix product."""
    size = bench.scale.matrix
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            torch.matmul(a, b)

    multiply()
    return [10 * 2 * size**3 / seconds_of(multiply, bench.device) / 1e12 for _ in range(9)]


def copy_rates(bench: Bench) -> list[float]:
    """Measure the GB/s of a large copy on the device, bytes read plus bytes written."""
    a = torch.rand(bench.scale.copied // 4, device=bench.device)
    b = torch.empty_like(a)

    def copy() -> None:
        for _ in range(10):
            b.copy_(a)

    copy()
    return [10 * 2 * a.nbytes / seconds_of(copy, bench.device) / 1e9 for _ in range(9)]


def flops_per_image(data: TrainingData, images: int = 4) -> float:
    """Return the operations of forward and backward per image, as PyTorch counts them."""
    model = build_model(ARTICLE, data, seed=1).train()
    counter = FlopCounterMode(display=False)
    with counter:
        logits = forward(model, data.train.inputs[:images])
        F.cross_entropy(logits, data.train.labels[:images]).backward()
    return float(counter.get_total_flops()) / images


# --- throughput -------------------------------------------------------------------------------


def throughput(bench: Bench) -> list[Row]:
    """Compare this project's loop with torchvision's, by batch size and augmentation."""
    rows = []
    for batch_size in bench.scale.batch_sizes:
        for augment in bench.scale.augments:
            seconds = loop_seconds(bench, batch_size, augment)
            images = bench.scale.steps * batch_size
            what = f"batch {batch_size}, {augment}"
            rows += [
                row(f"{what}: {name}", [images / s for s in values], "images/s")
                for name, values in seconds.items()
            ]
            for name in list(seconds)[1:]:
                gains = ratios(seconds[name], seconds["own"])
                is_met = statistics.median(gains) >= 2
                # No target on a CPU, where both loops spend their time in the same few kernels.
                verdict = "" if bench.device == CPU else judge(is_met, "2 or more")
                rows.append(row(f"{what}: own / {name}", gains, "×", verdict))
    return rows


def loop_seconds(bench: Bench, batch_size: int, augment: Augment) -> dict[str, list[float]]:
    """Time the same number of steps of each loop, repeat by repeat; in seconds."""
    device, scale, data = bench.device, bench.scale, bench.data(augment=augment)
    with own_stream(device):
        own = OwnLoop({**ARTICLE, "batch_size": batch_size}, data)
        own.run(warm_up(bench))
        images = PilImages(bench.prepared.training.train, flip=augment == "flip")
        batches = reference_batches(images, batch_size, scale.workers, pinned=data.device != CPU)
        references = {
            name: ReferenceLoop(batches, data.classes, device, amp=amp)
            for name, amp in (("torchvision --amp", True), ("torchvision fp32", False))
        }
        for loop in references.values():
            loop.run(warm_up(bench))
        seconds: dict[str, list[float]] = {name: [] for name in ("own", *references)}
        for repeat in range(scale.repeats):
            for name in list(seconds)[:: 1 if repeat % 2 == 0 else -1]:
                if name == "own":
                    taken = seconds_of(lambda: own.run(scale.steps), device)
                else:
                    loop = references[name]
                    loop.run(scale.drain)
                    taken = seconds_of(lambda loop=loop: loop.run(scale.steps), device)  # type: ignore[misc]
                seconds[name].append(taken)
    return seconds


# --- graph ------------------------------------------------------------------------------------


def graph(bench: Bench) -> list[Row]:
    """Compare replayed with plain steps, in time and in the resulting weights."""
    rows: list[Row] = []
    if bench.device.type == "cuda":
        rows += [graph_speed(bench, batch_size) for batch_size in bench.scale.batch_sizes]
    values = {**ARTICLE, "batch_size": bench.scale.run_batch, "dropout": 0.3}
    rows += graph_equality(bench, "ResNet50", values, bench.data(augment="flip"))
    return rows + graph_equality(bench, "head", values, made_up_features(bench))


def captures(device: torch.device) -> tuple[Capture | None, Capture | None]:
    """Return the captures for plain and for replayed steps; stand-ins on a CPU."""
    return (do_again, None) if device.type == "cuda" else (None, do_again)


def graph_speed(bench: Bench, batch_size: int) -> Row:
    """Measure the time of plain steps relative to replayed ones."""
    data = bench.data()
    with own_stream(bench.device):
        loops = {
            name: OwnLoop({**ARTICLE, "batch_size": batch_size}, data, capture)
            for name, capture in zip(("plain", "graph"), captures(bench.device), strict=True)
        }
        for loop in loops.values():
            loop.run(warm_up(bench))
        seconds = alternate(
            {name: lambda loop=loop: loop.run(bench.scale.steps) for name, loop in loops.items()},  # type: ignore[misc]
            bench.device,
            bench.scale.repeats,
        )
    gains = ratios(seconds["plain"], seconds["graph"])
    return row(f"batch {batch_size}: plain steps / replayed", gains, "×")


def graph_equality(
    bench: Bench, what: str, values: Mapping[str, Value], data: TrainingData
) -> list[Row]:
    """Compare the final weights of plain and replayed runs with the same seed."""
    steps, repeats = bench.scale.run_steps, bench.scale.run_repeats
    plain, replayed = captures(bench.device)
    start = short_run(values, data, 0)
    references = [short_run(values, data, steps, plain) for _ in range(repeats + 1)]
    runs = [short_run(values, data, steps, replayed) for _ in range(repeats)]
    pairs = itertools.combinations(references, 2)
    noise = [compare(a, b, start) for a, b in pairs]
    found = [compare(a, b, start) for a, b in itertools.product(runs, references)]
    return difference_rows(f"{what}, plain to plain", noise) + difference_rows(
        f"{what}, replayed to plain", found, noise
    )


def difference_rows(
    what: str, found: Sequence[Difference], noise: Sequence[Difference] | None = None
) -> list[Row]:
    """Return rows of the differences, judged by those of unmodified runs (noise) if given."""
    verdict = ""
    if noise is not None:
        limit = 1.5 * max(difference.relative for difference in noise)
        is_met = statistics.median(difference.relative for difference in found) <= limit
        verdict = judge(is_met, f"{limit:.2g} or less")
    return [
        row(f"{what}: relative", [d.relative for d in found], "×", verdict),
        row(f"{what}: largest", [d.largest for d in found], ""),
    ]


def made_up_features(bench: Bench) -> TrainingData:
    """Return random features with the training images' labels, to train a head only."""
    data = bench.data()
    random = torch.Generator().manual_seed(0)
    features = torch.randn(len(data.train.labels), 2048, generator=random).bfloat16()
    part = Part(features.to(bench.device), data.train.labels)
    return TrainingData(part, part, part, data.classes)


# --- packing and memory -----------------------------------------------------------------------


def packing(bench: Bench) -> list[Row]:
    """Check what packing decides, its speedup, and that it does not change runs."""
    rows = []
    for image_size in (32, 96):
        load = measure_load(largest_run(find_space("finetune")), bench.data(image_size, "flip"))
        what = f"largest run at {image_size} px"
        rows += [
            Row(f"{what}: memory", load.peak / 2**30, "GiB"),
            Row(f"{what}: one step", 1000 * load.step_seconds, "ms"),
            Row(f"{what}: GPU busy", 100 * load.busy, "%"),
            Row(f"{what}: in training", load.images_per_second, "images/s"),
            Row(f"{what}: runs per GPU", runs_per_gpu(load, cpu_count()), "runs"),
        ]
        free_memory(bench)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(bench, Path(folder), 32)
        answers = {k: in_processes(work, [replace(job, share=1 / k)] * k) for k in (1, 2, 4)}
    return rows + packing_gains(answers) + packing_equality(bench, job, answers)


def make_job(bench: Bench, folder: Path, image_size: int) -> Job:
    """Return a job that trains the article's head with dropout, on a whole GPU."""
    path = folder / "arrays.pickle"
    path.write_bytes(pickle.dumps(bench.arrays(image_size, "flip")))
    cuda = bench.device.type == "cuda"
    return Job(
        arrays=path,
        device=bench.device.type,
        share=1.0,
        values={**ARTICLE, "batch_size": bench.scale.run_batch, "dropout": 0.3},
        windows=3 if cuda else 1,
        seconds=2.0 if cuda else 0.1,
        stride=20 if cuda else 1,
        steps=bench.scale.run_steps,
        role="train",
    )


def packing_gains(answers: Mapping[int, Sequence[Answer]]) -> list[Row]:
    """Return the summed rates, and their ratio to the rate of one process alone."""
    sums = {
        k: [sum(rates) for rates in zip(*(answer.rates for answer in found), strict=True)]
        for k, found in answers.items()
    }
    rows = [row(f"{k} at once: all together", rates, "images/s") for k, rates in sums.items()]
    alone = statistics.median(sums[1])
    return rows + [
        row(f"{k} at once / one alone", [rate / alone for rate in rates], "×")
        for k, rates in sums.items()
        if k > 1
    ]


def packed_differences(
    start: np.ndarray, answers: Mapping[int, Sequence[Answer]]
) -> tuple[list[Difference], list[Difference]]:
    """Compare two runs alone with each other, and with every run among others."""
    alone = answers[1][0].weights
    among = [w for k, found in answers.items() if k > 1 for a in found for w in a.weights]
    return (
        [compare(a, b, start) for a, b in itertools.combinations(alone, 2)],
        [compare(a, b, start) for a, b in itertools.product(among, alone)],
    )


def packing_equality(bench: Bench, job: Job, answers: Mapping[int, Sequence[Answer]]) -> list[Row]:
    """Compare the final weights of runs among others with the same run alone."""
    start = short_run(job.values, bench.data(augment="flip"), 0)
    noise, found = packed_differences(start, answers)
    return difference_rows("weights, alone to alone", noise) + difference_rows(
        "weights, packed to alone", found, noise
    )


def memory(bench: Bench) -> list[Row]:
    """Check that a run that exceeds its share of the memory does not affect its neighbour."""
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(bench, Path(folder), 160)
        values = {**job.values, "batch_size": min(256, 8 * bench.scale.run_batch)}
        jobs = [
            replace(job, share=0.5, role="go on"),
            replace(job, share=0.02, role="ask for too much", values=values),
        ]
        neighbour, greedy = in_processes(work, jobs)
    start = short_run(job.values, bench.data(160, "flip"), 0)
    *alone, beside = neighbour.weights
    failed = greedy.error == "OutOfMemoryError"
    return [
        Row("runs that raised OutOfMemoryError", float(failed), "runs", verdict=judge(failed, "1")),
        *difference_rows(
            "neighbour's weights, to alone",
            [compare(beside, weights, start) for weights in alone],
            [compare(a, b, start) for a, b in itertools.combinations(alone, 2)],
        ),
    ]


def free_memory(bench: Bench) -> None:
    """Free memory that earlier checks hold."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


# --- trials -----------------------------------------------------------------------------------


def trial(bench: Bench, epochs: int = 15) -> list[Row]:
    """Time the article's run."""
    data = bench.data(preprocess=PREPROCESSES["raw"])
    start = time.perf_counter()
    run = train(ARTICLE, data, seed=1, epochs=epochs, metric="val_accuracy")
    seconds = time.perf_counter() - start
    return [
        Row(f"{epochs} epochs at 32 px", seconds, "s", verdict=judge(seconds <= 45, "45 or less")),
        row("one epoch", [epoch.end - epoch.start for epoch in run.epochs], "s"),
        Row(f"val accuracy at its best epoch, {run.best.epoch}", 100 * run.epochs[-1].score, "%"),
        Row("val accuracy at the last epoch", 100 * run.epochs[-1].val_accuracy, "%"),
    ]


def trial_160(bench: Bench, most: int = 6) -> list[Row]:
    """Train a modern recipe at 160 px, for as many epochs as time permits."""
    data = bench.data(160, "flip")
    epoch = epoch_seconds(bench, MODERN, data)
    free_memory(bench)
    epochs = min(most, int((bench.left() - 20) / epoch))
    if epochs < 2:
        why = f"left out: an epoch takes {epoch:.0f} s, {bench.left():.0f} s are left"
        return [Row("a run at 160 px", verdict=why)]
    start = time.perf_counter()
    run = train(MODERN, data, seed=1, epochs=epochs, metric="val_accuracy")
    seconds = time.perf_counter() - start
    model = build_model(MODERN, data, seed=1)
    model.load_state_dict(run.best.weights)
    test = bench.prepared.test.to(bench.device)
    _, accuracy = loss_and_accuracy(compute_logits(model, test.inputs), test.labels)
    return [
        Row(f"{epochs} epochs at 160 px, weights {bench.weights.name}", seconds, "s"),
        Row("val accuracy", 100 * run.epochs[-1].score, "%"),
        Row("test accuracy", 100 * accuracy, "%", verdict=judge(accuracy >= 0.97, "97 or more")),
    ]


def epoch_seconds(bench: Bench, values: Mapping[str, Value], data: TrainingData) -> float:
    """Estimate the seconds of an epoch, including its evaluation."""
    with own_stream(bench.device):
        loop = OwnLoop(values, data)
        loop.run(warm_up(bench))
        step = seconds_of(lambda: loop.run(bench.scale.steps), bench.device) / bench.scale.steps
    # The factor adds evaluation and the choice of its kernels.
    return 1.4 * step * len(data.train.labels) / int(values["batch_size"])


# --- compile ----------------------------------------------------------------------------------


def compiled(bench: Bench) -> list[Row]:
    """Compare a compiled backbone with the graph; a failed compilation becomes a row."""
    if bench.left() < COMPILING:
        return [Row("torch.compile", verdict=f"left out: {bench.left():.0f} s are left")]
    data, batch_size = bench.data(), bench.scale.batch_sizes[0]
    values = {**ARTICLE, "batch_size": batch_size}
    plain, replayed = captures(bench.device)
    with own_stream(bench.device):
        graphed = OwnLoop(values, data, replayed)
        graphed.run(warm_up(bench))
        loop = OwnLoop(values, data, plain)
        assert isinstance(loop.model, Network)
        loop.model.backbone.compile()
        try:
            first = seconds_of(lambda: loop.run(1), bench.device)
        except Exception as error:  # whatever a compiler may raise
            return [Row("torch.compile", verdict=f"could not compile: {_in_one_line(error)}")]
        loop.run(warm_up(bench))
        seconds = alternate(
            {
                "compiled": lambda: loop.run(bench.scale.steps),
                "graph": lambda: graphed.run(bench.scale.steps),
            },
            bench.device,
            bench.scale.repeats,
        )
    gains = ratios(seconds["compiled"], seconds["graph"])
    return [
        Row(f"batch {batch_size}: first compiled step", first, "s"),
        row(f"batch {batch_size}: compiled steps / replayed", gains, "×"),
    ]


# --- the command ------------------------------------------------------------------------------

CHECKS: Mapping[str, Callable[[Bench], list[Row]]] = {
    "ceiling": ceiling,
    "throughput": throughput,
    "graph": graph,
    "packing": packing,
    "memory": memory,
    "trial": trial,
    "trial-160": trial_160,
    "compile": compiled,
}

#: Checks that a CPU can run, on a small scale.
CPU_CHECKS = ("ceiling", "throughput", "graph")


def run_checks(bench: Bench, names: Sequence[str]) -> tuple[list[Row], bool]:
    """Run checks one after the other; return their rows, and whether all could be run."""
    rows: list[Row] = []
    failures = 0
    for name in names:
        start = time.monotonic()
        try:
            found = CHECKS[name](bench)
        except Exception as error:  # keep running the others
            failures += 1
            found = [Row("the check", verdict=f"failed: {_in_one_line(error)}")]
        rows += [replace(row, check=name) for row in found]
        free_memory(bench)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return rows, failures == 0


@contextmanager
def settings_of_runs(device: torch.device) -> Iterator[None]:
    """Set up PyTorch as for the runs of a study: one CPU thread, autotuned kernels."""
    threads, by_trial = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = by_trial


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def describe(bench: Bench) -> dict[str, str]:
    """Describe machine, versions and settings."""
    cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device)
        if cuda
        else f"CPU ({platform.machine()})",
        "driver": driver() if cuda else "none",
        "cpu cores": str(cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "cuda": str(torch.version.cuda) if cuda else "none",
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "none",
        "train / val / test": " / ".join(
            f"{len(part.labels):,}"
            for part in (
                bench.prepared.training.train,
                bench.prepared.training.val,
                bench.prepared.test,
            )
        ),
        "weights": bench.weights.source,
    }


def driver() -> str:
    """Return the version of the GPU's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.split("\n")[0].strip()


def show_table(rows: Sequence[Row]) -> str:
    """Format the rows as plain text, at most WIDTH columns wide."""
    lines = [_line("check", "", "median", "unit", "n", "min", "max", "target")]
    for item in rows:
        if item.value is None:
            text = f"{item.check:<10} {item.name}: {item.verdict}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * 11)
            continue
        numbers = (item.least, item.most)
        least, most = ("" if number is None else show(number) for number in numbers)
        value, n = show(item.value), str(item.n)
        lines.append(_line(item.check, item.name, value, item.unit, n, least, most, item.verdict))
    return "\n".join(lines)


def _line(
    check: str, name: str, value: str, unit: str, n: str, least: str, most: str, verdict: str
) -> str:
    text = f"{check:<10} {name:<41} {value:>8} {unit:<8} {n:>2} {least:>8} {most:>8}  {verdict}"
    return text.rstrip()


def show(value: float) -> str:
    """Format a number with about three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="cifar10", help="as run_study.py takes it")
    parser.add_argument("--weights", default="auto", help="as run_study.py takes it")
    parser.add_argument("--images", type=int, help="images in all; all, or 1,000 on a CPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="run these checks only")
    parser.add_argument("--batch-size", type=int, help="images per step that is timed")
    parser.add_argument("--steps", type=int, help="steps that are timed at once")
    parser.add_argument("--repeats", type=int, help="repeats of each timing")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print the table, and return the exit status."""
    options, until = parse(arguments), time.monotonic() + BUDGET
    cuda = torch.cuda.is_available()
    if not cuda:
        print("No GPU here: the checks that a CPU can run are run, in a small form.")
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else CPU
    names = options.only or (CHECKS if cuda else CPU_CHECKS)
    names = [name for name in CHECKS if name in names and (cuda or name in CPU_CHECKS)]
    images = options.images or (None if cuda else 1_000)
    try:
        dataset, weights = load_dataset(options.data, images), load_weights(options.weights)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    pretrained = Pretrained(weights.state, weights.architecture, weights.preprocess)
    prepared = prepare_images(dataset, make_split(dataset), pretrained, "none")
    scale = scale_for(device, options)
    bench = Bench(device, prepared, weights, scale, until)
    with settings_of_runs(device):
        rows, complete = run_checks(bench, names)
    about = describe(bench)
    if options.json:
        found = {"about": about, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=2))
    print("\n" + "\n".join(f"{name}: {value}" for name, value in about.items()) + "\n")
    print(show_table(rows))
    return 0 if complete or not cuda else 1


if __name__ == "__main__":
    sys.exit(main())
