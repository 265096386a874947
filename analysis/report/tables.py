"""The data of the tables: the article's four rows for every setting, and the trials by state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.frames import (
    ComparedRuns,
    Evidence,
    StudyFrames,
    compute_champions,
    compute_compared_runs,
)
from analysis.stats.article import ARTICLE_ROWS, ArticleFigures
from analysis.stats.effect import estimate_effect


@dataclass(frozen=True)
class MeanOfRuns:
    """A mean over several runs.

    Attributes:
        mean: Mean of the runs; per cent for an accuracy.
        low: Lower end of the mean's 95 % confidence interval over the seeds, same unit; -inf with
            fewer than 6 seeds.
        high: Upper end; inf with fewer than 6 seeds.
        sd: Sample standard deviation (divisor n - 1) of the runs; NaN for a single run.
        n: Number of runs.
    """

    mean: float
    low: float
    high: float
    sd: float
    n: int


@dataclass(frozen=True)
class ArticleRow:
    """One of the article's four rows.

    Attributes:
        name: As in the article.
        measured_on: The images that this study evaluated on.
        percent: True if the figures are per cent; else nats per image.
        cells: One per setting.
        article: The article's own figures, without and with dropout.
    """

    name: str
    measured_on: str
    percent: bool
    cells: tuple[MeanOfRuns, ...]
    article: tuple[float, float]


@dataclass(frozen=True)
class ArticleTable:
    """The article's table, with this study's results.

    Attributes:
        evidence: The kind of runs behind it.
        settings: Names of the columns, in the study's order; empty before there is a champion.
        rows: The four; plus balanced accuracy if the study's metric is balanced accuracy.
        recipes: Number of recipes that each setting ran with.
        seeds: Number of seeds that each setting ran with.
        beside: True if the article's own figures are shown next to them.
    """

    evidence: Evidence
    settings: tuple[str, ...]
    rows: tuple[ArticleRow, ...]
    recipes: int
    seeds: int
    beside: bool = True


@dataclass(frozen=True)
class SearchRow:
    """The trials of an arm, counted by state, and its champion.

    Attributes:
        arm: Its name.
        completed: Number of trials that reached the last epoch.
        pruned: Number that ASHA stopped early.
        diverged: Number with a non-finite loss.
        failed: Number that raised an exception.
        champion: Run id of the best completed trial; empty without one.
        score: The champion's score; NaN without one.
        hyperparameters: The champion's hyperparameters.
    """

    arm: str
    completed: int
    pruned: int
    diverged: int
    failed: int
    champion: str
    score: float
    hyperparameters: Mapping[str, Any]


@dataclass(frozen=True)
class SearchTable:
    """The trials of a study, by arm.

    Attributes:
        metric: The study's metric: `val_accuracy` (a fraction) or `val_loss`.
        rows: One per searched arm, in the study's order.
    """

    metric: str
    rows: tuple[SearchRow, ...]


#: Not in the article.
BALANCED = ArticleFigures(
    "Balanced testing accuracy",
    True,
    (math.nan, math.nan),
    "test_balanced_accuracy",
    "test",
    "val_balanced_accuracy",
)


def compute_article_table(frames: StudyFrames) -> ArticleTable:
    """Return the article's table over all runs of each setting, at the epoch selected on `val`."""
    compared = compute_compared_runs(frames)
    confirmed = compared.evidence == "confirmation"
    rows = []
    balanced = (BALANCED,) if frames.accuracy == "balanced_accuracy" else ()
    for name, percent, article, column, images, val_column in (*ARTICLE_ROWS, *balanced):
        if not confirmed:
            column = val_column
            images = "val" if column.startswith("val") else "part of train"
            name = name.replace("Testing", "Validation").replace("testing", "validation")
        cells = _cells(compared, column, 100 if percent else 1)
        rows.append(ArticleRow(name, images, percent, cells, article))
    return ArticleTable(
        evidence=compared.evidence,
        settings=compared.settings,
        rows=tuple(rows),
        recipes=compared.runs["recipe"].nunique() if confirmed else 1,
        seeds=compared.runs["seed"].nunique() if confirmed else 1,
        beside=not frames.own_images,
    )


def compute_search_table(frames: StudyFrames) -> SearchTable:
    """Count the trials of each arm by state, and find its champion."""
    champions = {row["arm"]: row for row in compute_champions(frames).to_dict("records")}
    rows = []
    for arm, trials in frames.trials.groupby("arm", sort=False):
        states = trials["state"].value_counts()
        champion = champions.get(arm, {})
        values = {name: champion.get(name) for name in frames.hyperparameters}
        rows.append(
            SearchRow(
                arm=str(arm),
                completed=int(states.get("completed", 0)),
                pruned=int(states.get("pruned", 0)),
                diverged=int(states.get("diverged", 0)),
                failed=int(states.get("failed", 0)),
                champion=champion.get("run_id", ""),
                score=champion.get("score", math.nan),
                hyperparameters={k: v for k, v in values.items() if pd.notna(v)},
            )
        )
    return SearchTable(frames.metric, tuple(rows))


def _cells(compared: ComparedRuns, column: str, scale: float) -> tuple[MeanOfRuns, ...]:
    cells = []
    for setting in compared.settings:
        runs = compared.runs[compared.runs["setting"] == setting]
        figures = scale * runs[column]
        # Runs with the same seed are not independent: the interval is over the means per seed.
        by_seed = figures.groupby(runs["seed"]).mean().dropna()
        mean = estimate_effect(by_seed.to_numpy()) if len(by_seed) else None
        cells.append(
            MeanOfRuns(
                mean=float(figures.mean()),
                low=mean.low if mean else -math.inf,
                high=mean.high if mean else math.inf,
                sd=float(figures.std()),
                n=int(figures.count()),
            )
        )
    return tuple(cells)
