"""Options of `run_study.py`, by group.

Functions that need only some options take one group; `StudyConfig` combines all groups.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from analysis.rundir.metric import Metric

Transfer = Literal["auto", "frozen", "finetune"]
Augment = Literal["none", "flip", "crop-flip"]

#: ASHA's first rung, in epochs, and the factor between rungs.
GRACE_PERIOD = 3
REDUCTION_FACTOR = 3


def option(metavar: str | None = None, default: str | None = None) -> object:
    """Return an annotation that sets how an option is shown in `--help`.

    Args:
        metavar: Placeholder for its value; None: its type.
        default: Description of a default that the study chooses; None: the field's default.
    """
    hint = None if default is None else f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]


# Help texts are one line each: tyro keeps the source's line breaks.
@dataclass(frozen=True)
class DataOptions:
    """The images."""

    data: Annotated[str, option("cifar10|PATH")] = "cifar10"
    """CIFAR-10, or the folder of your own images (docs/own-images.md)."""
    images: Annotated[int | None, option("N", "all")] = None
    """Use a stratified sample of this many images."""
    image_size: Annotated[int | None, option("PIXELS", "96, own images 224, or the space's")] = None
    """Side length images are resized to, at least 32; the largest lever on accuracy."""
    val_fraction: Annotated[float | None, option("FRACTION", "0.1")] = None
    """Fraction of each class's training images used as val if there is no val/."""
    test_fraction: Annotated[float | None, option("FRACTION", "0.2")] = None
    """Fraction of each class of your own images used as test if there is no test/."""


@dataclass(frozen=True)
class ModelOptions:
    """The network and how it trains."""

    transfer: Transfer = "auto"
    """Train the head alone (frozen) or all layers (finetune); auto: finetune if there is a GPU."""
    weights: Annotated[str | None, option("NAME|FILE", "auto, or the space's")] = None
    """Pretrained ResNet50: imagenet-v1, imagenet-v2, keras, a file, or auto for the first found."""
    preprocess: Annotated[
        Literal["own", "raw"] | None, option("own|raw", "own, or the space's")
    ] = None
    """Images as the weights were trained on (own), or RGB 0 to 255 as in the article (raw)."""
    augment: Annotated[
        Augment | None, option("none|flip|crop-flip", "flip with finetune, or the space's")
    ] = None
    """Augmentation of training images; needs finetune."""
    epochs: Annotated[int, option("N")] = 15
    """Epochs of a full training run."""


@dataclass(frozen=True)
class SearchOptions:
    """What to compare, and how much to search."""

    trials: Annotated[int, option("N")] = 40
    """Search trials in all, shared equally by the arms of the space."""
    space: Annotated[
        str | None, option("NAME", "dropout, or finetune with --transfer finetune")
    ] = None
    """Arms and hyperparameters to search; `python -m search_spaces` lists the spaces."""
    metric: Metric = "val_accuracy"
    """Metric optimised by the search, ASHA, epoch selection and export."""
    time_budget: Annotated[float | None, option("MINUTES", "none")] = None
    """Start no new trials after this long; running trials finish."""
    seed: Annotated[int, option("N")] = 0
    """The study's seed, from which all randomness is derived."""


@dataclass(frozen=True)
class ConfirmationOptions:
    """Confirmation runs, and which model to export."""

    seeds: Annotated[int, option("N")] = 8
    """Confirmation seeds; each trains every recipe with every setting. 0: no confirmation."""
    export: Annotated[str, option("best|ARM|ensemble")] = "best"
    """Model to export: the best run, an arm's best run, or an ensemble of all seeds' heads."""


@dataclass(frozen=True)
class ResourceOptions:
    """Resources per run, and how failed runs are handled."""

    cpus_per_trial: Annotated[float, option("N")] = 1
    """CPU cores of one run."""
    gpus_per_trial: Annotated[float | Literal["auto"], option("N|auto")] = "auto"
    """GPUs of one run; with a fraction, runs share a GPU. auto: measured before the search."""
    max_concurrent: Annotated[int | None, option("N", "as many as fit")] = None
    """Maximum concurrent runs; on a cluster, how many to request, so that it can autoscale."""
    max_failures: Annotated[int, option("N")] = 3
    """Times a lost run is retried without progress in between."""
    trial_timeout: Annotated[float | None, option("MINUTES", "none")] = None
    """Time without a finished epoch after which a run counts as hung and is retried."""
    stop_after_failures: Annotated[int, option("N")] = 5
    """Stop the study after this many consecutive failures with the same cause."""


@dataclass(frozen=True)
class RunOptions:
    """Where the study runs and is stored."""

    name: Annotated[str | None, option("NAME", "space and time, or the latest to resume")] = None
    """Name of the run directory."""
    resume: Flag = False
    """Resume a study, or extend it with more --trials or --seeds; with --name, start it if new."""
    dry_run: Flag = False
    """Print the plan and stop."""
    storage: Annotated[str, option("FOLDER|URI")] = "runs"
    """Where run directories are kept: a folder, or a URI such as s3://bucket/studies."""
    address: Annotated[str | None, option("auto|HOST:PORT", "RAY_ADDRESS, else local")] = None
    """Ray cluster to run on; local: start Ray on this machine."""
    mlflow: Annotated[str | None, option("URI", "none")] = None
    """Also log trials and the best model to this MLflow server; needs the mlflow extra."""
    verbose: Flag = False
    """Also show Ray's output."""


@dataclass(frozen=True)
class StudyConfig(
    DataOptions,
    ModelOptions,
    SearchOptions,
    ConfirmationOptions,
    ResourceOptions,
    RunOptions,
):
    """Does dropout in the head of a fine-tuned ResNet50 help?

    Searches each arm of a space with the same number of trials, retrains the champions over
    matched seeds, compares them, and exports the best model.

      run_study.py --trials 40                     the default study, on CIFAR-10
      run_study.py --data PATH --trials 40         on your own images
      run_study.py --resume                        resume the latest study
    """


#: Option groups by their heading in `--help`.
GROUPS: Mapping[str, type] = {
    "data": DataOptions,
    "model": ModelOptions,
    "search": SearchOptions,
    "confirmation": ConfirmationOptions,
    "resource": ResourceOptions,
    "run": RunOptions,
}

#: Options that affect how a study runs but not its results: they may change on resume.
#: Data and weights may move; their content must stay the same.
OPERATIONAL = (
    "data",
    "weights",
    "cpus_per_trial",
    "gpus_per_trial",
    "max_concurrent",
    "export",
    "time_budget",
    "max_failures",
    "trial_timeout",
    "stop_after_failures",
    "address",
    "storage",
    "mlflow",
    "name",
    "resume",
    "dry_run",
    "verbose",
)

#: Options of a single start, which a resumed study does not inherit.
NOT_INHERITED = ("address", "storage", "name", "resume", "dry_run", "verbose")


def as_arguments(config: Mapping[str, Any]) -> list[str]:
    """Return the command line for a configuration given as in study.json (by `asdict`)."""
    return [
        f"--{name.replace('_', '-')}={value}"
        for name, value in config.items()
        if name not in NOT_INHERITED and value is not None
    ]


def resume_command(config: StudyConfig) -> str:
    """Return the command that resumes a study."""
    where = "".join(
        f" --{name} {shlex.quote(value)}"
        for name, value in (("address", config.address), ("storage", config.storage))
        if value not in (None, StudyConfig.storage)
    )
    return f"python run_study.py --resume --name {config.name}{where}"
