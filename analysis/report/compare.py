"""One page that compares several studies, for example of two image sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.frames import StudyFrames, load_readable_frames
from analysis.report.health import check_health
from analysis.report.page import Section, render_page
from analysis.report.provenance import describe_inputs
from analysis.report.text_tables import TextTable
from analysis.rundir import write_atomically
from analysis.stats.effect import interval
from analysis.stats.verdict import Verdict, compute_verdict
from analysis.words import p_value, signed


@dataclass(frozen=True)
class ComparedStudy:
    """One of the studies on the page.

    Attributes:
        name: Name of its run directory.
        frames: Its data.
        verdict: Its verdict.
        warnings: The health checks that did not pass, a phrase each.
    """

    name: str
    frames: StudyFrames
    verdict: Verdict
    warnings: tuple[str, ...]


def write_comparison(run_dirs: Sequence[Path], path: Path) -> TextTable:
    """Write one page about several studies and return its table.

    Raises:
        RunDirError: A directory is not a run directory, or has another format.
    """
    studies = [_compare(run_dir) for run_dir in run_dirs]
    table = show_studies(studies)
    sections = (
        Section("studies", table.title, tables=[table]),
        *(
            Section(
                f"study-{index}",
                study.name,
                texts=_texts(study),
            )
            for index, study in enumerate(studies, start=1)
        ),
    )
    lead = (
        f"{len(studies)} studies side by side. Each verdict is about its own study;"
        " differences between studies are not tested."
    )
    page = render_page("Comparison of studies", [lead], "", sections, None)
    write_atomically(path, page)
    return table


def show_studies(studies: Sequence[ComparedStudy]) -> TextTable:
    """Return a table with a row per study and setting."""
    rows = []
    for study in studies:
        config = study.frames.record.get("config", {})
        place = (study.name, str(config.get("space", "")), str(config.get("image_size", "")))
        for comparison in study.verdict.comparisons:
            confirm = study.frames.confirm
            means = 100 * confirm.groupby("setting")[f"test_{study.frames.accuracy}"].mean()
            rows.append(
                (
                    *place,
                    f"{means[comparison.baseline]:.2f} %",
                    f"{comparison.setting} {means[comparison.setting]:.2f} %",
                    f"{signed(comparison.accuracy.mean)} ({interval(comparison.accuracy)})",
                    p_value(comparison.adjusted_p),
                    f"{signed(comparison.loss.mean, 3)} ({interval(comparison.loss, 3)})",
                    comparison.outcome,
                )
            )
        if not study.verdict.comparisons:
            rows.append((*place, "", "", "", "", "", study.verdict.outcome))
    header = (
        "study",
        "space",
        "image size",
        "baseline test accuracy",
        "test accuracy",
        "change (95 % CI)",
        "p",
        "change of test loss (95 % CI)",
        "verdict",
    )
    note = (
        "Mean test accuracy over all confirmation runs (balanced if the study's metric is);"
        " changes over matched pairs, in points and nats."
    )
    return TextTable("Studies", header, tuple(rows), note)


def _texts(study: ComparedStudy) -> list[str]:
    texts = [*study.frames.problems, study.verdict.sentence]
    if study.warnings:
        texts.append(f"Check before you trust this: {'; '.join(study.warnings)}.")
    return [*texts, f"Used: {describe_inputs(study.frames.record)}."]


def _compare(run_dir: Path) -> ComparedStudy:
    frames = load_readable_frames(run_dir)
    verdict = compute_verdict(frames)
    warnings = [finding.check for finding in check_health(frames, verdict) if not finding.passed]
    return ComparedStudy(run_dir.resolve().name, frames, verdict, tuple(warnings))
