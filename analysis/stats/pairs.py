"""Matched pairs: the effect of the factor at each seed, all else being equal."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from analysis.frames import StudyFrames, settings_in_order

#: Column prefix by epoch of measurement: the epoch selected on `val`, or the last epoch.
EPOCHS = {"selected": "", "last": "last_"}


@dataclass(frozen=True)
class Pairs:
    """A setting of the factor against the baseline.

    Attributes:
        setting: The setting.
        baseline: The first setting of the space, such as `no-dropout`.
        by_recipe: The setting's value minus the baseline's; a row per seed, a column per recipe.
        without: The baseline's values, in the same layout.
        with_: The setting's values, in the same layout.
    """

    setting: str
    baseline: str
    by_recipe: pd.DataFrame
    without: pd.DataFrame
    with_: pd.DataFrame

    @property
    def by_seed(self) -> pd.Series:
        """Effect at each seed, averaged over the recipes."""
        return self.by_recipe.mean(axis=1)

    @property
    def correlation(self) -> float:
        """Correlation within pairs, after subtracting recipe means; NaN for too few pairs."""
        return float(_centred(self.without).corr(_centred(self.with_)))


def compute_pairs(frames: StudyFrames, column: str) -> tuple[Pairs, ...]:
    """Pair every setting with the first one, at the seeds where no run is missing.

    Args:
        frames: A study with confirmation runs.
        column: Column of the confirmation runs, such as `test_accuracy`.
    """
    table = frames.confirm.pivot_table(
        index="seed", columns=["setting", "recipe"], values=column, sort=False
    ).dropna()
    if table.empty:
        return ()
    present = set(table.columns.get_level_values("setting"))
    first, *others = [name for name in settings_in_order(frames.confirm) if name in present]
    pairs = []
    for setting in others:
        # If all runs of a setting with a recipe failed, the other setting's runs have no partner.
        recipes = [recipe for recipe in table[setting] if recipe in table[first]]
        if recipes:
            without = pd.DataFrame(table[first], columns=recipes)
            with_ = pd.DataFrame(table[setting], columns=recipes)
            pairs.append(Pairs(setting, first, with_ - without, without, with_))
    return tuple(pairs)


def compute_changed(frames: StudyFrames) -> Mapping[str, frozenset[str]]:
    """Return, by setting, the hyperparameters that differ from the first one in any recipe."""
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
        # A hyperparameter missing from both counts as equal.
        differs = before.ne(after) & ~(before.isna() & after.isna())
        changed[setting] = frozenset(differs.columns[differs.any()])
    return changed


def _centred(figures: pd.DataFrame) -> pd.Series:
    return (figures - figures.mean()).melt()["value"]
