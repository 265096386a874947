"""The last phase: write the selected model, evaluate it from images, and check every format."""

import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.frames import load_frames
from analysis.rundir import write_atomically
from analysis.rundir.metric import Metric
from analysis.stats.verdict import compute_verdict, describe_loss
from study.errors import UserError, storage_error
from study.export import bundle, formats, verify
from study.export.model import ModelParts, predict_logits
from study.export.model_card import ExportMetrics, compute_export_metrics, write_card
from study.export.select import Selection, select_model
from study.export.verify import Agreement
from study.features.standardise import no_standardisation
from study.inputs import Inputs
from study.models.state_dict import strip_prefix
from study.screen import Screen, describe_score
from study.search.champions import Champion
from study.study import Study
from study.system.cache import sha256_of

SUMS, REQUIREMENTS = "SHA256SUMS", "requirements.txt"


@dataclass(frozen=True)
class Export:
    """An exported model, and how good it is."""

    selection: Selection
    measured: ExportMetrics
    agreements: Mapping[str, Agreement]
    """Agreement of each other format with the model, by file name."""


def export_best_model(
    study: Study, champions: Sequence[Champion], inputs: Inputs, to: Path | None = None
) -> Export:
    """Write the model that `--export` asks for and evaluate it as it will be used.

    The model is loaded from its files and run on the test images in fp32; every other format is run
    in its own process and compared with it.

    Args:
        study: The study whose run directory holds the runs.
        champions: Candidates if there are no confirmation runs.
        inputs: The study's inputs.
        to: Folder to write to, replaced at the end; None: best_model/ in the run directory.

    Raises:
        UserError: The model does not exist or cannot be read.
        StudyStoppedError: A format disagrees with the model, or the folder cannot be written to.
    """
    dataset, test = inputs.dataset, inputs.split.test
    height, width = dataset.pixels.shape[1:3]
    selection = select_model(study, champions)
    parts = _model_parts(selection, inputs)
    record = _record(study, selection, inputs)
    path = to or study.rundir.best_model
    if existing := _find_exported(path, selection, record):
        return existing
    with _new_folder(path) as folder:
        bundle.save(folder, parts)
        bundle.save_config(folder, parts, record)
        model = bundle.load(folder)
        labels = np.asarray(dataset.labels[test])
        with ExitStack() as processes:
            running = {}
            for name, write in formats.WRITERS.items():
                write(model, folder / name)
                # It loads the file while this process continues.
                started = verify.start_exported(folder / name, height, width, model.batch_size)
                running[name] = processes.enter_context(started)
            logits = predict_logits(model, dataset.pixels, test, "Evaluating the best model")
            measured = compute_export_metrics(logits, torch.from_numpy(labels))
            expected = logits.softmax(dim=1).numpy()
            agreements = {
                name: verify.check_agreement(running[name], dataset.pixels, test, labels, expected)
                for name in (formats.ONNX, formats.PROGRAM)
            }
        record["test"] = {**asdict(measured), "how": "from the images, in fp32"}
        record["verified"] = {name: asdict(found) for name, found in agreements.items()}
        bundle.save_config(folder, parts, record)
        write_atomically(folder / REQUIREMENTS, _requirements())
        write_card(folder, study, selection, inputs, measured, agreements, record["verdict"])
        _write_sums(folder)
    if to is None:
        for file in sorted(study.rundir.best_model.iterdir()):
            study.rundir.wrote(file)
    return Export(selection, measured, agreements)


def describe_export(exported: Export) -> str:
    """Describe the exported model in a phrase, with its test accuracy measured from images."""
    selection, measured = exported.selection, exported.measured
    name = (
        selection.run_ids[0] if len(selection.run_ids) == 1 else f"{len(selection.run_ids)} heads"
    )
    text = f"{name}: test accuracy {100 * measured.accuracy:.2f} % from images in fp32"
    if len(selection.rows) == 1:
        text += f", {100 * selection.rows[0].test_accuracy:.2f} % in its confirmation run"
    worst = min((found.same_answers for found in exported.agreements.values()), default=1.0)
    return f"{text}; {' and '.join(exported.agreements)} predict the same class for" + (
        f" {100 * worst:.2f} % of the test images"
    )


