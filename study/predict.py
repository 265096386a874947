"""Predict the classes of image files with an exported model.

    python -m study.predict runs/NAME/best_model photo.jpg holiday/

In Python:

    from study.predict import predict
    answers = predict("runs/NAME/best_model", ["photo.jpg", "holiday/"])

Files are read as in the study (study/data/decode.py), on all cores, while the model computes.
Exit status 0: every file was read; 1: some could not be read and are listed on standard error;
2: an error the user can fix, reported in one line.
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

from study.config import Flag, option
from study.errors import UserError
from study.system.cli import parse_arguments, run_command

if TYPE_CHECKING:  # torch takes seconds to import; argument errors should not wait for it
    from study.data.decode import UnreadableImageError
    from study.export.model import Model

PROG = "python -m study.predict"
#: Seed of the dropout masks, fixed so that predictions are repeatable.
SEED = 0

Form = Literal["table", "json", "csv"]


@dataclass(frozen=True)
class PredictArguments:
    """Predict the classes of image files with an exported model."""

    model: Annotated[Path, tyro.conf.Positional, option("MODEL")]
    """The best_model/ folder of a study."""
    images: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """Image files, and folders to search for images at any depth."""
    top: Annotated[int, option("N")] = 3
    """Classes to print for each image, most probable first."""
    json: Flag = False
    """Print JSON Lines, one object per image."""
    csv: Flag = False
    """Print CSV, one row per image and class."""
    mc_dropout: Annotated[int | None, option("N", "dropout off")] = None
    """Predict N times with dropout on; print the mean and its uncertainty."""


@dataclass(frozen=True)
class ImagePredictions:
    """Predictions for image files, one row per file."""

    files: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: np.ndarray
    """fp32 [files, classes]; with `mc_dropout`, the mean over the passes."""
    entropy: np.ndarray | None = None
    """Total uncertainty with `mc_dropout`: entropy of that mean in nats, [files], 0 to
    log(classes)."""
    mutual_information: np.ndarray | None = None
    """Model uncertainty with `mc_dropout`: the part of the entropy due to disagreement between the
    passes, in nats, [files] (Gal et al. 2017, BALD)."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """Files that could not be read, each with the reason."""

    def top(self, row: int, count: int) -> list[tuple[str, float]]:
        """Return the `count` most probable classes of an image with their probabilities."""
        order = np.argsort(-self.probabilities[row], kind="stable")[:count]
        return [(self.classes[i], float(self.probabilities[row, i])) for i in order]


def predict(
    model: str | Path, images: Iterable[str | Path], mc_dropout: int | None = None
) -> ImagePredictions:
    """Predict the classes of image files.

    Args:
        model: The best_model/ folder of a study.
        images: Image files, and folders to search for images at any depth.
        mc_dropout: Number of passes with dropout on; None: one pass with dropout off.

    Raises:
        UserError: There is no such model or file, or `mc_dropout` is invalid for the model.
    """
    parts = list(predict_batches(Path(model), find_images(map(Path, images)), mc_dropout))
    entropies = [part.entropy for part in parts if part.entropy is not None]
    information = [p.mutual_information for p in parts if p.mutual_information is not None]
    return ImagePredictions(
        files=tuple(file for part in parts for file in part.files),
        classes=parts[0].classes,
        probabilities=np.concatenate([part.probabilities for part in parts]),
        entropy=np.concatenate(entropies) if entropies else None,
        mutual_information=np.concatenate(information) if information else None,
        unreadable=tuple(problem for part in parts for problem in part.unreadable),
    )


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the files given and the images in and below the folders given, each folder's sorted.

    Raises:
        UserError: There is no such file, no image in a folder, or no file at all.
    """
    from study.data.decode import is_image_name, walk

    found: list[Path] = []
    for path in paths:
        if _exists(path) and path.is_dir():
            inside = [file for file in walk(path) if is_image_name(file.name)]
            if not inside:
                raise UserError(f"{path}: no images in this folder; give another one.")
            found += inside
        elif _exists(path):
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; give image files or folders.")
    if not found:
        raise UserError("no images given; give image files or folders.")
    return found


