"""Tables as people read them: the same cells on the screen and in Markdown."""

import math
from dataclasses import dataclass

from rich import box
from rich.table import Table
from tabulate import tabulate

from analysis.tables import ArticleTable, Cell, SearchRow, SearchTable


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        rows: The cells, as many in each row as there are columns.
        note: How to read it, in one paragraph.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str

    def to_markdown(self) -> str:
        """A section with title, table and note."""
        table = tabulate(self.rows, self.header, tablefmt="github", disable_numparse=True)
        return f"## {self.title}\n\n{table}\n\n{self.note}\n"

    def to_rich(self) -> Table:
        """The table for a rich console, which leaves it plain in a pipe."""
        table = Table(
            title=self.title,
            caption=self.note,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for name in self.header:
            table.add_column(name)
        for row in self.rows:
            table.add_row(*row)
        return table


def show_article_table(table: ArticleTable) -> Grid:
    """The article's table in words, with what it rests on."""
    counts = [cell.n for cell in table.rows[0].cells]
    return Grid(
        title="The article's table, measured anew",
        header=(
            "",
            "measured on",
            *(f"{name} (n = {n})" for name, n in zip(table.settings, counts, strict=True)),
            "article, without",
            "article, with",
        ),
        rows=tuple(
            (
                row.name,
                row.measured_on,
                *(_cell(cell, row.percent) for cell in row.cells),
                *(f"{figure:g}{' %' if row.percent else ''}" for figure in row.article),
            )
            for row in table.rows
        ),
        note=_article_note(table),
    )


def show_search_table(table: SearchTable) -> Grid:
    """The trials by arm in words."""
    return Grid(
        title="The search",
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
        note=f"Score: the best {table.metric} so far. A champion is the best trial of its arm that"
        " reached the last epoch."
        if table.rows
        else "There are no trials.",
    )


def _article_note(table: ArticleTable) -> str:
    article = (
        "The article trained all layers on images of 32 px, one run per model, and took both its"
        " testing accuracy and its validation loss from the test images."
    )
    if not table.settings:
        return f"No run can be compared yet. {article}"
    if table.evidence == "champions":
        return (
            "No confirmation runs: each figure is a single run, the champion of its arm, on the"
            " images it was chosen by. That says little about dropout, and there are no test"
            f" figures. {article}"
        )
    return (
        "Mean ± standard deviation over n confirmation runs"
        f" ({_count(table.recipes, 'recipe')}, {_count(table.seeds, 'seed')}), each at the epoch"
        f" selected on val; training figures with dropout off. {article}"
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _cell(cell: Cell, percent: bool) -> str:
    digits, unit = (2, " %") if percent else (3, "")
    spread = "" if math.isnan(cell.sd) else f" ± {cell.sd:.{digits}f}"
    return f"{cell.mean:.{digits}f}{spread}{unit}"


def _score(score: float, metric: str) -> str:
    if math.isnan(score):
        return "none"
    return f"{100 * score:.2f} %" if metric == "val_accuracy" else f"{score:.3f}"


def _champion(row: SearchRow) -> str:
    if not row.champion:
        return "none"
    values = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.hyperparameters.items()
    )
    return f"{row.champion}: {', '.join(values)}"
