"""The architecture: which package may import which, and how many modules a folder holds."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.support import ROOT

#: Maximum number of modules in a folder, without `__init__.py`, to keep folders easy to scan.
MOST_MODULES = 12

#: Exempt: one module per figure.
EXEMPT = Path("analysis/figures")


def test_imports_respect_the_layers() -> None:
    """The contracts are in pyproject.toml; `uv run lint-imports` prints violations."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_folder_is_crowded() -> None:
    files = [f.relative_to(ROOT) for top in ("study", "analysis") for f in ROOT.glob(f"{top}/**/*")]
    modules = Counter(f.parent for f in files if f.suffix == ".py" and f.name != "__init__.py")
    crowded = {folder: n for folder, n in modules.items() if n > MOST_MODULES}
    assert not {folder: n for folder, n in crowded.items() if folder != EXEMPT}
    assert EXEMPT in modules
