"""Separate Python environments, for tests that must not use this project's packages."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path


def make_environment(folder: Path, *packages: str) -> Path:
    """Create an environment with these packages, using uv if installed, else pip.

    Args:
        folder: Where to create it.
        packages: Requirements, such as "numpy==2.4.6".

    Returns:
        Path of its Python.
    """
    python = folder / "bin" / "python"
    if uv := shutil.which("uv"):
        create = [uv, "venv", "--quiet", "--python", sys.executable, str(folder)]
        subprocess.run(create, check=True, timeout=300)
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    else:
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
    # From another folder: inside this project uv would apply the project's pins.
    subprocess.run([*install, *packages], cwd=folder, check=True, timeout=600)
    return python
