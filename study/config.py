"""What the user asks for: the options of `run_study.py`, checked before anything is written."""

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

import search_spaces
from analysis.rundir import RunDir, RunDirError
from study.cluster import check_address
from study.errors import UserError
from study.layouts import is_image_folder
from study.place import Place
from study.storage import Remote
from study.system.cli import parse_arguments

Metric = Literal["val_accuracy", "val_loss", "val_balanced_accuracy"]
Transfer = Literal["auto", "frozen", "finetune"]

#: ASHA's first rung and the factor between rungs (DESIGN: grace period 3 or more, factor 3).
GRACE_PERIOD = 3
REDUCTION_FACTOR = 3

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


@dataclass(frozen=True)
class StudyConfig:
    """Does dropout in the head of a fine-tuned ResNet50 help?

    Searches the arms of a space with the same number of trials each, trains the champions anew
    over matched seeds, compares them, and leaves the best model ready to use.
    """

    trials: int = 40
    """Search trials in all, shared equally by the arms of the space."""
    space: str | None = None
    """What is compared and searched: dropout, finetune, article, dose, layerwise, placebo, or your
    own as package.module:NAME; `python -m search_spaces` lists them. Default: dropout where the
    backbone is frozen, else finetune."""
    data: str = "cifar10"
    """Images: cifar10 (downloaded once, verified), a folder or archive that holds CIFAR-10, or your
    own: a folder with a folder of images for each class, or with train/ and test/ (and val/) of
    such folders."""
    images: int | None = None
    """Use a stratified part of the data with this many images in all. Default: all of them."""
    val_fraction: float | None = None
    """Part of the training images of each class that becomes val, where no val/ is given.
    Default: 0.1."""
    test_fraction: float | None = None
    """Part of your own images of each class that becomes test, where no test/ is given.
    Default: 0.2."""
    weights: str | None = None
    """Pretrained ResNet50: auto (imagenet-v1, then keras), imagenet-v1, imagenet-v2, keras, or a
    file. Default: the space's, else auto."""
    image_size: int | None = None
    """Side in pixels to which images are resized, 32 or more. Default: the space's (article: 32),
    else 96; for your own images 224."""
    preprocess: Literal["own", "raw"] | None = None
    """own: as the weights were trained; raw: RGB 0 to 255, as in the article. Default: the
    space's (article: raw), else own."""
    transfer: Transfer = "auto"
    """frozen: the backbone is fixed, its features are computed once, and only the head trains.
    finetune: all layers train. auto: the space's, else finetune where there is a GPU, else
    frozen."""
    augment: Literal["none", "flip", "crop-flip"] | None = None
    """With finetune, what is done to training images at random: flip mirrors half of them;
    crop-flip also shifts each by up to an eighth of its side. Default: the space's (article:
    none), else flip."""
    epochs: int = 15
    """Epochs of a full training run."""
    metric: Metric = "val_accuracy"
    """What the search, ASHA, epoch selection and export go by, measured on val. With
    val_balanced_accuracy, the mean over the classes of their accuracies, the verdict goes by it
    too."""
    seeds: int = 8
    """Confirmation seeds; each trains every recipe with every setting of the factor. 0 leaves the
    confirmation out."""
    seed: int = 0
    """The study's seed, from which all randomness is derived."""
    export: str = "best"
    """The model to export: best (of all confirmation runs, by the metric), the best of an arm such
    as no-dropout, or, with a frozen backbone, ensemble: the heads of one recipe and setting under
    all seeds, over one backbone."""
    cpus_per_trial: float = 1
    """CPU cores of one trial."""
    gpus_per_trial: float | Literal["auto"] = "auto"
    """GPUs of one trial; a fraction lets trials share a GPU. auto: what a trial needs is measured
    before the search; without a GPU, 0."""
    max_concurrent: int | None = None
    """Trials that run at once, at most. Default: as many as fit. On a cluster so many are asked for
    even if fewer fit now, so that one that grows on demand grows."""
    time_budget: float | None = None
    """Minutes, counted from each start, after which the search starts no more trials (those running
    finish)."""
    max_failures: int = 3
    """Times in a row that a run is tried again, from its last saved state, after its process or
    machine was lost before another epoch ended. A run that fails by itself is not tried again."""
    trial_timeout: float | None = None
    """Minutes without an epoch after which a run is taken to hang, and tried again like one that
    was lost. Default: it may take its time."""
    stop_after_failures: int = 5
    """Runs in a row that fail for the same cause after which the study stops."""
    address: str | None = None
    """Ray cluster to run on: auto (the one that this machine is a node of) or host:port of its
    head. Default: RAY_ADDRESS, else a Ray of this machine alone, as with local."""
    storage: str = "runs"
    """Folder that holds the run directories, or a URI such as s3://bucket/studies. On a cluster,
    one that every node reaches."""
    mlflow: str | None = None
    """Where MLflow gets the trials and the best model as well: a tracking server such as
    http://127.0.0.1:5000, or sqlite:///FILE. Needs the extra mlflow. Default: nowhere."""
    name: str | None = None
    """Name of the run directory. Default: the space with date and time; with --resume, the
    latest study."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with a study that was interrupted, or extend it with more --trials or --seeds. Options
    that are left out are as they were. Where there is no study of that --name yet, it begins."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the plan and stop."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show Ray's own output too."""


