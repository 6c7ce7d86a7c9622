"""The statements of the design: imports run one way and in no circle, and frameworks are imported only where they are
used."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "graftax"

# The rooms of the house, from the ground up: a room may import what stands below it.
ORDER = (
    *("errors", "tree", "ops", "plans", "layers", "rules", "match"),
    *("formats", "adapters", "probe", "execute", "surgery", "api", "parity", "report", "studies", "cli"),
)
GROUND = {"errors", "tree"}
NARROW = {
    "formats": GROUND,
    "adapters": GROUND,
    "probe": GROUND | {"ops", "plans", "layers", "rules", "adapters"},
    "execute": GROUND | {"ops", "plans", "formats", "adapters"},
}
"""Rooms that know less than all that stands below them."""
FACADES = {"types", "examples"}
"""What only names or shows what the rooms hold."""
ROOMS = 19

FRAMEWORKS = {"torch", "jax", "flax", "orbax", "tensorstore"}
MAY_IMPORT_FRAMEWORKS = {"adapters", "formats", "execute", "parity", "probe", "studies", "examples"}
LAZY_CORE = ("errors", "tree", "ops", "plans", "layers", "rules", "match", "match.planning", "surgery")


def room_of(path: Path) -> str:
    """The folder or file at the top level that a module belongs to."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


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
            elif node.module.startswith("graftax."):  # a name may be a module of that package
                found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((node.module, node.lineno))
    return found


FILES = sorted(path for path in SRC.rglob("*.py") if path != SRC / "__init__.py")
ids = lambda path: str(path.relative_to(SRC))  # noqa: E731


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in FILES}
    assert rooms == {*ORDER, *FACADES}
    assert len(rooms) <= ROOMS


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_room_imports_what_stands_below_it(path: Path):
    room = room_of(path)
    if room in FACADES:
        return
    allowed = NARROW.get(room, set(ORDER[: ORDER.index(room)])) | {room}
    for module, line in imports(path):
        if module == "graftax" or module.startswith("graftax."):
            other = module.split(".")[1] if "." in module else "graftax"
            if other == "__version__":  # no room: the package names its version
                continue
            assert other in allowed, f"{path.relative_to(SRC)}:{line}: {room} may not import {module}"


def test_no_module_imports_itself_through_others():
    modules = {
        ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    graph = {
        name: {other for module, _ in imports(path) if (other := longest(module, modules)) not in (None, name)}
        for name, path in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


BY_NAME = {
    "__init__.py": "public names, on first use",
    "plans/__init__.py": "its own names, on first use",
    "plans/plan.py": "graftax.api: a plan's methods `run` and `answer` are those of the front, which stands above it",
    "api.py": "graftax.parity.proving: parity stands above the front, and a port with inputs is proved by it",
    "formats/base.py": "the module of a row of FORMATS",
    "execute/factories.py": "the user's own module",
}
"""Modules that import by name, where no import statement shows it."""


def test_imports_by_name_are_few_and_stated():
    found = {str(path.relative_to(SRC)) for path in SRC.rglob("*.py") if "import_module(" in path.read_text("utf-8")}
    assert found == set(BY_NAME)


def longest(name: str, modules: Mapping[str, Path]) -> str | None:
    """The module that `name` (a module, or a name in one) belongs to."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_frameworks_stay_where_they_are_used(path: Path):
    if room_of(path) in MAY_IMPORT_FRAMEWORKS:
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
