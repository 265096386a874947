"""Features computed by all machines of a cluster: each takes parts of the images in turn.

The parts go out and the features come back through Ray's object store. A part whose machine is lost
is computed again by another one; what is done lies with the study's own process.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import ray
import torch
from torch import Tensor, nn

from study.cluster.machines import Machines
from study.features.extract import FEATURES, Compute, Precision, compute_features, images_at_once
from study.models.preprocess import Preprocess
from study.system.progress import progress

#: Parts per worker: enough that fast machines take more of them, and that little is lost with one.
PARTS_PER_WORKER = 4


def on_cluster(machines: Machines, precision: Precision) -> Compute:
    """Compute on every machine's GPUs, or where none has any, on every machine's cores.

    Args:
        machines: Of the cluster.
        precision: The same on all of them.
    """

    def run(backbone: nn.Module, pixels: np.ndarray, preprocess: Preprocess) -> Tensor:
        gpu = machines.gpus > 0
        # A worker of one size that fits everywhere can be replaced by one anywhere.
        least = min((node.cpus for node in machines.nodes if node.cpus), default=1)
        cores = 1 if gpu else max(1, int(least))
        # Where no node has room yet, a part that waits makes the cluster grow.
        workers = max(1, machines.gpus if gpu else machines.room(cores, 0))
        task = ray.remote(max_calls=1 if gpu else 0)(_compute_part).options(
            num_cpus=cores, num_gpus=int(gpu), max_retries=-1
        )
        shared = ray.put((backbone, preprocess))
        batch_size = images_at_once("cuda" if gpu else "cpu", preprocess.image_size)
        bounds = part_bounds(len(pixels), workers, batch_size)
        values = torch.empty(len(pixels), FEATURES, dtype=torch.bfloat16)
        waiting = deque(bounds)
        running: dict[ray.ObjectRef[np.ndarray], tuple[int, int]] = {}
        with progress("Computing features", len(pixels), "images") as advance:
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    start, end = waiting.popleft()
                    running[task.remote(shared, pixels[start:end], precision, cores)] = (start, end)
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                start, end = running.pop(done)
                part = torch.from_numpy(ray.get(done).copy())
                values[start:end] = part.view(torch.bfloat16)
                advance(end - start)
        return values

    return Compute(precision, run)


def part_bounds(images: int, workers: int, batch_size: int) -> Sequence[tuple[int, int]]:
    """Where parts begin and end: whole batches, so that they are those of one process.

    Args:
        images: In all.
        workers: That compute at once.
        batch_size: Of the backbone.
    """
    batches = max(1, images // (workers * PARTS_PER_WORKER * batch_size))
    size = batches * batch_size
    return [(start, min(start + size, images)) for start in range(0, images, size)]


def _compute_part(
    shared: tuple[nn.Module, Preprocess], pixels: np.ndarray, precision: Precision, threads: int
) -> np.ndarray:
    """Features of a part, as the bits of bf16 ones, since numpy has no such type."""
    backbone, preprocess = shared
    cuda = bool(ray.get_gpu_ids())
    if not cuda:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if cuda else "cpu")
    values = compute_features(backbone, pixels, preprocess, precision=precision, device=device)
    bits: np.ndarray = values.view(torch.uint16).numpy()
    return bits
