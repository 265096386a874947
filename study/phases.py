"""The phases of a study, in order; each is skipped when its outputs are there."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfDiskError, RayError, RayTaskError

from analysis.report.health import IMBALANCE
from analysis.rundir import RunDir
from analysis.rundir.metric import Metric
from study.champions import champions
from study.cluster.machines import Machines
from study.cluster.remote import on_node
from study.cluster.resources import Resources, is_measured, plan_cores, plan_resources
from study.cluster.session import find_machines, ray_session
from study.confirm import confirm
from study.errors import StudyStoppedError, UserError, first_line, storage_error
from study.failures import failure_of
from study.features.distributed import on_cluster
from study.features.extract import Compute
from study.inputs import Inputs, load_inputs
from study.integrity import check_left, refuse_foreign
from study.nodes import differences, inspect_nodes
from study.packing import Load, fits, hungriest, runs_per_gpu
from study.plan import check_disk, plan_disk, plan_table
from study.provenance import (
    begin,
    check_same_inputs,
    check_same_request,
    describe_changes,
    describe_used,
    grows,
    pinned_sources,
    with_this_start,
)
from study.screen import Screen
from study.search import search
from study.storage.lock import exclusive_access
from study.study import Study
from study.system import signals
from study.system.malloc import give_back_freed
from study.system.phase_timer import PhaseTimer
from study.training.data import TrainingArrays
from study.training.prepare import Prepared
from study.worker import RunSettings, measure_load

if TYPE_CHECKING:
    from analysis.report.write import Report
    from study.best_model import Exported


def run(study: Study, began: float | None = None) -> None:
    """Run a study from its data to its best model, going on from where an earlier start stopped.

    Args:
        study: What to run.
        began: When the command began, in Unix seconds; None: now.

    Raises:
        UserError: Something is missing or wrong that the user can mend.
        RunDirError: The run directory is none, or of another format.
    """
    began = time.time() if began is None else began
    check_tracking(study)
    screen = Screen()
    machines = find_machines(study.config.address, verbose=study.config.verbose)
    screen.print(plan_table(study, machines))
    screen.print()
    if study.config.dry_run:
        return
    with exclusive_access(study.rundir, study.remote, screen.print) as rundir:
        study = replace(study, rundir=rundir)
        try:
            clock = PhaseTimer(study.rundir, began)
            compute = inspect(study, machines, screen)
            report, exported = run_phases(study, machines, compute, clock, screen)
        except BaseException as error:
            known = what_the_user_can_mend(study, error)
            screen.log_error(known or error)
            if known is None:
                raise
            raise known from error
    show(study, report, exported, screen)


def check_tracking(study: Study) -> None:
    """Make sure, before anything is written, that MLflow can be reached where it is asked for.

    Raises:
        UserError: It is not installed, or `check_server` says why not.
    """
    uri = study.config.mlflow
    if uri is None:
        return
    try:
        # Optional, and slow to import.
        from study.tracking import check_server
    except ImportError as error:
        raise UserError(
            f"--mlflow: MLflow cannot be imported ({error}); install it with `pip install -e"
            " .[mlflow]`, or run `uv run --extra mlflow run_study.py`."
        ) from error
    name = str(study.config.name)
    check_server(uri, name, is_new=not study.place.holds(name))


def export_again(study: Study, to: Path | None, screen: Screen) -> None:
    """Export another model of a study that has ended.

    Args:
        study: With the wanted model as its `export`.
        to: The folder; None: best_model/ of the run directory.
        screen: Is told what comes of it.

    Raises:
        UserError: The model is not to be had, or data or weights are not those of the study.
        RunDirError: A file of the run directory cannot be read.
    """
    with exclusive_access(study.rundir, study.remote, screen.print) as rundir:
        study = replace(study, rundir=rundir)
        record = study.rundir.read_study()
        inputs, _ = load_inputs(study, pinned_sources(record), None)
        check_same_inputs(record, describe_inputs(inputs))
        from study.best_model import export  # slow to import, with all that files are written by

        exported = export(study, champions(study), inputs, to)
    show_model(study, exported, to, screen)


def show(study: Study, report: "Report", exported: "Exported", screen: Screen) -> None:
    """What a study ends with on the screen."""
    for part in report.as_rich():
        screen.print()
        screen.print(part)
    screen.print()
    screen.print(f"Used: {report.inputs}")
    screen.print(f"Report: {study.where(report.path)}")
    show_model(study, exported, None, screen)


def show_model(study: Study, exported: "Exported", to: Path | None, screen: Screen) -> None:
    """Where the exported model is, and how good."""
    from study.best_model import describe, describe_ensemble_gain

    if pays := describe_ensemble_gain(study, exported.chosen):
        screen.print(pays)
    place = study.where(study.rundir.best_model) if to is None else str(to)
    screen.print(f"Best model: {place} ({describe(exported)})")


def what_the_user_can_mend(study: Study, error: BaseException) -> StudyStoppedError | None:
    """What an error of the disk's or of Ray's means to the user; None for any other."""
    if isinstance(error, OutOfDiskError):
        return StudyStoppedError(
            "Ray's object store in memory cannot hold the data, and the disk that it lays the rest"
            " on (that of RAY_TMPDIR, else of /tmp) is too full for that: free some space there."
        )
    if isinstance(error, RayError):
        return StudyStoppedError(f"Ray has failed: {type(error).__name__}: {first_line(error)}.")
    if isinstance(error, OSError):
        return storage_error(error, study.rundir.path)
    return None


def inspect(study: Study, machines: Machines, screen: Screen) -> Compute | None:
    """Make sure that every node of a cluster that can run a trial is fit for it.

    Returns:
        How features are computed there; None on this machine alone.

    Raises:
        UserError: Names each node that is not, and why.
    """
    if not machines.is_cluster:
        return None
    resources = plan_resources(study.config, machines)
    able = [node for node in machines.nodes if node.room(resources.cpus, resources.gpus)]
    looks = inspect_nodes(able, study.remote or study.rundir.path.absolute())
    if found := differences(looks):
        screen.print(f"Not the same on all nodes, and figures may depend on it: {found}.")
    native = bool(looks) and all(look.native_bf16 for look in looks.values())
    return on_cluster(machines, "bf16" if native else "fp32")


def take_up(study: Study) -> dict[str, Any]:
    """study.json as an earlier start has left it, or as a new study begins it."""
    rundir = study.rundir
    if not rundir.study_json.exists():
        refuse_foreign(rundir)
        record = begin(study)
        rundir.write_study(record)
        return record
    record = rundir.read_study()
    check_same_request(record, study)
    check_left(study)
    rundir.delete_partial()
    return record


def prepare(
    study: Study,
    machines: Machines,
    record: Mapping[str, Any],
    compute: Compute | None,
    clock: PhaseTimer,
    screen: Screen,
) -> tuple[Inputs, Prepared]:
    """Load what the study needs, make sure that it is what an earlier start had, and note it.

    Where nothing has begun yet, a mistake leaves nothing behind.
    """
    rundir, is_new = study.rundir, not record.get("starts")
    try:
        inputs, prepared = load_inputs(study, pinned_sources(record), compute, clock.phase)
    except UserError:
        if is_new:
            rundir.delete(rundir.phases)
            rundir.delete(rundir.study_json)
        raise
    used = describe_inputs(inputs)
    check_same_inputs(record, used)
    screen.keep_log(rundir.log)
    for warning in warn_of_images(used["data"], study.config.metric):
        screen.print(warning)
    if not is_new and (changes := describe_changes(record)):
        screen.print(f"Not as at this study's start: {changes}.")
    if grows(record, study):
        # In this order: a crash in between leaves the study as it was, or extended.
        rundir.put_confirm_away()
    rundir.write_study(with_this_start(record, study, machines, used))
    return inputs, prepared


def describe_inputs(inputs: Inputs) -> dict[str, Any]:
    """What study.json says of them."""
    return describe_used(
        inputs.dataset, inputs.split, inputs.weights, inputs.preprocess, inputs.features
    )


def warn_of_images(data: Mapping[str, Any], metric: Metric) -> list[str]:
    """What to know of the user's own images before anything is trained; `data` of study.json."""
    warnings = []
    in_train = dict(zip(data["classes"], data["images_per_class"]["train"], strict=True))
    rarest, commonest = (f(in_train, key=lambda name: in_train[name]) for f in (min, max))
    ratio = in_train[commonest] / in_train[rarest]
    if ratio >= IMBALANCE and metric != "val_balanced_accuracy":
        warnings.append(
            f"Classes are uneven: {in_train[commonest]} training images of {commonest},"
            f" {in_train[rarest]} of {rarest}. Accuracy is mostly about the frequent ones;"
            " --metric val_balanced_accuracy counts all classes alike."
        )
    if alike := data.get("duplicates"):
        first = alike[0]
        warnings.append(
            f"{len(alike)} image{'s' * (len(alike) > 1)} of val or test"
            f" look{'s' * (len(alike) == 1)} like one of another part, such as {first['file']} and"
            f" {first['like']}: a model may know them by heart. The report lists them."
        )
    return warnings


