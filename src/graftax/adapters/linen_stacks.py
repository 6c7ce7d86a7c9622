"""On which axes a Linen model stacks its leaves (nn.scan, nn.vmap), read from the jaxpr of its call.

Shapes do not show it where a model has as many layers as each is wide. Inside its own call a module sees its leaves
without the stacked axes: there each leaf is marked by a reduction over all axes that it has. In the jaxpr of the whole
call the mark reduces every axis but those of vmap; those of scan are gone where its body begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from graftax.adapters import containers
from graftax.adapters.flow import Notes
from graftax.tree import join_path

MARK = "graftax_marked_leaf:"
"""Begins the name of a mark, before that of its leaf."""


@contextmanager
def marked() -> Iterator[None]:
    """Inside this context every Linen module that is called marks the leaves that it holds directly."""
    import jax
    from flax import linen as nn

    def mark(name: str, leaf: Any) -> None:
        def reduced(leaf: Any) -> Any:
            return jax.numpy.max(leaf)

        reduced.__name__ = f"{MARK}{name}"
        jax.jit(reduced)(leaf)

    def watch(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "setup" and "<" not in context.method_name:
            for keys, leaf in containers.leaves(context.module.variables):
                if len(keys) == 2 and leaf.ndim and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
                    mark(join_path([keys[0], *context.module.path, keys[1]]), leaf)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        yield


def stacked_axes(shapes: Mapping[str, tuple[int, ...]], notes: Notes) -> dict[str, tuple[int, ...]]:
    """leaf -> the axes on which it is stacked, from the front; () if it is not. A leaf that is used in different ways
    is left out, and so is a stack of one layer."""
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        gone, count = notes.marked.get(name) or ((), -1)
        axes = tuple(axis for axis, size in enumerate(shape) if size > 1 and axis not in gone)
        if len(axes) + count == len(shape):
            out[name] = axes
    return out
