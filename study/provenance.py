"""study.json: what a study is made of, so that its results can be traced and it can go on."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from study.backbone import Preprocess
from study.config import OPERATIONAL, Study
from study.data import Dataset, Split
from study.errors import UserError
from study.features import Features
from study.hardware import cpu_count
from study.streams import derive_seed
from study.weights import Weights

PACKAGES = ("ray", "torch", "torchvision", "optuna", "numpy", "pandas", "dropout-study")


def describe(
    study: Study,
    dataset: Dataset,
    split: Split,
    weights: Weights,
    preprocess: Preprocess,
    features: Features | None,
) -> dict[str, Any]:
    """The record that stands in study.json; `features` is None where all layers train."""
    config = {**asdict(study.config), "storage": str(study.config.storage)}
    return {
        "config": config,
        "command": " ".join(["run_study.py", *sys.argv[1:]]),
        "arms": {
            arm.name: {"factor": list(arm.factor), "trials": study.trials_per_arm[arm.name]}
            for arm in study.space.arms
        },
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "source_key": dataset.source_key,
            "sha256": dataset.sha256,
            "images": len(dataset.labels),
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
        "seeds": {
            "study": study.config.seed,
            "confirmation": [
                derive_seed(study.config.seed, "confirm", index)
                for index in range(study.config.seeds)
            ],
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "git_commit": _git_commit(),
    }


def pinned_sources(record: Mapping[str, Any] | None) -> dict[str, str]:
    """Where an earlier start had its data and weights from; nothing where there was none."""
    if record is None:
        return {}
    return {"data": record["data"]["source_key"], "weights": record["weights"]["name"]}


def check_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to go on with a study whose results would not be comparable.

    Raises:
        UserError: Names the first difference.
    """
    for option, value in new["config"].items():
        before = old["config"].get(option)
        if option not in OPERATIONAL and before != value:
            raise UserError(
                f"--resume: this study has --{option.replace('_', '-')} {before}, not {value}; "
                "give the same options as at its start, or a new --name."
            )
    for part in ("data", "weights", "split"):
        if old[part]["sha256"] != new[part]["sha256"]:
            raise UserError(
                f"--resume: the {part} changed since this study's start (sha256 "
                f"{old[part]['sha256'][:12]}, now {new[part]['sha256'][:12]}); "
                "bring the old one back, or give a new --name."
            )


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
