"""Matched pairs: what setting the factor changes, seed by seed, all else the same."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from analysis.frames import StudyFrames, settings_in_order

#: Where a run is measured: at the epoch that `val` selected, or at its last epoch.
EPOCHS = {"selected": "", "last": "last_"}


@dataclass(frozen=True)
class Pairs:
    """A setting of the factor against the baseline.

    Attributes:
        setting: The setting.
        baseline: The first setting of the space, such as `no-dropout`.
        by_recipe: Row per seed, column per recipe: the setting's figure minus the baseline's.
        without: The baseline's figures, likewise.
        with_: The setting's figures, likewise.
    """

    setting: str
    baseline: str
    by_recipe: pd.DataFrame
    without: pd.DataFrame
    with_: pd.DataFrame

    @property
    def by_seed(self) -> pd.Series:
        """The effect at each seed: the mean over the recipes."""
        return self.by_recipe.mean(axis=1)

    @property
    def correlation(self) -> float:
        """Between the two runs of a pair, over all pairs, recipes' means taken out; NaN for few."""
        return float(_centred(self.without).corr(_centred(self.with_)))


def compute_pairs(frames: StudyFrames, column: str) -> tuple[Pairs, ...]:
    """Every setting against the first one, over the seeds at which no run is missing.

    Args:
        frames: With confirmation runs.
        column: A figure of a confirmation run, such as `test_accuracy`.
    """
    table = frames.confirm.pivot_table(
        index="seed", columns=["setting", "recipe"], values=column, sort=False
    ).dropna()
    if table.empty:
        return ()
    there = set(table.columns.get_level_values("setting"))
    first, *others = [name for name in settings_in_order(frames.confirm) if name in there]
    pairs = []
    for setting in others:
        # A cell whose runs all failed leaves the other setting's runs without a partner.
        recipes = [recipe for recipe in table[setting] if recipe in table[first]]
        if recipes:
            without = pd.DataFrame(table[first], columns=recipes)
            with_ = pd.DataFrame(table[setting], columns=recipes)
            pairs.append(Pairs(setting, first, with_ - without, without, with_))
    return tuple(pairs)


def compute_changed(frames: StudyFrames) -> Mapping[str, frozenset[str]]:
    """By setting, the hyperparameters that it changes against the first one, in any recipe."""
    confirm = frames.confirm
    if confirm.empty:
        return {}
    names = [name for name in frames.hyperparameters if name in confirm]
    cells = confirm.drop_duplicates(["setting", "recipe"]).set_index(["setting", "recipe"])[names]
    first, *others = settings_in_order(confirm)
    changed = {}
    for setting in others:
        pair = [pd.DataFrame(cells.xs(name, level="setting")) for name in (first, setting)]
        before, after = pair[0].align(pair[1], join="inner", axis=0)
        # A hyperparameter that neither has is the same in both.
        differs = before.ne(after) & ~(before.isna() & after.isna())
        changed[setting] = frozenset(differs.columns[differs.any()])
    return changed


def _centred(figures: pd.DataFrame) -> pd.Series:
    return (figures - figures.mean()).melt()["value"]
