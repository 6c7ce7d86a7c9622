"""Do the oldest and the newest dependencies that pyproject.toml admits work, on every Python that it names?

    python scripts/versions.py [--python PATH ...] [--set oldest|newest] [--torch VERSION] [--tests PATH ...]

For each Python a temporary environment with the oldest release of every dependency, and one with the newest. Each gets
graftax installed, and runs scripts/quickstart.py and every file format through the command line. Prints what was
installed and what passed, or the first step that failed and the end of what it said; exits 1 if one failed.

The oldest release is the first one at or above the bound that has a wheel for that Python; what the dependencies need
themselves is the newest that fits. Without --torch neither set has torch. The script needs `packaging`, which pytest
brings, and the package registry; an environment takes up to 1 GB and some minutes, and is removed when it is done.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
SETS = ("oldest", "newest")
WHEELS = ("--only-binary", ":all:", "--disable-pip-version-check")
"""Old releases without a wheel for a Python were not made for it."""
LINES = 20
"""How much of a failed step's output is shown."""

OFFICIAL = """
import sys
from pathlib import Path
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util
from safetensors.numpy import load_file

folder = Path(sys.argv[1]).resolve()
flat = lambda tree: traverse_util.flatten_dict(tree, sep="/")
want = load_file(folder / "flax.safetensors")
found = {
    "npz": dict(np.load(folder / "flax.npz")),
    "msgpack": flat(serialization.msgpack_restore((folder / "flax.msgpack").read_bytes())),
    "orbax": flat(ocp.PyTreeCheckpointer().restore(folder / "flax")),
}
for name, leaves in found.items():
    assert leaves.keys() == want.keys(), (name, sorted(leaves), sorted(want))
    assert all(np.array_equal(leaves[key], want[key]) for key in want), name
"""
"""What graftax wrote, read by the libraries that these formats come from."""

REMOTE = """
import sys
import fsspec
import graftax as gx
fsspec.filesystem("memory").put(sys.argv[1], "/bucket/weights.safetensors")
assert dict(gx.open_checkpoint("memory://bucket/weights.safetensors")) == dict(gx.open_checkpoint(sys.argv[1]))
"""


class Failed(Exception):
    """A step did not succeed: its name, and the end of what it said."""


@dataclass(frozen=True, slots=True)
class Project:
    """pyproject.toml. `pythons`: the versions of its classifiers; `dependencies`, `extras`: its requirements."""

    pythons: tuple[str, ...]
    dependencies: tuple[Requirement, ...]
    extras: dict[str, tuple[Requirement, ...]]


def project() -> Project:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = (line.rpartition(" :: ")[2] for line in table["classifiers"] if "Python :: 3." in line)
    extras = {name: tuple(map(Requirement, lines)) for name, lines in table["optional-dependencies"].items()}
    return Project(tuple(named), tuple(map(Requirement, table["dependencies"])), extras)


def lower_bound(requirement: Requirement) -> Version:
    """Raises ValueError unless the requirement is one `>=`: then no oldest release is promised, or a newest is."""
    clauses = list(requirement.specifier)
    if [clause.operator for clause in clauses] != [">="]:
        raise ValueError(f"{requirement} does not have a lower bound alone")
    return Version(clauses[0].version)


def oldest(requirement: Requirement, releases: Iterable[Version]) -> Version:
    """Raises ValueError if no release is new enough."""
    fit = [release for release in releases if release >= lower_bound(requirement)]
    if not fit:
        raise ValueError("no release is new enough")
    return min(fit)


def releases(python: Path, name: str) -> list[Version]:
    """What the registry has for this Python, as wheels: pip lists it where it is asked for what is not there. (`pip
    index versions` lists releases without a wheel, too.)"""
    asked = [python, "-m", "pip", "install", "--no-deps", *WHEELS, f"{name}==9999"]
    said = subprocess.run(asked, capture_output=True, text=True).stderr
    listed = re.search(r"\(from versions: ([^)]+)\)", said)
    if listed is None or listed[1] == "none":
        raise Failed("\n    ".join([f"pip lists no release of {name}", *said.splitlines()[-LINES:]]))
    found = map(Version, listed[1].split(","))
    return [version for version in found if not version.is_prerelease]


def pins(python: Path, requirements: Iterable[Requirement]) -> list[str]:
    """A line for each, for pip. Raises Failed where there is no release for this Python."""
    lines: list[str] = []
    for item in requirements:
        try:
            lines.append(f"{item.name}=={oldest(item, releases(python, item.name))}")
        except ValueError as error:
            raise Failed(f"{item}: {error}") from None
    return lines


def found_pythons(versions: Iterable[str]) -> Iterator[tuple[str, Path | None]]:
    """(version, its interpreter): the one on PATH, else the newest that pyenv has, else None."""
    root = subprocess.run(["pyenv", "root"], capture_output=True, text=True) if shutil.which("pyenv") else None
    for version in versions:
        places = [shutil.which(f"python{version}")]
        if root is not None and root.returncode == 0:
            below = Path(root.stdout.strip(), "versions").glob(f"{version}.*/bin/python")
            places += sorted(map(str, below), key=lambda path: Version(Path(path).parts[-3]), reverse=True)
        yield version, next((Path(place) for place in places if place and _runs(place, version)), None)


