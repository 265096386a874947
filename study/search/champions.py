"""Each arm's champion: the best trial that the search has found."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from analysis.frames import compute_champions, load_frames
from analysis.rundir import RunDir, TrialRow
from search_spaces import Space, Value
from study.errors import UserError


@dataclass(frozen=True)
class Champion:
    """An arm's trial with the best score among those that reached the last epoch."""

    arm: str
    hyperparameters: Mapping[str, Value]
    run_id: str | None
    """Run id of the trial; None if the arm has nothing to search."""
    score: float
    """NaN if the arm has nothing to search."""


def find_champions(rundir: RunDir, space: Space) -> tuple[Champion, ...]:
    """Return the champion of each arm, in the order of the space, from trials.csv.

    Raises:
        UserError: No trial of an arm reached the last epoch.
    """
    trials = rundir.read_trials()
    chosen = set(compute_champions(load_frames(rundir.path))["run_id"])
    best = {row.arm: row for row in trials if row.run_id in chosen}
    found = []
    for arm in space.arms:
        if not space.searches(arm):
            found.append(Champion(arm.name, space.fixed_values(arm), None, math.nan))
        elif arm.name in best:
            row = best[arm.name]
            found.append(Champion(arm.name, row.hyperparameters, row.run_id, row.score))
        else:
            raise UserError(
                f"arm {arm.name}: no trial reached the last epoch, so it has no champion; "
                f"{_why(trials, arm.name)}"
            )
    return tuple(found)


def _why(trials: Iterable[TrialRow], arm: str) -> str:
    errors = [row.error for row in trials if row.arm == arm and row.error]
    if errors:
        return f"the last error was: {errors[-1]}; fix its cause, then --resume with more --trials."
    return "--resume with more --trials, or with a longer --time-budget."
