"""Properties that hold for any input, tested on thousands of generated ones.

Run directories, spaces and command lines are either read correctly or refused in one line.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from analysis.rundir import ConfirmRow, EpochRow, RunDir, RunDirError, TrialRow
from search_spaces import (
    PARAMETERS,
    SPACES,
    Arm,
    Choice,
    Fixed,
    Float,
    Range,
    Space,
    SpaceError,
    Value,
    find_space,
)
from study.cluster import session
from study.cluster.machines import Machines, Node
from study.config import StudyConfig
from study.errors import UserError
from study.study import Study, parse_config, resolve_study
from tests.support import FIXTURES

Row = TypeVar("Row", EpochRow, TrialRow, ConfirmRow)

#: The same inputs every time, so that a test fails only if the code has changed.
settings.register_profile(
    "same",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("same")

#: Any text that a UTF-8 file can hold.
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBERS = st.floats() | st.integers(-10, 10).map(float)


def check_line(error: Exception) -> None:
    """Check that a message is one line, and can be encoded as UTF-8."""
    assert len(str(error).splitlines()) == 1, str(error)
    str(error).encode()


# --- the run directory ------------------------------------------------------------------------


@st.composite
def hyperparameters(draw: st.DrawFn) -> dict[str, Value]:
    """Values of the right types, not necessarily in their ranges."""
    strategies: dict[type, st.SearchStrategy[Value]] = {
        float: st.floats(allow_nan=False, allow_infinity=False),
        int: st.integers(),
        str: TEXT.filter(bool),
    }
    names = draw(st.lists(st.sampled_from(list(PARAMETERS)), unique=True))
    return {name: draw(strategies[type(PARAMETERS[name].default)]) for name in names}


def rows(kind: type[Row]) -> st.SearchStrategy[Row]:
    """Return a strategy for rows of a kind with anything in their fields."""
    strategies: dict[str, st.SearchStrategy[Any]] = {}
    for field in fields(kind):
        if get_origin(field.type) is Literal:
            strategies[field.name] = st.sampled_from(get_args(field.type))
        elif field.name == "hyperparameters":
            strategies[field.name] = hyperparameters()
        elif field.name == "attempt":
            strategies[field.name] = st.integers(1)
        else:
            known = {float: NUMBERS, int: st.integers(), str: TEXT}
            strategies[field.name] = known[field.type]  # type: ignore[index]
    return st.builds(kind, **strategies)


def comparable(row: EpochRow | TrialRow | ConfirmRow) -> dict[str, Any]:
    """Return a row as a dictionary in which all non-finite numbers compare equal."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(row).items()
    }


def same(found: Sequence[Row], written: Sequence[Row]) -> bool:
    return [comparable(row) for row in found] == [comparable(row) for row in written]


@given(st.lists(rows(TrialRow), max_size=4))
def test_trials_round_trip(tmp_path: Path, written: list[TrialRow]) -> None:
    RunDir(tmp_path).write_trials(written)
    assert same(RunDir(tmp_path).read_trials(), written)


@given(st.lists(rows(ConfirmRow), max_size=4))
def test_confirmation_runs_round_trip(tmp_path: Path, written: list[ConfirmRow]) -> None:
    RunDir(tmp_path).write_confirm(written)
    assert same(RunDir(tmp_path).read_confirm(), written)


@given(st.lists(rows(EpochRow), max_size=6, unique_by=lambda row: row.run_id))
def test_epochs_round_trip(tmp_path: Path, written: list[EpochRow]) -> None:
    RunDir(tmp_path).epochs.unlink(missing_ok=True)
    RunDir(tmp_path).append_epochs(written)
    assert same(RunDir(tmp_path).read_epochs(), written)


EPOCH = RunDir(FIXTURES / "run").read_epochs()[0]


