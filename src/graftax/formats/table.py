"""FORMATS: one row for each format, in the order in which files are tested. A new format needs a module and a row
here."""

from __future__ import annotations

from graftax.errors import UsageError, escape
from graftax.formats.base import Format
from graftax.tree import DTYPES, Side
from graftax.tree.dtypes import NUMPY_OWN

_ALL = frozenset(DTYPES)
_FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"})
_COMMON = NUMPY_OWN | {"bfloat16"} | _FLOAT8
_SAFETENSORS = _ALL - {"int4", "uint4", "complex128"}
_MSGPACK = _COMMON | {"int4", "uint4"}
_BOTH: tuple[Side, ...] = ("torch", "flax")

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("safetensors", "graftax.formats.safetensors_file", (".safetensors",), False, _BOTH, _SAFETENSORS, True),
        Format("torch", "graftax.formats.torch_pt", (".pt", ".pth", ".bin"), False, ("torch",), _COMMON, True),
        Format("npz", "graftax.formats.npz", (".npz",), False, _BOTH, NUMPY_OWN, True),
        Format("spec", "graftax.formats.spec_file", (".json",), False, _BOTH, _ALL, writes=False, weights=False),
        Format("orbax", "graftax.formats.orbax_folder", (), True, ("flax",), _COMMON),
        Format("hf_folder", "graftax.formats.hf_folder", (), True, _BOTH, _SAFETENSORS, True),
        # Last: almost any byte can begin a msgpack value.
        Format("msgpack", "graftax.formats.msgpack_file", (".msgpack",), False, ("flax",), _MSGPACK, True),
    )
}
"""name -> row. `holds` names the dtypes that a format restores bit for bit."""

NO_ENDING: dict[Side, str] = {"torch": "hf_folder", "flax": "orbax"}
"""side -> the format of an OUT without an ending."""


def by_ending(ending: str) -> Format | None:
    """The format of '.safetensors' and the like; None for an ending of no format."""
    return next((row for row in FORMATS.values() if ending.lower() in row.endings), None)


def by_name(name: str) -> Format:
    """The format called `name`, or with the ending `name` (without its dot). UsageError for any other text."""
    row = FORMATS.get(name) or by_ending(f".{name.lstrip('.')}") if isinstance(name, str) else None
    if row is None:
        raise UsageError(f"unknown format {escape(name)!r}; known: {', '.join(FORMATS)}")
    return row


def holders(dtype: str, side: Side) -> list[str]:
    """The writable formats that hold this dtype."""
    return [r.name for r in FORMATS.values() if r.writes and dtype in r.holds and side in r.sides]
