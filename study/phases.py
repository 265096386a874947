"""The phases of a study, in order; each is skipped when its outputs are there."""

from dataclasses import replace

import ray

from analysis.report import write_report
from study.backbone import PREPROCESSES, Preprocess
from study.champions import champions
from study.config import Study
from study.confirm import confirm
from study.data import load_dataset, make_split
from study.export import Exported, export
from study.features import load_features
from study.plan import concurrency, plan_table
from study.prepare import prepare
from study.provenance import check_same, describe, pinned_sources
from study.ray_session import local_ray
from study.screen import Screen
from study.search import search
from study.weights import Weights, load_weights
from study.worker import RunSettings


def run(study: Study) -> None:
    """Run a study from its data to its best model, going on from where an earlier start stopped.

    Raises:
        UserError: Something is missing or wrong that the user can mend.
    """
    config, rundir, screen = study.config, study.rundir, Screen()
    screen.say(plan_table(study))
    screen.say()
    if config.dry_run:
        return
    earlier = rundir.read_study() if config.resume else None

    pinned = pinned_sources(earlier)
    dataset = load_dataset(config.data, config.images, pinned.get("data"))
    split = make_split(dataset)
    weights = load_weights(study.weights, pinned.get("weights"))
    preprocess = choose_preprocess(study, weights)
    features = load_features(dataset, weights, preprocess)
    record = describe(study, dataset, split, weights, preprocess, features)
    if earlier is None:
        rundir.write_study(record)
    else:
        check_same(earlier, record)
    screen.keep_log(rundir.log)
    prepared = prepare(dataset, split, features)

    settings = RunSettings(config.epochs, config.metric, max(1, int(config.cpus_per_trial)))
    with local_ray(config):
        training = ray.put(prepared.training)
        search(study, training, settings, screen)
        found = champions(study)
        if config.seeds:
            test = ray.put(prepared.test)
            confirm(study, found, training, test, settings, screen, concurrency(study))
    exported = export(study, found, dataset, split, weights, preprocess, prepared.standardisation)
    report = write_report(rundir.path)
    for part in report.as_rich():
        screen.say()
        screen.say(part)
    screen.say()
    screen.say(f"Used: {report.inputs}")
    screen.say(f"Report: {report.path}")
    screen.say(f"Best model: {rundir.best_model} ({describe_exported(exported)})")


def describe_exported(exported: Exported) -> str:
    """The exported model in a phrase, with its test accuracy measured anew."""
    measured = f"test accuracy {100 * exported.test_accuracy:.2f} % from the images in fp32"
    recorded = exported.recorded_test_accuracy
    if recorded is not None:
        measured += f", {100 * recorded:.2f} % on the cached features"
    return f"{exported.run_id}: {measured}"


def choose_preprocess(study: Study, weights: Weights) -> Preprocess:
    """The weights' own preprocessing or the article's, at the study's image size."""
    own = study.config.preprocess == "own"
    return replace(weights.preprocess if own else PREPROCESSES["raw"], image_size=study.image_size)
