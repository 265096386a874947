"""The backbone's features of each image: computed once, then read from the user's cache.

The fast path folds BatchNorm into the convolutions. Where the processor multiplies bf16 natively,
it runs in bf16, channels last, on a CPU in oneDNN's operators; other CPUs run it in ONNX Runtime.
The reference is `build_backbone` in fp32; tests/study/features/test_extract.py compares the two,
tests/benchmarks/features.py times them.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from study.data.dataset import Dataset
from study.models.backbone import build_backbone
from study.models.head import FEATURES
from study.models.preprocess import Preprocess
from study.models.weights import Weights
from study.system.cache import cache_dir, cached, sha256_of, whole_file
from study.system.hardware import has_native_bf16
from study.system.malloc import give_back_freed, keep_freed
from study.system.progress import console, progress

Precision = Literal["fp32", "bf16"]

#: Images per batch on a GPU.
GPU_BATCH = 512

#: Most images and most pixels per batch on a CPU, since memory grows with both: in fp32, 128 images
#: take 0.36 GB more than 28 at 96 px and 1.4 GB more than 5 at 224 px, and are not faster. In bf16
#: at 96 px, batches of 56 images are 1.2 times as fast as of 28, and batches of 112 no faster.
CPU_BATCH, CPU_PIXELS = 256, 2**19

#: Part of the cache key: increment it with every change to this code that changes the values.
VERSION: dict[Precision, int] = {"bf16": 2, "fp32": 2}


@dataclass(frozen=True)
class FeaturesName:
    """Identifies the features of a dataset."""

    key: str
    """SHA-256 of everything the features depend on; their name in the cache."""
    precision: Precision
    """What they were computed in; they are always stored in bf16."""


@dataclass(frozen=True)
class Features:
    """The backbone's features of a dataset."""

    values: Tensor
    """bf16 [N, 2048] on the CPU; rows in the dataset's order, not standardised."""
    name: FeaturesName
    seconds: float
    """Time to compute them; 0 if they come from the cache."""
    cached: bool
    """True if they come from the cache."""


@dataclass(frozen=True)
class Compute:
    """How features are computed: a precision and a function."""

    precision: Precision
    run: Callable[[nn.Module, np.ndarray, Preprocess], Tensor]
    """From backbone, pixels (uint8 [N, H, W, 3]) and preprocessing to bf16 [N, 2048] on the CPU."""


def compute_here(device: torch.device, precision: Precision) -> Compute:
    """Return a Compute that runs in this process, with a progress bar."""

    def run(backbone: nn.Module, pixels: np.ndarray, preprocess: Preprocess) -> Tensor:
        with progress("Computing features", len(pixels), "images") as advance:
            return compute_features(
                backbone, pixels, preprocess, precision=precision, device=device, advance=advance
            )

    return Compute(precision, run)


def load_features(
    dataset: Dataset,
    weights: Weights,
    preprocess: Preprocess,
    device: torch.device | None = None,
    compute: Compute | None = None,
) -> Features:
    """Load the features of all images of a dataset from the cache, or compute and cache them.

    Args:
        dataset: The images.
        weights: The backbone's weights.
        preprocess: The backbone's preprocessing, at the study's image size.
        device: Where to compute; None: the GPU if there is one, else the CPU.
        compute: How to compute; None: in this process.

    Raises:
        UserError: The cache cannot be written to.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = compute or compute_here(device, "bf16" if has_native_bf16(device) else "fp32")
    precision = compute.precision
    name = FeaturesName(cache_key(dataset, weights, preprocess, precision), precision)
    path = cache_dir() / "features" / f"{name.key}.safetensors"
    shape = (len(dataset.labels), FEATURES)

    def load() -> Features | None:
        values = _read(path, shape)
        return None if values is None else Features(values, name, 0.0, cached=True)

    def make() -> Features:
        if path.exists():
            console.print(f"Features: {path} is damaged, recomputing them", soft_wrap=True)
        backbone = build_backbone(weights.state, weights.architecture)
        started = time.perf_counter()
        values = compute.run(backbone, dataset.pixels, preprocess)
        seconds = time.perf_counter() - started
        del backbone
        give_back_freed()
        _write(path, values)
        return Features(values, name, seconds, cached=False)

    return cached(path, load, make)


def compute_features(
    backbone: nn.Module,
    pixels: np.ndarray,
    preprocess: Preprocess,
    *,
    precision: Precision,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Run images through a backbone.

    Args:
        backbone: From `build_backbone`; it is not modified.
        pixels: uint8 [N, H, W, 3], RGB.
        preprocess: The backbone's preprocessing.
        precision: What to compute in. Resizing and normalising are always done in fp32.
        device: Where to compute.
        dtype: What the features are rounded to.
        advance: Called after each batch with its number of images.

    Returns:
        [N, 2048] on the CPU.
    """
    computed_in = torch.bfloat16 if precision == "bf16" else torch.float32
    net = _fastest(fold_batch_norms(backbone), preprocess.image_size, device, computed_in)
    batch_size = batch_size_for(device.type, preprocess.image_size)
    keep_freed()
    # Round batch by batch: all of CIFAR-10's features take half a gigabyte in fp32.
    values = torch.empty(len(pixels), FEATURES, dtype=dtype)
    with torch.inference_mode():
        for start in range(0, len(pixels), batch_size):
            batch = torch.from_numpy(pixels[start : start + batch_size]).to(device)
            values[start : start + batch_size] = net(preprocess(batch)).cpu()
            if advance is not None:
                advance(len(batch))
    return values


