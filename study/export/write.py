"""The last phase: write the chosen model, measure it from the images, and check every format."""

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
from analysis.rundir import write_whole
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
from study.models.state_dict import part_of
from study.screen import Screen, describe_score
from study.search.champions import Champion
from study.study import Study
from study.system.cache import sha256_of

SUMS, REQUIREMENTS = "SHA256SUMS", "requirements.txt"


@dataclass(frozen=True)
class Exported:
    """What was exported, and how good it is."""

    chosen: Selection
    measured: ExportMetrics
    agreements: Mapping[str, Agreement]
    """By the name of the file."""


def export_best_model(
    study: Study, champions: Sequence[Champion], inputs: Inputs, to: Path | None = None
) -> Exported:
    """Write the model that `--export` asks for and evaluate it as it will be used.

    It is loaded from its files and run on the test images in fp32, then every other format is run
    in a process of its own and held against that.

    Args:
        study: Its run directory holds the runs.
        champions: Stand in for confirmation runs where there are none.
        inputs: Of the study.
        to: The folder; None: best_model/ of the run directory. What stood there is replaced at
            the end.

    Raises:
        UserError: The model is not to be had.
        StudyStoppedError: A format does not predict what the model does, or the place is full.
    """
    dataset, test = inputs.dataset, inputs.split.test
    height, width = dataset.pixels.shape[1:3]
    chosen = select_model(study, champions)
    content = _bundle(chosen, inputs)
    record = _record(study, chosen, inputs)
    path = to or study.rundir.best_model
    if there := _find_exported(path, chosen, record):
        return there
    with _new_folder(path) as folder:
        bundle.save(folder, content)
        bundle.save_config(folder, content, record)
        model = bundle.load(folder)
        labels = np.asarray(dataset.labels[test])
        with ExitStack() as processes:
            running = {}
            for name, write in formats.WRITERS.items():
                write(model, folder / name)
                # It loads the file while this process goes on.
                started = verify.start(folder / name, height, width, model.images_at_once)
                running[name] = processes.enter_context(started)
            logits = predict_logits(model, dataset.pixels, test, "Measuring the best model")
            measured = compute_export_metrics(logits, torch.from_numpy(labels))
            expected = logits.softmax(dim=1).numpy()
            agreements = {
                name: verify.verify(running[name], dataset.pixels, test, labels, expected)
                for name in (formats.ONNX, formats.PROGRAM)
            }
        record["test"] = {**asdict(measured), "how": "from the images, in fp32"}
        record["verified"] = {name: asdict(found) for name, found in agreements.items()}
        bundle.save_config(folder, content, record)
        write_whole(folder / REQUIREMENTS, _requirements())
        write_card(folder, study, chosen, inputs, measured, agreements, record["verdict"])
        _write_sums(folder)
    if to is None:
        for file in sorted(study.rundir.best_model.iterdir()):
            study.rundir.wrote(file)
    return Exported(chosen, measured, agreements)


def describe_export(exported: Exported) -> str:
    """The exported model in a phrase, with its test accuracy measured anew."""
    chosen, measured = exported.chosen, exported.measured
    name = chosen.run_ids[0] if len(chosen.run_ids) == 1 else f"{len(chosen.run_ids)} heads"
    said = f"{name}: test accuracy {100 * measured.accuracy:.2f} % from the images in fp32"
    if len(chosen.rows) == 1:
        said += f", {100 * chosen.rows[0].test_accuracy:.2f} % when it was confirmed"
    worst = min((found.same_answers for found in exported.agreements.values()), default=1.0)
    return f"{said}; {' and '.join(exported.agreements)} give the same answer for" + (
        f" {100 * worst:.2f} % of the test images"
    )


def show_export(study: Study, exported: Exported, to: Path | None, screen: Screen) -> None:
    """Print where the exported model is, and how good."""
    if gain := describe_ensemble_gain(exported.chosen, study.config.metric):
        screen.print(gain)
    place = study.where(study.rundir.best_model) if to is None else str(to)
    screen.print(f"Best model: {place} ({describe_export(exported)})")


def describe_ensemble_gain(chosen: Selection, metric: Metric) -> str:
    """What an ensemble gains on val over the best single run, as a sentence; empty for others."""
    if chosen.best_single is None:
        return ""
    return (
        f"On val the ensemble of {len(chosen.run_ids)} heads has"
        f" {describe_score(chosen.score, metric)}, the best single run"
        f" {describe_score(chosen.best_single, metric, short=True)}: it"
        f" {'pays' if chosen.pays else 'does not pay'}."
    )


def _bundle(chosen: Selection, inputs: Inputs) -> ModelParts:
    backbone = _backbone(chosen.trained[0])
    return ModelParts(
        classes=inputs.dataset.classes,
        preprocess=inputs.preprocess,
        side=inputs.dataset.side,
        architecture=inputs.weights.architecture,
        hyperparameters=chosen.hyperparameters,
        backbone=backbone or inputs.weights.state,
        standardisation=inputs.standardisation or no_standardisation(),
        heads=tuple(part_of(trained, "head.") or trained for trained in chosen.trained),
    )


def _backbone(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a network under torchvision's names; nothing where a head alone trained."""
    backbone = part_of(trained, "backbone.")
    return {k: value for k, value in backbone.items() if not k.endswith("num_batches_tracked")}


def _record(study: Study, chosen: Selection, inputs: Inputs) -> dict[str, Any]:
    """What config.json says of where the model comes from."""
    verdict = compute_verdict(load_frames(study.rundir.path))
    record: dict[str, Any] = {
        "study": study.config.name,
        "export": study.config.export,
        "run_id": chosen.run_ids[0] if len(chosen.run_ids) == 1 else list(chosen.run_ids),
        "chosen_by": f"{study.config.metric} on val",
        study.config.metric: chosen.score,
        "test_accuracy_when_confirmed": [row.test_accuracy for row in chosen.rows],
        "data": {"name": inputs.dataset.name, "sha256": inputs.dataset.sha256},
        "weights": {"source": inputs.weights.source, "sha256": inputs.weights.sha256},
        "verdict": [verdict.sentence, *map(describe_loss, verdict.comparisons[:1])],
    }
    if chosen.best_single is not None:
        record["ensemble"] = {"best_single_on_val": chosen.best_single, "pays": chosen.pays}
    return record


def _find_exported(path: Path, chosen: Selection, record: Mapping[str, Any]) -> Exported | None:
    """What stands at a place already, if it is whole and what would be written there."""
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
        return Exported(chosen, ExportMetrics(**measured), agreements)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _requirements() -> str:
    """What each way of using the model needs, at the versions that it was checked with."""

    def pin(package: str) -> str:
        return f"{package}=={version(package).split('+')[0]}"

    return "\n".join(
        [
            f"# Python {platform.python_version()}. For model.onnx:",
            *map(pin, ("numpy", "onnxruntime", "pillow")),
            "# For model.pt2:",
            f"# {pin('torch')}",
            "# For model.safetensors, and for `python -m study.predict`, the project itself.",
            "",
        ]
    )


def _write_sums(folder: Path) -> None:
    """The SHA-256 of each file, as `sha256sum --check` reads them."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for file in files:
        file.chmod(0o644)
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in files]
    write_whole(folder / SUMS, "".join(lines))


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that takes its place when the block has come to its end; until then the old stays.

    Raises:
        StorageError: It cannot be written to.
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
