"""Tables as text: the same cells on the screen, in Markdown and on the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from rich import box
from rich.table import Table
from tabulate import tabulate

from analysis.report.health import Finding
from analysis.report.tables import ArticleRow, ArticleTable, MeanOfRuns, SearchRow, SearchTable
from analysis.report.times import Times
from analysis.stats.effect import Effect, interval
from analysis.stats.verdict import FEWEST_PAIRS, Comparison, Verdict
from analysis.words import count, duration, p_value, signed


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        rows: The cells, one per column in each row.
        note: How to read it, in one paragraph.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str

    def to_markdown(self) -> str:
        """Return a Markdown section with title, table and note."""
        table = tabulate(self.rows, self.header, tablefmt="github", disable_numparse=True)
        return f"## {self.title}\n\n{table}\n\n{self.note}\n"

    def to_rich(self) -> Table:
        """Return the table for a rich console; in a pipe it prints as plain text."""
        table = Table(
            title=self.title,
            caption=f"{self.note}\n",
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
            collapse_padding=True,
        )
        for name, *cells in zip(self.header, *self.rows, strict=True):
            # Wrap a long header rather than the cells below it.
            table.add_column(fill(name, max(map(len, (*cells, *name.split(), " ")))))
        for row in self.rows:
            table.add_row(*row)
        return table


#: At most this many classes are listed.
CLASSES_LISTED = 100
PARTS = ("train", "val", "test")

#: With more settings, the table is transposed: as columns they would not fit a terminal.
MOST_COLUMNS = 2


def show_article_table(table: ArticleTable) -> TextTable:
    """Return the article's table as text, with the basis of its figures."""
    title, note = article_title(table), _article_note(table)
    counts = [cell.n for cell in table.rows[0].cells]
    settings = [f"{name} (n = {n})" for name, n in zip(table.settings, counts, strict=True)]
    columns = [*settings, *(("article, without", "article, with") if table.beside else ())]
    figures = [
        [
            *(_cell(cell, row.percent) for cell in row.cells),
            *(_article_figure(row, figure) for figure in row.article if table.beside),
        ]
        for row in table.rows
    ]
    names = [f"{row.name} ({row.measured_on})" for row in table.rows]
    if len(settings) > MOST_COLUMNS:
        by_setting = tuple(zip(columns, *figures, strict=True))
        return TextTable(title, ("", *names), by_setting, note)
    rows = tuple((name, *cells) for name, cells in zip(names, figures, strict=True))
    return TextTable(title, ("", *columns), rows, note)


def article_title(table: ArticleTable) -> str:
    """Return the title of the article's table."""
    return "The article's table, re-measured" if table.beside else "Accuracy and loss"


def show_classes(record: Mapping[str, Any]) -> TextTable:
    """Return the number of images per class and split, from study.json; no rows if unknown."""
    data = record.get("data", {})
    counts = data.get("images_per_class", {})
    columns = [data.get("classes", []), *(counts.get(part, []) for part in PARTS)]
    complete = len({len(column) for column in columns}) == 1
    rows = [tuple(map(str, row)) for row in zip(*columns, strict=True)] if complete else []
    hidden = len(rows) - CLASSES_LISTED
    note = f"And {hidden} more." if hidden > 0 else ""
    return TextTable("Images per class", ("class", *PARTS), tuple(rows[:CLASSES_LISTED]), note)


def show_search_table(table: SearchTable) -> TextTable:
    """Return the trials by arm as text."""
    return TextTable(
        title="Search",
        header=("arm", "completed", "pruned", "diverged", "failed", "best score", "champion"),
        rows=tuple(
            (
                row.arm,
                str(row.completed),
                str(row.pruned),
                str(row.diverged),
                str(row.failed),
                _score(row.score, table.metric),
                _champion(row),
            )
            for row in table.rows
        ),
        note=f"Score: the best {table.metric} so far. The champion is the arm's best trial that"
        " reached the last epoch."
        if table.rows
        else "No trials.",
    )


def show_times(times: Times) -> TextTable:
    """Return the time of each phase as text."""
    walls = [(phase.phase, phase.wall) for phase in times.phases]
    if times.phases:
        walls += [("between phases", times.other)] if round(times.other) else []
        walls += [("all", times.total)]
    rows = tuple(
        (name, duration(wall), f"{100 * wall / times.total:.0f} %" if times.total else "")
        for name, wall in walls
    )
    return TextTable("Where the time went", ("phase", "time", "share"), rows, _times_note(times))


def show_slot_times(times: Times) -> TextTable:
    """Return how the slots of search and confirmation spent their time, as text."""
    header = (
        "phase",
        "slots",
        "compute",
        "between epochs",
        "measuring",
        "between runs",
        "start-up",
        "idle",
        "efficiency",
    )
    rows = tuple(
        (
            phase.phase,
            str(phase.slots),
            duration(time.compute),
            duration(time.between_epochs),
            duration(time.measuring) if phase.phase == "confirm" else "",
            duration(time.between_runs),
            "unknown" if phase.unrecorded and not time.start_up else duration(time.start_up),
            duration(time.idle),
            "" if math.isnan(time.efficiency) else f"{100 * time.efficiency:.0f} %",
        )
        for phase in times.phases
        if (time := phase.slot_time)
    )
    note = (
        "Slot time: slots × time of the phase, where a slot is room for one run. Compute: epochs,"
        " including evaluation. Between epochs: reporting and checkpointing. Measuring: final"
        " evaluation of confirmation runs. Between runs: a worker waits for its next run. Start-up:"
        " until a slot's first epoch. Idle: the rest (end of the phase, lost attempts, replaced"
        " workers). Efficiency: compute as a share of slot time."
    )
    return TextTable("How the slots spent their time", header, rows, note)