@st.composite
def attempts(draw: st.DrawFn, run_id: str) -> list[EpochRow]:
    """Rows of a run that is resumed several times, each time at a possible epoch."""
    written, done = [], 0
    for attempt in range(1, draw(st.integers(1, 4)) + 1):
        first = draw(st.integers(1, done + 1))
        done = draw(st.integers(first, first + 3))
        for epoch in range(first, done + 1):
            place = {"run_id": run_id, "attempt": attempt, "epoch": epoch}
            written.append(EpochRow(**{**asdict(EPOCH), **place}))
    return written


@st.composite
def histories(draw: st.DrawFn) -> list[EpochRow]:
    """Interleaved rows of several runs, each run's in order."""
    waiting = [draw(attempts(f"run-{number}")) for number in range(draw(st.integers(1, 3)))]
    written: list[EpochRow] = []
    while waiting := [run for run in waiting if run]:
        written.append(draw(st.sampled_from(waiting)).pop(0))
    return written


@given(histories())
def test_each_epoch_of_a_run_is_read_once_and_the_last_attempt_wins(
    tmp_path: Path, written: list[EpochRow]
) -> None:
    RunDir(tmp_path).epochs.unlink(missing_ok=True)
    RunDir(tmp_path).append_epochs(written)
    found = RunDir(tmp_path).read_epochs()
    assert [row for row in written if row in found] == found
    for run_id in {row.run_id for row in written}:
        of_run = [row for row in written if row.run_id == run_id]
        last = of_run[-1]
        kept = [row for row in found if row.run_id == run_id]
        # All epochs up to the last one written; later epochs of earlier attempts are dropped.
        assert [row.epoch for row in kept] == list(range(1, last.epoch + 1))
        for row in kept:
            again = [r.attempt for r in of_run if r.epoch <= row.epoch]
            assert row.attempt == max(again)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """One real file of every kind."""
    run = RunDir(FIXTURES / "study")
    found = {file.name: file.read_bytes() for file in (run.epochs, run.trials, run.confirm)}
    found["study.json"] = run.study_json.read_bytes()
    # A few lines, to keep the test fast.
    found["epochs.jsonl"] = b"".join(found["epochs.jsonl"].splitlines(keepends=True)[:40])
    return found


READERS: dict[str, Callable[[RunDir], object]] = {
    "epochs.jsonl": RunDir.read_epochs,
    "trials.csv": RunDir.read_trials,
    "confirm.csv": RunDir.read_confirm,
    "study.json": RunDir.read_study,
}
EACH_FILE = pytest.mark.parametrize("name", READERS)


def read_or_refuse(folder: Path, name: str, content: bytes) -> None:
    """Read a file; any exception but RunDirError fails the test."""
    (folder / name).write_bytes(content)
    try:
        READERS[name](RunDir(folder))
    except RunDirError as error:
        check_line(error)


@EACH_FILE
@given(part=st.floats(0, 1))
def test_file_truncated_anywhere(
    tmp_path: Path, files: dict[str, bytes], name: str, part: float
) -> None:
    read_or_refuse(tmp_path, name, files[name][: int(part * len(files[name]))])


#: Changed bytes: position as a fraction of the file, and new value.
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1)


@EACH_FILE
@given(changes=CHANGES)
def test_file_with_changed_bytes(
    tmp_path: Path, files: dict[str, bytes], name: str, changes: list[tuple[float, int]]
) -> None:
    content = bytearray(files[name])
    for place, byte in changes:
        content[int(place * len(content))] = byte
    read_or_refuse(tmp_path, name, bytes(content))


@EACH_FILE
@given(content=st.binary() | TEXT.map(str.encode))
@example(content=b"[" * 100_000 + b"\n")
@example(content=b'{"a":' * 100_000 + b"\n")
@example(content=b"1" * 10_000 + b"\n")
def test_file_with_any_content(tmp_path: Path, name: str, content: bytes) -> None:
    read_or_refuse(tmp_path, name, content)