def _runs(python: str, version: str) -> bool:
    """A shim on PATH may be of a Python that is not active."""
    asked = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip() == version


def ran(name: str, command: Sequence[str | Path], cwd: Path | None = None, exits: int = 0) -> str:
    """Its stdout. Raises Failed unless it exits with `exits`."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment)
    if done.returncode != exits:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-LINES:]
        raise Failed("\n    ".join([f"{name} (exit {done.returncode})", *said]))
    return done.stdout


def smoke(python: Path, work: Path) -> int:
    """The first command of the README and every format, in the environment of `python`; how many steps passed."""
    steps = 0

    def step(*command: str | Path, exits: int = 0) -> str:
        nonlocal steps
        name = " ".join("..." if "\n" in part else Path(part).name for part in map(str, command))
        said = ran(name, command, cwd=work, exits=exits)
        steps += 1
        return said

    graftax = functools.partial(step, python.with_name("graftax"))

    digits, like, rules = FIXTURES / "digits.pt", "graftax.examples:digits_nnx", FIXTURES / "digits_nnx.toml"
    step(python, ROOT / "scripts" / "quickstart.py", "--out", work / "quickstart")
    graftax("--help")
    graftax("layers")
    graftax("plan", digits, "--like", like, "--rules", rules, "-o", "plan.json")
    for out in ("flax.safetensors", "flax.msgpack", "flax.npz", "flax"):
        graftax("port", digits, "--like", like, "--plan", "plan.json", "-o", out)
        graftax("inspect", out, "--stats", "--hashes")
        graftax("diff", "flax.safetensors", out)
    step(python, "-c", OFFICIAL, work)
    (work / "spec.json").write_text(graftax("inspect", FIXTURES / "digits.safetensors", "--spec"), encoding="utf-8")
    for out in ("back.pt", "back.safetensors", "back"):
        graftax("port", "flax", "--like", digits, "--rules", rules, "--missing", "keep", "-o", out)
        graftax("diff", digits, out)
    graftax("plan", "flax.npz", "--like", "spec.json", "--rules", rules, "--missing", "zeros")
    graftax("replace", "flax", "linear2/kernel", "--zeros", "--expect", "1", "-o", "zeroed")
    graftax("diff", "flax", "zeroed", exits=1)
    step(python, "-c", REMOTE, FIXTURES / "digits.safetensors")
    return steps


def environment(python: Path, work: Path, which: str, torch: str | None, tests: bool) -> tuple[Path, str]:
    """Make it in `work`: (its interpreter, what it has of what pyproject.toml asks for)."""
    known = project()
    extras = {"remote": True, "torch": torch is not None, "test": tests}
    asked = [*known.dependencies, *known.extras["remote"]]
    ran("venv", [python, "-m", "venv", work / "env"])
    inner = work / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    constraints = pins(inner, asked) if which == "oldest" else []
    constraints += [] if torch is None else [f"torch=={torch}"]
    (work / "constraints.txt").write_text("\n".join(constraints), encoding="utf-8")
    chosen = ",".join(name for name, wanted in extras.items() if wanted)
    ran(
        "pip install",
        [inner, "-m", "pip", "install", *WHEELS, "-c", work / "constraints.txt", f"{ROOT}[{chosen}]"],
    )
    names = [item.name for item in asked] + ["torch"] * (torch is not None)
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    versions = ran("versions", [inner, "-c", code, *names]).split()
    return inner, ", ".join(f"{name} {version}" for name, version in zip(names, versions, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, action="append", help="an interpreter; without it those that are found")
    parser.add_argument("--set", choices=SETS, help="one set of dependencies instead of both")
    parser.add_argument("--torch", metavar="VERSION", help="install this torch, too, in each environment")
    parser.add_argument("--tests", nargs="+", default=[], help="then run these tests there; needs --torch")
    options = parser.parse_args()
    if options.tests and not options.torch:
        parser.error("--tests needs --torch VERSION")
    pythons = [(str(path), path) for path in options.python or ()] or list(found_pythons(project().pythons))
    failed = not any(python for _, python in pythons)
    for name, python in pythons:
        if python is None:
            print(f"Python {name}: not found", flush=True)
            continue
        for which in (options.set,) if options.set else SETS:
            print(f"Python {name}, {which}", flush=True)
            with tempfile.TemporaryDirectory(prefix="graftax-versions-") as folder:
                work = Path(folder).resolve()
                try:
                    inner, versions = environment(python, work, which, options.torch, bool(options.tests))
                    print(f"  {versions}", flush=True)
                    print(f"  passed: {smoke(inner, work)} steps", flush=True)
                    if options.tests:
                        pytest = [inner, "-m", "pytest", "-q", "-n", "2", *options.tests]
                        print(f"  passed: {ran('pytest', pytest, cwd=ROOT).splitlines()[-1]}", flush=True)
                except Failed as error:
                    failed = True
                    print(f"  FAILED: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
