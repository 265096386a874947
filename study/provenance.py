"""study.json: what a study is made of, so that its results can be traced and it can go on."""

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
from study.config import OPERATIONAL, as_arguments
from study.data.dataset import Dataset, count_by_class
from study.data.duplicates import find_duplicates
from study.data.split import Split
from study.errors import UserError
from study.features.extract import FeaturesName
from study.models.preprocess import Preprocess
from study.models.weights import Weights
from study.seeds import derive_seed
from study.study import Study
from study.system.hardware import cpu_count

PACKAGES = ("ray", "torch", "torchvision", "optuna", "numpy", "pandas", "dropout-study")

#: Options that a study may have more of when it goes on.
GROWING = ("trials", "seeds")


def begin(study: Study) -> dict[str, Any]:
    """What stands in study.json from the first moment on: what was asked for, and where."""
    return {
        **_asked(study),
        "command": " ".join(["run_study.py", *sys.argv[1:]]),
        **_made_with(),
        "starts": [],
    }


def describe_used(
    dataset: Dataset,
    split: Split,
    weights: Weights,
    preprocess: Preprocess,
    features: FeaturesName | None,
) -> dict[str, Any]:
    """What was used; `features` is None where all layers train."""
    return {
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "source_key": dataset.source_key,
            "sha256": dataset.sha256,
            "images": len(dataset.labels),
            **_describe_own(dataset, split),
        },
        "split": {
            "train": len(split.train),
            "val": len(split.val),
            "test": len(split.test),
            "sha256": split.sha256,
        },
        "weights": {"name": weights.name, "source": weights.source, "sha256": weights.sha256},
        "preprocess": asdict(preprocess),
        "features": features and {"key": features.key, "precision": features.precision},
    }


def _describe_own(dataset: Dataset, split: Split) -> dict[str, Any]:
    """What is known of classes, and of files that are the user's own."""
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


def with_this_start(
    record: Mapping[str, Any], study: Study, machines: Machines, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """The record with this start added; a study may have grown by it."""
    start = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "trials": study.config.trials,
        "seeds": study.config.seeds,
        **_made_with(),
        "nodes": [
            {"address": node.address, "cpus": node.cpus, "gpus": node.gpus, "gpu": node.gpu_type}
            for node in machines.nodes
        ],
    }
    grown = _asked(study) if grows(record, study) else {}
    if grown:
        grown["command"] = " ".join(["run_study.py", *as_arguments(grown["config"])])
    return {**record, **inputs, **grown, "starts": [*record.get("starts", []), start]}


def grows(record: Mapping[str, Any], study: Study) -> bool:
    """Whether this start asks for more trials or seeds than the study had."""
    before, now = record["config"], study.config
    return bool(now.trials > before["trials"] or now.seeds > before["seeds"])


def pinned_sources(record: Mapping[str, Any]) -> dict[str, str]:
    """Where an earlier start had its data and weights from; nothing where there was none."""
    if "data" not in record or "weights" not in record:
        return {}
    return {"data": record["data"]["source_key"], "weights": record["weights"]["name"]}


def check_same_request(old: Mapping[str, Any], study: Study) -> None:
    """Refuse to go on with a study under options that make its results incomparable.

    Raises:
        UserError: Names the first difference.
    """
    new = _asked(study)
    for option, value in new["config"].items():
        before = old["config"].get(option)
        if option in OPERATIONAL or before == value:
            continue
        shown = f"--{option.replace('_', '-')}"
        if option not in GROWING:
            raise UserError(
                f"--resume: this study has {shown} {before}, not {value}; leave the option out,"
                " or give a new --name."
            )
        if value < before:
            raise UserError(
                f"--resume: this study has {shown} {before}, which cannot become fewer; give more,"
                " or leave the option out."
            )
    for part, before in old.get("space", new["space"]).items():
        if before != new["space"].get(part):
            raise UserError(
                f"--resume: the space {study.space.name} changed since this study's start: its"
                f" {part} was {before} and is {new['space'].get(part)}; change it back, or give a"
                " new --name."
            )


def check_same_inputs(old: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Refuse to go on with a study on other data, weights or another split.

    Raises:
        UserError: Names the first difference.
    """
    for part in ("data", "weights", "split"):
        if part in old and old[part]["sha256"] != inputs[part]["sha256"]:
            raise UserError(
                f"--resume: the {part} changed since this study's start (sha256 "
                f"{old[part]['sha256'][:12]}, now {inputs[part]['sha256'][:12]}); "
                "bring the old one back, or give a new --name."
            )


def describe_changes(record: Mapping[str, Any]) -> str:
    """In what this start is made otherwise than the first, where figures may depend on it."""
    now = _made_with()
    changed = [
        f"{name} {record['versions'].get(name)}, now {version}"
        for name, version in now["versions"].items()
        if record["versions"].get(name) != version
    ]
    if record["git_commit"] != now["git_commit"]:
        changed.append(f"commit {record['git_commit']}, now {now['git_commit']}")
    return "; ".join(changed)


def _asked(study: Study) -> dict[str, Any]:
    """What the user asks for, with all that follows from it."""
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


def _made_with() -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
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
    """The project's commit, with "+changes" where files differ; None outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
