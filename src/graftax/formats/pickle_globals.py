"""The classes and functions that a checkpoint's pickle may name, and those that it may call.

This package never imports or calls anything that a pickle names. But a file that an inert reader opens today may be
loaded by another reader tomorrow, and weights that are themselves objects cannot be read. Therefore:

- torch's own constructors of tensors (`inert.ALLOWED`) are understood;
- an object of any other class is kept as the name of its class. The pickle may name such a class if it is not part of
  Python's standard library, or if it is one of the data types in DATA (NumPy's arrays and scalars, paths, dates,
  namespaces ...);
- any other name of the standard library (os, subprocess, builtins.eval, pickle, ctypes ...) refuses the file as unsafe,
  called or not, even if it is reached through a module that imported it. So does a dunder in a name;
- a call of a plain function also refuses the file, whoever wrote the function: only classes make data. A function is
  recognised by how the pickle calls it (REDUCE) and by a name that begins in lower case; the constructors in DATA are
  exempt.
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
"""Constructors of plain data, by the names that pickles use for them."""
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
"""Constructors that make an object of the class in their first argument."""

_GONE = (
    "__builtin__ copy_reg cPickle cStringIO StringIO commands popen2 os2 exceptions imp distutils asyncore asynchat "
    "smtpd pipes cgi cgitb crypt nntplib telnetlib xdrlib aifc audioop chunk imghdr mailcap msilib nis ossaudiodev "
    "sndhdr spwd sunau uu pip setuptools pkg_resources"
)
"""Standard modules of other Python versions, and modules that install code."""
_STANDARD = frozenset(sys.stdlib_module_names) | frozenset(_GONE.split())


_RUN = frozenset({"Popen", "CDLL", "PyDLL", "InteractiveInterpreter", "InteractiveConsole"})
"""Classes that run their arguments, under any module that exposes them."""


def may_be_named(module: str, name: str) -> bool:
    """True if a pickle may name this class or function. `name` may be a chain (`Outer.Inner`), but not through a module
    of the standard library that `module` imported."""
    full = f"{module}.{name}"
    if full in DATA:
        return True
    if module.partition(".")[0] in _STANDARD or not _STANDARD.isdisjoint(name.split(".")) or not module or not name:
        return False
    parts = full.split(".")
    return parts[-1] not in _RUN and not any(part.startswith("__") and part != "__main__" for part in parts)


def may_be_called(full: str) -> bool:
    """True if a pickle may call it, as it calls a class to make an object. `may_be_named` must hold already."""
    return full in DATA or full.rpartition(".")[2].lstrip("_")[:1].isupper()


def shown(full: str) -> str:
    """The class of the objects that such a constructor makes."""
    return _SHOWN.get(full, full)
