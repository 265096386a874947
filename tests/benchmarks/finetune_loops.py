"""The training loops that tests/benchmarks/finetune.py compares."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.models import resnet50

from search_spaces import Value
from study.models.preprocess import PREPROCESSES
from study.seeds import derive_seed, generator
from study.training.augment import draw_views
from study.training.data import PartArrays, TrainingData
from study.training.loop import build_model, epoch_order
from study.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rates
from study.training.step import TrainingStep, own_stream

#: Records work and returns a function that replays it; see `study.training.step.TrainingStep`.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

#: Epochs of a run, on which the learning rate schedule depends.
EPOCHS = 15


def do_again(work: Callable[[], None]) -> Callable[[], None]:
    """Return the work itself, so that each step launches its kernels one by one."""
    return work


# --- this project's loop ----------------------------------------------------------------------


class OwnLoop:
    """This project's training loop, as in `study.training.loop.train` between two evaluations.

    It uses full batches only, so that all steps are of the same size.

    Attributes:
        model: The model being trained.
    """

    def __init__(
        self, values: Mapping[str, Value], data: TrainingData, capture: Capture | None = None
    ) -> None:
        """Prepare a run.

        Args:
            values: Hyperparameters of the run.
            data: Training data on the device that trains.
            capture: Passed to `TrainingStep`.
        """
        self.model = build_model(values, data, seed=1).train()
        self._optimizer = build_optimizer(self.model, values)
        inputs, labels = data.train.inputs, data.train.labels
        self._step = TrainingStep(
            self.model, self._optimizer, inputs, labels, values, capture=capture
        )
        self._values, self._data = values, data
        self._batch_size = int(values["batch_size"])
        self._steps = enumerate(full_batches(data, self._batch_size))

    def run(self, steps: int) -> None:
        """Run the next steps."""
        per_epoch = math.ceil(len(self._data.train.labels) / self._batch_size)
        for number, (rows, views) in itertools.islice(self._steps, steps):
            factor = learning_rate_factor(self._values, number, per_epoch, EPOCHS)
            set_learning_rates(self._optimizer, factor)
            self._step(rows, views)


def full_batches(data: TrainingData, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield rows and augmented views of full batches, endlessly."""
    count = len(data.train.labels)
    for epoch in itertools.count(1):
        order, views = epoch_order(count, 1, epoch).to(data.device), epoch_views(data, epoch)
        torch.manual_seed(derive_seed(1, "masks", epoch))
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                yield rows, None if views is None else views[rows]


def epoch_views(data: TrainingData, epoch: int) -> Tensor | None:
    """Return the augmented view of each image in an epoch; None without augmentation."""
    if data.augment == "none":
        return None
    count, height, width, _ = data.train.inputs.shape
    random = generator(1, "augmentation", epoch)
    return draw_views(data.augment, count, height, width, random).to(data.device)


# --- torchvision's loop -----------------------------------------------------------------------


class ReferenceLoop:
    """torchvision's reference training, `references/classification/train.py`: `train_one_epoch`.

    It reproduces what that function does with each batch, and the inputs from its `main`: a
    ResNet50 in fp32 and PyTorch's usual memory layout, with 10 classes; cross-entropy; SGD with
    momentum 0.9, learning rate 0.1 and weight decay 1e-4; batches from a DataLoader with worker
    processes and, on a GPU, pinned memory; forward and loss under autocast, and a gradient scaler,
    with `--amp`; top-1 and top-5 accuracy and the loss read back at each step for its meters; and
    cuDNN's autotuner. The mean of the meters, model averaging, gradient clipping, several
    processes and printing, which are off or rare by default, are omitted.
    """

    def __init__(
        self, batches: Iterator[list[Tensor]], classes: int, device: torch.device, *, amp: bool
    ) -> None:
        """Prepare a run.

        Args:
            batches: From `reference_batches`.
            classes: Number of classes.
            device: The device that trains.
            amp: Same as the reference's option `--amp`.
        """
        self._batches, self._device = batches, device
        self._model = resnet50(num_classes=classes).to(device).train()
        self._criterion = nn.CrossEntropyLoss()
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4
        )
        self._scaler = torch.amp.GradScaler(device.type) if amp else None
        self.meters: list[tuple[float, float, float]] = []

    def run(self, steps: int) -> None:
        """Run the next steps."""
        for image, target in itertools.islice(self._batches, steps):
            self._step(image.to(self._device), target.to(self._device))

    def _step(self, image: Tensor, target: Tensor) -> None:
        with torch.autocast(self._device.type, enabled=self._scaler is not None):
            output = self._model(image)
            loss = self._criterion(output, target)
        self._optimizer.zero_grad()
        if self._scaler is not None:
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            loss.backward()
            self._optimizer.step()
        top1, top5 = top_accuracies(output, target, (1, 5))
        self.meters.append((loss.item(), top1.item(), top5.item()))


