"""What things cost, counted and not timed: a change that makes them dearer fails here.

Counts are the same on every machine and under any load. What they mean in seconds is measured by
the commands in tests/benchmarks/.
"""

import ctypes
import itertools
import json
import os
import resource
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from analysis.rundir import RunDir
from search_spaces import Value
from study.features.extract import folded
from study.features.onnx_engine import write
from study.models.backbone import build_backbone
from study.models.head import build_head
from study.models.weights import Weights
from study.runs import worker
from study.runs.worker import RunSettings
from study.training.optimizer import build_optimizer
from study.training.step import TrainingStep
from tests.benchmarks.head_step import steps_of
from tests.support import ROOT

BATCH, FEATURES, CLASSES = 64, 48, 10
WIDTHS = (32, 16)
VALUES: dict[str, Value] = {
    "head": "32-16",
    "dropout": 0.3,
    "learning_rate": 1e-3,
    "weight_decay": 1e-2,
    "batch_size": BATCH,
    "optimizer": "adamw",
}


class CountedOperators(TorchDispatchMode):
    """Counts the operators that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count and run one."""
        self.counts[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


#: Operators that look at the same memory in another way.
VIEWS = {"t", "detach", "view", "expand", "alias", "unsqueeze", "squeeze"}


@pytest.fixture
def step() -> TrainingStep:
    """A step of a head on features, taken twice already."""
    torch.manual_seed(0)
    inputs = torch.randn(2 * BATCH, FEATURES).bfloat16()
    labels = torch.arange(2 * BATCH) % CLASSES
    head = build_head(VALUES, FEATURES, CLASSES, seed=1).train()
    made = TrainingStep(head, build_optimizer(head, VALUES), inputs, labels, VALUES)
    for _ in range(2):
        made(torch.arange(BATCH), None)
    return made


def test_a_step_multiplies_no_more_than_it_must(step: TrainingStep) -> None:
    """Forward and both gradients of each layer, but for the gradient of the first one's inputs."""
    with FlopCounterMode(display=False) as counter:
        step(torch.arange(BATCH), None)
    layers = list(itertools.pairwise((FEATURES, *WIDTHS, CLASSES)))
    products = [2 * BATCH * a * b for a, b in layers]
    assert counter.get_total_flops() == 3 * sum(products) - products[0]


@pytest.mark.parametrize(("bf16", "most"), [(False, 46), (True, 62)])
def test_a_step_takes_few_operators(
    step: TrainingStep, bf16: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At small sizes a step is bound by how many operators there are to launch."""
    monkeypatch.setattr("study.training.step.has_native_bf16", lambda _: bf16)
    step(torch.arange(BATCH), None)
    with CountedOperators() as counted:
        step(torch.arange(BATCH), None)
    # One optimizer step for all parameters, whatever their number.
    assert counted.counts["aten._fused_adamw_.default"] == 1
    work = {name: n for name, n in counted.counts.items() if name.split(".")[1] not in VIEWS}
    assert sum(work.values()) <= most, work


def test_the_folded_backbone_is_convolutions_and_what_joins_them(random_weights: Weights) -> None:
    backbone: Any = folded(build_backbone(random_weights.state, random_weights.architecture))
    nodes = Counter(node.op_type for node in onnx.load_from_string(write(backbone)).graph.node)
    assert nodes == {
        "Conv": 53,
        "Relu": 49,
        "Add": 16,
        "MaxPool": 1,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Identity": 1,
    }


#: Each takes a second or more to import, and training a head needs none of them.
SLOW = ("torchvision", "torch._dynamo", "matplotlib", "scipy", "onnx", "onnxruntime", "imagehash")


@pytest.mark.parametrize("module", ["study.pipeline", "study.runs.worker"])
def test_what_is_imported_before_the_first_step(module: str) -> None:
    assert not {*SLOW} & imported_by(f"import {module}")


def test_a_run_imports_no_more() -> None:
    run = f"""
        import torch
        from study.training.data import Part, TrainingData
        from study.training.loop import train

        part = Part(torch.zeros(8, 4).bfloat16(), torch.zeros(8, dtype=torch.int64))
        data = TrainingData(part, part, part, classes=2)
        train({VALUES!r}, data, seed=0, epochs=1, metric="val_accuracy")
    """
    assert not {*SLOW} & imported_by(textwrap.dedent(run))


def test_ray_starts_before_anything_slow_is_imported() -> None:
    slow = {*SLOW, "torch", "ray.tune", "pandas"}
    assert not slow & imported_by("import study.cluster.session")
    started = printed_by(
        """
        import sys
        from unittest.mock import patch

        from study.cluster import session

        def start(**_):
            print({"ray.tune", "study.training.loop"} & sys.modules.keys())

        with (
            patch.object(session, "start_ray", start),
            session.ray_ahead(cores=2),
        ):
            pass
        """
    )
    assert started == "set()\n"


def test_a_search_imports_no_loggers() -> None:
    count = "from ray.air._internal import usage; usage.tag_callbacks([object()])"
    assert "mlflow" in imported_by(count)
    ours = "from study.search.tune import import_no_loggers; import_no_loggers()"
    assert "mlflow" not in imported_by(f"{ours}; {count}")


def imported_by(code: str) -> set[str]:
    """All modules that a new process has after it has run some code."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(found.stdout))


def test_wrong_options_are_refused_before_anything_slow_is_imported() -> None:
    assert not {*SLOW, "torch", "ray", "pandas", "optuna"} & imported_by("import run_study")


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a setting of glibc's")
def test_a_step_asks_the_system_for_no_memory() -> None:
    """What a step frees serves the next one: the system clears each page before it gives it out."""
    code = """
        import ray
        from study.cluster.session import ray_session
        from tests.contracts.test_costs import count_page_faults

        with ray_session(None, cores=1):
            print(ray.get(ray.remote(count_page_faults).remote()))
    """
    # The weights alone are 5,130 pages.
    assert int(printed_by(code)) < 250


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="counts glibc's heaps")
def test_threads_of_a_process_that_trains_share_a_heap(tmp_path: Path) -> None:
    """Each trial has a thread of its own; each heap would keep what a trial has freed."""
    code = f"""
        import ray
        from pathlib import Path
        from study.cluster.session import ray_session
        from tests.contracts.test_costs import count_heaps

        with ray_session(None):
            print(ray.get(ray.remote(count_heaps).remote(Path({str(tmp_path / "info")!r}))))
    """
    assert printed_by(code) == "1\n"


@pytest.mark.integration
def test_trials_get_the_processes_that_have_imported_what_runs_need() -> None:
    """Those that Ray starts with itself; new ones would import everything anew."""
    code = """
        import time
        import psutil, ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
        from study.system.hardware import cpu_count
        from study.cluster.session import ray_session

        class Trial:
            def started(self):
                return psutil.Process().create_time()

        with ray_session(None):
            time.sleep(6)  # they start and import
            groups = [placement_group([{"CPU": 1}]) for _ in range(cpu_count())]
            assert all(group.wait(30) for group in groups)
            reserved = time.time()
            time.sleep(1.5)  # Ray Tune takes tenths of a second
            actors = [
                ray.remote(num_cpus=1)(Trial).options(
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group)
                ).remote()
                for group in groups
            ]
            started = ray.get([actor.started.remote() for actor in actors])
            print(sum(time > reserved for time in started))
    """
    # Something quick, since what they import does not matter here.
    assert printed_by(code, RAY_preload_python_modules="json") == "0\n"


@pytest.mark.integration
def test_processes_are_as_many_as_a_study_can_use() -> None:
    code = """
        import psutil, time
        from study.cluster.session import ray_session

        def processes():
            children = psutil.Process().children(recursive=True)
            return sum(child.name().startswith("ray::IDLE") for child in children)

        with ray_session(None, cores=1):
            end = time.time() + 60
            while not processes() and time.time() < end:
                time.sleep(0.1)
            time.sleep(2)  # others would start at the same time
            print(processes())
    """
    assert printed_by(code, RAY_preload_python_modules="json") == "1\n"


def printed_by(code: str, **environment: str) -> str:
    """What code prints in a process of its own: a session sets environment variables for good."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    ).stdout


def count_page_faults() -> int:
    """How many pages a step of a wide head asks of the system, in a process of Ray's."""
    settings = RunSettings(1, "val_accuracy", threads=1, rundir=RunDir(Path()))
    with worker._device(settings):
        take = steps_of("2048-512", 64)
        take(10)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        take(10)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10


def count_heaps(file: Path) -> int:
    """The heaps that this process has once some threads have allocated memory."""
    meeting = threading.Barrier(4)
    threads = [threading.Thread(target=meeting.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fopen(str(file).encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    return file.read_text().count("<heap nr=")


#: What a process holds for itself alone, before it computes features and afterwards; bytes.
HELD = """
import gc, psutil, torch
from study.features.extract import here, load_features
from study.features.onnx_engine import write  # what is imported stays, and is not counted
from tests import conftest
from tests.study.features.test_extract import SMALL, part
dataset = part(conftest.small_dataset.__wrapped__(), 256)
weights = conftest.random_weights.__wrapped__()
torch.zeros(256, 256) @ torch.zeros(256, 256)
gc.collect()
before = psutil.Process().memory_full_info().uss
compute = here(torch.device("cpu"), "fp32")
features = load_features(dataset, weights, SMALL, compute=compute)
print(psutil.Process().memory_full_info().uss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
@pytest.mark.usefixtures("empty_cache")
def test_what_computing_features_takes_is_given_back() -> None:
    """A backbone takes 94 MB, and is copied several times on its way to ONNX Runtime."""
    assert int(printed_by(HELD).splitlines()[-1]) < 100e6
