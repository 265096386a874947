"""The phases of a study, in order; each is skipped when its outputs are there."""

from dataclasses import replace

import ray

from analysis.report import write_report
from study.arrays import TrainingArrays
from study.backbone import PREPROCESSES, Preprocess
from study.champions import champions
from study.config import Study
from study.confirm import confirm
from study.data import load_dataset, make_split
from study.export import Exported, export
from study.features import load_features
from study.hardware import cpu_count, gpu_count
from study.network import Pretrained
from study.packing import Load, Resources, hungriest, runs_per_gpu
from study.plan import check_disk, plan_disk, plan_resources, plan_table
from study.prepare import prepare_features, prepare_images
from study.provenance import check_same, describe, pinned_sources
from study.ray_session import local_ray
from study.screen import Screen
from study.search import search
from study.weights import Weights, load_weights
from study.worker import RunSettings, measure_load


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
    if study.finetunes:
        features = None
        pretrained = Pretrained(weights.state, weights.architecture, preprocess)
        prepared = prepare_images(dataset, split, pretrained, study.augment)
    else:
        features = load_features(dataset, weights, preprocess)
        prepared = prepare_features(dataset, split, features)
    record = describe(study, dataset, split, weights, preprocess, features)
    if earlier is None:
        rundir.write_study(record)
    else:
        check_same(earlier, record)
    screen.keep_log(rundir.log)

    with local_ray(config):
        training = ray.put(prepared.training)
        resources = choose_resources(study, training, screen)
        check_disk(study, plan_disk(study, resources.at_once))
        threads = max(1, int(config.cpus_per_trial))
        settings = RunSettings(config.epochs, config.metric, threads, resources.gpus)
        search(study, training, settings, resources, screen)
        found = champions(study)
        if config.seeds:
            test = ray.put(prepared.test)
            confirm(study, found, training, test, settings, resources, screen)
    exported = export(study, found, dataset, split, weights, preprocess, prepared.standardisation)
    report = write_report(rundir.path)
    for part in report.as_rich():
        screen.say()
        screen.say(part)
    screen.say()
    screen.say(f"Used: {report.inputs}")
    screen.say(f"Report: {report.path}")
    screen.say(f"Best model: {rundir.best_model} ({describe_exported(exported)})")


def choose_resources(
    study: Study, training: "ray.ObjectRef[TrainingArrays]", screen: Screen
) -> Resources:
    """What each run gets; how many share a GPU is measured where the user leaves it open."""
    if study.config.gpus_per_trial != "auto" or gpu_count() == 0:
        return plan_resources(study)
    settings = RunSettings(study.config.epochs, study.config.metric, 1, gpu_share=1.0)
    # One call per process, so that the GPU's memory is free again for the search.
    task = ray.remote(max_calls=1)(measure_load).options(num_cpus=1, num_gpus=1)
    load = ray.get(task.remote(hungriest(study.space), [training], settings))
    packed = runs_per_gpu(load, cpu_count() / study.config.cpus_per_trial / gpu_count())
    screen.say(describe_load(load, packed))
    return plan_resources(study, packed)


def describe_load(load: Load, packed: int) -> str:
    """What one run was measured to ask of a GPU, and what follows, in a sentence."""
    return (
        f"{load.device}: the largest run takes {load.peak / 2**30:.1f} of"
        f" {load.memory / 2**30:.0f} GiB and {1000 * load.step_seconds:.1f} ms a step"
        f" ({load.images_per_second:,.0f} images/s), and keeps the GPU {100 * load.busy:.0f} %"
        f" busy: {packed} {'run' if packed == 1 else 'runs'} at once per GPU."
    )


def describe_exported(exported: Exported) -> str:
    """The exported model in a phrase, with its test accuracy measured anew."""
    measured = f"test accuracy {100 * exported.test_accuracy:.2f} % from the images in fp32"
    recorded = exported.recorded_test_accuracy
    if recorded is not None:
        measured += f", {100 * recorded:.2f} % when it was confirmed"
    return f"{exported.run_id}: {measured}"


def choose_preprocess(study: Study, weights: Weights) -> Preprocess:
    """The weights' own preprocessing or the article's, at the study's image size."""
    own = study.config.preprocess == "own"
    return replace(weights.preprocess if own else PREPROCESSES["raw"], image_size=study.image_size)
