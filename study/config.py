"""The options of `run_study.py`, by group.

A function that needs a few options takes their group; `StudyConfig` is all of them.
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
    """How an option looks in `--help`.

    Args:
        metavar: What stands for its value; None: its type.
        default: Its default in words, for one that the study chooses; None: the field's own.
    """
    hint = None if default is None else f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]


# Help texts are one line each: tyro breaks longer ones where the source does.
@dataclass(frozen=True)
class DataOptions:
    """The images."""

    data: Annotated[str, option("cifar10|PATH")] = "cifar10"
    """CIFAR-10, or the folder of your own images (docs/own-images.md)."""
    images: Annotated[int | None, option("N", "all")] = None
    """Use a stratified part of this many images."""
    image_size: Annotated[int | None, option("PIXELS", "96, own images 224, or the space's")] = None
    """Side to which images are resized, 32 or more; the largest lever on accuracy."""
    val_fraction: Annotated[float | None, option("FRACTION", "0.1")] = None
    """Part of each class's training images that becomes val, where there is no val/."""
    test_fraction: Annotated[float | None, option("FRACTION", "0.2")] = None
    """Part of each class of your own images that becomes test, where there is no test/."""


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
    """Random changes to training images; needs finetune."""
    epochs: Annotated[int, option("N")] = 15
    """Epochs of a full training run."""


@dataclass(frozen=True)
class SearchOptions:
    """What is compared, and how long it is searched."""

    trials: Annotated[int, option("N")] = 40
    """Search trials in all, shared equally by the arms of the space."""
    space: Annotated[
        str | None, option("NAME", "dropout, or finetune with --transfer finetune")
    ] = None
    """What is compared and searched; `python -m search_spaces` lists the spaces."""
    metric: Metric = "val_accuracy"
    """What the search, ASHA, epoch selection and export optimise."""
    time_budget: Annotated[float | None, option("MINUTES", "none")] = None
    """Start no more trials after this long; those running finish."""
    seed: Annotated[int, option("N")] = 0
    """The study's seed, from which all randomness is derived."""


@dataclass(frozen=True)
class ConfirmationOptions:
    """What is trained again and compared, and which model is exported."""

    seeds: Annotated[int, option("N")] = 8
    """Confirmation seeds; each trains every recipe with every setting. 0: no confirmation."""
    export: Annotated[str, option("best|ARM|ensemble")] = "best"
    """Model to export: the best run, the best run of an arm, or the heads of all seeds together."""


@dataclass(frozen=True)
class ResourceOptions:
    """What each run gets, and what happens when one is lost."""

    cpus_per_trial: Annotated[float, option("N")] = 1
    """CPU cores of one run."""
    gpus_per_trial: Annotated[float | Literal["auto"], option("N|auto")] = "auto"
    """GPUs of one run; a fraction shares a GPU. auto: measured before the search."""
    max_concurrent: Annotated[int | None, option("N", "as many as fit")] = None
    """Most runs at once; on a cluster, how many to ask for, so that it grows."""
    max_failures: Annotated[int, option("N")] = 3
    """Times that a lost run is tried again without having progressed."""
    trial_timeout: Annotated[float | None, option("MINUTES", "none")] = None
    """Time without an epoch after which a run counts as hung, and is tried again."""
    stop_after_failures: Annotated[int, option("N")] = 5
    """Runs in a row that fail for the same cause before the study stops."""


@dataclass(frozen=True)
class RunOptions:
    """Where the study runs and is kept."""

    name: Annotated[str | None, option("NAME", "space and time, or the latest to resume")] = None
    """Name of the run directory."""
    resume: Flag = False
    """Go on with a study, or extend it with more --trials or --seeds; other options are kept."""
    dry_run: Flag = False
    """Print the plan and stop."""
    storage: Annotated[str, option("FOLDER|URI")] = "runs"
    """Where run directories are kept: a folder, or a URI such as s3://bucket/studies."""
    address: Annotated[str | None, option("auto|HOST:PORT", "RAY_ADDRESS, else local")] = None
    """Ray cluster to run on; local: a Ray of this machine alone."""
    mlflow: Annotated[str | None, option("URI", "none")] = None
    """MLflow server that gets trials and best model too; needs the extra mlflow."""
    verbose: Flag = False
    """Show Ray's own output too."""


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

    Searches each arm of a space with the same number of trials, trains the winners again over
    matched seeds, compares them, and exports the best model.

      run_study.py --trials 40                     the default study, on CIFAR-10
      run_study.py --data PATH --trials 40         on your own images
      run_study.py --resume                        go on with the latest study
    """


#: The options by the heading that they have in `--help`.
GROUPS: Mapping[str, type] = {
    "data": DataOptions,
    "model": ModelOptions,
    "search": SearchOptions,
    "confirmation": ConfirmationOptions,
    "resource": ResourceOptions,
    "run": RunOptions,
}

#: Options that steer how a study runs, not what it finds: they may differ when a study goes on.
#: Data and weights may lie elsewhere; it is their content that must be the same.
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

#: What belongs to one start of a study, and not to the study.
OF_ONE_START = ("address", "storage", "name", "resume", "dry_run", "verbose")


def as_arguments(config: Mapping[str, Any]) -> list[str]:
    """The command line that gives this configuration, as `asdict` of it stands in study.json."""
    return [
        f"--{name.replace('_', '-')}={value}"
        for name, value in config.items()
        if name not in OF_ONE_START and value is not None
    ]


def resume_command(config: StudyConfig) -> str:
    """The command that goes on with a study."""
    where = "".join(
        f" --{name} {shlex.quote(value)}"
        for name, value in (("address", config.address), ("storage", config.storage))
        if value not in (None, StudyConfig.storage)
    )
    return f"python run_study.py --resume --name {config.name}{where}"
