"""Whether a failed run is retried, and when a run has its device to itself."""

import pytest

from study.cluster.resources import Resources
from study.runs.failures import FailureKind
from study.runs.retry import Retry, choose_retry


@pytest.mark.parametrize(
    ("kind", "losses", "exclusive", "expected"),
    [
        ("lost", 1, False, "now"),
        ("lost", 3, True, "now"),
        ("lost", 4, True, "never"),
        ("memory", 0, False, "alone"),
        ("memory", 0, True, "never"),
        ("failed", 0, False, "never"),
        ("diverged", 0, False, "never"),
        ("storage", 0, False, "stop"),
        ("storage", 0, True, "stop"),
    ],
)
def test_retry_follows_from_kind_losses_and_exclusive_use(
    kind: FailureKind, losses: int, exclusive: bool, expected: Retry
) -> None:
    found = choose_retry(kind, losses=losses, max_failures=3, exclusive=exclusive)
    assert found == expected


@pytest.mark.parametrize(
    ("gpus", "at_once", "exclusive"),
    [
        (0.0, 1, True),
        (1.0, 1, True),
        (0.25, 1, False),  # alone on the GPU, but limited to a quarter of its memory
        (0.5, 2, False),
        (1.0, 2, False),  # each has a GPU, and they share the machine's memory
        (0.0, 2, False),
    ],
)
def test_a_run_is_exclusive_if_it_shares_neither_machine_nor_device(
    gpus: float, at_once: int, exclusive: bool
) -> None:
    resources = Resources(1, gpus, at_once)
    assert resources.exclusive == exclusive
    assert resources.one_at_a_time().exclusive
