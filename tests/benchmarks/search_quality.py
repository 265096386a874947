"""Quality of the champions that this study's search and others find, replayed on recorded runs.

    python -m tests.benchmarks.search_quality [--replays 100] [--trials 40] [--metric val_accuracy]

recorded.csv (see record.py) holds 381 sets of the space `dropout`, each trained in full once. Each
suggestion of a search is answered, epoch by epoch, by the nearest recorded set of the arm, while
the search learns from its suggestion; two trials run at once, and every epoch takes the same time.
Nothing is trained, and there is no Ray cluster.

Regret: the gap between the champion's score (the best among full runs) and the best in its arm's
table, mean over the arms, in hundredths (points of accuracy). An arm without a champion, for which
a study would end with an error, counts as a random set: 0.81 points without dropout, 1.07 with.
Every search runs until it has spent both its trials and its epochs, and is evaluated twice: after
the same number of trials, and after the same number of epochs, which is the fairer comparison.
"difference" is relative to this study's search at the last stage, paired by seed; "epochs" is the
number spent by then. Intervals are 95 % intervals of the mean.

    this study's search      ArmSearch and ArmScheduler: per arm a bracket and a TPE (multivariate,
                             constant liar) that sees how trials ended; arms in turn
    same, told COMPLETE      stopped trials reported as complete with their early score, as Ray does
    same, full runs          without early stopping: twice the epochs for the same trials
    random, full runs        at the stages of trials, as many as fit into the same epochs
    random, ASHA per arm     this study's search with a random sampler
    Ray's, one ASHA          OptunaSearch with its default TPE, the arm as a choice; stock ASHA
    Ray's, ASHA per arm      the same with this study's brackets
    ...Pruner                Optuna's ask and tell, arms in turn, this study's kind of TPE

Measured: 100 replays, Python 3.11.7, ray 2.60.0, optuna 5.0.0, numpy 2.4.6; 3 minutes of CPU time.

    search                        10 trials      20 trials      40 trials      difference  epochs
    this study's search       0.480 ± 0.037  0.348 ± 0.023  0.276 ± 0.017                     310
    same, told COMPLETE       0.480 ± 0.037  0.348 ± 0.023  0.276 ± 0.017  +0.000 ± 0.000     310
    same, full runs           0.374 ± 0.025  0.285 ± 0.019  0.212 ± 0.015  -0.063 ± 0.019     600
    random, full runs         0.501 ± 0.044  0.367 ± 0.028  0.262 ± 0.016  -0.014 ± 0.023     310
    random, ASHA per arm      0.468 ± 0.040  0.348 ± 0.024  0.275 ± 0.016  -0.001 ± 0.023     279
    Ray's, one ASHA           0.599 ± 0.044  0.521 ± 0.044  0.439 ± 0.038  +0.163 ± 0.041     310
    Ray's, ASHA per arm       0.503 ± 0.043  0.403 ± 0.034  0.334 ± 0.024  +0.058 ± 0.028     330
    Optuna's MedianPruner     0.396 ± 0.028  0.318 ± 0.024  0.268 ± 0.016  -0.008 ± 0.024     361
    SuccessiveHalvingPruner   0.506 ± 0.037  0.391 ± 0.030  0.312 ± 0.021  +0.036 ± 0.025     280
    Optuna's HyperbandPruner  0.442 ± 0.031  0.328 ± 0.023  0.264 ± 0.017  -0.012 ± 0.025     363

    search                        75 epochs     150 epochs     300 epochs      difference  epochs
    this study's search       0.582 ± 0.042  0.363 ± 0.024  0.278 ± 0.017                     291
    same, told COMPLETE       0.582 ± 0.042  0.363 ± 0.024  0.277 ± 0.017  -0.001 ± 0.001     291
    same, full runs           0.595 ± 0.045  0.374 ± 0.025  0.285 ± 0.019  +0.007 ± 0.021     300
    random, full runs         0.583 ± 0.050  0.373 ± 0.026  0.264 ± 0.016  -0.014 ± 0.023     300
    random, ASHA per arm      0.583 ± 0.049  0.383 ± 0.028  0.269 ± 0.015  -0.009 ± 0.024     295
    Ray's, one ASHA           0.679 ± 0.046  0.537 ± 0.043  0.449 ± 0.040  +0.171 ± 0.042     290
    Ray's, ASHA per arm       0.663 ± 0.054  0.432 ± 0.035  0.339 ± 0.025  +0.061 ± 0.028     291
    Optuna's MedianPruner     0.592 ± 0.049  0.396 ± 0.028  0.293 ± 0.019  +0.015 ± 0.026     289
    SuccessiveHalvingPruner   0.600 ± 0.048  0.405 ± 0.031  0.313 ± 0.022  +0.035 ± 0.025     292
    Optuna's HyperbandPruner  0.614 ± 0.049  0.402 ± 0.029  0.289 ± 0.021  +0.011 ± 0.026     291

After 600 epochs (`--trials 80`, 100 replays) the regret is 0.244 ± 0.014, told COMPLETE 0.241, full
runs 0.212, random full 0.214, random ASHA 0.215, Ray's 0.402 and 0.300, the pruners 0.252, 0.269
and 0.223. Random search is then ahead by 0.030 ± 0.018.

Conclusions:

- This study's search is no better than random search at 40 trials, and slightly worse at 80. This
  is partly due to the coarse table: TPE returns to the same region and gets the same run again (10
  distinct sets in 25 full trials in 600 epochs; 15 of 17 at random), while the best run of a table
  is also a lucky one, found by trying many. Averaged over the six sets around the champion, which
  removes luck, TPE and random search, both with ASHA, do not differ (0.02 ± 0.05 points ahead, 40
  replays); TPE with ASHA is 0.10 ± 0.07 ahead of random full runs.
- ASHA has no effect on regret at the same epochs; full runs, half as many, end up as good.
- A bracket per arm and arms in turn are worth 0.16 points. Most of this is because one bracket left
  11 % of the arms without a champion (in 60 examined replays, the dropout arm in 13 and the other
  in 3). The brackets are worth 0.10 of it. The rest is due to the arm as a choice and the default
  TPE: half of those searches gave one arm 11 of the 40 trials or fewer.
- Reporting the true state changes nothing here: the same trials up to 40, no difference at 80. TPE
  models the best tenth, and a stopped trial's early score is too low for it in either state.
- Optuna's pruners are no better at the same epochs (HyperbandPruner at 600: -0.021 ± 0.021), and
  SuccessiveHalvingPruner is slightly worse.
- The results do not depend on `APART`: with 0.25 random search with ASHA is at -0.010 ± 0.028, with
  1 at -0.045 ± 0.032 (60 replays, 300 epochs).
"""

