"""Text that names a checkpoint: a path, `pkg.mod:factory`, a hub id."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graftax.errors import GraftaxError, UsageError, escape
from graftax.tree import Checkpoint

_FACTORY = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")


def resolve_text(text: str) -> Checkpoint:
    """See `adapters.resolve`.

    Raises UsageError (exit code 2) where a factory cannot be imported, GraftaxError (70) where it fails itself.
    """
    from graftax.formats import open_path

    match = None if _exists(text) else _FACTORY.fullmatch(text)
    if match is None:
        return open_path(text)
    from graftax.adapters import open_tree

    made = call_factory(text)
    try:
        return open_tree(made, label=text)
    except UsageError as exc:
        said = UsageError(f"{escape(text)} does not return weights: {exc}")
        said.failures = exc.failures
        raise said from None


def is_factory(text: str) -> bool:
    """Is `text` read as `pkg.mod:factory`? Not where a path of that name exists."""
    return not _exists(text) and _FACTORY.fullmatch(text) is not None


def _exists(text: str) -> bool:
    """Is `text`, or what stands before a '::' in it, a path that exists?"""
    if "\0" in text:
        return False
    pieces = text.split("::")
    return any(os.path.lexists("::".join(pieces[:i])) for i in range(len(pieces), 0, -1))


def call_factory(text: str) -> Any:
    """What the function at `pkg.mod:factory` returns. The current folder is importable.

    Raises UsageError where the module or the name is not there, GraftaxError (70) where its code fails.
    """
    match = _FACTORY.fullmatch(text)
    if match is None:
        raise UsageError(f"{escape(text)} is not of the form pkg.mod:factory")
    with _current_folder():
        return _call(_import(match["module"], text), match, text)


def _call(target: Any, match: re.Match[str], text: str) -> Any:
    for part in match["name"].split("."):
        if not hasattr(target, part):
            known = ", ".join(escape(name) for name in vars(target) if callable(vars(target)[name]) and name[0] != "_")
            raise UsageError(
                f"{escape(match['module'])} has no {escape(match['name'])!r}",
                next=f"It has: {known[:400]}" if known and hasattr(target, "__dict__") else "",
            )
        target = getattr(target, part)
    if not callable(target):
        return target
    try:
        return target()
    except GraftaxError:
        raise
    except (Exception, SystemExit) as exc:
        raise GraftaxError(f"the factory {escape(text)} failed: {_last_words(exc)}") from exc


def _import(name: str, text: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as exc:
        raise UsageError(
            f"{escape(text)}: {escape(name)} cannot be imported: {_last_words(exc)}",
            next="The current folder is importable; is the package installed in this environment?"
            if isinstance(exc, ModuleNotFoundError)
            else "",
        ) from exc


@contextmanager
def _current_folder() -> Iterator[None]:
    """The current folder is importable, first of all, as it is for `python -m`."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _last_words(exc: BaseException) -> str:
    """The error and the line of the user's code that raised it."""
    frames = traceback.extract_tb(exc.__traceback__)
    where = f" ({escape(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(exc).__name__}: {escape(exc, 600)}{where}"
