"""model.onnx and model.pt2: the model for use without this project.

Both take RGB images, uint8 [batch, height, width, 3], in any number and size, and return logits and
probabilities, fp32 [batch, classes]. Non-square images are stretched.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from study.export.model import Model

ONNX, PROGRAM = "model.onnx", "model.pt2"
#: The newest opset that commonly installed versions of onnxruntime support.
OPSET = 23
#: Largest image height and width of the exported formats, in pixels.
LARGEST_SIDE = 1 << 14


class Portable(nn.Module):
    """The model in operations that torch can export for images of any size."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.size = model.preprocess.image_size
        self.flips = model.preprocess.channels == "BGR"
        self.scale = model.preprocess.scale
        self.register_buffer("mean", torch.tensor(model.preprocess.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.preprocess.std).view(3, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map uint8 RGB [batch, height, width, 3] to logits and probabilities [batch, classes]."""
        values = images.permute(0, 3, 1, 2).float()
        if self.flips:
            values = values.flip(1)
        # Unconditional, since sizes are unknown at export time; a no-op if the size is right.
        values = F.interpolate(values, (self.size, self.size), mode="bilinear", antialias=True)
        values = (values * self.scale - self.mean) / self.std
        logits = self.model.classify(self.model.features(values))
        return logits, logits.softmax(dim=1)


def write_program(model: Model, path: Path) -> None:
    """Write a `torch.export` program; `torch.export.load(path).module()` runs it with torch alone.

    Args:
        model: The model.
        path: The file to write.
    """
    with _quiet():
        program = torch.export.export(
            Portable(model), (_example(model),), dynamic_shapes=(_dynamic(),)
        )
        torch.export.save(program, path)


def write_onnx(model: Model, path: Path) -> None:
    """Write an ONNX file; its metadata has the class names as JSON, under "label_names".

    Args:
        model: The model.
        path: The file to write.
    """
    with _quiet():
        program = torch.onnx.export(
            Portable(model),
            (_example(model),),
            dynamo=True,
            dynamic_shapes=(_dynamic(),),
            input_names=["images"],
            output_names=["logits", "probabilities"],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None, "dynamo=True returns a program"
        program.model.metadata_props["label_names"] = json.dumps(list(model.classes))
        program.save(path, external_data=False)


#: The function that writes each file; the file that is slowest to load comes first.
WRITERS = {PROGRAM: write_program, ONNX: write_onnx}


def _example(model: Model) -> Tensor:
    """Return images to trace with; two, since torch treats a dimension of size 1 as fixed."""
    return torch.zeros(2, model.side + 8, model.side + 16, 3, dtype=torch.uint8)


def _dynamic() -> dict[int, torch.export.Dim]:
    return {
        0: torch.export.Dim("batch", min=1),
        1: torch.export.Dim("height", min=1, max=LARGEST_SIDE),
        2: torch.export.Dim("width", min=1, max=LARGEST_SIDE),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' notes to their own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
