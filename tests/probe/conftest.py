"""A smaller budget for what running cannot decide: the models here are tiny."""

from __future__ import annotations

import pytest

from graftax.probe.limits import Limits


@pytest.fixture(autouse=True)
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends by evaluations, not by seconds: what a test finds does not depend on how busy the machine is."""
    monkeypatch.setattr("graftax.probe.both.GIVEN", Limits(seconds=60.0, evaluations=6_000))
