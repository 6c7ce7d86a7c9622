"""A format that is only read: the worked example of CONTRIBUTING.md, as a row of FORMATS."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import graftax as gx
from graftax.cli import run
from graftax.errors import FormatError, UsageError
from graftax.formats import table
from graftax.formats.base import Format
from graftax.tree.dtypes import NUMPY_OWN

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
VALUES = np.arange(12, dtype=">i4").reshape(3, 4)


@pytest.fixture
def idx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An IDX file, and graftax with the module and the row of the page."""
    page = PAGE.read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (row,) = re.findall(r"```text\n(Format\(.*?\)),?\n```", page, re.DOTALL)
    module = ModuleType("graftax.formats.idx")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "graftax.formats.idx", module)
    names = {"Format": Format, "NUMPY_OWN": NUMPY_OWN, "_BOTH": ("torch", "flax")}
    rows = {"idx": eval(row, names), **table.FORMATS}
    monkeypatch.setattr(table, "FORMATS", rows)
    for name, other in list(sys.modules.items()):
        if name.startswith("graftax.") and "FORMATS" in vars(other):
            monkeypatch.setattr(other, "FORMATS", rows)
    path = tmp_path / "images.idx"
    path.write_bytes(bytes([0, 0, 12, 2]) + struct.pack(">2I", *VALUES.shape) + VALUES.tobytes())
    return path


def test_it_is_opened_and_listed(idx: Path, capsys: pytest.CaptureFixture[str]):
    opened = gx.open_checkpoint(idx)
    assert dict(opened) == {"tensor": gx.types.TensorSpec((3, 4), "int32")}
    np.testing.assert_array_equal(opened.read("tensor"), VALUES)
    assert run(["inspect", str(idx)]) == 0
    assert "tensor" in capsys.readouterr().out


def test_a_truncated_one_is_refused(idx: Path):
    idx.write_bytes(idx.read_bytes()[:-1])
    with pytest.raises(FormatError, match="asks for 60 bytes, it has 59"):
        gx.open_checkpoint(idx)
    idx.write_bytes(bytes([0, 0, 12, 8]) + bytes(8))
    with pytest.raises(FormatError, match="asks for 36 bytes, it has 12"):
        gx.open_checkpoint(idx)


def test_it_is_not_written(idx: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="graftax only reads idx files"):
        gx.port_file({"w": np.zeros(3)}, {"w": np.zeros(3)}, tmp_path / "out.idx", to="flax", source_side="flax")
    with pytest.raises(UsageError, match="graftax only reads idx files"):
        gx.port_file(
            {"w": np.zeros(3)}, {"w": np.zeros(3)}, tmp_path / "out", format="idx", to="flax", source_side="flax"
        )  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [idx]
