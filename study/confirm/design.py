"""Design of the confirmation: champions' recipes crossed with champions' factor settings.

Two searches find two recipes, and the luck of a search is as large as dropout's effect. So each
recipe is retrained with each setting of the factor, over seeds that the search has not used.
Runs with the same recipe and seed are matched pairs that differ in the factor alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from search_spaces import Fixed, Space, Value
from study.search.champions import Champion
from study.seeds import derive_seed


@dataclass(frozen=True)
class Cell:
    """A recipe combined with a setting of the factor."""

    recipe: str
    """The arm whose champion the recipe comes from."""
    setting: str
    """The arm whose champion's factor values are used, or a setting defined by the space."""
    hyperparameters: dict[str, Value]

    @property
    def name(self) -> str:
        """Display name."""
        return f"recipe {self.recipe} · {self.setting}"


@dataclass(frozen=True)
class PlannedRun:
    """A planned confirmation run."""

    cell: Cell
    index: int
    """Index of the seed, from 0."""
    seed: int

    @property
    def run_id(self) -> str:
        """Name of the run in all files and messages."""
        return f"{self.cell.recipe}-recipe-{self.cell.setting}-{self.index}"


def cross_recipes(space: Space, champions: Sequence[Champion]) -> tuple[Cell, ...]:
    """Return every recipe with every setting of the factor; of equal cells, only the first."""
    factor = space.factor_names
    settings = {
        setting.name: {name: _value(setting.factor[name]) for name in factor}
        for setting in space.settings
    } or {
        champion.arm: {name: champion.hyperparameters[name] for name in factor}
        for champion in champions
    }
    crossed = [
        Cell(champion.arm, name, {**champion.hyperparameters, **values})
        for champion in champions
        for name, values in settings.items()
    ]
    first: dict[tuple[tuple[str, Value], ...], Cell] = {}
    for cell in crossed:
        first.setdefault(tuple(sorted(cell.hyperparameters.items())), cell)
    return tuple(first.values())


def planned_runs(crossed: Sequence[Cell], seed: int, seeds: int) -> list[PlannedRun]:
    """Plan every cell with every seed, seed by seed, so that matched pairs finish together."""
    return [
        PlannedRun(cell, index, derive_seed(seed, "confirm", index))
        for index in range(seeds)
        for cell in crossed
    ]


def _value(values: object) -> Value:
    assert isinstance(values, Fixed)
    return values.value
