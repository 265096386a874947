"""Feature computation on all nodes of a cluster, which take chunks of the images in turn.

Chunks go out and features come back through Ray's object store. A chunk whose node is lost is
recomputed on another one; finished chunks are safe in the driver.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import ray
import torch
from torch import Tensor, nn

from study.cluster.machines import Machines
from study.features.extract import Compute, Precision, batch_size_for, compute_features
from study.models.head import FEATURES
from study.models.preprocess import Preprocess
from study.system.progress import progress

#: Chunks per worker: enough for fast nodes to take more of them, and for a lost one to cost little.
CHUNKS_PER_WORKER = 4


def compute_on_cluster(machines: Machines, precision: Precision) -> Compute:
    """Return a Compute that uses all nodes' GPUs, or all their cores if the cluster has no GPU.

    Args:
        machines: The cluster's nodes.
        precision: The same on all nodes.
    """

    def run(backbone: nn.Module, pixels: np.ndarray, preprocess: Preprocess) -> Tensor:
        gpu = machines.gpus > 0
        # Workers sized for the smallest node can be replaced on any node.
        least = min((node.cpus for node in machines.nodes if node.cpus), default=1)
        cores = 1 if gpu else max(1, int(least))
        # If no node has room yet, a pending chunk makes the cluster scale up.
        workers = max(1, machines.gpus if gpu else machines.capacity(cores, 0))
        task = ray.remote(max_calls=1 if gpu else 0)(_compute_chunk).options(
            num_cpus=cores, num_gpus=int(gpu), max_retries=-1
        )
        shared = ray.put((backbone, preprocess))
        batch_size = batch_size_for("cuda" if gpu else "cpu", preprocess.image_size)
        bounds = chunk_bounds(len(pixels), workers, batch_size)
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
                chunk = torch.from_numpy(ray.get(done).copy())
                values[start:end] = chunk.view(torch.bfloat16)
                advance(end - start)
        return values

    return Compute(precision, run)


def chunk_bounds(images: int, workers: int, batch_size: int) -> Sequence[tuple[int, int]]:
    """Return where chunks start and end: whole batches, the same ones as in a single process.

    Args:
        images: Total number of images.
        workers: Number of workers that compute at once.
        batch_size: The backbone's batch size.
    """
    batches = max(1, images // (workers * CHUNKS_PER_WORKER * batch_size))
    size = batches * batch_size
    return [(start, min(start + size, images)) for start in range(0, images, size)]


def _compute_chunk(
    shared: tuple[nn.Module, Preprocess], pixels: np.ndarray, precision: Precision, threads: int
) -> np.ndarray:
    """Compute the features of a chunk; returns bf16 as its uint16 bits, since numpy has no bf16."""
    backbone, preprocess = shared
    cuda = bool(ray.get_gpu_ids())
    if not cuda:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if cuda else "cpu")
    values = compute_features(backbone, pixels, preprocess, precision=precision, device=device)
    bits: np.ndarray = values.view(torch.uint16).numpy()
    return bits
