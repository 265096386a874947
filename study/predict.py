"""What a model says of image files.

    python -m study.predict runs/NAME/best_model photo.jpg holiday/

In Python:

    from study.predict import predict
    answers = predict("runs/NAME/best_model", ["photo.jpg", "holiday/"])

Files are read as the study reads them (study/data/decode.py), on all cores, while the model
computes.
Exit status 0: every file was read; 1: some could not be, which standard error names; 2: something
that the user can mend, in one line.
"""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import numpy as np
import tyro

from study.errors import UserError
from study.system.cli import parse_arguments, run_command

if TYPE_CHECKING:  # torch takes seconds to import, which a wrong argument need not wait for
    from study.data.decode import UnreadableImageError
    from study.export.model import Model

PROG = "python -m study.predict"
#: Of the dropout masks: the same images give the same answers.
SEED = 0

Form = Literal["table", "json", "csv"]


@dataclass(frozen=True)
class PredictArguments:
    """Say what a model sees in image files."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A best_model/ folder."""
    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]")
    ]
    """Image files, and folders that hold some, at any depth."""
    top: int = 3
    """So many classes for each image, the most probable first."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON, an object on a line for each image."""
    csv: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print CSV, a line for each image and class."""
    mc_dropout: int | None = None
    """Keep dropout on, predict so many times, and print the mean and how uncertain it is."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of images; row by row."""

    files: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: np.ndarray
    """fp32 [files, classes]; with `mc_dropout` their mean over the predictions."""
    entropy: np.ndarray | None = None
    """With `mc_dropout`, of that mean, in nats: [files], 0 to log(classes). How uncertain the
    answer is in all."""
    mutual_information: np.ndarray | None = None
    """With `mc_dropout`, the part of the entropy that comes from the predictions' not agreeing:
    [files], in nats. How unsure the model is of itself (Gal et al. 2017, BALD)."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """Files that could not be read, each with the reason."""

    def top(self, row: int, count: int) -> list[tuple[str, float]]:
        """The most probable classes of an image, with their probabilities."""
        order = np.argsort(-self.probabilities[row], kind="stable")[:count]
        return [(self.classes[i], float(self.probabilities[row, i])) for i in order]


def predict(
    model: str | Path, images: Iterable[str | Path], mc_dropout: int | None = None
) -> Predictions:
    """What a model says of image files and folders.

    Args:
        model: A best_model/ folder.
        images: Image files, and folders that hold some, at any depth.
        mc_dropout: Keep dropout on and predict so many times.

    Raises:
        UserError: There is no such model or file, or `mc_dropout` makes no sense for the model.
    """
    parts = list(predict_batches(Path(model), find_images(map(Path, images)), mc_dropout))
    entropies = [part.entropy for part in parts if part.entropy is not None]
    information = [p.mutual_information for p in parts if p.mutual_information is not None]
    return Predictions(
        files=tuple(file for part in parts for file in part.files),
        classes=parts[0].classes,
        probabilities=np.concatenate([part.probabilities for part in parts]),
        entropy=np.concatenate(entropies) if entropies else None,
        mutual_information=np.concatenate(information) if information else None,
        unreadable=tuple(problem for part in parts for problem in part.unreadable),
    )


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files that are named, and the image files in the folders that are named, sorted.

    Raises:
        UserError: There is no such file, or no image in a folder.
    """
    from study.data.decode import is_image_name, walk

    found: list[Path] = []
    for path in paths:
        if _exists(path) and path.is_dir():
            inside = [file for file in walk(path) if is_image_name(file.name)]
            if not inside:
                raise UserError(f"{path}: there is no image in this folder; give another one.")
            found += inside
        elif _exists(path):
            found.append(path)
        else:
            raise UserError(f"{path}: there is no such file; give image files or folders.")
    if not found:
        raise UserError("no images are given; give image files or folders.")
    return found


def predict_batches(
    model_path: Path, files: Sequence[Path], mc_dropout: int | None = None
) -> Iterator[Predictions]:
    """Predict batch by batch, as files are read; at least one batch, which may be empty.

    Raises:
        UserError: There is no such model, or `mc_dropout` makes no sense for it.
    """
    import torch

    from study.data.decode import read_images
    from study.export import bundle

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bundle.load(model_path).to(device)
    if mc_dropout is not None and mc_dropout < 2:
        raise UserError(f"--mc-dropout {mc_dropout}: one prediction has no spread; give 2 or more.")
    if mc_dropout is not None and not model.has_dropout:
        raise UserError(
            f"--mc-dropout: the model in {model_path} has no dropout that could be kept on; export"
            " one that has (python -m study.export RUN --arm dropout)."
        )
    for batch in _collect(read_images(files, model.side), model.images_at_once):
        yield _answer(model, batch, mc_dropout)