#: Includes NaN and infinities, which Python's JSON reader accepts beyond the standard.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([field.name for field in fields(EpochRow)]), JSON)
@example("train_loss", 10**400)
def test_epoch_with_anything_in_a_field(tmp_path: Path, field: str, value: Any) -> None:
    line = json.dumps({**asdict(EPOCH), field: value})
    read_or_refuse(tmp_path, "epochs.jsonl", f"{line}\n".encode())


@given(data=st.data())
def test_whole_lines_of_truncated_epochs_are_read(
    tmp_path: Path, files: dict[str, bytes], data: st.DataObject
) -> None:
    """Each run in this file has a single attempt."""
    content = files["epochs.jsonl"]
    cut = content[: data.draw(st.integers(0, len(content)))]
    run = RunDir(tmp_path)
    run.epochs.write_bytes(content)
    whole = run.read_epochs()
    assert len(whole) == content.count(b"\n")
    run.epochs.write_bytes(cut)
    assert run.read_epochs() == whole[: cut.count(b"\n")]


# --- spaces -----------------------------------------------------------------------------------

VALUES: st.SearchStrategy[Any] = (
    st.floats()
    | st.integers(-3, 3)
    | st.integers()
    | st.sampled_from([10**400, -(10**400), True, "adam", "constant", "none", "512-256", "٣"])
    | st.text(max_size=5)
)


