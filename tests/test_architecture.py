"""The two statements of the design: dependencies run one way, and frameworks are imported only where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "graftax"

# What each part may import from graftax, at the top of a module or inside a function.
ALLOWED = {
    "errors": set(),
    "uncollected": set(),
    "tree": {"errors"},
    "sides": {"tree"},
    "training_state": set(),
    "training_containers": {"tree", "training_state"},
    "training_tree": {"tree", "training_state", "training_containers"},
    "dtypes": {"errors", "tree"},
    "ops": {"errors", "tree", "dtypes"},
    "plans": {"errors", "tree", "ops", "plan_text", "plan_json"},
    "plan_json": {"errors", "tree", "ops", "plans"},
    "plan_text": {"errors", "tree", "ops", "plans"},
    "formats": {"errors", "tree", "sides", "training_state", "training_tree", "dtypes", "uncollected"},
    "adapters": {"errors", "tree", "sides", "dtypes", "formats"},
    "layers": {"errors", "tree", "ops", "plans"},
    "rules": {"errors", "tree", "ops", "plans", "layers"},
    "match": {"uncollected", "errors", "tree", "ops", "plans", "plan_text", "layers", "rules"},
    "leftovers": {"errors", "tree", "ops", "plans", "rules", "match"},
    "planning": {
        *("uncollected", "errors", "tree", "sides", "ops", "plans", "layers", "rules", "match", "leftovers", "formats"),
    },
    "surgery": {"training_tree", "errors", "tree", "sides", "dtypes", "ops", "plans", "layers", "formats", "adapters"},
    "execute": {"uncollected", "errors", "tree", "dtypes", "ops", "plans", "formats", "adapters"},
    "api": {
        "uncollected",
        "errors",
        "tree",
        "ops",
        "plans",
        "plan_json",
        "planning",
        "surgery",
        "execute",
        "formats",
        "adapters",
    },
    "types": {"errors", "tree", "ops", "plans", "execute", "adapters", "layers", "surgery", "parity"},
    "parity": {
        *("errors", "tree", "dtypes", "ops", "plans", "plan_text", "formats", "adapters", "layers", "rules", "match"),
        *("planning", "surgery", "execute", "api", "report", "plan_json"),
    },
    "report": {
        "training_tree",
        "errors",
        "tree",
        "dtypes",
        "ops",
        "plans",
        "plan_text",
        "formats",
        "execute",
        "parity",
    },
    "examples": {"graftax", "errors"},
}
FRAMEWORKS = {"torch", "jax", "flax", "orbax", "tensorstore"}
MAY_IMPORT_FRAMEWORKS = {"adapters", "formats", "execute", "parity", "examples"}
LAZY_CORE = ("errors", "tree", "ops", "plans", "layers", "rules", "match", "planning", "surgery")


def part_of(path: Path) -> str:
    """The part a module belongs to: its package, or its own name; surgery_values belongs to surgery."""
    first = path.relative_to(SRC).parts[0].removesuffix(".py")
    return "surgery" if first.startswith(("surgery", "loading")) else first


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import of a file that runs, TYPE_CHECKING blocks apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only |= {id(child) for part in node.body for child in ast.walk(part)}
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "graftax":
                found += [(f"graftax.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((node.module, node.lineno))
    return found


FILES = sorted(p for p in SRC.rglob("*.py") if p.parent != SRC or not p.stem.startswith(("__init__", "cli")))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_dependencies_run_one_way(path: Path):
    part = part_of(path)
    allowed = ALLOWED[part] | {part}
    for module, line in imports(path):
        if module == "graftax" or module.startswith("graftax."):
            other = module.split(".")[1] if "." in module else "graftax"
            other = "surgery" if other.startswith(("surgery", "loading")) else other
            assert other in allowed, f"{path.relative_to(SRC)}:{line}: {part} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_frameworks_stay_where_they_are_used(path: Path):
    if part_of(path) in MAY_IMPORT_FRAMEWORKS:
        return
    for module, line in imports(path):
        assert module.split(".")[0] not in FRAMEWORKS, f"{path.relative_to(SRC)}:{line} imports {module}"


def loaded(code: str) -> set[str]:
    """The heavy modules that `code` loads in a fresh interpreter."""
    heavy = ["torch", "jax", "flax", "orbax", "numpy", "ml_dtypes"]
    script = f"{code}\nimport sys\nprint('LOADED', *[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_import_graftax_loads_nothing_heavy():
    assert loaded("import graftax; dir(graftax)") == set()


@pytest.mark.parametrize("part", LAZY_CORE)
def test_the_core_loads_no_framework_and_no_numpy(part: str):
    assert loaded(f"import graftax.{part}") == set()


def test_help_loads_nothing_heavy():
    assert (
        loaded("from graftax.cli import run\nassert run(['--help']) == 0\nassert run(['port', '--help']) == 0") == set()
    )


def test_names_stay_callable_after_every_module_is_imported():
    code = (
        "import pkgutil, importlib, graftax as gx\n"
        "for m in pkgutil.walk_packages(gx.__path__, 'graftax.'): importlib.import_module(m.name)\n"
        "import types\n"
        "bad = [n for n in gx.__all__ if n not in ('errors', 'examples', 'types')"
        " and isinstance(getattr(gx, n), types.ModuleType)]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves():
    import graftax as gx

    for name in gx.__all__:
        assert getattr(gx, name) is not None
    assert set(gx.__all__) <= set(dir(gx))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = gx.nonsense
