"""False positive rate of the verdict: simulated studies of a factor without effect.

    python -m tests.benchmarks.placebo --studies 2000

Each study runs the project's own search (an Optuna study and an ASHA bracket per arm), chooses its
champions, crosses them over 8 seeds and computes the verdict, all with the code of a real study;
only training is replaced by a synthetic learner. The factor is a placebo, so a verdict that claims
a difference is wrong, and at most 5 % may. The same studies show what a direct comparison of the
champions (uncrossed) would have claimed.

The learner: test accuracy has a smooth optimum in the recipe, a random offset for every
hyperparameter set (its true value beyond the smooth part), and noise from the seed. `val` is the
same plus noise from its own images.
"""

import argparse
import itertools
import math
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import pandas as pd
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from scipy import stats

from analysis.frames import StudyFrames
from analysis.stats.verdict import compute_verdict
from search_spaces import Value, find_space
from study.confirm.design import cross_recipes
from study.search.champions import Champion
from study.search.scheduler import EPOCH, SCORE, ArmScheduler
from study.search.searcher import ArmSearch, StudySearch
from study.seeds import derive_seed

SPACE = find_space("placebo")
EPOCHS, TRIALS, SEEDS = 15, 40, 8


@dataclass(frozen=True)
class Learner:
    """Synthetic accuracies in points; the defaults are of the size seen in a real study.

    Attributes:
        recipe_sd: Standard deviation of the offsets of hyperparameter sets.
        seed_sd: Standard deviation between seeds, shared by both runs of a pair.
        run_sd: Standard deviation between the runs of a pair.
        val_sd: Standard deviation of the noise on val at each epoch.
    """

    recipe_sd: float = 0.15
    seed_sd: float = 0.10
    run_sd: float = 0.15
    val_sd: float = 0.15

    def truth(self, values: Mapping[str, Value], study: int) -> float:
        """Return the expected test accuracy of a hyperparameter set, which ignores the placebo."""
        recipe = {name: value for name, value in values.items() if name not in SPACE.factor_names}
        random = np.random.default_rng(derive_seed(study, "recipe", repr(sorted(recipe.items()))))
        rate = math.log10(float(values["learning_rate"])) + 3.3
        decay = math.log10(float(values["weight_decay"])) + 3
        width = 0.1 * str(values["head"]).count("-")
        return 88 - 0.6 * rate**2 - 0.03 * decay**2 - width + random.normal(0, self.recipe_sd)


@dataclass(frozen=True)
class Outcome:
    """Result of a simulated study: p-values with and without crossing, and the true difference."""

    crossed: float
    uncrossed: float
    difference: float
    """Difference of the champions' true accuracies, in points: the luck of the search."""


def simulate(study: int, learner: Learner) -> Outcome:
    """Simulate one study of the placebo, from search to verdict."""
    champions = _search(study, learner)
    verdict = compute_verdict(_confirm(study, learner, champions))
    (comparison,) = verdict.comparisons
    assert verdict.champions is not None
    first, second = (learner.truth(champion.hyperparameters, study) for champion in champions)
    return Outcome(comparison.accuracy.p, verdict.champions.accuracy.p, second - first)


def _search(study: int, learner: Learner) -> list[Champion]:
    """Search both arms with two trials at a time, and return the champions."""
    storage = optuna.storages.InMemoryStorage()
    arms = {
        arm.name: ArmSearch(
            SPACE,
            arm,
            storage=storage,
            mode="max",
            epochs=EPOCHS,
            trials=TRIALS // len(SPACE.arms),
            seed=study,
        )
        for arm in SPACE.arms
    }
    search, scheduler = StudySearch(arms, "max"), ArmScheduler(arms, "max", EPOCHS)
    best: dict[str, Champion] = {}
    running: list[tuple[SimpleNamespace, list[float]]] = []
    names = map(str, itertools.count())
    while True:
        while len(running) < 2 and isinstance(config := search.suggest(name := next(names)), dict):
            scores = _val_scores(learner, config, study)
            trial = SimpleNamespace(trial_id=name, config=config, epoch=0)
            scheduler.on_trial_add(cast(Any, None), cast(Trial, trial))
            running.append((trial, scores))
        if not running:
            return [best[arm.name] for arm in SPACE.arms]
        for trial, scores in list(running):
            trial.epoch += 1
            result = {EPOCH: trial.epoch, SCORE: scores[trial.epoch - 1]}
            decision = scheduler.on_trial_result(cast(Any, None), cast(Trial, trial), result)
            if decision == TrialScheduler.CONTINUE and trial.epoch < EPOCHS:
                search.on_trial_result(trial.trial_id, result)
                continue
            running.remove((trial, scores))
            search.on_trial_complete(trial.trial_id, result)
            arm = trial.config["arm"]
            if trial.epoch == EPOCHS and (arm not in best or result[SCORE] > best[arm].score):
                values = trial.config["hyperparameters"]
                best[arm] = Champion(arm, values, trial.config["run_id"], result[SCORE])


def _val_scores(learner: Learner, config: Mapping[str, Any], study: int) -> list[float]:
    """Return the best accuracy on val so far, epoch by epoch."""
    random = np.random.default_rng(config["seed"])
    epochs = np.arange(1, EPOCHS + 1)
    luck = random.normal(0, math.hypot(learner.seed_sd, learner.run_sd))
    course = learner.truth(config["hyperparameters"], study) + luck - 3 * np.exp(-epochs / 2)
    return list(np.maximum.accumulate(course + random.normal(0, learner.val_sd, EPOCHS)))


def _confirm(study: int, learner: Learner, champions: list[Champion]) -> StudyFrames:
    """Return the project's confirmation runs with the learner's test accuracies."""
    rows = []
    for seed in range(SEEDS):
        for cell in cross_recipes(SPACE, champions):
            shared = np.random.default_rng(derive_seed(study, "pair", cell.recipe, seed))
            own = np.random.default_rng(derive_seed(study, "run", cell.name, seed))
            accuracy = learner.truth(cell.hyperparameters, study)
            accuracy += shared.normal(0, learner.seed_sd) + own.normal(0, learner.run_sd)
            figures = {"test_accuracy": accuracy / 100, "test_loss": 1 - accuracy / 100}
            last = {f"last_{name}": value for name, value in figures.items()}
            names = {"seed": seed, "recipe": cell.recipe, "setting": cell.setting, "run_id": ""}
            rows.append({**names, **figures, **last})
    nothing = pd.DataFrame()
    return StudyFrames(Path("simulated"), {}, nothing, nothing, pd.DataFrame(rows), ())


def main() -> None:
    """Simulate the studies and print what they claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--studies", type=int, default=2_000)
    studies = parser.parse_args().studies
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with ProcessPoolExecutor() as pool:
        outcomes = list(
            pool.map(simulate, range(studies), itertools.repeat(Learner()), chunksize=20)
        )
    print(f"{studies} studies of a placebo: {TRIALS} trials, {SEEDS} seeds each")
    for name, claims in (
        ("crossed, matched pairs (the verdict)", [o.crossed < 0.05 for o in outcomes]),
        ("champions compared as they are", [o.uncrossed < 0.05 for o in outcomes]),
    ):
        found = stats.binomtest(sum(claims), studies)
        low, high = found.proportion_ci()
        print(
            f"  {name}: a difference claimed in {100 * found.statistic:.1f} %"
            f" (95 % CI {100 * low:.1f} to {100 * high:.1f})"
        )
    luck = np.std([outcome.difference for outcome in outcomes])
    print(f"  true difference between the champions: standard deviation {luck:.2f} points")


if __name__ == "__main__":
    main()