@dataclass
class _Batch:
    """Images that are predicted together, and files beside them that could not be read."""

    names: list[str] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def _collect(
    read: "Iterable[tuple[Path, np.ndarray | UnreadableImageError]]", batch_size: int
) -> Iterator[_Batch]:
    """Gather images until a batch is full; at least one batch."""
    from study.data.decode import as_text

    batch = _Batch()
    for path, image in read:
        if isinstance(image, np.ndarray):
            batch.names.append(as_text(path))
            batch.pixels.append(image)
        else:
            batch.unreadable.append((as_text(path), str(image)))
        if len(batch.pixels) == batch_size:
            yield batch
            batch = _Batch()
    yield batch


def _answer(model: "Model", batch: _Batch, mc_dropout: int | None) -> Predictions:
    """What the model says of a batch."""
    import torch

    names, unreadable = tuple(batch.names), tuple(batch.unreadable)
    if not batch.pixels:
        empty = np.empty((0, len(model.classes)), np.float32)
        nothing = None if mc_dropout is None else np.empty(0, np.float32)
        return Predictions(names, model.classes, empty, nothing, nothing, unreadable)
    images = torch.from_numpy(np.stack(batch.pixels)).to(model.feature_mean.device)
    with torch.inference_mode():
        if mc_dropout is None:
            probabilities = model(images).softmax(dim=1).cpu().numpy()
            return Predictions(names, model.classes, probabilities, unreadable=unreadable)
        drawn = model.sample(images, mc_dropout, SEED).cpu().numpy()
    mean = drawn.mean(axis=0)
    entropy = _entropy(mean)
    # It cannot be below zero; rounding can.
    information = np.maximum(entropy - _entropy(drawn).mean(axis=0), 0)
    return Predictions(names, model.classes, mean, entropy, information, unreadable)


def main(words: Sequence[str] | None = None) -> int:
    """Predict and print; `words` as in `sys.argv[1:]`."""

    def body() -> int:
        arguments = parse_arguments(
            PredictArguments, PROG, sys.argv[1:] if words is None else words
        )
        if arguments.top < 1:
            raise UserError(f"--top {arguments.top}: must be 1 or more.")
        if arguments.json and arguments.csv:
            raise UserError("--json and --csv: give one of them.")
        files = find_images(arguments.images)
        form: Form = "json" if arguments.json else "csv" if arguments.csv else "table"
        unreadable = answered = 0
        for part in predict_batches(arguments.model, files, arguments.mc_dropout):
            if part.files:
                show(part, form, arguments.top, sys.stdout, header=answered == 0)
            answered += len(part.files)
            unreadable += len(part.unreadable)
            for file, reason in part.unreadable:
                sys.stderr.write(f"{file}: cannot be read: {reason}\n")
        if not answered:
            raise UserError("none of the files could be read.")
        return 1 if unreadable else 0

    return run_command(PROG, body)


def show(part: Predictions, form: Form, top: int, out: TextIO, *, header: bool) -> None:
    """Print predictions.

    Args:
        part: Of some images.
        form: Table for people, JSON lines, or CSV.
        top: Classes for each.
        out: Where to.
        header: Whether these are the first lines of a CSV file.
    """
    if form == "csv":
        _show_csv(part, top, out, header=header)
        return
    width = max((len(file) for file in part.files), default=0)
    for row, file in enumerate(part.files):
        answers = part.top(row, top)
        if form == "json":
            line = {"file": file, "classes": [{"label": k, "probability": p} for k, p in answers]}
            out.write(json.dumps(line | _uncertainty(part, row), ensure_ascii=False) + "\n")
            continue
        said = "   ".join(f"{name} {100 * p:5.1f} %" for name, p in answers)
        unsure = "".join(
            f"   {k.replace('_', ' ')} {v:.2f}" for k, v in _uncertainty(part, row).items()
        )
        out.write(f"{file:<{width}}   {said}{unsure}\n")
    out.flush()


def _show_csv(part: Predictions, top: int, out: TextIO, *, header: bool) -> None:
    writer = csv.writer(out, lineterminator="\n")
    extra = ["entropy", "mutual_information"] if part.entropy is not None else []
    if header:
        writer.writerow(["file", "rank", "label", "probability", *extra])
    for row, file in enumerate(part.files):
        for rank, (name, p) in enumerate(part.top(row, top), start=1):
            writer.writerow([file, rank, name, f"{p:.6g}", *_uncertainty(part, row).values()])
    out.flush()


def _uncertainty(part: Predictions, row: int) -> dict[str, float]:
    if part.entropy is None or part.mutual_information is None:
        return {}
    return {
        "entropy": round(float(part.entropy[row]), 6),
        "mutual_information": round(float(part.mutual_information[row]), 6),
    }


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """In nats, over the last axis."""
    return np.asarray(-(probabilities * np.log(np.maximum(probabilities, 1e-30))).sum(axis=-1))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # what cannot be a path is none
        return False


if __name__ == "__main__":
    sys.exit(main())
