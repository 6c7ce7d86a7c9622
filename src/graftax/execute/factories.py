"""Factories: `pkg.mod:factory` names a function without arguments that returns a live object."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from graftax.adapters import open_live
from graftax.errors import GraftaxError, UsageError, escape, with_article
from graftax.tree import Checkpoint, Side

_FACTORY = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")


def made_by(text: str, side: Side | None = None) -> Checkpoint:
    """Call the factory that `text` names and open its result. UsageError if the result is not a tree of weights."""
    made = call_factory(text)
    try:
        with _quiet():
            return open_live(made, label=text, side=side)
    except UsageError as exc:
        said = UsageError(f"{escape(text)} does not return weights: {exc}")
        said.failures = exc.failures
        raise said from None


def is_factory(text: str) -> bool:
    """True if `text` reads as `pkg.mod:factory` and no path of that name exists."""
    return not _exists(text) and _FACTORY.fullmatch(text) is not None


def _exists(text: str) -> bool:
    """True if `text`, or the part of it before a '::', is an existing path."""
    if "\0" in text:
        return False
    pieces = text.split("::")
    return any(os.path.lexists("::".join(pieces[:i])) for i in range(len(pieces), 0, -1))


def call_factory(text: str) -> Any:
    """Call the function at `pkg.mod:factory` and return its result. The current folder is importable. Output of the
    user's code goes to stderr, because stdout carries results.

    Raises UsageError if the module or the name does not exist or needs arguments, GraftaxError (70) if the user's code
    fails.
    """
    with _current_folder(), _quiet():
        target = _found(text)
        return target if not callable(target) or _is_model(target) else _called(target, text)


def named_function(text: str) -> Any:
    """The function at `pkg.mod:function`, which is not called. The current folder is importable. UsageError if there is
    none."""
    with _current_folder(), _quiet():
        target = _found(text)
    if not callable(target):
        raise UsageError(f"{escape(text)} is {with_article(type(target).__name__)}, not a function")
    return target


def _found(text: str) -> Any:
    """What `pkg.mod:name` names."""
    match = _FACTORY.fullmatch(text)
    if match is None:
        raise UsageError(f"{escape(text)} is not of the form pkg.mod:factory")
    target = _import(match["module"], text)
    for part in match["name"].split("."):
        if not hasattr(target, part):
            known = ", ".join(escape(name) for name in vars(target) if callable(vars(target)[name]) and name[0] != "_")
            raise UsageError(
                f"{escape(match['module'])} has no {escape(match['name'])!r}",
                next=f"It has: {known[:400]}" if known and hasattr(target, "__dict__") else "",
            )
        target = getattr(target, part)
    return target


def _called(target: Any, text: str) -> Any:
    missing = _needed(target)
    if missing:
        what = f"the class {escape(text)}" if isinstance(target, type) else escape(text)
        raise UsageError(f"{what} needs arguments ({missing}); a factory is called without any", next=_wrapped(target))
    try:
        return target()
    except GraftaxError:
        raise
    except (Exception, SystemExit) as exc:
        module, _, name = text.partition(":")
        run = f"`python -c 'import {module} as m; m.{name}()'` shows its traceback."
        raise GraftaxError(f"the factory {escape(text)} failed: {_last_words(exc)}", next=escape(run)) from exc


def _needed(target: Any) -> str:
    """The arguments that a call requires; '' if it requires none or the signature is unknown."""
    try:
        parameters = [*inspect.signature(target).parameters.values()]
        if isinstance(target, type) and "self" in (own := inspect.signature(target.__init__).parameters):
            parameters = [parameter for name, parameter in own.items() if name != "self"]  # NNX calls through (*args)
    except (TypeError, ValueError):  # builtins
        return ""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(escape(p.name) for p in parameters if p.default is p.empty and p.kind not in several)


def _wrapped(target: Any) -> str:
    """A factory around `target`, ready to paste."""
    name = escape(target.__name__)
    bases = {f"{cls.__module__}.{cls.__qualname__}" for cls in getattr(target, "__mro__", ())}
    call = f"{name}(...)"
    if any(base.startswith("flax.nnx.") for base in bases):
        call = f"nnx.eval_shape(lambda: {name}(rngs=nnx.Rngs(0)))"
    elif any(base.startswith("flax.linen.") for base in bases):
        call = f"gx.linen({name}(...), example_input)"
    return f"Write a factory around it: def make(): return {call}"


def _is_model(target: Any) -> bool:
    """True for a live module: it is callable, but takes inputs. `pkg.mod:model` names it as it is."""
    kinds = () if isinstance(target, type) else type(target).__mro__
    return any(kind.__module__.partition(".")[0] in ("torch", "flax") for kind in kinds)


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
def _quiet() -> Iterator[None]:
    """Send the output of the user's code to stderr."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def _current_folder() -> Iterator[None]:
    """Put the current folder first on the import path, as `python -m` does."""
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
