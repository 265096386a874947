"""Speedup of training confirmation runs of one recipe together, as one batched model.

    python -m tests.benchmarks.together [--head 1024] [--batch-size 256] [--runs 2 8 32]

The runs of a recipe differ only in seed and dropout rate, so their heads can be stacked: batched
matrix products (`torch.baddbmm`, equivalent to `torch.func.vmap` over linear layers), a rate and a
data order per member, one fused optimizer for all. Each repeat runs the same number of steps alone,
one run after the other as in `study.training` (replayed from a CUDA graph on a GPU), and together
(replayed as well), and prints the ratio of the two: the speedup of a step of one run when it is
batched with others. Features and labels are made up, since only time matters. On a CPU, a run alone
has one thread, with a neighbour on every other core, as in a study; together they have all cores.

Measured (n = 5; median, min to max):

    NVIDIA H200, torch 2.11.0:  2 runs 1.42 (1.41 to 1.42)
                                8 runs 2.69 (2.68 to 2.70)
                               32 runs 3.30 (3.29 to 3.30)

Not measured on a CPU.

Not used. On a GPU a step alone takes 0.13 ms, so all steps of the default study's 32 runs take 11
seconds. A speedup of three would save seven of them, in a phase that takes as long to start its
processes, and would lose an advantage of separate runs: each resumes on its own after a fault.
"""

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces import Value, dropout_rates, hidden_widths
from study.models.head import FEATURES, build_head
from study.system.hardware import cpu_count, has_native_bf16
from study.training.optimizer import build_optimizer
from study.training.step import TrainingStep, capture_graph, own_stream

ROWS, CLASSES = 45_000, 10

#: Untimed steps before the timed ones.
WARM_UP = 5


class StackedHeads(nn.Module):
    """Heads of the same widths, each with its own parameters and dropout rates."""

    keep: Tensor

    def __init__(self, heads: list[nn.Sequential], rates: Tensor) -> None:
        """Stack heads; `rates`: [heads, hidden layers]."""
        super().__init__()
        layers = [[m for m in head if isinstance(m, nn.Linear)] for head in heads]
        self.weights = nn.ParameterList(
            torch.stack([layer.weight.detach().T for layer in same]).contiguous()
            for same in zip(*layers, strict=True)
        )
        self.biases = nn.ParameterList(
            torch.stack([layer.bias.detach() for layer in same])[:, None]
            for same in zip(*layers, strict=True)
        )
        self.register_buffer("keep", 1 - rates.T[:, :, None, None])

    def forward(self, inputs: Tensor) -> Tensor:
        """[heads, batch, features] -> logits [heads, batch, classes]."""
        last = len(self.weights) - 1
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs = torch.baddbmm(bias.to(inputs.dtype), inputs, weight.to(inputs.dtype))
            if number < last:
                keep = self.keep[number].to(inputs.dtype)
                mask = (torch.rand_like(inputs) < keep).to(inputs.dtype) / keep
                inputs = inputs.relu() * mask
        return inputs


def values_of(options: argparse.Namespace, dropout: float) -> Mapping[str, Value]:
    """Return the hyperparameters of a run."""
    return {
        "head": options.head,
        "dropout": dropout,
        "learning_rate": 5e-4,
        "weight_decay": 1e-2,
        "batch_size": options.batch_size,
        "optimizer": "adamw",
    }


