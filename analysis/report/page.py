"""The HTML page: a single file that works offline, with dark mode, print and phone layouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis.figures import Picture, render_inline
from analysis.report.health import Finding
from analysis.report.provenance import command_again, describe_provenance
from analysis.report.text_tables import TextTable


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: The anchor for links.
        title: The heading.
        texts: Paragraphs.
        tables: Tables.
        pictures: Figures.
        findings: Health checks.
    """

    name: str
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[TextTable] = ()
    pictures: Sequence[Picture] = ()
    findings: Sequence[Finding] = ()

    @property
    def empty(self) -> bool:
        """True if there is nothing to show."""
        return not (self.texts or self.tables or self.pictures or self.findings)


def render_page(
    title: str,
    verdict: Sequence[str],
    outcome: str,
    sections: Sequence[Section],
    record: Mapping[str, Any] | None,
) -> str:
    """Return the HTML of a page.

    Args:
        title: What the page is about.
        verdict: Sentences for the top; the first is the verdict.
        outcome: The outcome of the verdict; sets the colour of the top.
        sections: In order; empty ones are omitted.
        record: study.json, for how to reproduce the results; None for a page of several studies.
    """
    environment = Environment(
        loader=PackageLoader("analysis.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = render_inline
    return environment.get_template("page.html.j2").render(
        title=title,
        verdict=verdict,
        outcome=outcome,
        sections=[section for section in sections if not section.empty],
        command=command_again(record) if record else "",
        provenance=describe_provenance(record) if record else (),
    )
