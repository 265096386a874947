"""What the backbone sees in each image: computed once, then read from the user's cache.

The fast path: BatchNorm folded into the convolutions; in bf16 where the processor multiplies it
natively, with channels last, on a CPU in oneDNN's operators; else, on a CPU, in ONNX Runtime. The
reference is `build_backbone` in fp32; tests/study/features/test_extract.py holds the two together,
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

__all__ = [
    "FEATURES",
    "Features",
    "FeaturesName",
    "Precision",
    "cache_key",
    "compute_features",
    "load_features",
]

Precision = Literal["fp32", "bf16"]

#: Images at a time on a GPU.
GPU_BATCH = 512

#: Images at a time on a CPU, and pixels at most, since memory grows with these: in fp32, 128 images
#: of 96 pixels take 0.36 GB more than 28 do, of 224 pixels 1.4 GB more than 5, and are not faster.
#: In bf16, 56 images of 96 pixels are 1.2 times as fast as 28, and 112 no faster.
CPU_BATCH, CPU_PIXELS = 256, 2**19

#: Part of the cache's key: raise it with every change to this code that changes the values.
VERSION: dict[Precision, int] = {"bf16": 2, "fp32": 2}


@dataclass(frozen=True)
class FeaturesName:
    """Which features of a dataset they are."""

    key: str
    """SHA-256 of all that they depend on; their name in the cache."""
    precision: Precision
    """What they were computed in; they are kept in bf16 in any case."""


@dataclass(frozen=True)
class Features:
    """The backbone's features of a dataset."""

    values: Tensor
    """bf16 [N, 2048] on the CPU; rows in the dataset's order, not standardised."""
    name: FeaturesName
    seconds: float
    """What computing them took; 0 if they come from the cache."""
    cached: bool
    """Whether they come from the cache."""


@dataclass(frozen=True)
class Compute:
    """A way to compute features."""

    precision: Precision
    run: Callable[[nn.Module, np.ndarray, Preprocess], Tensor]
    """Backbone, pixels (uint8 [N, H, W, 3]) and preprocessing -> bf16 [N, 2048] on the CPU."""


def here(device: torch.device, precision: Precision) -> Compute:
    """Compute in this process, with a progress bar."""

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
    """The features of all images of a dataset: from the cache, or else computed and kept there.

    Args:
        dataset: The images.
        weights: The backbone's.
        preprocess: How images are made ready for it, at the study's image size.
        device: Where to compute; None for the GPU, if there is one, else the CPU.
        compute: How to compute elsewhere than in this process; None: here.

    Raises:
        UserError: If the cache cannot be written to.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = compute or here(device, "bf16" if has_native_bf16(device) else "fp32")
    precision = compute.precision
    name = FeaturesName(cache_key(dataset, weights, preprocess, precision), precision)
    path = cache_dir() / "features" / f"{name.key}.safetensors"
    shape = (len(dataset.labels), FEATURES)

    def load() -> Features | None:
        values = _read(path, shape)
        return None if values is None else Features(values, name, 0.0, cached=True)

    def make() -> Features:
        if path.exists():
            console.print(f"Features: {path} is damaged, computing them anew", soft_wrap=True)
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
        backbone: From `build_backbone`; it is left as it is.
        pixels: uint8 [N, H, W, 3], RGB.
        preprocess: How images are made ready for the backbone.
        precision: What to compute in. Resizing and normalising are always done in fp32.
        device: Where to compute.
        dtype: What the features are rounded to.
        advance: Is told of images that are done.

    Returns:
        [N, 2048] on the CPU.
    """
    computed_in = torch.bfloat16 if precision == "bf16" else torch.float32
    net = _fastest(folded(backbone), preprocess.image_size, device, computed_in)
    batch_size = images_at_once(device.type, preprocess.image_size)
    keep_freed()
    # Rounded batch by batch: all of CIFAR-10's features take half a gigabyte in fp32.
    values = torch.empty(len(pixels), FEATURES, dtype=dtype)
    with torch.inference_mode():
        for start in range(0, len(pixels), batch_size):
            batch = torch.from_numpy(pixels[start : start + batch_size]).to(device)
            values[start : start + batch_size] = net(preprocess(batch)).cpu()
            if advance is not None:
                advance(len(batch))
    return values


def images_at_once(device_type: str, image_size: int) -> int:
    """How many images the backbone takes at a time, on a device of a type."""
    if device_type == "cuda":
        return GPU_BATCH
    return max(1, min(CPU_BATCH, CPU_PIXELS // image_size**2))


def _fastest(
    net: nn.Module, image_size: int, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """A folded backbone as the function that computes it fastest, from images in fp32."""
    if device.type == "cpu" and dtype == torch.float32:
        # Only here: it takes a moment to import.
        from study.features.onnx_engine import in_onnx_runtime

        return in_onnx_runtime(net, torch.get_num_threads())
    layout = torch.channels_last
    net = net.to(device=device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    run: Callable[[Tensor], Tensor] = net
    if device.type == "cpu":
        from study.features.onednn_engine import in_onednn  # not always needed

        run = in_onednn(net, image_size, images_at_once("cpu", image_size))
    return lambda images: run(images.to(dtype=dtype, memory_format=layout))


def folded(backbone: nn.Module) -> nn.Module:
    """A copy of a ResNet50 in evaluation mode whose BatchNorms are folded into its convolutions."""
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
    """SHA-256 over everything that features depend on, but for the device's rounding."""
    depends_on = {
        "version": VERSION[precision],
        "data": dataset.sha256,
        "weights": weights.sha256,
        # The momentum of BatchNorm matters in training only.
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
    """The features in a file of the cache; None if it is not there or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            values: Tensor = file.get_tensor("features")
            sha256 = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return values if values.shape == shape and _digest(values) == sha256 else None


def _digest(values: Tensor) -> str:
    return sha256_of(values.view(torch.uint16).numpy().reshape(-1).data)
