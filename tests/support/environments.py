"""Python environments of their own, for what is to run without this project or beside it."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path


def make_environment(folder: Path, *packages: str) -> Path:
    """Make an environment with these packages, with uv where it is there, else with pip.

    Args:
        folder: Where to.
        packages: As pip takes them, such as "numpy==2.4.6".

    Returns:
        Its Python.
    """
    python = folder / "bin" / "python"
    if uv := shutil.which("uv"):
        create = [uv, "venv", "--quiet", "--python", sys.executable, str(folder)]
        subprocess.run(create, check=True, timeout=300)
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    else:
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
    # From elsewhere: in this project's folder uv would hold them to its pins.
    subprocess.run([*install, *packages], cwd=folder, check=True, timeout=600)
    return python
