"""The report of a study with hostile names and texts: they stay text everywhere."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from analysis import __main__ as command
from analysis.figures import importance
from analysis.report.compare import write_comparison
from analysis.report.write import Report, write_report
from analysis.rundir import RunDir
from tests.support.hostile import EVIL, EVIL_NAME, make_hostile_study

#: Matplotlib warns that such long names leave no room for the axes.
pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")


class Elements(HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_hostile_study(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def report(run: RunDir) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        # The small study has too few completed trials for this figure.
        patch.setattr(importance, "FEWEST_FOR_IMPORTANCE", 1)
        return write_report(run.path)


def check_page(elements: Elements) -> None:
    """Check that the only script is the page's own, and that nothing is fetched or called."""
    assert elements.tags.count("script") == 1
    assert not {"img", "image", "iframe", "object", "a", "foreignobject"} & {*elements.tags}
    names = {name for name, _ in elements.attributes}
    assert not [name for name in names if name.startswith("on") or "src" in name or "'" in name]
    assert all(value[0] == "#" for name, value in elements.attributes if "href" in name)


def test_names_and_texts_stay_text_in_the_page(report: Report) -> None:
    elements = Elements(report.path)
    check_page(elements)
    shown = " ".join(elements.texts)
    for text in (
        f"study{EVIL_NAME}",  # the title
        f"no-dropout{EVIL}",
        f"no-dropout-005{EVIL_NAME}",  # a champion
        f"--name small{EVIL}",
        f"AMD EPYC{EVIL}",
        f"head 2048-512{EVIL}",
        f"own{EVIL} {EVIL}",  # a hyperparameter and its value
        f"damaged{EVIL_NAME}.npz cannot be read",
    ):
        assert text in shown
    assert any(name == "aria-label" and EVIL in value for name, value in elements.attributes)


def test_names_stay_text_in_the_figures(report: Report) -> None:
    assert {path.stem for path in report.figures} >= {"classes", "heatmap", "importance"}
    drawn = ""
    for path in report.figures:
        if path.suffix == ".svg":
            svg = ElementTree.parse(path).getroot()
            tags = {element.tag.rsplit("}", 1)[-1] for element in svg.iter()}
            assert not {"script", "img", "foreignObject", "a"} & tags
            drawn += "".join(svg.itertext())
    for text in (f"dropout{EVIL}", f"class 3 {EVIL}", f"own{EVIL}", f"2048-512{EVIL}"):
        assert text in drawn


def test_names_stay_text_on_the_screen(
    run: RunDir,
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In rich markup, [/bold] would be an error and [red] would vanish."""
    monkeypatch.setattr(command, "write_report", lambda _: report)
    monkeypatch.setattr(sys, "argv", ["analysis", str(run.path)])
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert f"Report: {report.path}\n" in printed
    assert "[/bold][red]" in printed


def test_names_stay_text_in_a_comparison(run: RunDir, tmp_path: Path) -> None:
    write_comparison([run.path, run.path], tmp_path / "page.html")
    elements = Elements(tmp_path / "page.html")
    check_page(elements)
    assert f"dropout{EVIL}" in " ".join(elements.texts)


def test_the_error_of_a_trial_is_read_back_unchanged(run: RunDir) -> None:
    assert {trial.error for trial in run.read_trials()} == {EVIL}
