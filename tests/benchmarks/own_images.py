"""Speed of reading image files, and of predictions on them.

    python -m tests.benchmarks.own_images [--files 2000] [--repeats 5]

Compares reading on all cores with reading on one, and prediction from files, as in `study.predict`,
with the model alone on images in memory. The files are JPEGs of 1,000 x 750 pixels, enlarged from
CIFAR-10; the model is a ResNet50 with a head of 512 at 96 px with Keras' weights (the predictions
do not matter here). Pairs run one right after the other, after one discarded round. Prints median,
minimum and maximum of the ratios.

Measured (1,000 files, n = 5, 2 cores of an AMD EPYC, Python 3.11.7, torch 2.15.0, Pillow 13.0.0):

    reading on one core / on all: 1.84 (1.77 to 2.20)
    files to answers / the model alone: 1.23 (1.18 to 1.27)

The second is above 1 since reading takes 1.8 ms of a core per file, and the model uses both cores.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from study.data.decode import read_images
from study.data.load import load_dataset
from study.export import bundle
from study.export.model import Model, ModelParts
from study.features.standardise import no_standardisation
from study.models.head import FEATURES, build_head
from study.models.weights import load_weights
from study.predict import predict_batches
from study.system.hardware import cpu_count

SIDE = 96
HEAD: dict[str, Any] = {"head": "512", "dropout": 0.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(
        f"{cpu_count()} cores, torch {version('torch')}, Pillow {version('pillow')},"
        f" {options.files} files, n = {options.repeats}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_files(folder / "images", options.files)
        write_model(folder / "model")
        model = bundle.load(folder / "model")
        pixels = np.stack([image for _, image in read_images(files, SIDE)])  # type: ignore[misc]

        compare(
            "reading on one core / on all",
            lambda: read_all(files, 1),
            lambda: read_all(files, cpu_count()),
            options.repeats,
        )
        compare(
            "files to answers / the model alone",
            lambda: sum(len(part.files) for part in predict_batches(folder / "model", files)),
            lambda: run_model(model, pixels),
            options.repeats,
        )


def compare(
    what: str, first: Callable[[], object], second: Callable[[], object], repeats: int
) -> None:
    """Time two functions in turn, and print the ratio of their times."""
    ratios, seconds = [], []
    for round_number in range(repeats + 1):
        times = []
        for run in (first, second):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        if round_number:
            ratios.append(times[0] / times[1])
            seconds.append(times)
    low, high = min(ratios), max(ratios)
    typical = ", ".join(f"{median(column):.1f} s" for column in zip(*seconds, strict=True))
    print(f"{what}: {median(ratios):.2f} ({low:.2f} to {high:.2f}); {typical}")


def read_all(files: list[Path], cores: int) -> None:
    """Read every file with `cores` threads."""
    for _ in read_images(files, SIDE, cores):
        pass


def run_model(model: Model, pixels: np.ndarray) -> None:
    """Run the model on the same batches from memory."""
    with torch.inference_mode():
        for batch in torch.from_numpy(pixels).split(model.batch_size):
            model(batch).softmax(dim=1).numpy()


def write_files(folder: Path, count: int) -> list[Path]:
    """Write JPEG files of the size of photographs."""
    folder.mkdir()
    dataset = load_dataset("cifar10")
    files = []
    for row in range(count):
        image = Image.fromarray(dataset.pixels[row]).resize((1000, 750), Image.Resampling.BICUBIC)
        files.append(folder / f"{row:05d}.jpg")
        image.save(files[-1], quality=90)
    return files


def write_model(folder: Path) -> None:
    """Write a bundle."""
    weights = load_weights("keras")
    content = ModelParts(
        classes=tuple(map(str, range(10))),
        preprocess=replace(weights.preprocess, image_size=SIDE),
        side=SIDE,
        architecture=weights.architecture,
        hyperparameters=HEAD,
        backbone=weights.state,
        standardisation=no_standardisation(),
        heads=(build_head(HEAD, FEATURES, 10, seed=0).state_dict(),),
    )
    bundle.save(folder, content)
    bundle.save_config(folder, content, {})


if __name__ == "__main__":
    main()
