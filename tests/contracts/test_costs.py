"""Upper bounds on costs, counted rather than timed: a change that raises them fails here.

Counts are the same on every machine and under any load. The commands in tests/benchmarks/ measure
what they mean in seconds.
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
from study.features.extract import fold_batch_norms
from study.features.onnx_engine import build_onnx
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


#: Operators that return a view of the same memory.
VIEWS = {"t", "detach", "view", "expand", "alias", "unsqueeze", "squeeze"}


@pytest.fixture
def step() -> TrainingStep:
    """A training step of a head on features, already run twice."""
    torch.manual_seed(0)
    inputs = torch.randn(2 * BATCH, FEATURES).bfloat16()
    labels = torch.arange(2 * BATCH) % CLASSES
    head = build_head(VALUES, FEATURES, CLASSES, seed=1).train()
    made = TrainingStep(head, build_optimizer(head, VALUES), inputs, labels, VALUES)
    for _ in range(2):
        made(torch.arange(BATCH), None)
    return made


def test_step_does_only_the_necessary_multiplications(step: TrainingStep) -> None:
    """Forward and both gradients of each layer, except the gradient of the first layer's inputs."""
    with FlopCounterMode(display=False) as counter:
        step(torch.arange(BATCH), None)
    layers = list(itertools.pairwise((FEATURES, *WIDTHS, CLASSES)))
    products = [2 * BATCH * a * b for a, b in layers]
    assert counter.get_total_flops() == 3 * sum(products) - products[0]


@pytest.mark.parametrize(("bf16", "most"), [(False, 46), (True, 62)])
def test_step_runs_few_operators(
    step: TrainingStep, bf16: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At small sizes the number of operator launches dominates a step."""
    monkeypatch.setattr("study.training.step.has_native_bf16", lambda _: bf16)
    step(torch.arange(BATCH), None)
    with CountedOperators() as counted:
        step(torch.arange(BATCH), None)
    # One fused optimizer step for all parameters.
    assert counted.counts["aten._fused_adamw_.default"] == 1
    work = {name: n for name, n in counted.counts.items() if name.split(".")[1] not in VIEWS}
    assert sum(work.values()) <= most, work


def test_folded_backbone_has_only_the_expected_operators(random_weights: Weights) -> None:
    backbone: Any = fold_batch_norms(
        build_backbone(random_weights.state, random_weights.architecture)
    )
    nodes = Counter(node.op_type for node in onnx.load_from_string(build_onnx(backbone)).graph.node)
    assert nodes == {
        "Conv": 53,
        "Relu": 49,
        "Add": 16,
        "MaxPool": 1,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Identity": 1,
    }


#: Each takes a second or more to import, and training a head does not need them.
SLOW = ("torchvision", "torch._dynamo", "matplotlib", "scipy", "onnx", "onnxruntime", "imagehash")


@pytest.mark.parametrize("module", ["study.pipeline", "study.runs.worker"])
def test_nothing_slow_is_imported_before_the_first_step(module: str) -> None:
    assert not {*SLOW} & imported_by(f"import {module}")


def test_run_imports_nothing_slow() -> None:
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
            session.ray_started_early(cores=2),
        ):
            pass
        """
    )
    assert started == "set()\n"


def test_search_imports_no_loggers() -> None:
    count = "from ray.air._internal import usage; usage.tag_callbacks([object()])"
    assert "mlflow" in imported_by(count)
    ours = "from study.search.tune import skip_logger_imports; skip_logger_imports()"
    assert "mlflow" not in imported_by(f"{ours}; {count}")


def imported_by(code: str) -> set[str]:
    """Return all modules that a new process has imported after running some code."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(found.stdout))


def test_invalid_options_are_refused_before_anything_slow_is_imported() -> None:
    assert not {*SLOW, "torch", "ray", "pandas", "optuna"} & imported_by("import run_study")


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc (mallopt)")
def test_step_requests_no_memory_from_the_system() -> None:
    """Steps reuse freed memory: the system zeroes each new page, which takes time."""
    code = """
        import ray
        from study.cluster.session import ray_session
        from tests.contracts.test_costs import count_page_faults

        with ray_session(None, cores=1):
            print(ray.get(ray.remote(count_page_faults).remote()))
    """
    # The weights alone take 5,130 pages.
    assert int(printed_by(code)) < 250


@pytest.mark.integration
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc (malloc_info)"
)
def test_threads_of_a_worker_share_a_heap(tmp_path: Path) -> None:
    """Each trial has its own thread; with a heap per thread, each would retain freed memory."""
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
def test_trials_run_in_prestarted_processes() -> None:
    """Processes that Ray starts with itself have done the imports; new ones would repeat them."""
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
            time.sleep(6)  # processes start and import
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
    # A quick import, since it does not matter here what they import.
    assert printed_by(code, RAY_preload_python_modules="json") == "0\n"


@pytest.mark.integration
def test_ray_prestarts_only_as_many_processes_as_a_study_can_use() -> None:
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
    """Return what code prints in a separate process, since a session changes the environment."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    ).stdout


def count_page_faults() -> int:
    """Return the page faults per training step of a wide head, in a Ray worker process."""
    settings = RunSettings(1, "val_accuracy", threads=1, rundir=RunDir(Path()))
    with worker._device(settings):
        take = steps_of("2048-512", 64)
        take(10)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        take(10)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10


def count_heaps(file: Path) -> int:
    """Return the number of heaps of this process after some threads have allocated memory."""
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


#: Prints by how many bytes computing features grows the process's private memory (USS).
HELD = """
import gc, psutil, torch
from study.features.extract import compute_here, load_features
from study.features.onnx_engine import build_onnx  # imported before measuring
from tests import conftest
from tests.study.features.test_extract import SMALL, part
dataset = part(conftest.small_dataset.__wrapped__(), 256)
weights = conftest.random_weights.__wrapped__()
torch.zeros(256, 256) @ torch.zeros(256, 256)
gc.collect()
before = psutil.Process().memory_full_info().uss
compute = compute_here(torch.device("cpu"), "fp32")
features = load_features(dataset, weights, SMALL, compute=compute)
print(psutil.Process().memory_full_info().uss - before)
"""


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
@pytest.mark.usefixtures("empty_cache")
def test_memory_for_computing_features_is_released() -> None:
    """A backbone takes 94 MB, and is copied several times before it reaches ONNX Runtime."""
    assert int(printed_by(HELD).splitlines()[-1]) < 100e6
