"""A study's configuration, checked and resolved before anything is written."""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

import search_spaces
from analysis.rundir import RunDir, RunDirError
from analysis.rundir.metric import mode
from study.cluster.machines import check_address
from study.config import (
    GRACE_PERIOD,
    GROUPS,
    REDUCTION_FACTOR,
    Augment,
    StudyConfig,
    Transfer,
    as_arguments,
)
from study.data.layouts import is_image_folder
from study.data.split import SMALLEST_SAMPLE
from study.errors import UserError
from study.storage.location import Location
from study.storage.object_store import Remote
from study.system.cli import parse_arguments


@dataclass(frozen=True)
class Study:
    """A checked configuration, resolved as far as possible without the data."""

    config: StudyConfig
    """All options resolved."""
    space: search_spaces.Space
    rundir: RunDir
    skipped_arms: tuple[str, ...] = ()
    """Arms of the space that do not apply to a frozen backbone."""

    @property
    def location(self) -> Location:
        """Storage location that holds the run directory."""
        return Location(self.config.storage)

    @property
    def remote(self) -> Remote | None:
        """The run directory in its object store; None if it is on disk."""
        store = self.location.remote
        return store and store.child(str(self.config.name))

    def where(self, file: Path) -> str:
        """Return where a file of the run directory is, for messages."""
        if self.remote is None:
            return str(file)
        return (
            f"{self.remote.child(file.relative_to(self.rundir.path).as_posix()).uri}, here {file}"
        )

    @property
    def finetunes(self) -> bool:
        """True if all layers train, False if only the head does."""
        return self.config.transfer == "finetune"

    @property
    def augment(self) -> Augment:
        """Augmentation of training images."""
        assert self.config.augment is not None
        return self.config.augment

    @property
    def image_size(self) -> int:
        """Side of the backbone's input in pixels."""
        assert self.config.image_size is not None
        return self.config.image_size

    @property
    def weights(self) -> str:
        """The resolved value of `--weights`."""
        assert self.config.weights is not None
        return self.config.weights

    @property
    def mode(self) -> Literal["min", "max"]:
        """Direction in which the score improves."""
        return mode(self.config.metric)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which ASHA decides on a trial."""
        rungs, epoch = [], GRACE_PERIOD
        while epoch < self.config.epochs:
            rungs.append(epoch)
            epoch *= REDUCTION_FACTOR
        return tuple(rungs)

    @property
    def searched_arms(self) -> tuple[search_spaces.Arm, ...]:
        """Arms that have something to search."""
        return tuple(arm for arm in self.space.arms if self.space.searches(arm))

    @property
    def trials_per_arm(self) -> dict[str, int]:
        """Number of trials by arm; a remainder goes to the first arms."""
        share, rest = divmod(self.config.trials, max(len(self.searched_arms), 1))
        quota = {arm.name: share + (i < rest) for i, arm in enumerate(self.searched_arms)}
        return {arm.name: quota.get(arm.name, 0) for arm in self.space.arms}


def parse_config(arguments: Sequence[str] | None = None) -> StudyConfig:
    """Parse the command line; with `--resume`, it overrides the options recorded with the study.

    Args:
        arguments: As in `sys.argv[1:]`, the default.

    Raises:
        UserError: An option is unknown, its value is malformed, or there is no study to resume.
        RunDirError: The study's record cannot be read.
        SystemExit: `--help` was given; the help has been printed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    config = _parse(words)
    if not config.resume:
        return config
    name = _run_name(config)
    location = Location(config.storage)
    if (record := location.read_study(name)) is not None:
        recorded = record.get("config", {})
        try:
            if not isinstance(recorded, dict):
                raise UserError("not a mapping of options")
            _check_ranges(_parse(as_arguments(recorded)))
        except UserError as error:
            raise RunDirError(f"{location.of(name)}/study.json: invalid config: {error}") from None
        config = _parse([*as_arguments(recorded), *words])
    return replace(config, name=name)


def _parse(words: Sequence[str]) -> StudyConfig:
    return parse_arguments(StudyConfig, "run_study.py", words, GROUPS)


