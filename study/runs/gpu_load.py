"""The GPU load of one run, and how many such runs fit on a GPU.

If a run leaves the GPU idle between kernels, others can share it. Memory and CPU cores limit how
many fit.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from search_spaces import Space, Value
from study.models.head import head_parameters
from study.training.augment import draw_views
from study.training.data import TrainingData
from study.training.evaluate import evaluate
from study.training.loop import batches, build_model, epoch_order
from study.training.optimizer import build_optimizer
from study.training.step import TrainingStep, own_stream

#: Number of timed steps, after as many warm-up steps.
STEPS = 20

#: Fraction of a GPU's memory reserved for the driver and fragmentation.
RESERVE = 0.08

#: GPU memory of a process in addition to its tensors: CUDA context and loaded kernels.
CONTEXT_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Load:
    """Measured GPU load of one run."""

    device: str
    """Name of the device."""
    memory: int
    """Total bytes of the device; 0 on a CPU."""
    peak: int
    """Peak bytes of the run's tensors, evaluation included; 0 on a CPU."""
    step_seconds: float
    """Duration of one training step, averaged over many."""
    busy: float
    """Fraction of that time in which the device computes; 1 if unknown."""
    images_per_second: float
    """Training throughput."""


def runs_per_gpu(load: Load, most_by_cpu: float) -> int:
    """Return how many runs share one GPU: as many as fit, but no more than fill its idle time.

    Args:
        load: Load of the largest run.
        most_by_cpu: Runs per GPU that the CPU cores allow.
    """
    if load.memory == 0:
        return 1
    fit = int(load.memory * (1 - RESERVE) / (load.peak + CONTEXT_BYTES))
    return max(1, min(fit, round(1 / load.busy), int(most_by_cpu)))


def fits_on_gpu(load: Load) -> bool:
    """Return whether a run fits on the GPU it was measured on."""
    return load.memory == 0 or load.peak + CONTEXT_BYTES <= load.memory * (1 - RESERVE)


def memory_share(gpu_share: float) -> float:
    """Return the fraction of a GPU's memory for the tensors of a run with this GPU share."""
    if gpu_share >= 1:
        return 1.0
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return max(gpu_share * (1 - RESERVE) - CONTEXT_BYTES / total, 0.01)


def largest_run(space: Space) -> dict[str, Value]:
    """Return the hyperparameters of a space's most demanding run: widest head, largest batch."""
    arm = space.arms[-1]
    values: dict[str, Value] = {}
    for name, values_of in space.ranges(arm).items():
        ends = values_of.ends
        match name:
            case "head":
                values[name] = max(ends, key=lambda head: head_parameters(str(head), classes=10))
            case "batch_size":
                values[name] = max(int(end) for end in ends)
            case "frozen_layers":
                values[name] = "none" if "none" in ends else ends[0]
            case "backbone_warmup_epochs":
                values[name] = 0
            case _:
                values[name] = ends[-1]
    return values


def measure_load(hyperparameters: Mapping[str, Value], data: TrainingData) -> Load:
    """Measure the load of a few training steps and one evaluation.

    Args:
        hyperparameters: Hyperparameters of the run.
        data: Training data, on the device to measure.
    """
    device = data.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with own_stream(device):
        model = build_model(hyperparameters, data, seed=0)
        optimizer = build_optimizer(model, hyperparameters)
        step = TrainingStep(model, optimizer, data.train.inputs, data.train.labels, hyperparameters)
        size = min(int(hyperparameters["batch_size"]), len(data.train.labels))
        batch = batches(epoch_order(len(data.train.labels), 0, 1).to(device), size)[0]
        views = None
        if data.augment != "none":
            _, height, width, _ = data.train.inputs.shape
            random = torch.Generator().manual_seed(0)
            views = draw_views(data.augment, len(batch), height, width, random).to(device)

        def steps() -> float:
            start = time.perf_counter()
            for _ in range(STEPS if cuda else 2):
                step(batch, views)
            if cuda:
                torch.cuda.synchronize(device)
            return (time.perf_counter() - start) / (STEPS if cuda else 2)

        model.train()
        steps()
        seconds = steps()
        busy = min(_kernel_seconds(steps) / seconds, 1.0) if cuda else 1.0
        # An epoch's smaller last batch needs memory in addition to what the CUDA graph holds.
        step(batch[:-1], None if views is None else views[:-1])
        evaluate(model, data.val)
    return Load(
        device=torch.cuda.get_device_name(device) if cuda else "CPU",
        memory=torch.cuda.get_device_properties(device).total_memory if cuda else 0,
        peak=torch.cuda.max_memory_reserved(device) if cuda else 0,
        step_seconds=seconds,
        busy=busy or 1.0,
        images_per_second=len(batch) / seconds,
    )


def _kernel_seconds(steps: Callable[[], float]) -> float:
    """Return the seconds per step in which kernels run; 0 if the profiler sees none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps()
    micros = sum(event.self_device_time_total for event in profile.key_averages())
    return float(micros) / 1e6 / STEPS
