"""The state of a training run as one file, without pickle.

A safetensors file: the tensors under "model.", "optimizer." and "best." (left out where the best
epoch is the last one), and the epochs that are done as JSON in its metadata.
"""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from study.tensors import part_of
from study.training import EpochMetrics, Snapshot, TrainingState


def save_state(path: Path, state: TrainingState) -> None:
    """Write a state."""
    last, best = state.history[-1].epoch, state.best
    parts = {"model": state.model, "optimizer": state.optimizer}
    if best.epoch != last:
        parts["best"] = best.weights
    tensors = {
        f"{part}.{name}": value.contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }
    history = json.dumps([asdict(epoch) for epoch in state.history])
    save_file(tensors, path, {"history": history, "best_epoch": str(best.epoch)})


def load_state(path: Path) -> TrainingState:
    """Read a state.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        history = tuple(EpochMetrics(**epoch) for epoch in json.loads(metadata["history"]))
        model = part_of(tensors, "model.")
        best = part_of(tensors, "best.") or model
        best_epoch = int(metadata["best_epoch"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no state of a training run ({error})") from error
    return TrainingState(model, part_of(tensors, "optimizer."), history, Snapshot(best_epoch, best))


def read_epochs(path: Path) -> int:
    """How many epochs are done in a state; 0 where there is none, or it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return len(json.loads(file.metadata()["history"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return 0
