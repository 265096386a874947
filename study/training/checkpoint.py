"""A training run's checkpoint as one file, without pickle.

A safetensors file: tensors under "model.", "optimizer." and "best." (omitted if the best epoch is
the last one); in its metadata the finished epochs as JSON, the number of the best one, whether the
backbone is still warming up, and the run's fingerprint.
"""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open

from study.models.state_dict import save_safetensors, strip_prefix
from study.training.loop import EpochMetrics, EpochWeights, TrainingState


def save_checkpoint(path: Path, state: TrainingState, fingerprint: str) -> None:
    """Write a checkpoint; a crash leaves either the previous file or this one.

    Args:
        path: The file to write.
        state: The state to save.
        fingerprint: Identifies the run; `load_checkpoint` requires the same one.

    Raises:
        StorageError: The file cannot be written.
    """
    last, best = state.history[-1].epoch, state.best
    parts = {"model": state.model, "optimizer": state.optimizer}
    if best.epoch != last:
        parts["best"] = best.weights
    tensors = {
        f"{part}.{name}": value.contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }
    metadata = {
        "history": json.dumps([asdict(epoch) for epoch in state.history]),
        "best_epoch": str(best.epoch),
        "warmup": json.dumps(state.warmup),
        "fingerprint": fingerprint,
    }
    save_safetensors(path, tensors, metadata)


def load_checkpoint(path: Path, fingerprint: str) -> TrainingState:
    """Read a checkpoint.

    Raises:
        ValueError: The file is missing or unreadable, or belongs to another run.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["fingerprint"] != fingerprint:
                raise ValueError("it belongs to another run")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        history = tuple(EpochMetrics(**epoch) for epoch in json.loads(metadata["history"]))
        model = strip_prefix(tensors, "model.")
        best = strip_prefix(tensors, "best.") or model
        best_epoch, warmup = int(metadata["best_epoch"]), bool(json.loads(metadata["warmup"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a valid checkpoint of this run ({error})") from error
    optimizer, best_so_far = strip_prefix(tensors, "optimizer."), EpochWeights(best_epoch, best)
    return TrainingState(model, optimizer, history, best_so_far, warmup)


def epochs_in_checkpoint(path: Path) -> int:
    """Return the number of epochs in a checkpoint; 0 if it is missing or unreadable."""
    try:
        with safe_open(path, "pt") as file:
            return len(json.loads(file.metadata()["history"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return 0
