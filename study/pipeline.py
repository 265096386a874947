"""The phases of a study, in order; each is skipped if its outputs exist."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from study.cluster.machines import Machines
from study.cluster.resources import plan_cores
from study.cluster.session import find_machines, ray_session
from study.confirm.run import run_confirmations
from study.errors import UserError
from study.features.distributed import compute_on_cluster
from study.features.extract import Compute
from study.inputs import Inputs, image_warnings, load_inputs
from study.plan import check_disk, plan_disk, plan_table
from study.provenance import add_start, inputs_as_record, is_extended
from study.resume import (
    check_same_inputs,
    describe_changes,
    load_or_create_record,
    pinned_sources,
)
from study.runs.context import RunContext, run_settings
from study.runs.failures import as_user_error
from study.runs.gpu_sharing import choose_resources
from study.runs.preflight import check_cluster
from study.screen import Screen
from study.search.champions import find_champions
from study.search.tune import check_tracking, run_search
from study.storage.lock import exclusive_access
from study.study import Study
from study.system import signals
from study.system.malloc import give_back_freed
from study.system.phase_timer import PhaseTimer
from study.training.prepare import Prepared

if TYPE_CHECKING:
    from analysis.report.write import Report
    from study.export.write import Export


def run(study: Study, started: float | None = None) -> None:
    """Run a study from its data to the exported model, resuming where an earlier start stopped.

    Args:
        study: What to run.
        started: When the command started, in Unix seconds; None: now.

    Raises:
        UserError: Something the user can fix.
        RunDirError: Not a run directory, or of another format.
    """
    started = time.time() if started is None else started
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
            report, exported = run_phases(study, machines, PhaseTimer(rundir, started), screen)
        except BaseException as error:
            known = as_user_error(error, rundir.path)
            screen.log_error(known or error)
            if known is None:
                raise
            raise known from error
    show_results(study, report, exported, screen)


def run_phases(
    study: Study, machines: Machines, timer: PhaseTimer, screen: Screen
) -> "tuple[Report, Export]":
    """Prepare, search, confirm, report, export."""
    config = study.config
    compute = check_nodes(study, machines, screen)
    record = load_or_create_record(study)
    timer.record_start_up()
    with ExitStack() as session:
        # First: Ray's workers import what runs need while this process loads the data. Does
        # nothing if Ray was started early.
        with timer.phase("ray"):
            cores = None if machines.is_cluster else plan_cores(config, machines)
            session.enter_context(ray_session(config.address, cores, verbose=config.verbose))
        inputs, prepared = prepare(study, machines, record, compute, timer, screen)
        with timer.phase("hand over"):
            training, test = ray.put(prepared.training), ray.put(prepared.test)
            del prepared  # Ray holds a copy
            give_back_freed()
            resources = choose_resources(study, machines, training, screen)
            check_disk(study.location, plan_disk(study, resources.at_once))
            context = RunContext(training, run_settings(study, resources), resources, screen)
        if study.searched_arms:
            with timer.phase("search", resources.at_once):
                run_search(study, context)
        signals.raise_if_received()
        champions = find_champions(study.rundir, study.space)
        if config.seeds:
            with timer.phase("confirm", resources.at_once):
                run_confirmations(study, champions, context, test)
    signals.raise_if_received()
    with timer.phase("report"):
        # Imported late: matplotlib and the exporters take seconds, which would delay training.
        from analysis.report.write import write_report

        report = write_report(study.rundir.path)
    signals.raise_if_received()
    with timer.phase("export"):
        from study.export.write import export_best_model

        exported = export_best_model(study, champions, inputs)
        if config.mlflow is not None:
            from study.search.mlflow_tracking import register_best_model

            register_best_model(study, screen)
    return report, exported


def check_nodes(study: Study, machines: Machines, screen: Screen) -> Compute | None:
    """Check every node of a cluster; return how to compute features there, None on one machine.

    Raises:
        UserError: Names each node that cannot run trials, and why.
    """
    if not machines.is_cluster:
        return None
    place = study.remote or study.rundir.path.absolute()
    precision = check_cluster(study.config, machines, place, screen.print)
    return compute_on_cluster(machines, precision)


def prepare(
    study: Study,
    machines: Machines,
    record: Mapping[str, Any],
    compute: Compute | None,
    timer: PhaseTimer,
    screen: Screen,
) -> tuple[Inputs, Prepared]:
    """Load the study's inputs, compare them with those of an earlier start, and record them.

    If the inputs of a new study cannot be loaded, its record is deleted again.
    """
    rundir, is_new = study.rundir, not record.get("starts")
    try:
        inputs, prepared = load_inputs(study, pinned_sources(record), compute, timer.phase)
    except UserError:
        if is_new:
            rundir.delete(rundir.phases)
            rundir.delete(rundir.study_json)
        raise
    used = inputs_as_record(inputs)
    check_same_inputs(record, used)
    screen.start_log(rundir.log)
    for warning in image_warnings(used["data"], study.config.metric):
        screen.print(warning)
    if not is_new and (changes := describe_changes(record)):
        screen.print(f"Changed since this study started: {changes}.")
    if is_extended(record, study.config):
        # In this order: a crash in between leaves the study either unchanged or extended.
        rundir.archive_confirm()
    rundir.write_study(add_start(record, study, machines, used))
    return inputs, prepared


def show_results(study: Study, report: "Report", exported: "Export", screen: Screen) -> None:
    """Print the results of a study."""
    from study.export.write import show_export

    for part in report.as_rich():
        screen.print()
        screen.print(part)
    screen.print()
    screen.print(f"Used: {report.inputs}")
    screen.print(f"Report: {study.where(report.path)}")
    show_export(study, exported, None, screen)
