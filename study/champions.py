"""The best of each arm, as the search has found it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from analysis.rundir import TrialRow
from search_spaces import Value
from study.config import Study
from study.errors import UserError
from study.training import is_better


@dataclass(frozen=True)
class Champion:
    """An arm's trial with the best score among those that reached the last epoch."""

    arm: str
    hyperparameters: Mapping[str, Value]
    run_id: str | None
    """The trial's name; None where the arm has nothing to search."""
    score: float
    """NaN where the arm has nothing to search."""


def champions(study: Study, trials: Iterable[TrialRow]) -> tuple[Champion, ...]:
    """The champion of each arm, in the space's order; among equals the earliest.

    Raises:
        UserError: No trial of an arm reached the last epoch.
    """
    rows = list(trials)
    found = []
    for arm in study.space.arms:
        if not study.space.searches(arm):
            found.append(Champion(arm.name, study.space.fixed_values(arm), None, math.nan))
            continue
        best: TrialRow | None = None
        for row in rows:
            if row.arm != arm.name or row.state != "completed":
                continue
            if best is None or is_better(row.score, best.score, study.config.metric):
                best = row
        if best is None:
            raise UserError(
                f"arm {arm.name}: no trial reached the last epoch, so there is no champion; "
                f"{_why(rows, arm.name)}"
            )
        found.append(Champion(arm.name, best.hyperparameters, best.run_id, best.score))
    return tuple(found)


def _why(rows: Iterable[TrialRow], arm: str) -> str:
    errors = [row.error for row in rows if row.arm == arm and row.error]
    if errors:
        return f"the last error was: {errors[-1]}"
    return "give more trials."
