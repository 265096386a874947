"""What is confirmed: the champions' recipes crossed with the champions' factor settings.

Two searches find two recipes, and the luck of a search is as large as dropout's effect. So each
recipe is trained again with each setting of the factor, over seeds that the search has not used;
runs of one recipe and one seed are matched pairs that differ in the factor alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from search_spaces import Fixed, Space, Value
from study.search.champions import Champion
from study.seeds import derive_seed


@dataclass(frozen=True)
class Cell:
    """A recipe with a setting of the factor."""

    recipe: str
    """The arm whose champion the recipe comes from."""
    setting: str
    """The arm whose champion's factor value it has, or a setting of the space's own."""
    hyperparameters: dict[str, Value]

    @property
    def name(self) -> str:
        """How the cell is called on the screen."""
        return f"recipe {self.recipe} · {self.setting}"


@dataclass(frozen=True)
class PlannedRun:
    """A confirmation run to do."""

    cell: Cell
    index: int
    """Of the seed, from 0."""
    seed: int

    @property
    def run_id(self) -> str:
        """The run's name wherever it appears."""
        return f"{self.cell.recipe}-recipe-{self.cell.setting}-{self.index}"


def cells(space: Space, champions: Sequence[Champion]) -> tuple[Cell, ...]:
    """Every recipe with every setting of the factor; equal cells once, under the first's name."""
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
    """Every cell under every seed, seed by seed, so that matched pairs end together."""
    return [
        PlannedRun(cell, index, derive_seed(seed, "confirm", index))
        for index in range(seeds)
        for cell in crossed
    ]


def _value(values: object) -> Value:
    assert isinstance(values, Fixed)
    return values.value
