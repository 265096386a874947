"""The report: every table and figure of a run directory, written into its folder report/."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.table import Table

from analysis.curves import compute_curves
from analysis.figures import make_curves_figure, render
from analysis.frames import StudyFrames, load_frames
from analysis.grid import Grid, show_article_table, show_search_table
from analysis.provenance import describe_inputs
from analysis.rundir import RunDir, write_whole
from analysis.tables import (
    ArticleTable,
    SearchTable,
    compute_article_table,
    compute_search_table,
)


@dataclass(frozen=True)
class Report:
    """What was written, and the tables as data.

    Attributes:
        path: The page that shows it all.
        inputs: What the study used, one line.
        article: The article's table.
        search: The trials by arm.
        tables: The files of the tables.
        figures: The files of the figures; none before there is a curve to draw.
    """

    path: Path
    inputs: str
    article: ArticleTable
    search: SearchTable
    tables: tuple[Path, ...]
    figures: tuple[Path, ...]

    def as_rich(self) -> tuple[Table, ...]:
        """The tables for a rich console, those without a row left out."""
        grids = (show_search_table(self.search), show_article_table(self.article))
        return tuple(grid.to_rich() for grid in grids if grid.rows)


def write_report(run_dir: Path) -> Report:
    """Write tables, figures and the page that shows them; earlier ones are replaced.

    Raises:
        RunDirError: The run directory is none, or a file in it cannot be read.
    """
    frames = load_frames(run_dir)
    folder = RunDir(run_dir).report
    inputs = describe_inputs(frames.record)
    article, search = compute_article_table(frames), compute_search_table(frames)
    grids = (show_article_table(article), show_search_table(search))
    tables = (
        *_write_table(folder, "article", grids[0], _article_frame(article), inputs),
        *_write_table(folder, "search", grids[1], _search_frame(search), inputs),
    )
    figures = _write_figures(folder, frames, inputs)
    path = folder / "report.md"
    write_whole(path, _page(run_dir.resolve().name, grids, figures, inputs))
    return Report(path, inputs, article, search, tables, figures)


def _write_table(
    folder: Path, name: str, grid: Grid, frame: pd.DataFrame, inputs: str
) -> tuple[Path, Path]:
    markdown, table = (folder / "tables" / f"{name}.{suffix}" for suffix in ("md", "csv"))
    write_whole(markdown, f"{grid.to_markdown()}\nUsed: {inputs}\n")
    write_whole(table, frame.to_csv(index=False))
    return markdown, table


def _article_frame(table: ArticleTable) -> pd.DataFrame:
    """Columns: row, measured_on, unit, then per setting its mean, sd and n, then the article's."""
    lines = []
    for row in table.rows:
        line: dict[str, str | float] = {
            "row": row.name,
            "measured_on": row.measured_on,
            "unit": "%" if row.percent else "nats",
        }
        for setting, cell in zip(table.settings, row.cells, strict=True):
            line[f"{setting} mean"] = cell.mean
            line[f"{setting} sd"] = cell.sd
            line[f"{setting} n"] = cell.n
        line["article without"], line["article with"] = row.article
        lines.append(line)
    return pd.DataFrame(lines)


def _search_frame(table: SearchTable) -> pd.DataFrame:
    """A row per arm; the champion's hyperparameters are columns."""
    return pd.DataFrame(
        {
            "arm": row.arm,
            "completed": row.completed,
            "pruned": row.pruned,
            "diverged": row.diverged,
            "failed": row.failed,
            "champion": row.champion,
            f"best {table.metric}": row.score,
            **row.hyperparameters,
        }
        for row in table.rows
    )


def _write_figures(folder: Path, frames: StudyFrames, inputs: str) -> tuple[Path, ...]:
    curves = compute_curves(frames)
    if not curves.settings:
        return ()
    written = []
    for quantity in ("accuracy", "loss"):
        figure = make_curves_figure(curves, quantity, inputs)
        for file_format in ("svg", "png"):
            path = folder / "figures" / f"{quantity}.{file_format}"
            write_whole(path, render(figure, file_format))
            written.append(path)
    return tuple(written)


def _page(name: str, grids: tuple[Grid, ...], figures: tuple[Path, ...], inputs: str) -> str:
    images = (f"![{path.stem} by epoch](figures/{path.name})" for path in figures)
    parts = [
        f"# {name}\n",
        *(grid.to_markdown() for grid in grids),
        *(f"{image}\n" for image in images if image.endswith(".svg)")),
        f"Used: {inputs}\n",
    ]
    return "\n".join(parts)
