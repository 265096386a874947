"""Spaces: contents, validation, lookup and the listing command."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
    dropout_rates,
    find_space,
    hidden_widths,
    typical,
)

NO_DROPOUT = Arm("no-dropout", {"dropout": Fixed(0.0)})
DROPOUT = Arm("dropout", {"dropout": Float(0.05, 0.6)})


def make_space(
    arms: tuple[Arm, ...] = (NO_DROPOUT, DROPOUT),
    recipe: dict[str, Range] | None = None,
    settings: tuple[Arm, ...] = (),
    options: dict[str, str | int] | None = None,
) -> Space:
    return Space("mine", "Does it?", arms, recipe or {}, settings, options or {})


def test_dropout_space_searches_the_same_recipe_in_both_arms() -> None:
    space = find_space("dropout")
    without, with_dropout = (space.ranges(arm) for arm in space.arms)
    assert space.factor_names == ("dropout",)
    assert without.pop("dropout") == Fixed(0.0)
    assert with_dropout.pop("dropout") == Float(0.05, 0.6)
    assert without == with_dropout == space.recipe
    assert all(space.searches(arm) for arm in space.arms)


def test_article_space_has_nothing_to_search() -> None:
    space = find_space("article")
    assert not any(space.searches(arm) for arm in space.arms)
    assert all(arm.fixed for arm in space.arms)
    assert space.recipe["head"] == Fixed("512-256-512-128")
    assert space.options == {
        "image_size": 32,
        "preprocess": "raw",
        "weights": "keras",
        "augment": "none",
    }


def test_dose_space_searches_one_arm_and_confirms_at_seven_rates() -> None:
    space = find_space("dose")
    assert [arm.name for arm in space.arms] == ["any-dropout"]
    assert [(arm.name, arm.factor["dropout"]) for arm in space.settings] == [
        (f"dropout-0.{tenth}", Fixed(tenth / 10)) for tenth in range(7)
    ]


def test_layerwise_arms_do_not_overlap() -> None:
    space = find_space("layerwise")
    assert space.factor_names == ("dropout_1", "dropout_2")
    for name in space.factor_names:
        dropout = space.arms[1].factor[name]
        assert isinstance(dropout, Float)
        assert dropout.low > 0


def test_omitted_hyperparameters_have_their_default() -> None:
    ranges = make_space(recipe={"head": Fixed("256")}).ranges(DROPOUT)
    assert ranges["head"] == Fixed("256")
    assert ranges["optimizer"] == Fixed(PARAMETERS["optimizer"].default)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(0.6, 0.05), "low below high"),
        (lambda: Float(float("nan"), 1.0), "low below high"),
        (lambda: Float(0.0, 1.0, log=True), "low must be above 0"),
        (lambda: Choice(("256",)), "use Fixed"),
        (lambda: Choice(("256", "256")), "twice"),
        (lambda: Choice(("256", 512)), "the same type"),
        (
            lambda: Arm("a", {"dropout": Fixed(1.0)}),
            "dropout: 1.0 is invalid; expected a number in [0, 1)",
        ),
        (lambda: Arm("a", {"dropout": Float(0.5, 1.0)}), "dropout: 1.0 is invalid"),
        (lambda: Arm("a", {"dropout": Fixed("0.5")}), "dropout: '0.5' is invalid"),
        (lambda: Arm("a", {"drpout": Fixed(0.5)}), "unknown hyperparameter 'drpout'"),
        (lambda: Arm("a/b", {"dropout": Fixed(0.5)}), "arm 'a/b'"),
        (lambda: Arm("a", {}), "at least one hyperparameter"),
        (lambda: typical("depth"), "unknown hyperparameter 'depth'"),
        (lambda: make_space(recipe={"head": Fixed("512-")}), "mine: head: '512-' is invalid"),
        (lambda: make_space(recipe={"batch_size": Float(1, 9)}), "batch_size: 1.0 is invalid"),
        (lambda: make_space(recipe={"learning_rate": Fixed(0.0)}), "learning_rate: 0.0 is invalid"),
        (lambda: make_space(recipe={"optimizer": Fixed("sgd")}), "optimizer: 'sgd' is invalid"),
        (lambda: make_space(recipe={"dropout": Fixed(0.1)}), "both the recipe and the factor"),
        (lambda: make_space(arms=()), "no arms"),
        (lambda: make_space(arms=(DROPOUT, DROPOUT)), "two arms are named dropout"),
        (
            lambda: make_space(arms=(DROPOUT, Arm("b", {"weight_decay": Fixed(0.0)}))),
            "b sets weight_decay, but dropout sets dropout",
        ),
        (lambda: make_space(settings=(DROPOUT,)), "every value must be Fixed"),
        (lambda: make_space(settings=(NO_DROPOUT, NO_DROPOUT)), "two settings are named"),
        (lambda: make_space(options={"epochs": 3}), "unknown option 'epochs'"),
        (
            lambda: make_space(options={"transfer": "some"}),
            "option transfer: 'some' is invalid; expected 'auto',",
        ),
        (
            lambda: make_space(options={"image_size": 31}),
            "image_size: 31 is invalid; expected a whole",
        ),
        (lambda: make_space(options={"image_size": "96"}), "image_size: '96' is invalid"),
        (
            lambda: make_space(options={"preprocess": ""}),
            "preprocess: '' is invalid; expected 'own' or 'raw'",
        ),
        (lambda: make_space(options={"weights": 3}), "option weights: 3 is invalid; expected text"),
        (lambda: make_space(options={"augment": "crop"}), "option augment: 'crop' is invalid"),
        (lambda: Space("a\nb", "?", (DROPOUT,), {}), r"space 'a\nb': the name must"),
        (lambda: Float(0.0, 10**400), "low below high"),
        (lambda: Arm("a", {"dropout": Fixed(10**400)}), "expected a number in [0, 1)"),
        (
            lambda: make_space(recipe={"head": Fixed("1" * 5000)}),
            "expected layer widths such as '512'",
        ),
        (lambda: make_space(recipe={"head": Fixed("1٣")}), "head: '1٣' is invalid"),
        (
            lambda: make_space(recipe={"dropout_1": Fixed(0.1)}),
            "dropout and dropout_1 cannot be combined",
        ),
        (
            lambda: make_space(
                arms=(Arm("a", {"dropout_1": Fixed(0.1)}),), recipe={"head": Fixed("512-256")}
            ),
            "head 512-256 has 2 hidden layers",
        ),
    ],
)
def test_invalid_input_is_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SpaceError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hidden_widths_and_dropout_rates() -> None:
    head = {"head": "512-256"}
    assert hidden_widths(head) == (512, 256)
    assert dropout_rates(head) == (0.0, 0.0)
    assert dropout_rates({**head, "dropout": 0.4}) == (0.4, 0.4)
    assert dropout_rates({**head, "dropout_2": 0.2, "dropout_1": 0.1}) == (0.1, 0.2)
    with pytest.raises(SpaceError, match="needs 2 dropout rates"):
        dropout_rates({**head, "dropout_1": 0.1})


def test_unknown_space_error_lists_all_spaces_and_the_closest() -> None:
    with pytest.raises(SpaceError) as caught:
        find_space("droput")
    assert all(name in str(caught.value) for name in SPACES)
    assert "did you mean 'dropout'?" in str(caught.value)


@pytest.fixture
def my_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable folder with user-defined spaces."""
    text = "from search_spaces import *\n"
    arm = 'Arm("a", {"dropout": Fixed(0.1)})'
    (tmp_path / "own_good.py").write_text(f'{text}MINE = Space("m", "?", ({arm},), {{}})\nX = 3\n')
    (tmp_path / "own_wrong.py").write_text(f'{text}MINE = Space("m", "?", (), {{}})\n')
    (tmp_path / "own_script.py").write_text("import sys\nsys.exit('done')\n")
    (tmp_path / "own_broken.py").write_text("def (\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("my_spaces")
def test_user_defined_space_is_found() -> None:
    assert find_space("own_good:MINE").name == "m"


@pytest.mark.usefixtures("my_spaces")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_missing:MINE", "No module named 'own_missing'"),
        ("own_good:MIEN", "has no 'MIEN'; did you mean 'MINE'?"),
        ("own_good:X", "is of type int, not a search_spaces.Space"),
        ("own_wrong:MINE", "space m: it has no arms"),
        ("own_broken:MINE", "SyntaxError"),
        ("own_script:MINE", "SystemExit: done"),
        (":MINE", "cannot import"),
    ],
)
def test_unusable_space_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(SpaceError) as caught:
        find_space(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def list_spaces(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "search_spaces", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_lists_every_space_when_piped() -> None:
    listing = list_spaces()
    assert listing.returncode == 0
    for space in SPACES.values():
        assert f"{space.name}  {space.question}" in listing.stdout
    assert "0.05 to 0.6" in listing.stdout
    assert "\x1b" not in listing.stdout


def test_command_shows_one_space() -> None:
    listing = list_spaces("dose")
    assert SPACES["dose"].question in listing.stdout
    assert SPACES["article"].question not in listing.stdout


def test_command_refuses_an_unknown_space() -> None:
    listing = list_spaces("dosis")
    assert listing.returncode == 2
    assert listing.stdout == ""
    assert listing.stderr.count("\n") == 1
    assert "did you mean 'dose'?" in listing.stderr


def test_spaces_import_no_heavy_package() -> None:
    check = "import sys, search_spaces; print({'torch', 'ray', 'optuna'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
