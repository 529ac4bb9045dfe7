"""Fixtures of the tests of destinations."""

import pytest


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Shorten the deadlines as the test's module says."""
    for constant, seconds in request.module.SHORT_DEADLINES.items():
        monkeypatch.setattr(f"receiver.destinations.{constant}", seconds)
