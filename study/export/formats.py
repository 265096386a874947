"""The model for programs that have nothing of this project: model.onnx and model.pt2.

Both take images, uint8 [batch, height, width, 3], RGB, any number of any size, and give logits and
probabilities, fp32 [batch, classes]. What is not square is stretched.
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
#: The newest that onnxruntime has had for long enough to be found everywhere.
OPSET = 23
LARGEST_SIDE = 1 << 14


class Portable(nn.Module):
    """A model whose every step torch can write down, whatever the size of the images."""

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
        """uint8 [batch, height, width, 3], RGB -> logits and probabilities, [batch, classes]."""
        values = images.permute(0, 3, 1, 2).float()
        if self.flips:
            values = values.flip(1)
        # Also where the size is right already, which is not known when this is written down; it
        # changes nothing there.
        values = F.interpolate(values, (self.size, self.size), mode="bilinear", antialias=True)
        values = (values * self.scale - self.mean) / self.std
        logits = self.model.classify(self.model.features(values))
        return logits, logits.softmax(dim=1)


def write_program(model: Model, path: Path) -> None:
    """Write a `torch.export` program; `torch.export.load(path).module()` runs it with torch alone.

    Args:
        model: The model.
        path: The file.
    """
    with _quiet():
        program = torch.export.export(
            Portable(model), (_example(model),), dynamic_shapes=(_dynamic(),)
        )
        torch.export.save(program, path)


def write_onnx(model: Model, path: Path) -> None:
    """Write an ONNX file; class names stand in its metadata under "label_names", as JSON.

    Args:
        model: The model.
        path: The file.
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
        assert program is not None, "with dynamo there is one"
        program.model.metadata_props["label_names"] = json.dumps(list(model.classes))
        program.save(path, external_data=False)


#: By what each file is written; first the one that takes longest to load.
WRITERS = {PROGRAM: write_program, ONNX: write_onnx}


def _example(model: Model) -> Tensor:
    """Images to trace with; two, since torch takes a size of 1 to be fixed."""
    return torch.zeros(2, model.side + 8, model.side + 16, 3, dtype=torch.uint8)


def _dynamic() -> dict[int, torch.export.Dim]:
    return {
        0: torch.export.Dim("batch", min=1),
        1: torch.export.Dim("height", min=1, max=LARGEST_SIDE),
        2: torch.export.Dim("width", min=1, max=LARGEST_SIDE),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes to their own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