def made_up(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return made-up features and labels."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, FEATURES, generator=random).bfloat16()
    return inputs.to(device), torch.randint(CLASSES, (ROWS,), generator=random).to(device)


def alone(options: argparse.Namespace, device: torch.device) -> Callable[[int], None]:
    """Return a function that runs steps of one run."""
    values = values_of(options, 0.3)
    inputs, labels = made_up(device)
    head = build_head(values, FEATURES, CLASSES, seed=1).to(device).train()
    step = TrainingStep(head, build_optimizer(head, values), inputs, labels, values)
    order = torch.randperm(ROWS).to(device)

    def run(steps: int) -> None:
        for number in range(steps):
            start = number * options.batch_size % (ROWS - options.batch_size)
            step(order[start : start + options.batch_size], None)

    return run


def together(options: argparse.Namespace, device: torch.device, runs: int) -> Callable[[int], None]:
    """Return a function that runs steps of several runs at once."""
    rates = [0.0 if number % 2 else 0.3 for number in range(runs)]
    inputs, labels = made_up(device)
    heads = [build_head(values_of(options, 0.3), FEATURES, CLASSES, n) for n in range(runs)]
    widths = len(hidden_widths(values_of(options, 0.3)))
    assert len(dropout_rates(values_of(options, 0.3))) == widths
    stacked = StackedHeads(heads, torch.tensor(rates)[:, None].expand(-1, widths)).to(device)
    optimizer = torch.optim.AdamW(
        stacked.parameters(), lr=5e-4, fused=True, capturable=device.type == "cuda"
    )
    dtype = torch.bfloat16 if has_native_bf16(device) else torch.float32
    orders = torch.stack([torch.randperm(ROWS) for _ in range(runs)]).to(device)
    rows = torch.zeros(runs, options.batch_size, dtype=torch.int64, device=device)

    def work() -> None:
        logits = stacked(inputs[rows].to(dtype)).float()
        # Sum the members' losses, so that each gets the same gradient as alone.
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten()) * runs
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    replay: Callable[[], None] | None = None

    def run(steps: int) -> None:
        nonlocal replay
        for number in range(steps):
            start = number * options.batch_size % (ROWS - options.batch_size)
            rows.copy_(orders[:, start : start + options.batch_size])
            if device.type != "cuda" or (number < WARM_UP and replay is None):
                work()
                continue
            if replay is None:
                replay = capture_graph(work)
            replay()

    return run


def seconds_per_step(run: Callable[[int], None], steps: int, device: torch.device) -> float:
    """Return the wall-clock seconds per step, after pending work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def neighbour(options: argparse.Namespace) -> None:
    """Train on one core until killed."""
    torch.set_num_threads(1)
    run = alone(options, torch.device("cpu"))
    while True:
        run(10)


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, float]]:
    """Return a summary of the ratios for each number of runs."""
    rows = []
    cuda = device.type == "cuda"
    context = multiprocessing.get_context("spawn")
    with own_stream(device):
        one = alone(options, device)
        one(WARM_UP + 5)
        for runs in options.runs:
            many = together(options, device, runs)
            torch.set_num_threads(cpu_count())
            many(WARM_UP + 5)
            ratios, steps = [], []
            for _ in range(options.repeats):
                neighbours = [
                    context.Process(target=neighbour, args=(options,), daemon=True)
                    for _ in range(0 if cuda else cpu_count() - 1)
                ]
                for process in neighbours:
                    process.start()
                if neighbours:
                    time.sleep(12)
                torch.set_num_threads(1)
                single = seconds_per_step(one, options.steps, device)
                for process in neighbours:
                    process.kill()
                    process.join()
                torch.set_num_threads(cpu_count())
                batched = seconds_per_step(
                    many, max(3, options.steps // (1 if cuda else runs)), device
                )
                ratios.append(runs * single / (1 if cuda else cpu_count()) / batched)
                steps.append((1e3 * single, 1e3 * batched))
            rows.append(
                {
                    "runs": runs,
                    "gain": median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                    "n": len(ratios),
                    "alone ms": median(a for a, _ in steps),
                    "together ms": median(b for _, b in steps),
                }
            )
            print(json.dumps({k: round(v, 3) for k, v in rows[-1].items()}), flush=True)
            del many
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--head", default="1024")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--runs", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    options.steps = options.steps or (500 if cuda else 40)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {cpu_count()} cores"
    print(f"{name} ({platform.machine()}), torch {torch.__version__}; head {options.head},")
    print(f"batches of {options.batch_size}; together / alone")
    measure(options, device)


if __name__ == "__main__":
    main()
