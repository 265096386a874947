"""What the documentation points to is there."""

import re

from tests.support import ROOT


def test_the_table_of_faults_names_tests_that_exist() -> None:
    text = (ROOT / "study" / "README.md").read_text()
    current, seen = "", 0
    for name in re.findall(r"`((?:test_|…)[^`]*)`", text):
        file, _, test = name.partition("::")
        if not file.startswith("…"):
            (found,) = (ROOT / "tests").rglob(file)
            current = found.read_text()
        parts = [part for part in (test or file).split("…") if part and not part.endswith(".py")]
        for part in parts:
            assert part in current, name
            seen += 1
    assert seen > 10