import argparse
import csv
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol, cast

import numpy as np
import optuna
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from scipy import stats

from search_spaces import Choice, Fixed, Float, Value, find_space
from study.config import GRACE_PERIOD, REDUCTION_FACTOR, StudyConfig
from study.search.scheduler import EPOCH, SCORE, ArmScheduler
from study.search.searcher import ArmSearch, StudySearch, _distributions
from study.seeds import derive_seed
from study.system.hardware import cpu_count
from tests.benchmarks.paired import about, show

SPACE = find_space("dropout")
ARMS = {arm.name: arm for arm in SPACE.arms}
EPOCHS = StudyConfig.epochs
FILE = Path(__file__).with_name("recorded.csv")

#: Trials that run at once.
AT_ONCE = 2

#: Distance between two sets that differ in one option, such as the head; a whole range is 1. At
#: half of a range, the set nearest to a recorded one has the same head in nine cases of ten.
APART = 0.5

Metric = Literal["val_accuracy", "val_loss"]
Values = Mapping[str, Value]

# ------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class ArmTable:
    """The recorded sets of an arm.

    Attributes:
        sets: Their hyperparameters.
        curves: Metric after each epoch, [sets, epochs]; larger is better, so losses are negated.
        places: Coordinates of the sets, [sets, axes].
    """

    sets: tuple[Values, ...]
    curves: np.ndarray
    places: np.ndarray

    @property
    def finals(self) -> np.ndarray:
        """Scores of full runs, [sets]."""
        return cast(np.ndarray, self.curves.max(axis=1))

    def scores(self, number: int) -> list[float]:
        """Return a set's best metric so far, epoch by epoch, as a search sees it."""
        return list(itertools.accumulate(map(float, self.curves[number]), max))