def top_accuracies(output: Tensor, target: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Return, for each k, how often the target is among the k largest outputs, in percent."""
    with torch.inference_mode():
        best = output.topk(max(ks), dim=1).indices.t()
        correct = best == target[None]
        return [correct[:k].flatten().sum(dtype=torch.float32) * (100 / len(target)) for k in ks]


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images as in `torchvision.datasets.CIFAR10`: arrays, converted to PIL on each access.

    The transforms are those of the reference's `ClassificationPresetTrain`, except the random
    resized crop, which none of the loops here applies.
    """

    def __init__(self, part: PartArrays, *, flip: bool) -> None:
        """Use the images of a part; `flip`: mirror half of them at random."""
        self._part = part
        normal = PREPROCESSES["imagenet"]
        self._transform = transforms.Compose(
            [
                *([transforms.RandomHorizontalFlip()] if flip else []),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float),
                transforms.Normalize(normal.mean, normal.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._part.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._transform(Image.fromarray(self._part.inputs[index]))
        return image, int(self._part.labels[index])


def reference_batches(
    images: PilImages, batch_size: int, workers: int, *, pinned: bool
) -> Iterator[list[Tensor]]:
    """Full batches of images in random order, epoch after epoch, from worker processes."""
    sampler = RandomSampler(images, num_samples=10_000 * batch_size)
    return iter(
        DataLoader(images, batch_size, sampler=sampler, num_workers=workers, pin_memory=pinned)
    )


# --- timing and comparison --------------------------------------------------------------------


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Return the wall-clock seconds of some work, including pending work on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all pending work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    works: Mapping[str, Callable[[], None]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Time several works in turn, reversing the order in every other repeat; in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        for name in list(works)[:: 1 if repeat % 2 == 0 else -1]:
            seconds[name].append(seconds_of(works[name], device))
    return seconds


@dataclass(frozen=True)
class Difference:
    """Difference between the final weights of two runs with the same seed."""

    largest: float
    """Largest difference of a single weight."""
    relative: float
    """Euclidean distance, as a fraction of the distance from the initial weights."""


def compare(first: np.ndarray, second: np.ndarray, start: np.ndarray) -> Difference:
    """Compare the weights of two runs, given their common initial weights."""
    apart = first - second
    moved = float(np.linalg.norm(first - start))
    return Difference(float(np.abs(apart).max()), float(np.linalg.norm(apart)) / moved)


def short_run(
    values: Mapping[str, Value], data: TrainingData, steps: int, capture: Capture | None = None
) -> np.ndarray:
    """Return the weights after a short, reproducible run; the initial ones for 0 steps.

    It covers whatever a replayed step could get wrong: the learning rate changes at every step, the
    seed of the dropout masks half-way, and the second-to-last step has half a batch.
    """
    size, count = int(values["batch_size"]), len(data.train.labels)
    with own_stream(data.device):
        model = build_model(values, data, seed=1).train()
        optimizer = build_optimizer(model, values)
        step = TrainingStep(
            model, optimizer, data.train.inputs, data.train.labels, values, capture=capture
        )
        epochs = range(1, 2 + steps * size // count)
        order = torch.cat([epoch_order(count, 1, epoch) for epoch in epochs]).to(data.device)
        views = epoch_views(data, 1)
        for number, rows in enumerate(order.split(size)[:steps]):
            if number in (0, steps // 2):
                torch.manual_seed(derive_seed(1, "masks", number))
            set_learning_rates(optimizer, 0.5 + 0.5 * (number + 1) / steps)
            taken = rows[: size // 2] if number == steps - 2 else rows
            step(taken, None if views is None else views[taken])
        return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu().numpy()