def predict_batches(
    model_path: Path, files: Sequence[Path], mc_dropout: int | None = None
) -> Iterator[ImagePredictions]:
    """Predict in batches as files are read; yield at least one batch, which may be empty.

    Raises:
        UserError: There is no such model, or `mc_dropout` is invalid for it.
    """
    import torch

    from study.data.decode import read_images
    from study.export import bundle

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bundle.load(model_path).to(device)
    if mc_dropout is not None and mc_dropout < 2:
        raise UserError(f"--mc-dropout {mc_dropout}: must be 2 or more, to measure uncertainty.")
    if mc_dropout is not None and not model.has_dropout:
        raise UserError(
            f"--mc-dropout: the model in {model_path} has no dropout; export one that has"
            " (python -m study.export RUN --arm dropout)."
        )
    for batch in _collect(read_images(files, model.side), model.batch_size):
        yield _predict_batch(model, batch, mc_dropout)


@dataclass
class _Batch:
    """Images to predict together, and the unreadable files found among them."""

    names: list[str] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def _collect(
    read: "Iterable[tuple[Path, np.ndarray | UnreadableImageError]]", batch_size: int
) -> Iterator[_Batch]:
    """Gather images into batches; yield at least one batch, which may be empty."""
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


def _predict_batch(model: "Model", batch: _Batch, mc_dropout: int | None) -> ImagePredictions:
    import torch

    names, unreadable = tuple(batch.names), tuple(batch.unreadable)
    if not batch.pixels:
        empty = np.empty((0, len(model.classes)), np.float32)
        nothing = None if mc_dropout is None else np.empty(0, np.float32)
        return ImagePredictions(names, model.classes, empty, nothing, nothing, unreadable)
    images = torch.from_numpy(np.stack(batch.pixels)).to(model.feature_mean.device)
    with torch.inference_mode():
        if mc_dropout is None:
            probabilities = model(images).softmax(dim=1).cpu().numpy()
            return ImagePredictions(names, model.classes, probabilities, unreadable=unreadable)
        drawn = model.sample(images, mc_dropout, SEED).cpu().numpy()
    mean = drawn.mean(axis=0)
    entropy = _entropy(mean)
    # Never negative, except by rounding.
    information = np.maximum(entropy - _entropy(drawn).mean(axis=0), 0)
    return ImagePredictions(names, model.classes, mean, entropy, information, unreadable)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; `words` as in `sys.argv[1:]`."""

    def body() -> int:
        arguments = parse_arguments(
            PredictArguments, PROG, sys.argv[1:] if words is None else words
        )
        if arguments.top < 1:
            raise UserError(f"--top {arguments.top}: must be 1 or more.")
        if arguments.json and arguments.csv:
            raise UserError("--json and --csv: give only one of them.")
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
            raise UserError(
                "none of the files could be read; give image files that Pillow can open."
            )
        return 1 if unreadable else 0

    return run_command(PROG, body)


def show(part: ImagePredictions, form: Form, top: int, out: TextIO, *, header: bool) -> None:
    """Print predictions.

    Args:
        part: Predictions for some of the images.
        form: Output format: a table to read, JSON Lines, or CSV.
        top: Classes to print for each image.
        out: Where to print.
        header: True to start CSV with its header.
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
        classes = "   ".join(f"{name} {100 * p:5.1f} %" for name, p in answers)
        uncertainty = "".join(
            f"   {k.replace('_', ' ')} {v:.2f}" for k, v in _uncertainty(part, row).items()
        )
        out.write(f"{file:<{width}}   {classes}{uncertainty}\n")
    out.flush()


def _show_csv(part: ImagePredictions, top: int, out: TextIO, *, header: bool) -> None:
    writer = csv.writer(out, lineterminator="\n")
    extra = ["entropy", "mutual_information"] if part.entropy is not None else []
    if header:
        writer.writerow(["file", "rank", "label", "probability", *extra])
    for row, file in enumerate(part.files):
        for rank, (name, p) in enumerate(part.top(row, top), start=1):
            writer.writerow([file, rank, name, f"{p:.6g}", *_uncertainty(part, row).values()])
    out.flush()


def _uncertainty(part: ImagePredictions, row: int) -> dict[str, float]:
    if part.entropy is None or part.mutual_information is None:
        return {}
    return {
        "entropy": round(float(part.entropy[row]), 6),
        "mutual_information": round(float(part.mutual_information[row]), 6),
    }


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Return the entropy over the last axis, in nats."""
    return np.asarray(-(probabilities * np.log(np.maximum(probabilities, 1e-30))).sum(axis=-1))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # not a valid path, for example too long
        return False


if __name__ == "__main__":
    sys.exit(main())
