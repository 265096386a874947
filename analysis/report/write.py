"""Write the report: all tables and figures of a run directory, in its folder report/."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd
from rich.console import RenderableType
from rich.text import Text

from analysis.figures import Picture, make_pictures, render_file
from analysis.frames import StudyFrames, load_readable_frames
from analysis.report.health import Finding, check_health
from analysis.report.page import Section, render_page
from analysis.report.provenance import describe_inputs
from analysis.report.tables import (
    ArticleTable,
    SearchTable,
    compute_article_table,
    compute_search_table,
)
from analysis.report.text_tables import (
    TextTable,
    article_title,
    show_article_table,
    show_classes,
    show_effects,
    show_health,
    show_search_table,
    show_slot_times,
    show_times,
)
from analysis.report.times import RunTime, SlotTime, Times, compute_times, describe_times
from analysis.rundir import RunDir, write_atomically
from analysis.rundir.damage import find_damage
from analysis.stats.agreement import compute_agreement, describe_agreement
from analysis.stats.article import compute_article_gain, describe_article_gain
from analysis.stats.test_set_looks import record_verdict
from analysis.stats.verdict import Verdict, compute_verdict, describe_champions, describe_loss


@dataclass(frozen=True)
class Report:
    """A written report and its contents.

    Attributes:
        path: The HTML page.
        inputs: What the study used, one line.
        problems: Damaged or missing data, a sentence each.
        verdict: The verdict of the study.
        sentences: The verdict in words, the main sentence first.
        article: The article's table.
        search: The trials by arm.
        findings: Health checks.
        tables: The files of the tables.
        figures: The files of the figures; empty if there is nothing to draw yet.
    """

    path: Path
    inputs: str
    problems: tuple[str, ...]
    verdict: Verdict
    sentences: tuple[str, ...]
    article: ArticleTable
    search: SearchTable
    findings: tuple[Finding, ...]
    tables: tuple[Path, ...]
    figures: tuple[Path, ...]

    def as_rich(self) -> tuple[RenderableType, ...]:
        """Return the report for a rich console: the non-empty tables, then the verdict."""
        tables = (show_search_table(self.search), show_article_table(self.article))
        shown = [table.to_rich() for table in tables if table.rows]
        return (*shown, *map(Text, self.problems), *map(Text, self.sentences))


def write_report(run_dir: Path) -> Report:
    """Write tables, figures, the verdict and the page that shows them; replaces earlier ones.

    Damaged and missing data is reported and skipped.

    Raises:
        RunDirError: Not a run directory, or of another format, or study.json or verdict.json is
            damaged.
    """
    frames = load_readable_frames(run_dir)
    problems = (*frames.problems, *find_damage(run_dir))
    inputs = describe_inputs(frames.record)
    verdict = compute_verdict(frames)
    article, search = compute_article_table(frames), compute_search_table(frames)
    times = compute_times(frames)
    findings = check_health(frames, verdict)
    gain = compute_article_gain(frames, verdict)
    look = record_verdict(run_dir, verdict, gain)
    sentences = _sentences(verdict, look, describe_article_gain(gain), findings)
    pictures = make_pictures(frames)
    folder = RunDir(run_dir).report
    path = folder / "index.html"
    sections = _sections(frames, problems, verdict, article, search, times, findings, pictures)
    title = run_dir.resolve().name
    page = render_page(title, sentences, verdict.outcome, sections, frames.record)
    write_atomically(path, page)
    return Report(
        path=path,
        inputs=inputs,
        problems=problems,
        verdict=verdict,
        sentences=sentences,
        article=article,
        search=search,
        findings=findings,
        tables=_write_tables(folder, verdict, article, search, times, findings, inputs),
        figures=_write_figures(folder, pictures, inputs),
    )


def _sentences(
    verdict: Verdict, look: int, gain: str, findings: Sequence[Finding]
) -> tuple[str, ...]:
    again = f" Look {look} at the test set; earlier verdicts are kept in verdict.json."
    sentences = [verdict.sentence + (again if look > 1 else "")]
    if len(verdict.comparisons) == 1:
        sentences.append(describe_loss(verdict.comparisons[0]))
    if gain:
        sentences.append(gain)
    warnings = [finding.check for finding in findings if not finding.passed]
    if warnings and verdict.comparisons:
        sentences.append(f"Check before you trust this: {'; '.join(warnings)}.")
    return tuple(sentences)


def _sections(
    frames: StudyFrames,
    problems: Sequence[str],
    verdict: Verdict,
    article: ArticleTable,
    search: SearchTable,
    times: Times,
    findings: Sequence[Finding],
    pictures: Mapping[str, Sequence[Picture]],
) -> tuple[Section, ...]:
    agreement = describe_agreement(compute_agreement(frames))
    champions = [describe_champions(verdict.champions)] if verdict.champions else []
    warnings = [finding for finding in findings if not finding.passed]
    passed = [finding for finding in findings if finding.passed]
    effects, found = show_effects(verdict), show_search_table(search)
    spent, slots = show_times(times), show_slot_times(times)
    return (
        Section("problems", "Damaged or missing data", texts=problems),
        Section(
            "article",
            article_title(article),
            texts=[agreement] if agreement else [],
            tables=[show_article_table(article)],
        ),
        Section("comparison", "Comparison", pictures=pictures.get("comparison", ())),
        Section("warnings", "Check before you trust this", findings=warnings),
        Section("effects", effects.title, champions, [effects] if effects.rows else []),
        Section("predictions", "Predictions", pictures=pictures.get("predictions", ())),
        Section(
            "search",
            found.title,
            tables=[found] if found.rows else [],
            pictures=pictures.get("search", ()),
        ),
        Section(
            "time",
            spent.title,
            describe_times(times),
            [table for table in (spent, slots) if table.rows],
            pictures.get("time", ()),
        ),
        *_classes(frames),
        Section("health", "Health checks passed", findings=passed),
    )


def _classes(frames: StudyFrames) -> tuple[Section, ...]:
    """Build the section of images per class, for a study of the user's own images."""
    table = show_classes(frames.record)
    if not (frames.own_images and table.rows):
        return ()
    return (Section("images", table.title, tables=[table]),)