def show_effects(verdict: Verdict) -> TextTable:
    """Return the effect of the factor on each measure, as text."""
    measure = verdict.comparisons[0].measure if verdict.comparisons else "test accuracy"
    measures = (
        (f"{measure}, selected epoch", "accuracy", "points", 2),
        ("test loss, selected epoch", "loss", "nats", 3),
        (f"{measure}, last epoch", "last_accuracy", "points", 2),
        ("test loss, last epoch", "last_loss", "nats", 3),
    )
    rows = []
    for comparison in verdict.comparisons:
        for name, attribute, unit, digits in measures:
            rows.append(_effect(comparison, name, getattr(comparison, attribute), unit, digits))
        if len(comparison.by_recipe) > 1:
            for recipe, effect in comparison.by_recipe.items():
                name = f"{measure}, selected epoch, recipe {recipe} only"
                rows.append(_effect(comparison, name, effect, "points", 2))
    header = ("setting", "measure", "change", "95 % CI", "p")
    return TextTable("Effect of the factor", header, tuple(rows), _effects_note(verdict))


def show_health(findings: Sequence[Finding]) -> TextTable:
    """Return the health checks as text, failed ones first."""
    ordered = sorted(findings, key=lambda finding: finding.passed)
    rows = tuple(
        (f.check, "passed" if f.passed else "warning", f.seen, f.meaning, f.remedy) for f in ordered
    )
    header = ("check", "", "found", "why it matters", "what to do")
    return TextTable("Health checks", header, rows, "Problems that could undermine the comparison.")


def _times_note(times: Times) -> str:
    if not times.phases:
        return "No phase has finished yet."
    parts = ["Wall time, summed over all starts of the study."]
    if any(phase.unrecorded for phase in times.phases):
        parts.append(
            "Begin and end of search or confirm are not recorded for every start; where they are"
            " missing, the phase counts from its first epoch to its last."
        )
    if not (times.whole or all(phase.unrecorded for phase in times.phases)):
        parts.append(
            "Report and export of the latest start are not included, since they finish after this"
            " is written; python -m analysis RUN adds them."
        )
    return " ".join(parts)


def _effect(
    comparison: Comparison, name: str, effect: Effect, unit: str, digits: int
) -> tuple[str, ...]:
    change = f"{signed(effect.mean, digits)} {unit}"
    return (comparison.setting, name, change, interval(effect, digits), p_value(effect.p))


def _effects_note(verdict: Verdict) -> str:
    if not verdict.comparisons:
        return "No matched pairs."
    first = verdict.comparisons[0]
    parts = [
        f"Mean over matched pairs ({count(first.accuracy.n, 'seed')} ×"
        f" {count(first.recipes, 'recipe')}), relative to {first.baseline}; p-values from an exact"
        " sign-flip test, intervals from its inversion. The verdict rests on the first row of each"
        " setting; the other rows are secondary, and their p-values are not corrected."
    ]
    if len(verdict.comparisons) == 1:
        if not math.isnan(first.correlation):
            parts.append(f"Correlation of test accuracy within pairs: {signed(first.correlation)}.")
        parts.append(_standard_errors(first))
    else:
        corrected = ", ".join(f"{c.setting} {p_value(c.adjusted_p)}" for c in verdict.comparisons)
        parts.append(f"p-values for test accuracy after Holm's correction: {corrected}.")
    return " ".join(parts)


def _standard_errors(comparison: Comparison) -> str:
    errors = comparison.errors
    if math.isnan(errors.images):
        return f"Standard error from the seeds: {errors.seeds:.2f} points."
    return (
        f"Standard error of the change in test accuracy: {errors.seeds:.2f} points from the seeds,"
        f" {errors.images:.2f} from the finite test set, {errors.both:.2f} from both."
    )


def _article_note(table: ArticleTable) -> str:
    article = (
        " The article trained all layers on 32 px images, one run per model, and took both its"
        " testing accuracy and its validation loss from the test images."
        if table.beside
        else ""
    )
    if not table.settings:
        return f"No runs to compare yet.{article}"
    if table.evidence == "champions":
        return (
            "No confirmation runs: each figure comes from a single run, the champion of its arm, on"
            " the images used to select it. This says little about dropout, and there are no test"
            f" figures.{article}"
        )
    interval = (
        "with its 95 % confidence interval"
        if table.seeds >= FEWEST_PAIRS
        else f"too few for a confidence interval (needs at least {FEWEST_PAIRS} seeds)"
    )
    return (
        f"Mean over n confirmation runs ({count(table.recipes, 'recipe')},"
        f" {count(table.seeds, 'seed')}), {interval}, each run at the epoch selected on val;"
        f" training figures are measured with dropout off.{article}"
    )


def _article_figure(row: ArticleRow, figure: float) -> str:
    return "" if math.isnan(figure) else f"{figure:g}{' %' if row.percent else ''}"


def _cell(cell: MeanOfRuns, percent: bool) -> str:
    digits, unit = (2, " %") if percent else (3, "")
    if not math.isfinite(cell.low):
        return f"{cell.mean:.{digits}f}{unit}"
    return f"{cell.mean:.{digits}f}{unit} ({cell.low:.{digits}f} to {cell.high:.{digits}f})"


def _score(score: float, metric: str) -> str:
    if math.isnan(score):
        return "none"
    return f"{100 * score:.2f} %" if metric != "val_loss" else f"{score:.3f}"


def _champion(row: SearchRow) -> str:
    if not row.champion:
        return "none"
    values = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.hyperparameters.items()
    )
    return f"{row.champion}: {', '.join(values)}"
