"""Run model.onnx or model.pt2 in a process without this project.

    python -I study/export/standalone.py model.onnx HEIGHT WIDTH BATCH

Reads the raw bytes of images from standard input; after every BATCH images, and after the last,
writes their probabilities, fp32, to standard output.
study/export/verify.py runs this file by path. It imports only the library that a user of the model
would have, and blocks imports of Ray and of this project.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

#: Packages whose import is blocked.
ABSENT = ("ray", "study", "analysis", "search_spaces", "torchvision", "safetensors")


def main(file: str, height: int, width: int, batch: int) -> None:
    """Predict the images on standard input; sizes in pixels, `batch` in images."""
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it now fails
    run = load_onnx(file) if Path(file).suffix == ".onnx" else load_program(file)
    image_size = height * width * 3
    while content := sys.stdin.buffer.read(batch * image_size):
        images = np.frombuffer(content, np.uint8).reshape(-1, height, width, 3)
        sys.stdout.buffer.write(run(images).tobytes())
        sys.stdout.buffer.flush()


def load_onnx(file: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that predicts with onnxruntime and numpy alone."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["probabilities"], {"images": images})[0])


def load_program(file: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that predicts with torch alone."""
    import torch

    program = torch.export.load(file).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            _, probabilities = program(torch.from_numpy(images.copy()))
        return np.asarray(probabilities)

    return run


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