Table = Mapping[str, ArmTable]


@cache
def load_table(metric: Metric = "val_accuracy") -> Table:
    """Load the recorded sets, by arm."""
    sign = -1.0 if metric == "val_loss" else 1.0
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {}
    for name, arm in ARMS.items():
        of_arm = [row for row in rows if row["arm"] == name]
        # Heads are strings, batch sizes integers, everything else floats.
        kinds = {key: type(values.ends[0]) for key, values in SPACE.ranges(arm).items()}
        sets = tuple({key: kind(row[key]) for key, kind in kinds.items()} for row in of_arm)
        curves = [[row[f"{metric}_{epoch}"] for epoch in range(1, EPOCHS + 1)] for row in of_arm]
        table[name] = ArmTable(sets, sign * np.array(curves, dtype=float), places(name, sets))
    return table


def places(arm: str, sets: Sequence[Values]) -> np.ndarray:
    """Return coordinates [sets, axes]: an axis from 0 to 1 per range, and one per option."""
    axes: list[list[float]] = []
    for name, values in SPACE.ranges(ARMS[arm]).items():
        match values:
            case Float(low, high, log):
                scale: Callable[[float], float] = math.log if log else float
                start, width = scale(low), scale(high) - scale(low)
                axes.append([(scale(float(found[name])) - start) / width for found in sets])
            case Choice(options):
                # Two sets with different options differ on two of these axes.
                size = APART / math.sqrt(2)
                axes += [[size * (found[name] == option) for found in sets] for option in options]
            case Fixed():
                pass
    return np.array(axes).T


def nearest(table: Table, arm: str, values: Values) -> int:
    """Return the index of the arm's recorded set that is nearest to some values."""
    away = table[arm].places - places(arm, [values])
    return int((away**2).sum(axis=1).argmin())


# -------------------------------------------------------------------------------- the contenders


class Contender(Protocol):
    """A search, which suggests trials and stops some early."""

    def start(self, name: str) -> tuple[str, Values]:
        """Return the next trial's arm and hyperparameters."""

    def report(self, name: str, epoch: int, score: float) -> bool:
        """Report a trial's score after an epoch; return whether the trial continues."""


class OnRay:
    """A searcher and a scheduler, called as Ray Tune's controller calls them."""

    def __init__(self, searcher: Searcher, scheduler: FIFOScheduler) -> None:
        self.searcher = searcher
        self.scheduler = scheduler
        self._running: dict[str, Trial] = {}

    def start(self, name: str) -> tuple[str, Values]:
        config = cast(dict[str, Any], self.searcher.suggest(name))
        named = {"run_id": name, **config}
        trial = cast(Trial, SimpleNamespace(trial_id=name, config=named))
        self.scheduler.on_trial_add(cast(Any, None), trial)
        self._running[name] = trial
        # Ray's searcher puts the hyperparameters at the top level, the study's under one key.
        return config["arm"], config.get("hyperparameters", config)

    def report(self, name: str, epoch: int, score: float) -> bool:
        result = {EPOCH: epoch, SCORE: score}
        decision = self.scheduler.on_trial_result(cast(Any, None), self._running[name], result)
        if decision == TrialScheduler.CONTINUE and epoch < EPOCHS:
            self.searcher.on_trial_result(name, result)
            return True
        del self._running[name]
        self.searcher.on_trial_complete(name, result)
        return False


