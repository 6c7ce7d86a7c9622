"""scripts/versions.py: what it takes pyproject.toml to promise. (It installs; it is run by hand.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import versions  # pyright: ignore[reportMissingImports]

    return versions


def test_every_dependency_has_a_lower_bound_alone_that_the_pinned_version_meets(versions: Any) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    project = versions.project()
    everything = [*project.dependencies, *(item for extra in project.extras.values() for item in extra)]
    assert {item.name for item in project.dependencies} >= {"jax", "flax", "numpy"}
    for item in everything:
        assert versions.lower_bound(item) <= Version(pinned[item.name])


def test_the_extras_agree_on_what_they_share(versions: Any) -> None:
    extras = versions.project().extras
    alone = {str(item) for name in ("torch", "remote") for item in extras[name]}
    assert alone <= {str(item) for item in extras["test"]}


def test_the_pythons_of_the_classifiers_begin_with_the_one_that_is_required(versions: Any) -> None:
    pythons = versions.project().pythons
    required = versions.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert required == f">={pythons[0]}"
    assert list(pythons) == sorted(pythons, key=Version)
    assert f"{pythons[0]} to {pythons[-1]} are tested" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("bad", ["numpy", "numpy>=1,<2", "numpy==1.26", "numpy>1"])
def test_other_promises_are_refused(versions: Any, bad: str) -> None:
    with pytest.raises(ValueError, match="a lower bound alone"):
        versions.lower_bound(Requirement(bad))


def test_the_oldest_release_is_the_first_at_the_bound_or_above(versions: Any) -> None:
    releases = [Version(text) for text in ("0.10.2", "0.9.1", "0.9", "0.8.3", "0.10.0")]
    assert str(versions.oldest(Requirement("jax>=0.8.4"), releases)) == "0.9"
    assert str(versions.oldest(Requirement("jax>=0.10"), releases)) == "0.10.0"
    with pytest.raises(ValueError, match="no release"):
        versions.oldest(Requirement("jax>=0.11"), releases)


def test_a_failing_step_is_told_with_the_end_of_what_it_said(versions: Any) -> None:
    code = "print('before'); raise SystemExit('no such\\nlayer')"
    with pytest.raises(versions.Failed, match=r"(?s)port \(exit 1\).*before.*no such\n    layer"):
        versions.ran("port", [sys.executable, "-c", code])
    assert versions.ran("port", [sys.executable, "-c", code], exits=1) == "before\n"


def test_tests_need_a_torch(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "versions.py"), "--tests", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "--tests needs --torch" in done.stderr


@pytest.mark.slow
def test_the_steps_pass_here(versions: Any, tmp_path: Path) -> None:
    assert versions.smoke(Path(sys.executable), tmp_path) > 20
