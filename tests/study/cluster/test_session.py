"""When Ray starts, and what happens if it cannot."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import ray

from run_study import start_ray_early
from study.cluster import session
from study.cluster.session import ray_started_early
from study.config import StudyConfig
from study.errors import UserError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep environment variables and a constant of Ray that a start sets from other tests."""
    monkeypatch.setattr(session, "_listen_on_loopback_only", lambda: None)
    with patch.dict(os.environ):
        os.environ.pop("RAY_ADDRESS", None)
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Calls of `start_ray`, replaced by a recorder."""
    found: list[dict[str, object]] = []
    monkeypatch.setattr(session, "start_ray", lambda **options: found.append(options))
    return found


def test_ray_gets_the_cores_that_the_study_can_use(calls: list[dict[str, object]]) -> None:
    with start_ray_early(StudyConfig(max_concurrent=1)):
        assert [call["num_cpus"] for call in calls] == [1]


@pytest.mark.parametrize("wanted", [None, "1"])
def test_ray_reports_usage_statistics_only_if_the_user_opts_in(
    wanted: str | None, calls: list[dict[str, object]]
) -> None:
    os.environ.pop("RAY_USAGE_STATS_ENABLED", None)
    if wanted:
        os.environ["RAY_USAGE_STATS_ENABLED"] = wanted
    with ray_started_early(cores=2):
        assert calls
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == (wanted or "0")


@pytest.mark.parametrize("options", [{"dry_run": True}, {"address": "head:6379"}])
def test_nothing_is_started_for_a_dry_run_or_a_cluster(
    options: dict[str, object], calls: list[dict[str, object]]
) -> None:
    with start_ray_early(StudyConfig(**options)):  # type: ignore[arg-type]
        assert not calls


def test_a_study_that_does_not_fit_is_refused_before_ray_starts(
    calls: list[dict[str, object]],
) -> None:
    with (
        pytest.raises(UserError, match="cpus-per-trial"),
        start_ray_early(StudyConfig(cpus_per_trial=999)),
    ):
        pass
    assert not calls


def test_a_failed_early_start_is_raised_by_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "start_ray", fail)
    with ray_started_early(cores=2):
        assert not ray.is_initialized()
        with pytest.raises(OSError, match="No space"), session.ray_session(None):
            pass
