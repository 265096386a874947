"""The architecture: who may import whom, and how many modules a folder holds."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.support import ROOT

#: As many modules as a newcomer can take in at a glance, `__init__.py` not counted.
MOST_MODULES = 12

#: A figure each.
EXEMPT = Path("analysis/figures")


def test_imports_run_downwards_only() -> None:
    """The contracts stand in pyproject.toml; `uv run lint-imports` prints what breaks them."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_folder_is_crowded() -> None:
    files = [f.relative_to(ROOT) for top in ("study", "analysis") for f in ROOT.glob(f"{top}/**/*")]
    modules = Counter(f.parent for f in files if f.suffix == ".py" and f.name != "__init__.py")
    crowded = {folder: n for folder, n in modules.items() if n > MOST_MODULES}
    assert not {folder: n for folder, n in crowded.items() if folder != EXEMPT}
    assert EXEMPT in modules
