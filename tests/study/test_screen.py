"""The live view."""

from rich.console import Console

from search_spaces import Value
from study.screen import EndedRun, PhaseView, Tally


def test_names_and_scores_are_not_truncated_on_a_narrow_terminal() -> None:
    view = PhaseView("Search", "val_accuracy", 15, {"no-dropout": Tally(4), "dropout": Tally(4)})
    view.running["dropout-001"] = (4, 0.8123)
    values: dict[str, Value] = {"head": "512-256-512-128", "weight_decay": 1e-2, "dropout": 0.4}
    for arm, state in (
        ("no-dropout", "completed"),
        ("no-dropout", "pruned"),
        ("dropout", "failed"),
    ):
        view.count(EndedRun(f"{arm}-000", arm, state, 15, 0.8831, values, 60.0))
    console = Console(width=90, force_terminal=False)
    with console.capture() as captured:
        console.print(view)
    lines = captured.get().splitlines()
    assert all(len(line) <= 90 for line in lines)
    (row,) = [line for line in lines if line.startswith("no-dropout")]
    assert row.split()[:4] == ["no-dropout", "2/4", "1", "0"]
    assert "val accuracy 88.31 %" in row
    assert row.rstrip().endswith("…")
    (other,) = [line for line in lines if line.startswith("dropout")]
    assert other.split()[:5] == ["dropout", "1/4", "0", "1", "–"]
    assert "dropout-001 4/15 81.23 %" in lines[-1]
    assert "3/8" in captured.get()
