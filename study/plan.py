"""The plan of a study and its disk usage, shown before it starts."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from analysis.words import count
from search_spaces import Range
from study.cluster.machines import Machines
from study.cluster.resources import Resources, is_measured, plan_resources
from study.errors import UserError
from study.models.head import head_parameters
from study.search.trials import KEPT_PER_ARM
from study.storage.location import Location
from study.study import Study

#: Parameters of a ResNet50 without its classifier, running statistics included.
BACKBONE_PARAMETERS = 23_561_152

#: Number of formats of the exported model: safetensors, ONNX and torch.export.
FORMATS = 3


@dataclass(frozen=True)
class DiskUse:
    """Upper bound on the disk space of a study's weights, in bytes."""

    running: int
    """While runs are in progress."""
    kept: int
    """After the study."""


def plan_disk(study: Study, at_once: int) -> DiskUse:
    """Return an upper bound on the disk space of a study's weights.

    A run in progress stores its weights, two optimizer moments of each, and its best weights;
    briefly twice, since a new checkpoint is written before the old one is deleted.

    Args:
        study: Its space bounds the head widths.
        at_once: Number of concurrent runs.
    """
    heads = study.space.ranges(study.space.arms[0])["head"].ends
    parameters = max(head_parameters(str(head), classes=1000) for head in heads)
    if study.finetunes:
        parameters += BACKBONE_PARAMETERS
    weights = 4 * parameters
    searched = sum(1 for trials in study.trials_per_arm.values() if trials)
    settings = len(study.space.settings or study.space.arms)
    seeds = study.config.seeds
    # Only the best seed of whole networks is kept, but the heads of all seeds.
    confirmed = max(searched, 1) * settings * (min(seeds, 1) if study.finetunes else seeds)
    exported = weights if study.finetunes else weights + 4 * BACKBONE_PARAMETERS
    if study.config.export == "ensemble":
        exported += (seeds - 1) * weights
    kept = (searched * KEPT_PER_ARM + confirmed) * weights + FORMATS * exported
    return DiskUse(running=2 * 4 * weights * at_once, kept=kept)


def check_disk(location: Location, use: DiskUse) -> None:
    """Check that the weights will fit on the disk.

    Raises:
        UserError: They will not fit.
    """
    if location.remote is not None:
        return
    place = Path(location.storage)
    while not place.exists():
        place = place.absolute().parent
    free, most = shutil.disk_usage(place).free, use.running + use.kept
    if free < most:
        raise UserError(
            f"--storage {location.storage}: the weights may take {most / 1e9:.1f} GB, but only"
            f" {free / 1e9:.1f} GB are free there; free some space, give another folder, or run"
            " fewer trials at once with --max-concurrent."
        )


def plan_table(study: Study, machines: Machines) -> Table:
    """Return the plan: arms, search, confirmation, inputs, resources and run directory.

    Raises:
        UserError: The machines cannot run a single trial.
    """
    config, space = study.config, study.space
    resources = plan_resources(study.config, machines)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("question", space.question)
    for arm in space.arms:
        trials = study.trials_per_arm[arm.name]
        work = count(trials, "trial") if trials else "nothing to search"
        table.add_row(f"arm {arm.name}", f"{work}, {_factor(arm.factor)}")
    if study.skipped_arms:
        table.add_row(
            "skipped arms",
            f"{', '.join(study.skipped_arms)}: only affects the backbone, which is frozen",
        )
    recipe = (
        f"{name} {values}"
        for name, values in space.ranges(space.arms[0]).items()
        if name not in space.factor_names
    )
    table.add_row("recipe", "; ".join(recipe))
    table.add_row(
        "data", f"{config.data}, {config.images or 'all'} images, resized to {config.image_size} px"
    )
    table.add_row("backbone", f"ResNet50, weights {config.weights}, preprocess {config.preprocess}")
    table.add_row("transfer", _transfer(study))
    if any(study.trials_per_arm.values()):
        rungs = ", ".join(map(str, study.rungs))
        word = "epoch" if len(study.rungs) == 1 else "epochs"
        stopping = f"ASHA decides after {word} {rungs}" if rungs else "too few for early stopping"
        table.add_row("search", f"{count(config.epochs, 'epoch')}; {stopping}; by {config.metric}")
    table.add_row("confirmation", _confirmation(study))
    table.add_row("resources", _resources(study, machines, resources))
    most = int(machines.cpus) if is_measured(study.config, machines) else resources.at_once
    use = plan_disk(study, most)
    table.add_row(
        "disk",
        f"weights take at most {use.running / 1e9:.1f} GB during runs, and"
        f" {use.kept / 1e9:.1f} GB permanently",
    )
    if config.time_budget:
        table.add_row(
            "time budget", f"no new trials after {config.time_budget:g} minutes of search"
        )
    table.add_row("run directory", study.location.of(str(config.name)))
    return table


def _factor(factor: Mapping[str, Range]) -> str:
    return ", ".join(f"{name} {values}" for name, values in factor.items())


def _transfer(study: Study) -> str:
    config = study.config
    if not study.finetunes:
        return "frozen: the backbone's features are computed once; only the head trains"
    augment = "no augmentation" if config.augment == "none" else f"augmentation {config.augment}"
    return f"finetune: all layers train, {augment}"


def _resources(study: Study, machines: Machines, resources: Resources) -> str:
    cpus = f"{resources.cpus:g} CPU"
    if is_measured(study.config, machines):
        return f"{cpus} per run; runs per GPU are measured before the search ({machines})"
    gpus = f", {resources.gpus:g} GPU" if resources.gpus else ""
    at_once = f"{resources.at_once} at once"
    fit = machines.capacity(resources.cpus, resources.gpus)
    if resources.at_once > fit:
        at_once += f" after nodes have joined, {fit} now"
    return f"{cpus}{gpus} per run, {at_once} ({machines})"


def _confirmation(study: Study) -> str:
    config, space = study.config, study.space
    if not config.seeds:
        return "none (--seeds 0)"
    settings = len(space.settings or space.arms)
    recipes = len(space.arms) if any(study.trials_per_arm.values()) else 1
    runs = recipes * settings * config.seeds
    return (
        f"{count(recipes, 'recipe')} × {count(settings, 'setting')} ×"
        f" {count(config.seeds, 'seed')} = {count(runs, 'run')} of"
        f" {count(config.epochs, 'epoch')}, no early stopping"
    )