@dataclass(frozen=True)
class Study:
    """A checked configuration with everything resolved that can be known before the data."""

    config: StudyConfig
    """With no option left open."""
    space: search_spaces.Space
    rundir: RunDir
    left_out: tuple[str, ...] = ()
    """Arms of the space that mean nothing with a frozen backbone."""

    @property
    def place(self) -> Place:
        """Where the run directory is kept."""
        return Place(self.config.storage)

    @property
    def remote(self) -> Remote | None:
        """The run directory in its store; None for one on a disk."""
        store = self.place.remote
        return store and store.child(str(self.config.name))

    def where(self, file: Path) -> str:
        """Where a file of the run directory is, for people."""
        if self.remote is None:
            return str(file)
        return (
            f"{self.remote.child(file.relative_to(self.rundir.path).as_posix()).uri}, here {file}"
        )

    @property
    def finetunes(self) -> bool:
        """Whether all layers train, not the head alone."""
        return self.config.transfer == "finetune"

    @property
    def augment(self) -> Literal["none", "flip", "crop-flip"]:
        """What is done to training images at random."""
        assert self.config.augment is not None
        return self.config.augment

    @property
    def image_size(self) -> int:
        """Side of the backbone's input in pixels."""
        assert self.config.image_size is not None
        return self.config.image_size

    @property
    def weights(self) -> str:
        """What `--weights` asks for."""
        assert self.config.weights is not None
        return self.config.weights

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether a better score is smaller or larger."""
        return "min" if self.config.metric == "val_loss" else "max"

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which ASHA decides on a trial."""
        rungs, epoch = [], GRACE_PERIOD
        while epoch < self.config.epochs:
            rungs.append(epoch)
            epoch *= REDUCTION_FACTOR
        return tuple(rungs)

    @property
    def searched(self) -> tuple[search_spaces.Arm, ...]:
        """The arms that have something to search."""
        return tuple(arm for arm in self.space.arms if self.space.searches(arm))

    @property
    def trials_per_arm(self) -> dict[str, int]:
        """Trials that each arm gets; a remainder goes to the first arms."""
        share, rest = divmod(self.config.trials, max(len(self.searched), 1))
        quota = {arm.name: share + (i < rest) for i, arm in enumerate(self.searched)}
        return {arm.name: quota.get(arm.name, 0) for arm in self.space.arms}