def study_search(trials: int, seed: int, *, truthful: bool = True) -> StudySearch:
    """Return the project's own search.

    Args:
        trials: Maximum number of trials.
        seed: Seed of the study.
        truthful: If False, stopped trials are reported as COMPLETE with their early score, as Ray
            does.
    """
    storage = optuna.storages.InMemoryStorage()
    arms = {
        arm.name: ArmSearch(
            SPACE,
            arm,
            storage=storage,
            mode="max",
            # With epochs=1, every trial that ends counts as completed.
            epochs=EPOCHS if truthful else 1,
            trials=trials,
            seed=seed,
        )
        for arm in ARMS.values()
    }
    return StudySearch(arms, "max")


def blind_search(trials: int, seed: int) -> StudySearch:
    """Return a random search with the arms in turn."""
    search = study_search(trials, seed)
    for name, arm in search._arms.items():
        arm._memory_study.sampler = optuna.samplers.RandomSampler(derive_seed(seed, "blind", name))
    return search


def stock_search(seed: int) -> OptunaSearch:
    """Return Ray's own searcher, for which the arm is a categorical choice."""

    def choose(trial: optuna.Trial) -> dict[str, Value]:
        arm = ARMS[trial.suggest_categorical("arm", list(ARMS))]
        for name, values in SPACE.ranges(arm).items():
            match values:
                case Float(low, high, log):
                    trial.suggest_float(name, low, high, log=log)
                case Choice(options):
                    trial.suggest_categorical(name, options)
        return SPACE.fixed_values(arm)

    sampler = optuna.samplers.TPESampler(seed=derive_seed(seed, "stock"))
    return OptunaSearch(space=choose, metric=SCORE, mode="max", sampler=sampler)


def stock_scheduler() -> AsyncHyperBandScheduler:
    """Return Ray's own ASHA: one bracket, with the study's settings."""
    return AsyncHyperBandScheduler(
        time_attr=EPOCH,
        metric=SCORE,
        mode="max",
        max_t=EPOCHS,
        grace_period=GRACE_PERIOD,
        reduction_factor=REDUCTION_FACTOR,
    )


def arm_scheduler() -> ArmScheduler:
    """Return the project's own scheduler."""
    return ArmScheduler(ARMS, "max", EPOCHS)


class OnOptuna:
    """Optuna alone: ask, report, prune, tell; an Optuna study per arm, the arms in turn."""

    def __init__(self, pruner: Callable[[], optuna.pruners.BasePruner], seed: int) -> None:
        self._studies = {
            name: optuna.create_study(
                study_name=f"{name}-{seed}",  # Hyperband derives its brackets from it
                direction="maximize",
                sampler=optuna.samplers.TPESampler(
                    multivariate=True, constant_liar=True, seed=derive_seed(seed, "alone", name)
                ),
                pruner=pruner(),
            )
            for name in ARMS
        }
        self._turns = itertools.cycle(ARMS)
        self._running: dict[str, tuple[optuna.Study, optuna.Trial]] = {}

    def start(self, name: str) -> tuple[str, Values]:
        arm = next(self._turns)
        study = self._studies[arm]
        trial = study.ask(_distributions(SPACE.ranges(ARMS[arm])))
        self._running[name] = study, trial
        return arm, trial.params

    def report(self, name: str, epoch: int, score: float) -> bool:
        study, trial = self._running[name]
        trial.report(score, epoch)
        if epoch == EPOCHS:
            study.tell(trial, score)
        elif trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            return True
        del self._running[name]
        return False


def median_pruner() -> optuna.pruners.BasePruner:
    return optuna.pruners.MedianPruner(n_warmup_steps=GRACE_PERIOD)


