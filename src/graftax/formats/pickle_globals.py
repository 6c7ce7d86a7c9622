"""Which classes and functions a checkpoint's pickle may name, and which of them it may call.

Nothing that a pickle names is ever imported or called here, whatever this module says of it. But a file that is opened
today by an inert reader is loaded tomorrow by another one, and weights that are themselves objects cannot be read. So

- torch's own constructors of tensors (`pickle_values.ALLOWED`) are understood;
- objects of any other class are kept as their class's name. Such a class may be named where it is no part of Python's
  standard library, or is one of the data types in DATA (NumPy's arrays and scalars, paths, dates, namespaces ...);
- everything else of the standard library (os, subprocess, builtins.eval, pickle, ctypes ...) refuses the file as
  unsafe, called or not, also where it is reached through a module that imported it. So does a dunder in a name;
- a plain function that is called refuses the file, too, whoever wrote it: only classes make data. A function is told by
  how the pickle calls it (REDUCE) and by a name that begins in lower case; the constructors in DATA are known.
"""

from __future__ import annotations

import sys

_BUILTINS = (
    "object list dict tuple int float bool str bytes complex set frozenset slice range xrange bytearray Ellipsis "
    "NotImplemented long unicode"
)
_DATETIME = "date time datetime timedelta timezone tzinfo"
_PATHS = "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath"
_RANDOM = "__randomstate_ctor __generator_ctor __bit_generator_ctor"

DATA = frozenset(
    {
        *(f"builtins.{name}" for name in _BUILTINS.split()),
        *(f"datetime.{name}" for name in _DATETIME.split()),
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS.split()),
        *("argparse.Namespace", "types.SimpleNamespace", "decimal.Decimal", "_decimal.Decimal", "fractions.Fraction"),
        *("uuid.UUID", "uuid.SafeUUID", "random.Random", "array.array"),
        *("array._array_reconstructor", "zoneinfo.ZoneInfo", "zoneinfo.ZoneInfo._unpickle", "logging.Logger"),
        *(f"typing.{name}" for name in ("Any", "Union", "Optional", "List", "Dict", "Tuple")),
        *("collections.deque", "collections.ChainMap", "collections.UserDict", "collections.UserList"),
        *("_io.BytesIO", "_io.StringIO", "io.BytesIO", "io.StringIO", "logging.getLogger"),
        *("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__"),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
        *(f"numpy.random._pickle.{name}" for name in _RANDOM.split()),
        *("numpy.random.bit_generator.__pyx_unpickle_SeedSequence", "numpy.ma.core._mareconstruct"),
        *("numpy.dtype", "numpy.ndarray"),
    }
)
"""Constructors of plain data, by the names under which pickles call them."""
_SHOWN = {
    "numpy.core.multiarray._reconstruct": "numpy.ndarray",
    "numpy._core.multiarray._reconstruct": "numpy.ndarray",
    "numpy.core.numeric._frombuffer": "numpy.ndarray",
    "numpy._core.numeric._frombuffer": "numpy.ndarray",
    "numpy.core.multiarray.scalar": "a NumPy scalar",
    "numpy._core.multiarray.scalar": "a NumPy scalar",
    "numpy.ma.core._mareconstruct": "numpy.ma.MaskedArray",
    "numpy.random._pickle.__randomstate_ctor": "numpy.random.RandomState",
    "numpy.random._pickle.__generator_ctor": "numpy.random.Generator",
    "numpy.random._pickle.__bit_generator_ctor": "numpy.random.BitGenerator",
    "logging.getLogger": "logging.Logger",
    "array._array_reconstructor": "array.array",
}
RECONSTRUCTORS = frozenset(
    {"copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__"}
)
"""They make an object of the class that is their first argument."""

_GONE = (
    "__builtin__ copy_reg cPickle cStringIO StringIO commands popen2 os2 exceptions imp distutils asyncore asynchat "
    "smtpd pipes cgi cgitb crypt nntplib telnetlib xdrlib aifc audioop chunk imghdr mailcap msilib nis ossaudiodev "
    "sndhdr spwd sunau uu pip setuptools pkg_resources"
)
"""Standard modules of other Pythons, and those that install code."""
_STANDARD = frozenset(sys.stdlib_module_names) | frozenset(_GONE.split())


_RUN = frozenset({"Popen", "CDLL", "PyDLL", "InteractiveInterpreter", "InteractiveConsole"})
"""Classes that run what they are given, under whatever module they are found again."""


def may_be_named(module: str, name: str) -> bool:
    """May a pickle name this class or function? `name` may be a chain (`Outer.Inner`), but not over a module of the
    standard library that `module` had imported."""
    full = f"{module}.{name}"
    if full in DATA:
        return True
    if module.partition(".")[0] in _STANDARD or not _STANDARD.isdisjoint(name.split(".")) or not module or not name:
        return False
    parts = full.split(".")
    return parts[-1] not in _RUN and not any(part.startswith("__") and part != "__main__" for part in parts)


def may_be_called(full: str) -> bool:
    """May a pickle call it, as it calls a class to make an object of it? Of what `may_be_named`."""
    return full in DATA or full.rpartition(".")[2].lstrip("_")[:1].isupper()


def shown(full: str) -> str:
    """The class that such a constructor makes objects of."""
    return _SHOWN.get(full, full)