def parse(arguments: Sequence[str] | None = None) -> StudyConfig:
    """Read the command line; with `--resume`, after the options that the study has recorded.

    Args:
        arguments: As in `sys.argv[1:]`, which is the default.

    Raises:
        UserError: An option is unknown or its value has the wrong form, or there is no study to go
            on with.
        RunDirError: The study's record cannot be read.
        SystemExit: `--help` was asked for and printed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    config = _parse(words)
    if not config.resume:
        return config
    name = _run_name(config)
    place = Place(config.storage)
    if (record := place.read_study(name)) is not None:
        recorded = record.get("config", {})
        try:
            if not isinstance(recorded, dict):
                raise UserError("it is no mapping of options")
            _check_ranges(_parse(as_arguments(recorded)))
        except UserError as error:
            raise RunDirError(
                f"{place.of(name)}/study.json: its config makes no sense: {error}"
            ) from None
        config = _parse([*as_arguments(recorded), *words])
    return replace(config, name=name)


def as_arguments(config: Mapping[str, Any]) -> list[str]:
    """The command line that gives this configuration, as `asdict` of it stands in study.json."""
    return [
        f"--{option.replace('_', '-')}={value}"
        for option, value in config.items()
        if option not in OF_ONE_START and value is not None
    ]


def resume_command(config: StudyConfig) -> str:
    """The command that goes on with a study."""
    where = "".join(
        f" --{option} {shlex.quote(value)}"
        for option, value in (("address", config.address), ("storage", config.storage))
        if value not in (None, StudyConfig.storage)
    )
    return f"python run_study.py --resume --name {config.name}{where}"


def _parse(words: Sequence[str]) -> StudyConfig:
    return parse_arguments(StudyConfig, "run_study.py", words)


def check(config: StudyConfig) -> Study:
    """Check a configuration as a whole and fill in what depends on the space and the clock.

    Nothing is written.

    Raises:
        UserError: A value is out of range, a path is missing, or the run name is not to be had.
    """
    _check_ranges(config)
    config, space = _choose_space(config)
    config = _with_space_options(config, space)
    left_out: tuple[str, ...] = ()
    if config.transfer == "frozen":
        whole, space = space, _frozen(space)
        kept = {arm.name for arm in space.arms}
        left_out = tuple(arm.name for arm in whole.arms if arm.name not in kept)
        if config.augment != "none":
            raise UserError(
                f"--augment {config.augment}: with a frozen backbone each image's features are"
                " computed once, so images cannot vary; add --transfer finetune, or leave --augment"
                " out."
            )
    if config.test_fraction is not None and not is_image_folder(config.data):
        raise UserError("--test-fraction: CIFAR-10 has test images; leave the option out.")
    if config.data != "cifar10" and not _exists(config.data):
        raise UserError(f"--data: there is no {config.data}; give 'cifar10' or an existing path.")
    named_weights = ("auto", "imagenet-v1", "imagenet-v2", "keras")
    if config.weights not in named_weights and not _exists(str(config.weights)):
        raise UserError(
            f"--weights: there is no {config.weights}; give one of {', '.join(named_weights)}, "
            "or an existing file."
        )
    config = replace(config, name=_run_name(config))
    study = Study(config, space, Place(config.storage).rundir(str(config.name)), left_out)
    _check_export(study)
    arms = len(study.searched)
    if config.trials < arms:
        raise UserError(
            f"--trials {config.trials}: the space {space.name} searches {arms} arms; "
            f"give at least {arms} trials."
        )
    if not arms and config.seeds == 0:
        raise UserError(
            f"--seeds 0: the space {space.name} has nothing to search, so nothing would run; "
            "give at least 1 seed."
        )
    return study


def _check_export(study: Study) -> None:
    what, space = study.config.export, study.space
    arms = (space.settings or space.arms) if study.config.seeds else study.searched
    names = [arm.name for arm in arms]
    if what not in ("best", "ensemble", *names):
        raise UserError(
            f"--export {what}: give best, ensemble, or one of this study's settings:"
            f" {', '.join(names)}."
        )
    if what == "ensemble" and study.finetunes:
        raise UserError(
            "--export ensemble: where all layers train, each run has a backbone of its own, and an"
            " ensemble would cost as much as all of them; give best or an arm, or add --transfer"
            " frozen."
        )
    if what == "ensemble" and study.config.seeds == 0:
        raise UserError(
            "--export ensemble: is made of confirmation runs, of which --seeds 0 leaves none; give"
            " --seeds 2 or more."
        )


def _choose_space(config: StudyConfig) -> tuple[StudyConfig, search_spaces.Space]:
    """Settle transfer and space, each of which may decide the other."""
    space = None if config.space is None else _find_space(config.space)
    transfer = config.transfer
    if transfer == "auto" and space is not None:
        transfer = cast(Transfer, space.options.get("transfer", "auto"))
    if transfer == "auto":
        # Ray and torch take seconds to import, so they are asked only where nothing else decides.
        from study.ray_session import find_machines

        transfer = (
            "finetune" if find_machines(config.address, verbose=config.verbose).gpus else "frozen"
        )
    if space is None:
        space = _find_space("finetune" if transfer == "finetune" else "dropout")
    return replace(config, transfer=transfer, space=config.space or space.name), space


def _find_space(spec: str) -> search_spaces.Space:
    try:
        return search_spaces.find_space(spec)
    except ValueError as error:
        raise UserError(f"--space: {error}") from None


def _frozen(space: search_spaces.Space) -> search_spaces.Space:
    try:
        return space.with_frozen_backbone()
    except ValueError as error:
        raise UserError(f"--transfer frozen: {error}; give --transfer finetune.") from None


def _with_space_options(config: StudyConfig, space: search_spaces.Space) -> StudyConfig:
    """Options that the user left open take the space's values, else the study's defaults."""
    frozen = config.transfer == "frozen"
    defaults: dict[str, Any] = {"image_size": 96, "preprocess": "own", "weights": "auto"}
    if is_image_folder(config.data):
        defaults["image_size"] = 224
    defaults |= {"augment": "flip", **space.options}
    if frozen:
        defaults["augment"] = "none"
    left_open = {name: v for name, v in defaults.items() if getattr(config, name) is None}
    return replace(config, **left_open)


def _check_ranges(config: StudyConfig) -> None:
    gpus = config.gpus_per_trial
    at_least = (
        ("trials", config.trials, 1),
        ("image-size", config.image_size, 32),
        ("epochs", config.epochs, 1),
        ("seeds", config.seeds, 0),
        ("seed", config.seed, 0),
        ("gpus-per-trial", None if gpus == "auto" else gpus, 0),
        ("max-concurrent", config.max_concurrent, 1),
        ("images", config.images, 200),
        ("max-failures", config.max_failures, 0),
        ("stop-after-failures", config.stop_after_failures, 1),
    )
    for option, value, low in at_least:
        if value is not None and not value >= low:
            raise UserError(f"--{option} {value}: must be {low} or more.")
    for option, number in (
        ("cpus-per-trial", config.cpus_per_trial),
        ("time-budget", config.time_budget),
        ("trial-timeout", config.trial_timeout),
    ):
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"--{option} {number:g}: must be a number above 0.")
    for option, fraction in (
        ("val-fraction", config.val_fraction),
        ("test-fraction", config.test_fraction),
    ):
        if fraction is not None and not 0 < fraction < 1:
            raise UserError(f"--{option} {fraction:g}: must lie between 0 and 1, as in 0.2.")
    if config.address is not None:
        check_address("--address", config.address)
    if gpus != "auto" and gpus > 1:
        raise UserError(
            f"--gpus-per-trial {gpus:g}: a trial uses one GPU or a part of one; "
            "give a number between 0 and 1, or auto."
        )


def _run_name(config: StudyConfig) -> str:
    """The name of the run directory, which must be new, or there already with `--resume`."""
    place = Place(config.storage)
    place.check()
    if config.name is not None and not re.fullmatch(r"\w[\w.-]{,99}", config.name):
        raise UserError(
            f"--name {config.name!r}: use letters, digits, '-', '_' and '.', 100 at most, as in"
            " dropout-1."
        )
    if config.resume:
        return config.name or place.latest_study()
    name = config.name or f"{str(config.space).split(':')[-1]}-{datetime.now():%Y-%m-%d-%H%M%S}"
    if place.holds(name):
        raise UserError(
            f"--name {name}: {place.of(name)} exists; choose another name, or add --resume to go "
            "on with that study."
        )
    return name


def _exists(path: str) -> bool:
    """Whether there is such a file or folder; what cannot be a path is none."""
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):
        return False
