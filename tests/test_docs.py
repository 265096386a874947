"""What the documentation points to is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_table_of_faults_names_tests_that_exist() -> None:
    text = (TESTS.parent / "study" / "README.md").read_text()
    current, seen = "", 0
    for name in re.findall(r"`((?:test_|…)[^`]*)`", text):
        file, _, test = name.partition("::")
        if not file.startswith("…"):
            current = (TESTS / file).read_text()
        parts = [part for part in (test or file).split("…") if part and not part.endswith(".py")]
        for part in parts:
            assert part in current, name
            seen += 1
    assert seen > 10