def show_export(study: Study, exported: Export, to: Path | None, screen: Screen) -> None:
    """Print where the exported model is, and how good it is."""
    if gain := describe_ensemble_gain(exported.selection, study.config.metric):
        screen.print(gain)
    place = study.where(study.rundir.best_model) if to is None else str(to)
    screen.print(f"Best model: {place} ({describe_export(exported)})")


def describe_ensemble_gain(selection: Selection, metric: Metric) -> str:
    """Return a sentence comparing an ensemble with the best single run on val; "" for others."""
    if selection.best_single is None:
        return ""
    return (
        f"On val, the ensemble of {len(selection.run_ids)} heads has"
        f" {describe_score(selection.score, metric)}, the best single run"
        f" {describe_score(selection.best_single, metric, short=True)}: the ensemble"
        f" {'is better' if selection.beats_best_single else 'is not better'}."
    )


def _model_parts(selection: Selection, inputs: Inputs) -> ModelParts:
    backbone = _backbone(selection.trained[0])
    return ModelParts(
        classes=inputs.dataset.classes,
        preprocess=inputs.preprocess,
        side=inputs.dataset.side,
        architecture=inputs.weights.architecture,
        hyperparameters=selection.hyperparameters,
        backbone=backbone or inputs.weights.state,
        standardisation=inputs.standardisation or no_standardisation(),
        heads=tuple(strip_prefix(trained, "head.") or trained for trained in selection.trained),
    )


def _backbone(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's backbone under torchvision's names; empty if only the head trained."""
    backbone = strip_prefix(trained, "backbone.")
    return {k: value for k, value in backbone.items() if not k.endswith("num_batches_tracked")}


def _record(study: Study, selection: Selection, inputs: Inputs) -> dict[str, Any]:
    """Return the provenance of the model for config.json."""
    verdict = compute_verdict(load_frames(study.rundir.path))
    record: dict[str, Any] = {
        "study": study.config.name,
        "export": study.config.export,
        "run_id": selection.run_ids[0] if len(selection.run_ids) == 1 else list(selection.run_ids),
        "chosen_by": f"{study.config.metric} on val",
        study.config.metric: selection.score,
        "test_accuracy_when_confirmed": [row.test_accuracy for row in selection.rows],
        "data": {"name": inputs.dataset.name, "sha256": inputs.dataset.sha256},
        "weights": {"source": inputs.weights.source, "sha256": inputs.weights.sha256},
        "verdict": [verdict.sentence, *map(describe_loss, verdict.comparisons[:1])],
    }
    if selection.best_single is not None:
        record["ensemble"] = {
            "best_single_on_val": selection.best_single,
            "beats_best_single": selection.beats_best_single,
        }
    return record


def _find_exported(path: Path, selection: Selection, record: Mapping[str, Any]) -> Export | None:
    """Return the model already there, if it is intact and the same; else None."""
    try:
        config = bundle.read_config(path)
        if any(config.get(name) != value for name, value in record.items()):
            return None
        for line in (path / SUMS).read_text().splitlines():
            sha256, name = line.split("  ", 1)
            if sha256_of(path / name) != sha256:
                return None
        measured = {k: value for k, value in config["test"].items() if k != "how"}
        for name in ("accuracy_interval", "class_accuracy"):
            measured[name] = tuple(measured[name])
        agreements = {name: Agreement(**found) for name, found in config["verified"].items()}
        return Export(selection, ExportMetrics(**measured), agreements)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _requirements() -> str:
    """Return requirements.txt: what each use of the model needs, at the versions checked."""

    def pin(package: str) -> str:
        return f"{package}=={version(package).split('+')[0]}"

    return "\n".join(
        [
            f"# Python {platform.python_version()}. For model.onnx:",
            *map(pin, ("numpy", "onnxruntime", "pillow")),
            "# For model.pt2:",
            f"# {pin('torch')}",
            "# For model.safetensors and `python -m study.predict`: the project itself.",
            "",
        ]
    )


def _write_sums(folder: Path) -> None:
    """Write the SHA-256 of each file for `sha256sum --check`."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for file in files:
        file.chmod(0o644)
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in files]
    write_atomically(folder / SUMS, "".join(lines))


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `path` once the block succeeds; until then the old stays.

    Raises:
        StorageError: The folder cannot be written to.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        (part / "new").mkdir(parents=True)
        yield part / "new"
        if path.exists():
            path.rename(part / "old")
        (part / "new").rename(path)
    except OSError as error:
        raise storage_error(error, path) or error from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