def batch_size_for(device_type: str, image_size: int) -> int:
    """Return the backbone's batch size in images, on a type of device."""
    if device_type == "cuda":
        return GPU_BATCH
    return max(1, min(CPU_BATCH, CPU_PIXELS // image_size**2))


def _fastest(
    net: nn.Module, image_size: int, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return the fastest function for a folded backbone; it takes images in fp32."""
    if device.type == "cpu" and dtype == torch.float32:
        # Imported here: it takes a moment to import.
        from study.features.onnx_engine import in_onnx_runtime

        return in_onnx_runtime(net, torch.get_num_threads())
    layout = torch.channels_last
    net = net.to(device=device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    run: Callable[[Tensor], Tensor] = net
    if device.type == "cpu":
        from study.features.onednn_engine import in_onednn  # not always needed

        run = in_onednn(net, image_size, batch_size_for("cpu", image_size))
    return lambda images: run(images.to(dtype=dtype, memory_format=layout))


def fold_batch_norms(backbone: nn.Module) -> nn.Module:
    """Copy a ResNet50 in evaluation mode, with its BatchNorms folded into its convolutions."""
    from torchvision.models.resnet import Bottleneck  # slow to import, and not always needed

    net = copy.deepcopy(backbone).eval()
    for block in [net, *(module for module in net.modules() if isinstance(module, Bottleneck))]:
        for number in (1, 2, 3):
            conv, bn = getattr(block, f"conv{number}", None), getattr(block, f"bn{number}", None)
            if conv is not None and bn is not None:
                setattr(block, f"conv{number}", fuse_conv_bn_eval(conv, bn))
                setattr(block, f"bn{number}", nn.Identity())
        if isinstance(block, Bottleneck) and block.downsample is not None:
            block.downsample = fuse_conv_bn_eval(*block.downsample)
    return net


def cache_key(
    dataset: Dataset, weights: Weights, preprocess: Preprocess, precision: Precision
) -> str:
    """Return the SHA-256 of everything features depend on, except the device's rounding."""
    depends_on = {
        "version": VERSION[precision],
        "data": dataset.sha256,
        "weights": weights.sha256,
        # BatchNorm's momentum only matters in training.
        "architecture": {
            "stride_on_1x1": weights.architecture.stride_on_1x1,
            "bn_eps": weights.architecture.bn_eps,
        },
        "preprocess": asdict(preprocess),
        "precision": precision,
    }
    return sha256_of(json.dumps(depends_on, sort_keys=True).encode())


def _write(path: Path, values: Tensor) -> None:
    with whole_file(path) as partial:
        safetensors.torch.save_file({"features": values}, partial, {"sha256": _digest(values)})


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Read features from a cache file; None if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            values: Tensor = file.get_tensor("features")
            sha256 = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return values if values.shape == shape and _digest(values) == sha256 else None


def _digest(values: Tensor) -> str:
    return sha256_of(values.view(torch.uint16).numpy().reshape(-1).data)