def halving_pruner() -> optuna.pruners.BasePruner:
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=GRACE_PERIOD, reduction_factor=REDUCTION_FACTOR
    )


def hyperband_pruner() -> optuna.pruners.BasePruner:
    return optuna.pruners.HyperbandPruner(
        min_resource=GRACE_PERIOD, max_resource=EPOCHS, reduction_factor=REDUCTION_FACTOR
    )


OWN = "this study's search"
TOLD_COMPLETE = "same, told COMPLETE"
BLIND = "random, full runs"
STOCK = "Ray's, one ASHA"

#: Contenders by name, built from the maximum number of trials and a seed.
CONTENDERS: Mapping[str, Callable[[int, int], Contender]] = {
    OWN: lambda n, s: OnRay(study_search(n, s), arm_scheduler()),
    TOLD_COMPLETE: lambda n, s: OnRay(study_search(n, s, truthful=False), arm_scheduler()),
    "same, full runs": lambda n, s: OnRay(study_search(n, s), FIFOScheduler()),
    BLIND: lambda n, s: OnRay(blind_search(n, s), FIFOScheduler()),
    "random, ASHA per arm": lambda n, s: OnRay(blind_search(n, s), arm_scheduler()),
    STOCK: lambda _, s: OnRay(stock_search(s), stock_scheduler()),
    "Ray's, ASHA per arm": lambda _, s: OnRay(stock_search(s), arm_scheduler()),
    "Optuna's MedianPruner": lambda _, s: OnOptuna(median_pruner, s),
    "SuccessiveHalvingPruner": lambda _, s: OnOptuna(halving_pruner, s),
    "Optuna's HyperbandPruner": lambda _, s: OnOptuna(hyperband_pruner, s),
}

# -------------------------------------------------------------------------------------- a replay


@dataclass
class Replayed:
    """A trial of a replay.

    Attributes:
        arm: Its arm.
        recorded: Index of the recorded set that answered for it.
        epochs: Number of epochs it has run.
        score: Its last score.
        ended: Epochs that all trials together had run when it ended.
    """

    arm: str
    recorded: int
    epochs: int = 0
    score: float = math.nan
    ended: float = math.inf


def replay(contender: Contender, table: Table, trials: int, epochs: int = 0) -> list[Replayed]:
    """Search the table until both `trials` and `epochs` have been spent.

    In each step every running trial runs an epoch, in the order in which they started; then free
    slots are filled.

    Returns:
        The trials in the order in which they started; all have ended.
    """
    started: list[Replayed] = []
    running: dict[str, Replayed] = {}
    spent = 0
    while running or len(started) < trials or spent < epochs:
        while len(running) < AT_ONCE and (len(started) < trials or spent < epochs):
            name = f"trial-{len(started)}"
            arm, values = contender.start(name)
            running[name] = Replayed(arm, nearest(table, arm, values))
            started.append(running[name])
        for name, trial in list(running.items()):
            trial.score = table[trial.arm].scores(trial.recorded)[trial.epochs]
            trial.epochs += 1
            spent += 1
            if not contender.report(name, trial.epochs, trial.score):
                trial.ended = spent
                del running[name]
    return started


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        regret: Gap between the champions' scores and the best of their arms' tables, mean over the
            arms, in hundredths of the metric. An arm without a champion counts as a random
            recorded set.
        without: Number of arms in which no trial reached the last epoch.
        epochs: Epochs spent.
    """

    regret: float
    without: int
    epochs: int


def found(table: Table, trials: Sequence[Replayed]) -> Found:
    """Return the result of these trials."""
    lacking, without = [], 0
    for arm, recorded in table.items():
        full = [trial.score for trial in trials if trial.arm == arm and trial.epochs == EPOCHS]
        without += not full
        champion = max(full) if full else float(recorded.finals.mean())
        lacking.append(100 * (float(recorded.finals.max()) - champion))
    return Found(float(np.mean(lacking)), without, sum(trial.epochs for trial in trials))


@dataclass(frozen=True)
class Stages:
    """Stages at which a search is evaluated, by number of trials and by number of epochs."""

    trials: tuple[int, ...]
    epochs: tuple[int, ...]

    @classmethod
    def of(cls, trials: int) -> "Stages":
        """Return a quarter, a half and all; the mean trial runs about half of all epochs."""
        parts = tuple(max(1, trials * part // 4) for part in (1, 2, 4))
        return cls(parts, tuple(part * EPOCHS // 2 for part in parts))


Looks = Mapping[tuple[str, Literal["trials", "epochs"], int], Found]


def compare(seed: int, stages: Stages, metric: Metric) -> Looks:
    """Replay every contender once, and return its result at every stage."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = load_table(metric)
    most, budget = max(stages.trials), max(stages.epochs)
    looks: dict[tuple[str, Literal["trials", "epochs"], int], Found] = {}
    for name, make in CONTENDERS.items():
        # Enough trials for the budget: each runs at least the grace period.
        trials = replay(make(most + budget, seed), table, most, budget)
        for number in stages.trials:
            # As many full runs as fit into the epochs that the study's search spends.
            fit = number if name != BLIND else round(looks[OWN, "trials", number].epochs / EPOCHS)
            looks[name, "trials", number] = found(table, trials[:fit])
        for number in stages.epochs:
            in_time = [trial for trial in trials if trial.ended <= number]
            looks[name, "epochs", number] = found(table, in_time)
    return looks


