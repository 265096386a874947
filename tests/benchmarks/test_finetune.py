"""The fine-tuning benchmark for GPUs: the checks that a CPU can run, with very few steps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from study.data.dataset import Dataset
from study.models.weights import Weights
from tests.benchmarks import finetune


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU")
def test_without_a_gpu_every_cpu_check_has_rows(
    small_dataset: Dataset,
    random_weights: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(finetune, "load_dataset", lambda *_: small_dataset)
    monkeypatch.setattr(finetune, "load_weights", lambda *_: random_weights)
    few = ["--batch-size", "4", "--steps", "1", "--repeats", "1"]
    assert finetune.main([*few, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["check"] for row in rows} == set(finetune.CPU_CHECKS)
    assert [row["verdict"] for row in rows if row["value"] is None] == []
    (operations,) = (row["value"] for row in rows if row["name"].startswith("operations"))
    # 4.09 billion multiply-adds at 224 px, times 2 for operations, times 3 with backward.
    assert operations == pytest.approx(6 * 4.09 * (32 / 224) ** 2, rel=0.1)
    printed = capsys.readouterr().out
    assert printed.startswith("No GPU here")
    assert max(map(len, printed.partition("check ")[2].splitlines())) <= finetune.WIDTH


def test_failed_check_is_a_row_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: finetune.Bench) -> list[finetune.Row]:
        raise ValueError("no\nluck")

    checks: dict[str, Callable[[finetune.Bench], list[finetune.Row]]] = {
        "bad": fail,
        "good": lambda _: [finetune.Row("fine", 1.0)],
    }
    monkeypatch.setattr(finetune, "CHECKS", checks)
    monkeypatch.setattr(finetune, "free_memory", lambda _: None)
    rows, complete = finetune.run_checks(None, ["bad", "good"])  # type: ignore[arg-type]
    assert not complete
    assert [(row.check, row.verdict) for row in rows] == [
        ("bad", "failed: ValueError: no luck"),
        ("good", ""),
    ]
