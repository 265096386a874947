"""Checks of options before anything is written; errors are one line each."""

import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from analysis.rundir import RunDir, RunDirError
from study.cluster import session
from study.config import GROUPS, StudyConfig, resume_command
from study.errors import UserError
from study.study import parse_config, resolve_study
from tests.support import ROOT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--trial 3", "did you mean --trials?"),
        ("--trials many", "--trials"),
        ("--metric accuracy", "Expected one of ('val_accuracy', 'val_loss', "),
        ("extra", "extra"),
        ("--trials 0", "--trials 0: must be 1 or more."),
        ("--trials 1", "searches 2 arms; give at least 2 trials."),
        ("--space dropuot", "did you mean 'dropout'?"),
        ("--space nowhere.module:SPACE", "nowhere"),
        ("--image-size 31", "--image-size 31: must be 32 or more."),
        ("--epochs 0", "--epochs 0: must be 1 or more."),
        ("--seeds -1", "--seeds -1: must be 0 or more."),
        ("--cpus-per-trial 0", "--cpus-per-trial 0: must be a number above 0."),
        ("--gpus-per-trial 2", "between 0 and 1"),
        ("--time-budget -5", "--time-budget -5: must be a number above 0."),
        ("--trial-timeout 0", "--trial-timeout 0: must be a number above 0."),
        ("--cpus-per-trial inf", "--cpus-per-trial inf: must be a number above 0."),
        ("--data cifar100", "--data: cifar100 does not exist; give 'cifar10'"),
        ("--max-failures -1", "--max-failures -1: must be 0 or more."),
        ("--stop-after-failures 0", "--stop-after-failures 0: must be 1 or more."),
        ("--data no/such/folder", "--data: no/such/folder does not exist"),
        ("--weights no-such-file.pth", "--weights: no-such-file.pth does not exist"),
        ("--name a/b", "letters, digits"),
        ("--resume", "there is no study in runs"),
        ("--space article --seeds 0", "nothing to search"),
        ("--gpus-per-trial some", "--gpus-per-trial"),
        ("--transfer frozen --augment flip", "add --transfer finetune"),
        ("--space tests.support.spaces:WARM_UP --transfer frozen", "give --transfer finetune"),
    ],
)
def test_invalid_options_give_a_one_line_error_with_a_remedy(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        resolve_study(parse_config(arguments.split()))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    config = StudyConfig(storage=str(tmp_path), name="mine")
    with pytest.raises(UserError, match="exists; choose another name, or add --resume"):
        resolve_study(config)


def test_resume_without_a_name_takes_the_latest(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    words = ["--resume", "--storage", str(tmp_path)]
    assert resolve_study(parse_config([])).rundir.path.name not in ("first", "second")
    for name in ("first", "second"):
        RunDir(tmp_path / name).write_study({"config": {}})
    assert resolve_study(parse_config(words)).rundir.path.name == "second"
    assert resolve_study(parse_config([*words, "--name", "first"])).rundir.path.name == "first"


def test_the_space_sets_options_that_the_user_did_not_give(tmp_path: Path) -> None:
    article = resolve_study(StudyConfig(space="article", storage=str(tmp_path)))
    assert (article.config.image_size, article.config.preprocess) == (32, "raw")
    assert article.weights == "keras"
    mixed = resolve_study(StudyConfig(space="article", image_size=64, storage=str(tmp_path)))
    assert (mixed.image_size, mixed.config.preprocess) == (64, "raw")
    default = resolve_study(StudyConfig(storage=str(tmp_path), transfer="frozen"))
    assert (default.image_size, default.config.preprocess, default.weights) == (96, "own", "auto")


def test_transfer_auto_is_finetune_if_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Auto also picks the space: a head's learning rate would wreck a backbone."""

    def chosen(gpus: int, **options: Any) -> tuple[str | None, str, str]:
        monkeypatch.setattr(session, "gpu_count", lambda: gpus)
        config = resolve_study(StudyConfig(storage=str(tmp_path), **options)).config
        return config.space, config.transfer, str(config.augment)

    assert chosen(0) == ("dropout", "frozen", "none")
    assert chosen(1) == ("finetune", "finetune", "flip")
    assert chosen(1, transfer="frozen") == ("dropout", "frozen", "none")
    assert chosen(0, transfer="finetune") == ("finetune", "finetune", "flip")
    assert chosen(0, space="finetune") == ("finetune", "finetune", "flip")
    assert chosen(1, space="article") == ("article", "finetune", "none")
    assert chosen(0, space="article") == ("article", "frozen", "none")
    assert chosen(0, space="article", augment="crop-flip", transfer="finetune")[2] == "crop-flip"


def test_a_frozen_backbone_drops_what_only_affects_its_training(tmp_path: Path) -> None:
    study = resolve_study(StudyConfig(space="article", transfer="frozen", storage=str(tmp_path)))
    assert [arm.name for arm in study.space.arms] == ["no-dropout", "dropout"]
    assert study.skipped_arms == ("as-printed",)
    assert "backbone_lr_ratio" not in study.space.recipe
    whole = resolve_study(StudyConfig(space="article", transfer="finetune", storage=str(tmp_path)))
    assert [arm.name for arm in whole.space.arms] == ["no-dropout", "dropout", "as-printed"]
    assert whole.skipped_arms == ()


@pytest.fixture
def started(tmp_path: Path) -> RunDir:
    """The run directory of a study started with non-default options."""
    options = "--transfer finetune --image-size 64 --epochs 7 --time-budget 5 --name a"
    study = resolve_study(parse_config([*options.split(), "--storage", str(tmp_path)]))
    study.rundir.path.mkdir()
    config = {**asdict(study.config), "storage": "elsewhere", "verbose": True}
    study.rundir.write_study({"config": config})
    return study.rundir


def resume(rundir: RunDir, *options: str) -> StudyConfig:
    place = ["--storage", str(rundir.path.parent), "--name", rundir.path.name]
    return resolve_study(parse_config(["--resume", *place, *options])).config


def test_a_resumed_study_keeps_its_options(started: RunDir) -> None:
    """Even on another machine, such as one with a GPU; only operational options are new."""
    again = resume(started)
    assert (again.transfer, again.space, again.image_size) == ("finetune", "finetune", 64)
    assert (again.epochs, again.time_budget, again.images) == (7, 5.0, None)
    assert (again.storage, again.verbose) == (str(started.path.parent), False)
    assert resume(started, "--trials", "80", "--time-budget", "9").trials == 80


def test_the_resume_command_resumes_the_study(started: RunDir) -> None:
    command = resume_command(resume(started)).split()
    assert command[:2] == ["python", "run_study.py"]
    assert resolve_study(parse_config(command[2:])).config == resume(started)
    assert resume_command(StudyConfig(name="b")) == "python run_study.py --resume --name b"


def test_a_record_with_an_invalid_config_is_refused(started: RunDir) -> None:
    for config in ({"epochs": "many"}, {"no_such_option": 1}, {"metric": "luck"}):
        started.write_study({"config": config})
        with pytest.raises(RunDirError, match=r"study\.json: invalid config: ") as error:
            resume(started)
        assert "\n" not in str(error.value)


def test_resume_starts_a_new_study_if_there_is_none(tmp_path: Path) -> None:
    """So that a restarted machine can always run the same command."""
    config = resolve_study(
        parse_config(["--resume", "--name", "new", "--storage", str(tmp_path)])
    ).config
    assert (config.name, config.trials) == ("new", 40)


def test_trials_are_split_equally_and_the_remainder_goes_to_the_first_arms(tmp_path: Path) -> None:
    def shares(space: str, trials: int) -> dict[str, int]:
        config = StudyConfig(space=space, trials=trials, storage=str(tmp_path), transfer="frozen")
        return resolve_study(config).trials_per_arm

    assert shares("dropout", 40) == {"no-dropout": 20, "dropout": 20}
    assert shares("dropout", 41) == {"no-dropout": 21, "dropout": 20}
    assert shares("article", 40) == {"no-dropout": 0, "dropout": 0}
    assert shares("dose", 40) == {"any-dropout": 40}


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(15, (3, 9)), (9, (3,)), (10, (3, 9)), (3, ()), (1, ()), (28, (3, 9, 27))]
)
def test_rungs(epochs: int, rungs: tuple[int, ...], tmp_path: Path) -> None:
    assert resolve_study(StudyConfig(epochs=epochs, storage=str(tmp_path))).rungs == rungs


