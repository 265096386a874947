"""Quality of TPE when it sees only some of very many trials (`sampler_memory.SHOWN`).

    python -m tests.benchmarks.shown [--trials 3000] [--seeds 2] [--shown 500 1000 1000000]

Searches a synthetic, noisy score over the ranges of the space `dropout`, 16 trials at once, with at
most `--shown` ended trials visible to TPE. Prints the best true score, the mean and median true
score of the last quarter of the trials, and the CPU time. The optimum is 0.87.

Measured (3,000 trials, 2 seeds, Python 3.11.7, optuna 5.0.0, 2 cores that others used too):

    seed  shown     best     last quarter: mean, median   CPU
    1     500       0.86997  0.86524  0.86792             18 s
    1     1,000     0.86993  0.86453  0.86782             29 s
    1     all       0.86994  0.86032  0.86601             55 s
    2     500       0.86998  0.86681  0.86817             24 s
    2     1,000     0.86998  0.86375  0.86755             31 s
    2     all       0.86996  0.86104  0.86653             53 s
"""

import argparse
import math
import random
import time
from collections.abc import Mapping
from statistics import mean, median
from typing import Any

import optuna

from search_spaces import find_space
from study.search.sampler_memory import SamplerMemory
from study.search.searcher import _distributions

AT_ONCE = 16
RANGES = find_space("dropout").ranges(find_space("dropout").arms[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shown", type=int, nargs="+", default=[500, 1000, 10**6])
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for seed in range(1, options.seeds + 1):
        for shown in options.shown:
            start = time.process_time()
            scores = search(options.trials, shown, seed)
            late = scores[-options.trials // 4 :]
            print(
                f"seed {seed}, shown {shown}: best {max(scores):.5f}, last quarter"
                f" {mean(late):.5f} {median(late):.5f}, {time.process_time() - start:.0f} s",
                flush=True,
            )


def search(trials: int, shown: int, seed: int) -> list[float]:
    """Return the true scores of the trials, in the order in which they end."""
    study = optuna.create_study(
        storage=SamplerMemory("max", seed, shown),
        direction="maximize",
        sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed),
    )
    luck, running, scores = random.Random(seed), [], []
    for _ in range(trials):
        running.append(study.ask(_distributions(RANGES)))
        if len(running) == AT_ONCE:
            trial = running.pop(0)
            scores.append(true_score(trial.params))
            study.tell(trial, scores[-1] + luck.gauss(0, 0.002))
    return scores


def true_score(values: Mapping[str, Any]) -> float:
    """Score with an optimum at a learning rate of 0.0004 and a head-dependent dropout rate."""
    rate: float = math.log10(values["learning_rate"] / 4e-4)
    decay: float = math.log10(values["weight_decay"])
    dropout: float = values["dropout"]
    head, batch = (
        RANGES[name].options.index(values[name])  # type: ignore[union-attr]
        for name in ("head", "batch_size")
    )
    return (
        0.87
        - 0.02 * rate**2
        - 0.05 * (dropout - 0.3 - 0.05 * head) ** 2
        - 0.002 * (head - 2) ** 2
        - 0.001 * abs(decay + 3) * (1 + rate**2)
        - 0.001 * batch
    )


if __name__ == "__main__":
    main()
