"""Pin the exact version of every package that `uv run` installs, in pyproject.toml.

    uv run --no-project .ci/pin.py

uv.lock is not committed, because it names the registry it was made with. The pins replace it: this
command resolves the dependencies without the old pins, and writes the full resolution to
`[tool.uv] constraint-dependencies`, which uv honours and pip ignores.
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^constraint-dependencies = \[\n.*?^\]\n", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Resolve all dependencies and write the pins."""
    pyproject = ROOT / "pyproject.toml"
    text = pyproject.read_text()
    pins = resolve(BLOCK.sub("", text))
    lines = "".join(f"    {quote(pin)},\n" for pin in pins)
    block = f"constraint-dependencies = [\n{lines}]\n"
    if BLOCK.search(text):
        text = BLOCK.sub(lambda _: block, text)
    else:
        text = text.replace("[tool.uv]\n", f"[tool.uv]\n{block}", 1)
    pyproject.write_text(text)
    print(f"{len(pins)} packages pinned in {pyproject.name}")


def resolve(pyproject: str) -> list[str]:
    """Return the full resolution of a pyproject.toml, as requirements with markers."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "pyproject.toml").write_text(pyproject)
        for name in ("README.md", "LICENSE", "run_study.py", "study", "search_spaces", "analysis"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, project / name)
        export = ["uv", "export", "--quiet", "--no-hashes", "--no-annotate", "--no-header"]
        export += ["--no-emit-project", "--all-groups", "--all-extras"]
        done = subprocess.run(export, cwd=project, capture_output=True, text=True, check=True)
    return sorted(line for line in done.stdout.splitlines() if line and not line.startswith("#"))


def quote(pin: str) -> str:
    """Return a requirement as a TOML string; its markers use single quotes only."""
    assert '"' not in pin
    return f'"{pin}"'


if __name__ == "__main__":
    main()