def resolve_study(config: StudyConfig) -> Study:
    """Check a configuration and fill in what depends on the space, the machines and the clock.

    Nothing is written.

    Raises:
        UserError: A value is out of range, a path is missing, the run name is taken, or the
            cluster cannot be joined.
    """
    _check_ranges(config)
    config, space = _choose_space(config)
    config = _with_space_options(config, space)
    skipped_arms: tuple[str, ...] = ()
    if config.transfer == "frozen":
        whole, space = space, _frozen(space)
        kept = {arm.name for arm in space.arms}
        skipped_arms = tuple(arm.name for arm in whole.arms if arm.name not in kept)
        if config.augment != "none":
            raise UserError(
                f"--augment {config.augment}: a frozen backbone computes each image's features"
                " once, so images cannot be augmented; add --transfer finetune, or omit --augment."
            )
    if config.data != "cifar10" and not _exists(config.data):
        raise UserError(
            f"--data: {config.data} does not exist; give 'cifar10' or an existing path."
        )
    if config.test_fraction is not None and not is_image_folder(config.data):
        raise UserError("--test-fraction: CIFAR-10 comes with test images; omit the option.")
    named_weights = ("auto", "imagenet-v1", "imagenet-v2", "keras")
    if config.weights not in named_weights and not _exists(str(config.weights)):
        raise UserError(
            f"--weights: {config.weights} does not exist; give one of {', '.join(named_weights)}, "
            "or an existing file."
        )
    config = replace(config, name=_run_name(config))
    study = Study(config, space, Location(config.storage).rundir(str(config.name)), skipped_arms)
    _check_export(study)
    arms = len(study.searched_arms)
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
    export, space = study.config.export, study.space
    arms = (space.settings or space.arms) if study.config.seeds else study.searched_arms
    names = [arm.name for arm in arms]
    if export not in ("best", "ensemble", *names):
        raise UserError(
            f"--export {export}: give best, ensemble, or one of this study's settings:"
            f" {', '.join(names)}."
        )
    if export == "ensemble" and study.finetunes:
        raise UserError(
            "--export ensemble: with --transfer finetune each run has its own backbone, so an"
            " ensemble would cost as much as all runs together; give best or an arm, or start a"
            " study with --transfer frozen."
        )
    if export == "ensemble" and study.config.seeds == 0:
        raise UserError(
            "--export ensemble: an ensemble is made of confirmation runs, and --seeds 0 has none;"
            " give best or an arm, or start a study with --seeds 2 or more."
        )


def _choose_space(config: StudyConfig) -> tuple[StudyConfig, search_spaces.Space]:
    """Choose transfer and space, either of which may decide the other."""
    space = None if config.space is None else _find_space(config.space)
    transfer = config.transfer
    if transfer == "auto" and space is not None:
        transfer = cast(Transfer, space.options.get("transfer", "auto"))
    if transfer == "auto":
        # Imported late: Ray and torch take seconds, and are only needed if nothing else decides.
        from study.cluster.session import find_machines

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
    """Fill options the user left open from the space, else from the study's defaults."""
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
        ("images", config.images, SMALLEST_SAMPLE),
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
            raise UserError(f"--{option} {fraction:g}: must be between 0 and 1, such as 0.2.")
    if config.address is not None:
        check_address("--address", config.address)
    if gpus != "auto" and gpus > 1:
        raise UserError(
            f"--gpus-per-trial {gpus:g}: a trial uses at most one GPU; "
            "give a number between 0 and 1, or auto."
        )


def _run_name(config: StudyConfig) -> str:
    """Return the name of the run directory, which must be new unless `--resume` is given."""
    location = Location(config.storage)
    location.check()
    if config.name is not None and not re.fullmatch(r"\w[\w.-]{,99}", config.name):
        raise UserError(
            f"--name {config.name!r}: use at most 100 letters, digits, '-', '_' and '.', such as"
            " dropout-1."
        )
    if config.resume:
        return config.name or location.latest_study()
    name = config.name or f"{str(config.space).split(':')[-1]}-{datetime.now():%Y-%m-%d-%H%M%S}"
    if location.holds(name):
        raise UserError(
            f"--name {name}: {location.of(name)} exists; choose another name, or add --resume to "
            "resume that study."
        )
    return name


def _exists(path: str) -> bool:
    """Return whether a file or folder exists; False for an invalid path."""
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):
        return False
