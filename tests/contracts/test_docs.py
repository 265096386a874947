"""What the documentation says: links lead somewhere, commands parse, code runs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from study.config import GROUPS, StudyConfig
from study.errors import UserError
from study.system.cli import parse_arguments
from tests.support import ROOT
from tests.support.command import Finished

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

#: What pages that follow the README must be, and nothing else.
NAMES = {
    "architecture", "article", "benchmarks", "cluster", "data-and-weights", "exported-model",
    "fault-tolerance", "finetuning", "method", "own-images", "results", "run-directory", "running",
    "spaces", "tracking",
}  # fmt: skip


def commands() -> Iterator[str]:
    """The indented command lines of all pages, continued lines joined, comments cut off."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).replace("\\\n", " ")
        for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
            yield re.sub(r"\s{2,}#.*", "", line)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_each_subject_has_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    assert {page.stem for page in PAGES[2:]} == NAMES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_table_of_faults_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "fault-tolerance.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+)…?)?`", text)
    assert len(named) > 30
    for file, test in named:
        (found,) = (ROOT / "tests").rglob(file)
        assert f"def {test}" in found.read_text(), (file, test)


def test_every_command_of_a_study_parses() -> None:
    studies = [
        c
        for c in commands()
        if "run_study.py" in c and not c.startswith(("uv run --group", "runs"))
    ]
    assert len(studies) > 15
    for line in studies:
        words = line.partition("run_study.py")[2].partition(" && ")[0].replace("'", "").split()
        parse_arguments(StudyConfig, "run_study.py", [w for w in words if w != "..."], GROUPS)


def test_an_option_that_does_not_exist_would_be_seen() -> None:
    with pytest.raises(UserError):
        parse_arguments(StudyConfig, "run_study.py", ["--trails", "40"], GROUPS)


@pytest.fixture(scope="module")
def folder(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: runs/NAME is a finished study, and there are photographs."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("NAME", "A", "B"):
        shutil.copytree(finished.rundir.path, folder / "runs" / name)
    (folder / "holiday").mkdir()
    for file in ("photo.jpg", "holiday/beach.jpg"):
        Image.new("RGB", (40, 30), "navy").save(folder / file)
    spaces = (ROOT / "docs" / "spaces.md").read_text()
    (folder / "my_spaces.py").write_text(re.findall(r"```python\n(.*?)```", spaces, re.DOTALL)[0])
    return folder


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["spaces", "run-directory", "exported-model"])
def test_python_blocks_run(page: str, folder: Path) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        run(folder, "-c", block)


def test_no_other_page_has_python_blocks() -> None:
    having = {page.stem for page in PAGES if "```python" in page.read_text()}
    assert having == {"spaces", "run-directory", "exported-model"}


PREFIXES = ("-m search_spaces", "-m analysis", "-m study.predict")


@pytest.mark.parametrize(
    "words",
    sorted(
        {
            c.removeprefix("python ")
            for c in commands()
            if c.startswith(tuple(f"python {p}" for p in PREFIXES))
        }
    ),
)
def test_commands_run(words: str, folder: Path) -> None:
    if "team-1" in words:  # a study that is fetched from a bucket first
        words = words.replace("team-1", "NAME")
    assert run(folder, *words.split())
