"""Time of a head's training step, relative to a lower bound on this machine.

    python -m tests.benchmarks.head_step [--repeats 5] [--steps 20]

Uses one thread, as a run does, and made-up features, since only time matters. The lower bound
covers the largest costs of a step: the operations of its matrix products (forward, and both
gradients of each layer, except that of the first layer's inputs) at the rate of large products of
the same type, plus the optimizer's bytes (weight, gradient and both moments read, three of them
written, fp32) at the rate of a copy. These rates are measured in every round, right before the
steps; the first round is discarded.

Measured (n = 5, a core of an AMD EPYC with AVX2, fp32, torch 2.15.0):

    | head                            |              ms a step |        time / least |
    | ------------------------------- | ---------------------: | ------------------: |
    | 512-256-512-128, batches of 100 |    27.4 (27.3 to 28.2) | 1.34 (1.32 to 1.38) |
    | 1024, batches of 256            |    75.2 (75.1 to 76.7) | 1.13 (1.12 to 1.13) |
    | 2048-512, batches of 256        | 195.4 (191.6 to 199.1) | 1.09 (1.07 to 1.11) |
    | 1024, batches of 1024           | 260.6 (235.1 to 269.0) | 1.09 (1.07 to 1.24) |

On a core of an Intel Xeon with AMX, bf16 (n = 5):

    | head                            |           ms a step |        time / least |
    | ------------------------------- | ------------------: | ------------------: |
    | 512-256-512-128, batches of 100 |    5.0 (4.8 to 5.0) | 1.55 (1.49 to 1.57) |
    | 1024, batches of 256            |    6.6 (6.6 to 6.7) | 1.16 (1.15 to 1.17) |
    | 2048-512, batches of 256        | 19.8 (19.7 to 21.0) | 1.38 (1.34 to 1.42) |
    | 1024, batches of 1024           | 17.2 (16.7 to 17.5) | 1.68 (1.65 to 1.72) |

There the optimizer is faster than its bound if its 34 MB stay in the cache (the head 1024). The
rest is rounding weights and gradients to and from bf16, a fifth of a step, the masks of dropout,
and waits of the processor's matrix units on small matrices.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch

from search_spaces import Value, hidden_widths
from study.models.head import FEATURES, build_head
from study.system.hardware import has_native_bf16
from study.system.malloc import keep_freed
from study.training.optimizer import build_optimizer
from study.training.step import TrainingStep
from tests.benchmarks.features import matrix_rate
from tests.benchmarks.paired import Spread, about, show

ROWS, CLASSES = 20_000, 10

#: Heads with batch sizes: the article's, the default, and the widest of the space `dropout`.
HEADS = (("512-256-512-128", 100), ("1024", 256), ("2048-512", 256), ("1024", 1024))

#: How often a parameter's four bytes are read or written in one step of AdamW.
MOVES = 7


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed()
    bf16 = has_native_bf16(torch.device("cpu"))
    dtype = torch.bfloat16 if bf16 else torch.float32
    print(f"{about()}; {'bf16' if bf16 else 'fp32'}, one thread, n = {options.repeats}")
    rows = []
    for head, batch_size in HEADS:
        operations, parameters = counted(head, batch_size)
        take = steps_of(head, batch_size)
        taken, least, parts = [], [], []
        for number in range(options.repeats + 1):
            products = operations / matrix_rate(dtype, side=1024)
            moves = MOVES * 4 * parameters / copy_rate()
            begun = time.perf_counter()
            take(options.steps)
            seconds = (time.perf_counter() - begun) / options.steps
            if number:
                taken.append(1e3 * seconds)
                least.append(seconds / (products + moves))
                parts.append(products / (products + moves))
        rows.append(
            [
                f"{head}, batches of {batch_size}",
                Spread(tuple(taken)).shown(1),
                Spread(tuple(least)).shown(),
                f"{100 * Spread(tuple(parts)).middle:.0f} %",
            ]
        )
    print(show(["head", "ms a step", "time / least", "products' part of the least"], rows))


def counted(head: str, batch_size: int) -> tuple[float, int]:
    """Return the floating-point operations of a step's matrix products, and the parameters."""
    widths = (FEATURES, *hidden_widths({"head": head}), CLASSES)
    layers = [a * b for a, b in itertools.pairwise(widths)]
    operations = 2.0 * batch_size * (3 * sum(layers) - layers[0])
    return operations, sum(layers) + sum(widths[1:])


def steps_of(head: str, batch_size: int) -> Callable[[int], None]:
    """Return a function that runs steps."""
    values: dict[str, Value] = {
        "head": head,
        "dropout": 0.3,
        "learning_rate": 5e-4,
        "weight_decay": 1e-2,
        "batch_size": batch_size,
        "optimizer": "adamw",
    }
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, FEATURES, generator=random).bfloat16()
    labels = torch.randint(CLASSES, (ROWS,), generator=random)
    model = build_head(values, FEATURES, CLASSES, seed=1).train()
    step = TrainingStep(model, build_optimizer(model, values), inputs, labels, values)
    order = torch.randperm(ROWS, generator=random)

    def take(steps: int) -> None:
        for number in range(steps):
            start = number * batch_size % (ROWS - batch_size)
            step(order[start : start + batch_size], None)

    return take


def copy_rate(size: int = 2**25, repeats: int = 3) -> float:
    """Return the bytes per second of a copy, read plus written."""
    source, target = torch.randn(size), torch.empty(size)
    best = 0.0
    for _ in range(repeats):
        begun = time.perf_counter()
        target.copy_(source)
        best = max(best, 8 * size / (time.perf_counter() - begun))
    return best


if __name__ == "__main__":
    main()
