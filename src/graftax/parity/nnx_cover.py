"""Wrap methods of NNX classes for the time of a run, so that calls of tagged modules are seen.

NNX has no interceptors, and jit, scan and remat call other objects than those a run starts with. Only the class and
static attributes survive, so classes are wrapped and modules are tagged. Other threads that use the same classes
meanwhile, and modules without a tag, are not affected.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

TAG = "_graftax_site"
"""Name of the attribute that holds 'run:path' on the modules of a run."""
NOT_CALLS = frozenset({"initialize_carry", "init_cache"})
"""Public methods that are not part of a model's forward."""

See = Callable[[Any, str, str, tuple[Any, ...], dict[str, Any], Callable[..., Any]], Any]
"""(module, its tag, method, args, kwargs, the method itself, bound) -> its output."""

_lock = threading.Lock()
_covered: dict[tuple[type, str], list[Any]] = {}  # -> [what the class held, how many runs cover it]
_seers = threading.local()


@contextlib.contextmanager
def covering(module: nnx.Module, see: See) -> Iterator[None]:
    """Inside this context, calls of public methods of the module's classes by this thread go to `see`."""
    wanted = {place for _, item in nnx.iter_modules(module) for place in _places(type(item))}
    stack: list[See] = _seers.__dict__.setdefault("stack", [])
    with _lock:
        for place in wanted:
            _cover(*place)
    stack.append(see)
    try:
        yield
    finally:
        stack.pop()
        with _lock:
            for place in wanted:
                _uncover(*place)


def taken(module: nnx.Module) -> tuple[tuple[Any, Any], list[Any]]:
    """((GraphDef, structure of its state), the leaves of its state) of a module as it is now."""
    graphdef, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)
    return (graphdef, structure), leaves


def alone(graph: tuple[Any, Any], leaves: list[Any]) -> Any:
    """A module of its own from what `taken` gave, without tags."""
    graphdef, structure = graph
    module = nnx.merge(graphdef, structure.unflatten(leaves), copy=True)
    for _, item in nnx.iter_modules(module):
        if TAG in vars(item):
            delattr(item, TAG)
    return module


def _cover(kind: type, name: str) -> None:
    held = _covered.get((kind, name))
    if held is None:
        original = kind.__dict__[name]
        _covered[kind, name] = [original, 1]
        setattr(kind, name, _seen(name, original))
    else:
        held[1] += 1


def _uncover(kind: type, name: str) -> None:
    held = _covered[kind, name]
    held[1] -= 1
    if not held[1]:
        del _covered[kind, name]
        setattr(kind, name, held[0])


def _seen(name: str, original: Any) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = original.__get__(self, type(self))
        stack = _seers.__dict__.get("stack")
        tag = vars(self).get(TAG)
        if not stack or tag is None:
            return bound(*args, **kwargs)
        return stack[-1](self, tag, name, args, kwargs, bound)

    with contextlib.suppress(AttributeError, TypeError):
        functools.update_wrapper(method, original)
    return method


@functools.lru_cache(maxsize=512)
def _places(kind: type) -> tuple[tuple[type, str], ...]:
    """(class, name) of every method through which a module of this kind may be called: `__call__` and public methods,
    in all classes that define them. Lists and dicts of modules are not called."""
    own = [cls for cls in kind.__mro__ if cls not in nnx.Module.__mro__]
    if not any("__call__" in cls.__dict__ for cls in own) and kind.__module__.startswith("flax."):
        return ()
    return tuple((cls, name) for cls in own for name, held in vars(cls).items() if _is_method(name, held))


def _is_method(name: str, held: Any) -> bool:
    if isinstance(held, (staticmethod, classmethod, property, type)) or not callable(held):
        return False
    public = not name.startswith("_") and name not in NOT_CALLS
    return (name == "__call__" or public) and hasattr(type(held), "__get__")