def run_phases(
    study: Study, machines: Machines, compute: Compute | None, clock: PhaseTimer, screen: Screen
) -> "tuple[Report, Exported]":
    """Prepare, search, confirm, report, export."""
    config, record = study.config, take_up(study)
    clock.started()
    with ExitStack() as session:
        # First of all, where `ray_ahead` has not started it: Ray's processes import what runs need
        # while this one loads the data.
        with clock.phase("ray"):
            cores = None if machines.is_cluster else plan_cores(study.config, machines)
            session.enter_context(ray_session(config.address, cores, verbose=config.verbose))
        inputs, prepared = prepare(study, machines, record, compute, clock, screen)
        with clock.phase("hand over"):
            training, test = ray.put(prepared.training), ray.put(prepared.test)
            del prepared  # what Ray holds need not be in memory twice
            give_back_freed()
            resources = choose_resources(study, machines, training, screen)
            check_disk(study, plan_disk(study, resources.at_once))
            settings = run_settings(study, resources)
        if study.searched:
            with clock.phase("search", resources.at_once):
                search(study, training, settings, resources, screen)
        signals.raise_if_received()
        found = champions(study)
        if config.seeds:
            with clock.phase("confirm", resources.at_once):
                confirm(study, found, training, test, settings, resources, screen)
    signals.raise_if_received()
    with clock.phase("report"):
        # Only now: with what draws and exports they take seconds to import, and training need not
        # wait.
        from analysis.report.write import write_report

        report = write_report(study.rundir.path)
    signals.raise_if_received()
    with clock.phase("export"):
        from study.best_model import export

        exported = export(study, found, inputs)
        if config.mlflow is not None:
            from study.tracking import register_best_model

            register_best_model(study, screen)
    return report, exported


