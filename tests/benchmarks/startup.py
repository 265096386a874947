"""Time from the command to the first trial's first step, and import time of each package.

    python -m tests.benchmarks.startup [--images 6000] [--image-size 32] [--repeats 5]

The study has its images, weights and features in the cache. The baseline is the minimum that any
study with Ray and PyTorch needs: a process that imports torch and Ray Tune, starts Ray with the
same options, and gets an answer from one worker that has imported torch. Rounds are paired; the
first one is discarded. Each import is timed in a new process.

Measured (`--images 60000`, n = 5, 2 cores of an AMD EPYC with AVX2, Python 3.11.7, torch 2.15.0,
ray 2.60.0): 1.59 times as long as the bare start (1.39 to 1.74), 19 s against 12 s. Imports: torch
2.2 s, torchvision 4.8, ray.tune 1.8, scipy.stats 1.3, study.pipeline 5.1, run_study 0.3.
"""

import argparse
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from analysis.rundir import RunDir
from tests.benchmarks.paired import Spread, about, in_turn, ratio, show
from tests.support import ROOT

BARE = """
import os
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
import torch, ray
from ray import tune
ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False,
         log_to_driver=False, logging_level="ERROR")

@ray.remote
def answer():
    import time
    import torch
    return time.time()

print(ray.get(answer.remote()), flush=True)
"""

PACKAGES = ("numpy", "torch", "torchvision", "ray", "ray.tune", "optuna", "pandas", "scipy.stats")
OWN = (
    "study.config",
    "study.training.loop",
    "study.pipeline",
    "analysis.report.write",
    "run_study",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(about("ray", "optuna", "pandas"))

    # Each work returns its own time; how long its process lives does not matter.
    found: dict[str, list[float]] = {"study": [], "bare": []}
    works: dict[str, Callable[[], object]] = {
        "study": lambda: found["study"].append(seconds_to_first_step(options)),
        "bare": lambda: found["bare"].append(seconds_of_bare()),
    }
    in_turn(works, options.repeats)
    study, bare = (Spread(tuple(found[name][1:])) for name in ("study", "bare"))
    print(f"study / bare: {ratio(study, bare).shown()}, n = {options.repeats}")
    print(f"seconds: study {study.shown(1)}, bare {bare.shown(1)}\n")

    imports = {name: import_seconds(name, options.repeats) for name in (*PACKAGES, *OWN)}
    rows = [[name, spread.shown()] for name, spread in imports.items()]
    print(show(["import in a new process", "seconds"], rows))


def seconds_to_first_step(options: argparse.Namespace) -> float:
    """Return the seconds from the start of the command to that of the first epoch of any trial."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"--images={options.images}",
            f"--image-size={options.image_size}",
            "--transfer=frozen",
            "--trials=40",
            f"--storage={folder}",
            "--name=startup",
        ]
        begun = time.time()
        process = subprocess.Popen(
            [sys.executable, "run_study.py", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        rundir = RunDir(Path(folder) / "startup")
        while process.poll() is None and not (rundir.epochs.exists() and rundir.read_epochs()):
            time.sleep(0.2)
        if process.poll() is not None:
            output = process.stdout.read().decode() if process.stdout else ""
            raise RuntimeError(f"the study ended before its first epoch:\n{output}")
        process.terminate()  # Ctrl-C is ignored if this command runs in the background
        process.communicate()
        return min(row.start for row in rundir.read_epochs()) - begun


def seconds_of_bare() -> float:
    """Return the seconds from the start of a process to its worker's answer."""
    begun = time.time()
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BARE)], capture_output=True, text=True, check=True
    ).stdout
    return float(output.split()[-1]) - begun


def import_seconds(module: str, repeats: int) -> Spread:
    """Time the import of a module with its dependencies, without the start of Python itself."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    seconds = []
    for _ in range(repeats + 1):
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        seconds.append(float(found.stdout.split()[-1]))
    return Spread(tuple(seconds[1:]))


if __name__ == "__main__":
    main()
