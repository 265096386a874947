"""study.json: the record of a study, for tracing its results and resuming it."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from study.cluster.machines import Machines
from study.config import StudyConfig, as_arguments
from study.data.dataset import Dataset, count_by_class
from study.data.duplicates import find_duplicates
from study.data.split import Split
from study.inputs import Inputs
from study.seeds import derive_seed
from study.study import Study
from study.system.hardware import cpu_count

RECORDED_PACKAGES = ("ray", "torch", "torchvision", "optuna", "numpy", "pandas", "dropout-study")


def new_record(study: Study) -> dict[str, Any]:
    """Return the initial study.json: what was requested, and on what machine."""
    return {
        **requested(study),
        "command": " ".join(["run_study.py", *sys.argv[1:]]),
        **describe_environment(),
        "starts": [],
    }


def inputs_as_record(inputs: Inputs) -> dict[str, Any]:
    """Return the study.json entries for data, split, weights and features."""
    dataset, split, weights = inputs.dataset, inputs.split, inputs.weights
    features = inputs.features
    return {
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "source_key": dataset.source_key,
            "sha256": dataset.sha256,
            "images": len(dataset.labels),
            **_describe_classes_and_files(dataset, split),
        },
        "split": {
            "train": len(split.train),
            "val": len(split.val),
            "test": len(split.test),
            "sha256": split.sha256,
        },
        "weights": {"name": weights.name, "source": weights.source, "sha256": weights.sha256},
        "preprocess": asdict(inputs.preprocess),
        "features": features and {"key": features.key, "precision": features.precision},
    }


def _describe_classes_and_files(dataset: Dataset, split: Split) -> dict[str, Any]:
    """Describe the classes and, for the user's own images, unreadable and duplicate files."""
    parts = {"train": split.train, "val": split.val, "test": split.test}
    described: dict[str, Any] = {
        "classes": list(dataset.classes),
        "images_per_class": {name: count_by_class(dataset, rows) for name, rows in parts.items()},
    }
    if dataset.files:
        part_of = {int(row): name for name, rows in parts.items() for row in rows}
        described["unreadable"] = list(dataset.unreadable)
        described["duplicates"] = [
            {
                "part": part_of[pair.first],
                "file": dataset.files[pair.first],
                "like_part": part_of[pair.second],
                "like": dataset.files[pair.second],
            }
            for pair in find_duplicates(dataset, split)
        ]
    return described


def add_start(
    record: Mapping[str, Any], study: Study, machines: Machines, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record with this start added, updated if it extends the study."""
    start = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "trials": study.config.trials,
        "seeds": study.config.seeds,
        **describe_environment(),
        "nodes": [
            {"address": node.address, "cpus": node.cpus, "gpus": node.gpus, "gpu": node.gpu_type}
            for node in machines.nodes
        ],
    }
    grown = requested(study) if is_extended(record, study.config) else {}
    if grown:
        grown["command"] = " ".join(["run_study.py", *as_arguments(grown["config"])])
    return {**record, **inputs, **grown, "starts": [*record.get("starts", []), start]}


def is_extended(record: Mapping[str, Any], config: StudyConfig) -> bool:
    """Return whether this start requests more trials or seeds than the study had."""
    before = record["config"]
    return bool(config.trials > before["trials"] or config.seeds > before["seeds"])


def requested(study: Study) -> dict[str, Any]:
    """Return what the user requested: configuration, arms, space and seeds."""
    config, space = study.config, study.space
    return {
        "config": asdict(config),
        "arms": {
            arm.name: {"factor": list(arm.factor), "trials": study.trials_per_arm[arm.name]}
            for arm in space.arms
        },
        "space": {
            **{f"arm {arm.name}": repr(dict(arm.factor)) for arm in space.arms},
            **{f"setting {arm.name}": repr(dict(arm.factor)) for arm in space.settings},
            **{name: repr(values) for name, values in space.recipe.items()},
        },
        "seeds": {
            "study": config.seed,
            "confirmation": [
                derive_seed(config.seed, "confirm", index) for index in range(config.seeds)
            ],
        },
    }


def describe_environment() -> dict[str, Any]:
    """Return package versions, hardware and commit of this process."""
    return {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in RECORDED_PACKAGES},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Return the project's commit, plus "+changes" if files differ; None outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