def run_settings(study: Study, resources: Resources) -> RunSettings:
    """What all runs of a study have in common."""
    config = study.config
    return RunSettings(
        epochs=config.epochs,
        metric=config.metric,
        threads=max(1, int(config.cpus_per_trial)),
        rundir=RunDir(study.rundir.path.absolute()),
        remote=study.remote,
        gpu_share=resources.gpus,
        timeout=None if config.trial_timeout is None else 60 * config.trial_timeout,
    )


def choose_resources(
    study: Study,
    machines: Machines,
    training: "ray.ObjectRef[TrainingArrays]",
    screen: Screen,
) -> Resources:
    """What each run gets; how many share a GPU is measured where the user leaves it open."""
    if not is_measured(study.config, machines):
        return plan_resources(study.config, machines)
    loads = measure_loads(study, machines, training)
    packed = {}
    for gpu_type, load in loads.items():
        if load is not None:
            alike = machines.with_gpus({gpu_type})
            room = alike.cpus / study.config.cpus_per_trial / alike.gpus
            packed[gpu_type] = runs_per_gpu(load, room)
    for gpu_type, load in loads.items():
        screen.print(
            f"{gpu_type or 'GPU'}: the largest run does not fit; none goes there."
            if load is None
            else describe_load(load, packed[gpu_type])
        )
    if not packed:
        raise UserError(
            "the largest run of the space fits on no GPU; give a space with smaller batches or"
            " heads, or a smaller --image-size."
        )
    chosen = plan_resources(study.config, machines.with_gpus(packed), min(packed.values()))
    return chosen if len(packed) == len(loads) else replace(chosen, gpu_types=tuple(packed))


def measure_loads(
    study: Study, machines: Machines, training: "ray.ObjectRef[TrainingArrays]"
) -> dict[str, Load | None]:
    """What one run asks of a GPU of each type that there is; None where it does not fit."""
    settings = run_settings(study, Resources(1, 1.0, 1))
    one_of_each = {node.gpu_type: node for node in machines.nodes if node.gpus}
    asked = {}
    for gpu_type, node in one_of_each.items():
        # One call per process, so that the GPU's memory is free again for the search.
        task = ray.remote(max_calls=1)(measure_load).options(
            num_cpus=1, num_gpus=1, scheduling_strategy=on_node(node)
        )
        asked[gpu_type] = task.remote(hungriest(study.space), [training], settings)
    loads: dict[str, Load | None] = {}
    for gpu_type, answer in asked.items():
        try:
            load = ray.get(answer)
            loads[gpu_type] = load if fits(load) else None
        except RayTaskError as error:
            if failure_of(error).kind != "memory":
                raise
            loads[gpu_type] = None
    return loads


def describe_load(load: Load, packed: int) -> str:
    """What one run was measured to ask of a GPU, and what follows, in a sentence."""
    return (
        f"{load.device}: the largest run takes {load.peak / 2**30:.1f} of"
        f" {load.memory / 2**30:.0f} GiB and {1000 * load.step_seconds:.1f} ms a step"
        f" ({load.images_per_second:,.0f} images/s), and keeps the GPU {100 * load.busy:.0f} %"
        f" busy: {packed} {'run' if packed == 1 else 'runs'} at once per GPU."
    )
