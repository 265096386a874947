"""The package as a wheel, installed in a separate environment and used from another folder."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import FIXTURES, ROOT


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("study", "search_spaces", "analysis"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", "run_study.py"):
        shutil.copy(ROOT / name, source)
    uv("build", "--wheel", "--out-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    uv("venv", "--python", sys.executable, folder / "env")
    found = folder / "env" / "bin" / "python"
    uv("pip", "install", "--python", found, "--no-deps", wheel)
    # .pth files in that folder are not processed, so the editable install here stays invisible.
    packages = folder / "env" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return found


def uv(*words: str | Path) -> None:
    done = subprocess.run(["uv", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run(python: Path, cwd: Path, *words: str) -> str:
    done = subprocess.run(
        [str(python), *words], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["study", "analysis", "search_spaces", "run_study"])
def test_packages_are_imported_from_the_wheel(package: str, python: Path, tmp_path: Path) -> None:
    found = run(python, tmp_path, "-c", f"import {package}; print({package}.__file__)")
    assert Path(found.strip()).is_relative_to(python.parents[1])


def test_commands_run_from_another_folder(python: Path, tmp_path: Path) -> None:
    assert "best_model/" in run(python, tmp_path, "-m", "study.predict", "--help")
    assert "run directory" in run(python, tmp_path, "-m", "study.export", "--help")
    assert "layerwise" in run(python, tmp_path, "-m", "search_spaces")
    assert "--trials" in run(python, tmp_path, "-m", "run_study", "--help")


def test_report_is_written_from_another_folder(python: Path, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "study", tmp_path / "study-1")
    run(python, tmp_path, "-m", "analysis", "study-1")
    assert (tmp_path / "study-1" / "report" / "index.html").exists()


def test_model_card_template_is_part_of_the_wheel(python: Path, tmp_path: Path) -> None:
    code = "from study.export.model_card import load_template; print(load_template().filename)"
    assert Path(run(python, tmp_path, "-c", code).strip()).is_relative_to(python.parents[1])