def _write_tables(
    folder: Path,
    verdict: Verdict,
    article: ArticleTable,
    search: SearchTable,
    times: Times,
    findings: Sequence[Finding],
    inputs: str,
) -> tuple[Path, ...]:
    return (
        *_write_table(
            folder, "article", show_article_table(article), _article_frame(article), inputs
        ),
        *_write_table(folder, "effects", show_effects(verdict), _effects_frame(verdict), inputs),
        *_write_table(folder, "search", show_search_table(search), _search_frame(search), inputs),
        *_write_table(folder, "health", show_health(findings), pd.DataFrame(findings), inputs),
        _write_markdown(folder, "time", (show_times(times), show_slot_times(times)), inputs),
        _write_csv(folder, "time", _times_frame(times)),
        _write_csv(folder, "time_per_run", pd.DataFrame(times.runs, columns=_names(RunTime))),
    )


def _write_table(
    folder: Path, name: str, table: TextTable, frame: pd.DataFrame, inputs: str
) -> tuple[Path, Path]:
    return _write_markdown(folder, name, (table,), inputs), _write_csv(folder, name, frame)


def _write_markdown(folder: Path, name: str, tables: Sequence[TextTable], inputs: str) -> Path:
    path = folder / "tables" / f"{name}.md"
    write_atomically(path, "\n".join([*(g.to_markdown() for g in tables), f"Used: {inputs}\n"]))
    return path


def _write_csv(folder: Path, name: str, frame: pd.DataFrame) -> Path:
    table = folder / "tables" / f"{name}.csv"
    write_atomically(table, frame.to_csv(index=False))
    return table


def _article_frame(table: ArticleTable) -> pd.DataFrame:
    """Columns: row, measured_on, unit, the figures of each setting, those of the article."""
    lines = []
    for row in table.rows:
        line: dict[str, str | float] = {
            "row": row.name,
            "measured_on": row.measured_on,
            "unit": "%" if row.percent else "nats",
        }
        for setting, cell in zip(table.settings, row.cells, strict=True):
            line[f"{setting} mean"] = cell.mean
            line[f"{setting} low"] = cell.low
            line[f"{setting} high"] = cell.high
            line[f"{setting} sd"] = cell.sd
            line[f"{setting} n"] = cell.n
        line["article without"], line["article with"] = row.article
        lines.append(line)
    return pd.DataFrame(lines)


def _search_frame(table: SearchTable) -> pd.DataFrame:
    """A row per arm, with the champion's hyperparameters as columns."""
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


def _times_frame(times: Times) -> pd.DataFrame:
    """A row per phase, and one for the time between phases; times in seconds."""
    lines = []
    for phase in times.phases:
        line: dict[str, str | float] = {"phase": phase.phase, "wall": phase.wall}
        line |= {"share": phase.wall / times.total if times.total else math.nan}
        if phase.slot_time:
            line |= {"slots": phase.slots, **asdict(phase.slot_time)}
            line |= {"efficiency": phase.slot_time.efficiency}
            if phase.unrecorded and not phase.slot_time.start_up:
                line |= {"start_up": math.nan}
        lines.append(line)
    if times.phases:
        share = times.other / times.total if times.total else math.nan
        lines.append({"phase": "between phases", "wall": times.other, "share": share})
    columns = ["phase", "wall", "share", "slots", *_names(SlotTime), "efficiency"]
    return pd.DataFrame(lines, columns=columns).astype({"slots": "Int64"})


def _names(kind: type[RunTime] | type[SlotTime]) -> list[str]:
    return [column.name for column in fields(kind)]


def _effects_frame(verdict: Verdict) -> pd.DataFrame:
    """A row per setting and measure; accuracies in points, losses in nats."""
    lines = []
    for comparison in verdict.comparisons:
        effects = {
            "test_accuracy": comparison.accuracy,
            "test_loss": comparison.loss,
            "last_test_accuracy": comparison.last_accuracy,
            "last_test_loss": comparison.last_loss,
            **{f"test_accuracy recipe {k}": e for k, e in comparison.by_recipe.items()},
        }
        for measure, effect in effects.items():
            place = {"setting": comparison.setting, "baseline": comparison.baseline}
            lines.append({**place, "measure": measure, **asdict(effect)})
    return pd.DataFrame(lines)


def _write_figures(
    folder: Path, pictures: Mapping[str, Sequence[Picture]], inputs: str
) -> tuple[Path, ...]:
    written = []
    for picture in (picture for section in pictures.values() for picture in section):
        for file_format in ("svg", "png"):
            path = folder / "figures" / f"{picture.name}.{file_format}"
            write_atomically(path, render_file(picture, inputs, file_format))
            written.append(path)
    return tuple(written)