# --------------------------------------------------------------------------------------- figures


def interval(values: Sequence[float], digits: int = 3, *, sign: bool = False) -> str:
    """Format the mean and half the width of its 95 % confidence interval."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread
    return f"{np.mean(values):{'+' if sign else ''}.{digits}f} ± {half:.{digits}f}"


def rows(
    replays: Sequence[Looks], kind: Literal["trials", "epochs"], stages: Sequence[int]
) -> Iterator[list[str]]:
    """Yield a row per contender: regret at each stage, and the other figures at the last one."""
    last = max(stages)
    for name in CONTENDERS:
        at_end = [looks[name, kind, last] for looks in replays]
        own = [looks[OWN, kind, last].regret for looks in replays]
        regrets = [
            interval([looks[name, kind, stage].regret for looks in replays]) for stage in stages
        ]
        apart = [look.regret - regret for look, regret in zip(at_end, own, strict=True)]
        yield [
            name,
            *regrets,
            "" if name == OWN else interval(apart, sign=True),
            f"{np.mean([look.epochs for look in at_end]):.0f}",
            f"{100 * np.mean([look.without / len(ARMS) for look in at_end]):.1f} %",
        ]


def main() -> None:
    """Replay all contenders and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--trials", type=int, default=40, help="over both arms")
    parser.add_argument("--metric", choices=("val_accuracy", "val_loss"), default="val_accuracy")
    parser.add_argument("--processes", type=int, default=cpu_count())
    options = parser.parse_args()
    print(about("ray", "optuna", "numpy"), flush=True)
    stages = Stages.of(options.trials)
    with ProcessPoolExecutor(options.processes) as pool:
        each = itertools.repeat
        replays = list(
            pool.map(compare, range(options.replays), each(stages), each(options.metric))
        )
    print(
        f"{options.replays} replays, {AT_ONCE} trials at once; regret in hundredths of"
        f" {options.metric}, ± half the 95 % interval of its mean"
    )
    for kind, numbers in (("trials", stages.trials), ("epochs", stages.epochs)):
        heads = ["search", *(f"{number} {kind}" for number in numbers)]
        heads += ["difference", "epochs", "without"]
        print("\n" + show(heads, list(rows(replays, cast(Any, kind), numbers))))


if __name__ == "__main__":
    main()