def test_the_default_name_has_the_space_and_the_time(tmp_path: Path) -> None:
    name = resolve_study(StudyConfig(space="dose", storage=str(tmp_path))).rundir.path.name
    assert name.startswith("dose-20")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "Submit a job instead: ray job submit"),
        ("head", "give auto, local, or host:port of the cluster's head"),
        ("head:", "give auto, local, or host:port of the cluster's head"),
    ],
)
def test_an_unsupported_address_is_refused(tmp_path: Path, address: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^--address {re.escape(address)}: .*{message}"):
        resolve_study(StudyConfig(storage=str(tmp_path), address=address))


def test_help_groups_the_options_and_gives_each_default_once() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_study.py"), "--help"],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    headings = re.findall(r"╭─ (\w+ )?options", done.stdout)
    assert headings[1:] == [f"{name} " for name in GROUPS]
    assert "None" not in done.stdout
    # An entry begins with its option; what is wrapped follows until the next one.
    entries = re.split(r"^│ (?=--)", done.stdout, flags=re.MULTILINE)[1:]
    names = {entry.split()[0].removeprefix("--").replace("-", "_") for entry in entries}
    assert names == {field.name for field in fields(StudyConfig)}
    for entry in entries:
        text = entry.split("╰")[0]
        is_flag = text.split()[0] in ("--resume", "--dry-run", "--verbose")
        assert text.lower().count("default:") == (0 if is_flag else 1), text
