"""What a node imports to report on itself."""

import subprocess
import sys

#: What a node may lack, or have in another version.
DEPENDENCIES = (
    "optuna",
    "pandas",
    "pyarrow",
    "ray",
    "rich",
    "safetensors",
    "torch",
    "tyro",
)


def test_a_node_that_lacks_packages_can_report_it() -> None:
    code = f"""
import sys
import study.runs.node_report
print([name for name in {DEPENDENCIES} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