def made(kind: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `kind` makes, or None if it refuses in one line."""
    try:
        return kind(*arguments)
    except SpaceError as error:
        check_line(error)
        return None


@st.composite
def ranges(draw: st.DrawFn) -> Range | None:
    kind = draw(st.sampled_from(["fixed", "float", "choice"]))
    if kind == "fixed":
        return Fixed(draw(VALUES))
    if kind == "float":
        ends = st.floats() | st.integers() | st.sampled_from([0.0, 0.5, 1.0, 10**400])
        made_float: Float | None = made(Float, draw(ends), draw(ends), draw(st.booleans()))
        return made_float
    made_choice: Choice | None = made(Choice, tuple(draw(st.lists(VALUES, max_size=3))))
    return made_choice


@st.composite
def factors(draw: st.DrawFn) -> dict[str, Range]:
    """Valid ranges, for hyperparameters that may not exist."""
    names = st.sampled_from([*PARAMETERS, "drpout", "a\nb"])
    found: dict[str, Range] = {}
    for name in draw(st.lists(names, max_size=3)):
        own = PARAMETERS[name].range if name in PARAMETERS else Fixed(1)
        values = draw(st.just(own) | st.just(Fixed(own.ends[0])) | ranges())
        if values is not None:
            found[name] = values
    return found


NAMES = st.sampled_from(["a", "b", "no-dropout"]) | st.text(max_size=5)
OPTION_NAMES = st.sampled_from(["transfer", "image_size", "preprocess", "weights", "augment", "x"])


@settings(max_examples=300)
@given(data=st.data())
def test_any_space_is_valid_or_refused_in_one_line(data: st.DataObject) -> None:
    arms = []
    for _ in range(data.draw(st.integers(0, 3))):
        arm = made(Arm, data.draw(NAMES), data.draw(factors()))
        arms += [arm] if arm is not None else []
    some = tuple(arms)
    options = data.draw(st.dictionaries(OPTION_NAMES, VALUES, max_size=2))
    recipe = data.draw(factors())
    space = made(Space, data.draw(NAMES), "Does it?", some, recipe, some[:1], options)
    if space is not None:
        for arm in space.arms:
            assert space.ranges(arm)
        made(Space.with_frozen_backbone, space)


@given(
    st.text()
    | st.tuples(st.sampled_from(["search_spaces", "math", "nowhere", ""]), st.text()).map(":".join)
)
@example("search_spaces.dropout:SPACE")
@example("a\nb:c")
@example("\n")
@example(":")
@example("math:\udcff")
@example("\udcff:x")
@example("math:a\nb")
def test_any_text_finds_a_space_or_is_refused_in_one_line(spec: str) -> None:
    found = made(find_space, spec)
    assert found is None or isinstance(found, Space)


# --- the command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty current folder, on a machine without a GPU."""
    folder = tmp_path_factory.mktemp("nowhere")
    machines = Machines((Node("localhost", 2, 0),), is_cluster=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(session, "find_machines", lambda *_, **__: machines)
        yield folder


OPTIONS = [f"--{field.name.replace('_', '-')}" for field in fields(StudyConfig)]
#: What a shell can pass, so no NUL; bytes that are not UTF-8 arrive as lone surrogates.
ARGUMENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NUMBER = st.integers(-3, 300) | st.integers() | st.floats()
WORDS = ["auto", "none", "None", "", "-", "--", ".", "..", "/", "runs", "cifar10", "a\nb", "\udcff"]
WORDS += [*SPACES, "frozen", "finetune", "flip", "val_loss", "keras", "raw", "nan", "inf", "1e400"]
GOOD: dict[str, st.SearchStrategy[object]] = {
    "--trials": st.integers(1, 50),
    "--space": st.sampled_from(list(SPACES)),
    "--image-size": st.integers(32, 224),
    "--epochs": st.integers(1, 30),
    "--seeds": st.integers(0, 20),
    "--transfer": st.sampled_from(["auto", "frozen", "finetune"]),
    "--name": st.sampled_from(["a", "a.b"]),
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Some options, most of which exist, with values some of which are valid."""
    arguments = []
    # One in six most likely does not exist.
    names = st.one_of(*[st.sampled_from(OPTIONS)] * 5, ARGUMENT)
    for name in draw(st.lists(names, min_size=1, max_size=4)):
        arguments.append(name)
        if name in ("--resume", "--dry-run", "--verbose") and draw(st.booleans()):
            continue
        any_value = NUMBER.map(str) | st.sampled_from(WORDS) | ARGUMENT
        arguments.append(str(draw(GOOD.get(name, any_value) | any_value)))
    return arguments


@settings(max_examples=300)
@given(command_lines())
@example(["--data", "a\nb"])
@example(["--weights", "a\nb"])
@example(["--data", "\udcff"])
@example(["--storage", "a\nb", "--resume"])
@example(["--name", "a\nb"])
@example(["--space", "a\nb"])
def test_any_command_line_is_valid_or_refused_in_one_line(
    nowhere: Path, arguments: list[str]
) -> None:
    assume(not {"-h", "--help"} & {*arguments})
    try:
        study = resolve_study(parse_config(arguments))
    except UserError as error:
        check_line(error)
    else:
        assert isinstance(study, Study)
        assert study.rundir.path.parent == Path(study.config.storage)
    assert list(nowhere.iterdir()) == []


FAR = "-" + 400 * "9"
LONG = 300 * "x"


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            [option, FAR]
            for option in ("--trials", "--seed", "--seeds", "--image-size", "--images")
        ),
        ["--max-concurrent", FAR],
        *([option, LONG] for option in ("--data", "--weights", "--storage")),
        ["--storage", LONG, "--resume"],
    ],
)
def test_extreme_numbers_and_names_are_refused_in_one_line(
    nowhere: Path, arguments: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        resolve_study(parse_config(arguments))
    check_line(error.value)
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize(
    "config",
    [
        None,
        3,
        {"image_size": "large"},
        {"image_size": 3},
        {"space": 3},
        {"space": ["dropout"]},
        {"transfer": "bogus"},
        {"a\nb": "c\nd"},
    ],
)
def test_resume_with_invalid_recorded_options_is_refused_in_one_line(
    tmp_path: Path, config: object
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "study.json").write_text(json.dumps({"format": 1, "config": config}))
    with pytest.raises((UserError, RunDirError)) as error:
        resolve_study(parse_config(["--resume", "--storage", str(tmp_path), "--name", "a"]))
    check_line(error.value)
