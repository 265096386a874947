"""The state of a training run as one file, without pickle.

A safetensors file: the tensors under "model.", "optimizer." and "best." (left out where the best
epoch is the last one); in its metadata the epochs that are done as JSON, the number of the best
one, and whether the backbone still warms up.
"""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open

from study.models.state_dict import part_of, save_whole
from study.training.loop import EpochMetrics, EpochWeights, TrainingState


def save_state(path: Path, state: TrainingState, fingerprint: str) -> None:
    """Write a state, so that a crash leaves either the earlier file or this one.

    Args:
        path: Where to.
        state: The state.
        fingerprint: Of the run; it can be read under the same one only.

    Raises:
        StorageError: It cannot be written.
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
    save_whole(path, tensors, metadata)


def load_state(path: Path, fingerprint: str) -> TrainingState:
    """Read a state.

    Raises:
        ValueError: There is none of that run, or it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["fingerprint"] != fingerprint:
                raise ValueError("it is another run's")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        history = tuple(EpochMetrics(**epoch) for epoch in json.loads(metadata["history"]))
        model = part_of(tensors, "model.")
        best = part_of(tensors, "best.") or model
        best_epoch, warmup = int(metadata["best_epoch"]), bool(json.loads(metadata["warmup"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no state of a training run ({error})") from error
    optimizer, best_so_far = part_of(tensors, "optimizer."), EpochWeights(best_epoch, best)
    return TrainingState(model, optimizer, history, best_so_far, warmup)


def epochs_in_state(path: Path) -> int:
    """How many epochs a saved state has; 0 where there is none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return len(json.loads(file.metadata()["history"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return 0
