"""Training functions that do what a healthy machine does not; workers import them from here."""

from typing import Any
from unittest.mock import patch

import ray
import torch

from study.arrays import TrainingArrays
from study.worker import RunSettings, run_trial


def run_trial_short_of_memory(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """A stand-in for a GPU on which some trials fit only alone, and one not even so.

    The exception is the one that CUDA's allocator raises; the training is done on the CPU.
    """
    assert ray.get_gpu_ids(), "Ray has given the trial no GPU"
    alone = settings.gpu_share == 1
    if config["run_id"].endswith("-001") and not (alone and config["arm"] == "dropout"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    with patch("ray.get_gpu_ids", return_value=[]):
        run_trial(config, shared, settings)
