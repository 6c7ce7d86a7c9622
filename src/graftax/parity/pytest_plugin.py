"""The pytest plugin: a `parity` fixture, golden files beside the test, and failures that show the report.

    def test_port(parity):
        parity(torch_module, flax_model, inputs)                       # gx.assert_parity

    def test_port_without_torch(parity):
        parity.golden(flax_model, torch=make_torch, inputs=inputs)     # pytest --graftax-update-golden records

A ParityError in any test (`gx.assert_parity` raises it) shows its report; `--tb=long` shows the traceback instead.
pytest loads this module in every run, so it imports nothing of graftax or a framework before it is used.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from graftax.parity.report.model import ParityReport

FLAG = "--graftax-update-golden"
FOLDER = "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("graftax").addoption(
        FLAG,
        action="store_true",
        default=False,
        dest="graftax_update_golden",
        help="record the golden files of `parity.golden` anew (needs torch)",
    )


# ---------------------------------------------------------------- the fixture


@dataclass(frozen=True, slots=True)
class Parity:
    """The value of the `parity` fixture: call it to assert parity, `.check` for the report, `.golden` without torch."""

    folder: Path
    default: str
    update: bool
    node: str

    def __call__(self, torch_module: Any, flax_model: Any, inputs: Any, weights: Any = None, **options: Any) -> Any:
        """`gx.assert_parity`: the report, or ParityError."""
        __tracebackhide__ = True
        from graftax.parity.check import assert_parity

        return assert_parity(torch_module, flax_model, inputs, weights, **options)

    def check(self, torch_module: Any, flax_model: Any, inputs: Any, weights: Any = None, **options: Any) -> Any:
        """`gx.check_parity`: the report, whatever it says."""
        from graftax.parity.check import check_parity

        return check_parity(torch_module, flax_model, inputs, weights, **options)

    def golden(
        self,
        flax_model: Any,
        *,
        torch: Any = None,
        inputs: Any = None,
        weights: Any = None,
        name: str | None = None,
        layers: bool = True,
        record: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ParityReport:
        """Judge the Flax model against a golden file beside the test; torch is not needed.

        torch, inputs   used to record with --graftax-update-golden: a torch module, or a function that makes one (then
                        torch is imported only when it records), and the inputs as for gx.check_parity
        weights         Flax weights, or a torch checkpoint, as for gx.check_parity
        name            the name of the file, golden/<name>.safetensors; None: the test's own name
        layers          record the inputs and outputs of every layer, so that a failure names the layer
        record          options for the recording only; `options` go to the recording and to the check, where each knows
        them

        Raises ParityError if parity fails; fails the test if the file does not exist.
        """
        __tracebackhide__ = True
        from graftax.errors import ParityError
        from graftax.parity.replay import assert_golden, record_golden

        path = self.folder / FOLDER / f"{_file_name(name or self.default)}.safetensors"
        if self.update:
            if torch is None or inputs is None:
                pytest.fail(f"{FLAG}: parity.golden needs torch= and inputs= to record {path.name}", pytrace=False)
            path.parent.mkdir(exist_ok=True)
            module = torch if _is_module(torch) else torch()
            record_golden(
                module, flax_model, inputs, path, layers=layers, **{**_for_recording(options), **(record or {})}
            )
        if not path.exists():
            pytest.fail(
                f"there is no golden file {path}\nRecord it where torch is installed: pytest {FLAG} '{self.node}'",
                pytrace=False,
            )
        try:
            return assert_golden(path, flax_model, weights, **_for_replay(options))
        except ParityError as error:
            error.add_note(f"golden file: {path}")
            raise


_RECORDING = ("rules", "plan", "layout", "out_layout", "rngs", "seed")
"""Options of a check that matter when a golden file is recorded."""


def _for_recording(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _RECORDING}


def _for_replay(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options but the layout of the inputs: the file holds them in Flax's layout."""
    return {name: value for name, value in options.items() if name != "layout"}


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _file_name(text: str) -> str:
    """Text as the name of a file: special characters become '-'."""
    return re.sub(r"[^\w.+=,-]+", "-", text).strip("-.")[:150] or "golden"


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """Prove that a Flax model computes what a torch module computes: `parity(torch_module, flax_model, inputs)`."""
    path = Path(request.path)
    update = bool(request.config.getoption("graftax_update_golden"))
    return Parity(path.parent, f"{path.stem}.{request.node.name}", update, request.node.nodeid)


# ---------------------------------------------------------------- failures


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A ParityError shows its report and the line of the test, not a traceback through graftax."""
    report = yield
    errors = sys.modules.get("graftax.errors")
    if errors is None or call.excinfo is None or not isinstance(call.excinfo.value, errors.ParityError):
        return report
    if item.config.getoption("tbstyle", "auto") not in ("auto", "short") or report.outcome != "failed":
        return report
    report.longrepr = _ParityFailure(call.excinfo.value, _crash(item, call.excinfo), _line(item, call.excinfo))  # pyright: ignore
    return report


@dataclass(frozen=True, slots=True)
class _Crash:
    """The place and the message in one line, as pytest's short summary shows it."""

    path: str
    lineno: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.lineno}: {self.message}"


@dataclass(frozen=True, slots=True)
class _ParityFailure:
    """The representation of a ParityError: pytest calls `toterminal`, or str() if there is no terminal."""

    error: BaseException
    reprcrash: _Crash
    source: str

    def _text(self, width: int | None, color: bool) -> str:
        report = getattr(self.error, "report", None)
        if report is None:
            return str(self.error)
        from graftax.parity.report.text import parity_text

        notes = getattr(self.error, "__notes__", ())
        return "\n".join([parity_text(report, width, color), *notes])

    def toterminal(self, tw: Any) -> None:
        tw.line(f">   {self.source}", bold=True, red=True)
        tw.line("")
        tw.line(self._text(tw.fullwidth, tw.hasmarkup))
        tw.line("")
        tw.line(f"{self.reprcrash.path}:{self.reprcrash.lineno}: ParityError")

    def __str__(self) -> str:
        return f">   {self.source}\n\n{self._text(None, False)}\n\n{self.reprcrash}"


def _entry(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
    """The innermost frame in the test's own file; the outermost frame if there is none."""
    own = [entry for entry in excinfo.traceback if Path(entry.path) == item.path]
    return own[-1] if own else excinfo.traceback[0]


def _crash(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> _Crash:
    entry = _entry(item, excinfo)
    report = getattr(excinfo.value, "report", None)
    lines = str(excinfo.value).splitlines()
    message = lines[0] if lines else "ParityError"
    if report is not None:
        from graftax.parity.report.words import one_line

        message = one_line(report)
    try:
        path = str(Path(entry.path).relative_to(item.config.rootpath))
    except ValueError:
        path = str(entry.path)
    return _Crash(path, entry.lineno + 1, message)


def _line(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """The first line of the test's statement that failed."""
    lines = str(_entry(item, excinfo).statement).splitlines()
    return lines[0].strip() if lines else ""
