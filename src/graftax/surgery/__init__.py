"""Surgery: replace selected leaves of a tree and leave everything else untouched.

`replace` works on live trees and gives a new one; `replace_checkpoint` and `write_replacement` go from file to file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

from graftax.adapters.jax_arrays import is_tracer
from graftax.errors import Failure, GraftaxError, PlanError, escape
from graftax.ops import misfit_of
from graftax.surgery.files import Change, Report, replace_checkpoint, selectable, write_replacement
from graftax.surgery.given import prepared
from graftax.surgery.leaves import new_leaf
from graftax.surgery.live import LiveTree, live_tree
from graftax.surgery.places import Place
from graftax.surgery.roles import open_like
from graftax.surgery.selecting import check_selector, choose, edits_of, excluded_from, pick

if TYPE_CHECKING:
    from flax.nnx import GraphDef
else:
    GraphDef = Any

__all__ = ["Change", "Report", "replace", "replace_checkpoint", "select", "write_replacement"]

T = TypeVar("T")
State = TypeVar("State")


@overload
def replace(
    tree: tuple[GraphDef, State],
    selector: Any,
    value: Any = None,
    *,
    expect: int | None = None,
    exclude: Any = None,
    like: Any = None,
) -> State: ...


@overload
def replace(
    tree: T, selector: Any, value: Any = None, *, expect: int | None = None, exclude: Any = None, like: Any = None
) -> T: ...


def replace(
    tree: Any, selector: Any, value: Any = None, *, expect: int | None = None, exclude: Any = None, like: Any = None
) -> Any:
    """A new tree like `tree` in which the selected leaves have new values; `tree` stays as it is.

    tree      Linen variables or params (dict, FrozenDict), any nest of arrays, a torch state_dict, an nnx.Module, a
              State, or (GraphDef, State), which gives a State
    selector  a path; a glob ('*' stays in a part, '**' spans parts, `{a,b}` is either; a collection may be left out
              where only `params` matches); a predicate (path, leaf) -> bool; an nnx filter such as nnx.Param; a list of
              these; or a dict {selector: value}, in which an exact path wins over the others. A path or a glob may end
              in a basic index as NumPy's: `**/query/kernel[:, 3]` is that part of each leaf; the value then sees the
              part as its leaf, and every other element keeps its bits
    value     constant(v) zeros() normal(stddev, seed) add_normal(stddev, seed, relative=False) scaled(f) mean()
              mix(donor, t) rounded(dtype) quantized(bits, axis=None, group=None) from_checkpoint(path, key, ...); an
              array; or a function of the old leaf, or of (path, leaf) if it has exactly two required parameters
    expect    how many leaves must be selected
    exclude   a selector of leaves that are not selected
    like      a live module with the same leaves (gx.linen(...), nnx.Module, torch Module), which tells `quantized` what
              the axes of a leaf are, and a donor its layout; an nnx.Module tells it of itself

    Container types, the order of keys, and the dtype and sharding of every leaf stay the same; a leaf that was not
    selected is the same object. An array is never broadcast and never cast. Only a selector that names a part of the
    optimizer state selects optimizer state: `**/mu/kernel` or `opt_state/**`, not `**/kernel`.

    Inside jit, grad and vmap every value works, arrays and functions with traced values too. What is computed from a
    traced leaf has the bits that it has outside, but nothing can be refused for its numbers: an overflow is infinity or
    NaN, and subnormal numbers count as zero. Gradients flow; those of rounded and quantized pass straight through.

    Raises PlanError that lists every failure: a selector that matches nothing or names a subtree, another count than
    `expect`, a bare number, another shape or dtype. UsageError for arguments that make no sense.
    """
    edits = edits_of(selector, value)
    live = live_tree(tree)
    edits = prepared(edits)
    values, failures = choose(live.selectable(), edits, expect, exclude)
    new: dict[str, Any] = {}
    shown = None if like is None else open_like(like)
    home = cache(lambda: live.opened() if shown is None else shown)
    for path, item in values.items():
        try:
            live.require_values(path)
            new[path] = new_leaf(Place(path, live.spec(path), home), item, live.leaves[path], partial(live.host, path))
        except GraftaxError as error:
            if error.exit_code != PlanError.exit_code:
                raise
            failures += misfit_of(path, error).failures
    failures += [
        Failure("a torch tensor cannot take a traced value", key=path)
        for path, made in new.items()
        if live.torch and is_tracer(made)
    ]
    failures += _torn(live, values, new) if not failures else []
    if failures:
        raise PlanError(f"nothing was replaced in {escape(live.label)}:", failures)
    from graftax.adapters import map_leaves

    return map_leaves(tree, new)


def _torn(live: LiveTree, values: Mapping[str, Any], new: dict[str, Any]) -> list[Failure]:
    """Failures of tensors that a state_dict holds under several names, if only some of the names would change: a module
    that ties them would keep the one it loads last. If all names take one value, it is computed once."""
    if not live.torch:
        return []
    failures: list[Failure] = []
    for name, first in live.other_names().items():
        if (name in values) != (first in values):
            chosen, other = (name, first) if name in values else (first, name)
            failures.append(
                Failure(
                    f"shares its memory with {escape(other)}, which is not selected",
                    key=chosen,
                    next="Select both, or untie them first: state_dict[name] = state_dict[name].clone().",
                )
            )
        elif name in new and first in new:
            if values[name] is values[first]:
                new[name] = new[first]
            elif not _same(new[name], new[first]):
                failures.append(
                    Failure(
                        f"shares its memory with {escape(first)}, and they would take different values",
                        key=name,
                        next="Give both one value, or untie them first: state_dict[name] = state_dict[name].clone().",
                    )
                )
    return failures


def _same(a: Any, b: Any) -> bool:
    import numpy as np

    from graftax.ops import same_bits

    return same_bits(np.asarray(a), np.asarray(b))


def select(tree: Any, selector: Any, exclude: Any = None) -> list[str]:
    """The paths that `selector` picks, in the tree's order, without those that `exclude` picks; see `replace`. A path
    ends in the index where the selector picks a part of the leaf: `replace(tree, select(tree, s), value)` is
    `replace(tree, s, value)`.

    tree    whatever `replace` takes; also a path (PATH::NAME too), an opened checkpoint, a torch Module, a
            gx.linen(...). In a checkpoint and a gx.linen(...) a predicate gets the spec of a leaf

    Raises PlanError if nothing is picked, or if a leaf has no such part; the errors of reading a path.
    """
    check_selector(selector)
    view = selectable(tree)
    excluded, failures = excluded_from(view, exclude)
    picked, failed = pick(view, selector, excluded)
    if failures or failed:
        raise PlanError(f"nothing is selected in {escape(view.label)}:", [*failures, *failed])
    return [one.text for one in picked]
