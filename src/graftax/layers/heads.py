"""Where the heads of an attention meet: its output projection, and the rows of each query head in it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from graftax.errors import LayoutError, escape, option
from graftax.layers.attention import projection_letter
from graftax.layers.roles import LeafRole, role_of
from graftax.tree import Checkpoint, LeafIndex, TensorSpec

HEADS = (
    *("num_heads", "n_heads", "n_head", "nhead", "heads", "head_count"),
    *("num_attention_heads", "num_query_heads", "num_q_heads", "n_q_heads"),
)
"""Settings that count the query heads of an attention."""
_HEAD_DIM = ("head_dim", "dim_head", "head_size", "d_head", "head_features")
_FUSED = re.compile(r"(?:.*[./_])?(?:qkv|q_k_v|query_key_value|c_attn|in_proj|kv)(?:_?(?:proj|kernel|dense))?")
_OUTPUT = re.compile(
    r"(?:.*[./_])?(?:to_)?(?:out|output|o|wo|w_o|proj|c_proj|dense)(?:_?(?:proj|projection|lin|dense))?"
)


@dataclass(frozen=True, slots=True)
class OutputProjection:
    """The matrix that takes the outputs of all heads.

    path    the leaf
    axis    the axis of the heads, or of the rows in which they stand one after another
    heads   the number of query heads
    rows    how many indices of the axis a head has: 1 where the axis is that of the heads
    stacks  axes before and behind it that count layers -> their lengths
    """

    path: str
    axis: int
    heads: int
    rows: int
    stacks: Mapping[int, int]

    def parts(self) -> Iterator[tuple[tuple[int, ...], int, LeafIndex]]:
        """(the places on the stack axes, the head, the index of its part of the leaf), layer by layer."""
        last = max((self.axis, *self.stacks))
        for places in itertools.product(*map(range, self.stacks.values())):
            at = dict(zip(self.stacks, places, strict=True))
            for head in range(self.heads):
                here = head if self.rows == 1 else (head * self.rows, (head + 1) * self.rows, None)
                items = [here if n == self.axis else at.get(n, (None, None, None)) for n in range(last + 1)]
                yield places, head, LeafIndex(tuple(items))


def output_projection(tree: Checkpoint, module: str, leaves: Sequence[str]) -> OutputProjection:
    """The output projection of the attention at `module`, whose leaves below are `leaves`. A path of the projection
    itself does too.

    A leaf whose heads have an axis of their own is found by its role (`roles.role_of`), or, without live modules, by
    the query beside it. One that merges them, (heads head_dim, out), needs their number: a setting of the module, or
    the query's axis.

    Raises LayoutError if there is none, several, or the number of heads is not known.
    """
    matrices = {
        path: tree[path] for path in leaves if path in tree and tree[path].floating and len(tree[path].shape) > 1
    }
    roles = {path: role for path in matrices if (role := role_of(tree, path)) is not None}
    split = {path: found for path, role in roles.items() if (found := _by_role(path, role)) is not None}
    if not split and not tree.live.modules:
        split = _by_query(matrices, module)
    if not split:
        split = _merged(tree, module, matrices, roles)
    if len(split) > 1:
        raise LayoutError(
            f"{escape(module)} has several output projections of heads: {', '.join(map(escape, split))}",
            next="Select the attention, or the projection itself.",
        )
    return next(iter(split.values()))


def _by_role(path: str, role: LeafRole) -> OutputProjection | None:
    """The projection, if the leaf sums over heads that its role names."""
    stacks = {n: math.prod(axis.size for axis in role.axes[n]) for n in role.of_kind("stack")}
    for n, merged in enumerate(role.axes):
        if merged[0].name == "heads" and merged[0].kind == "in":
            return OutputProjection(path, n, merged[0].size, math.prod(axis.size for axis in merged[1:]), stacks)
    return None


def _by_query(matrices: Mapping[str, TensorSpec], module: str) -> dict[str, OutputProjection]:
    """The leaves (heads, head_dim, out) beside a query (in, heads, head_dim)."""
    letters = {path: projection_letter(path) for path in matrices}
    queries = {spec.shape[1:] for path, spec in matrices.items() if letters[path] == "q" and len(spec.shape) == 3}
    return {
        path: OutputProjection(path, 0, spec.shape[0], 1, {})
        for path, spec in matrices.items()
        if not letters[path] and len(spec.shape) == 3 and spec.shape[:2] in queries
    }


def _merged(
    tree: Checkpoint, module: str, matrices: Mapping[str, TensorSpec], roles: Mapping[str, LeafRole]
) -> dict[str, OutputProjection]:
    """The matrices (heads head_dim, out) of a module whose number of heads is known."""
    around, heads, head_dim, width = _facts(tree, module, roles)
    found: dict[str, OutputProjection] = {}
    for path, role in roles.items():
        name = path.rpartition("/")[0]
        inputs = [n for n, axes in enumerate(role.axes) if axes[0].kind == "in"]
        if projection_letter(path) or _FUSED.fullmatch(name) or len(inputs) != 1 or role.inputs != ("in",):
            continue
        rows = matrices[path].shape[inputs[0]]
        if width not in (None, rows) or (heads and (rows % heads or head_dim not in (None, rows // heads))):
            continue
        stacks = {n: matrices[path].shape[n] for n in role.of_kind("stack")}
        found[path] = OutputProjection(path, inputs[0], heads or 0, rows // heads if heads else 0, stacks)
    named = {path: one for path, one in found.items() if _OUTPUT.fullmatch(path.rpartition("/")[0])}
    found = named if len(found) > 1 and len(named) == 1 else found
    if not found:
        raise LayoutError(
            f"{escape(module)} has no output projection of heads",
            next=f"Select the attention, or the projection itself; {option('each', 'module')} changes whole modules.",
        )
    if not heads:
        if tree.live.modules:
            who = f"Give the module an attribute such as {HEADS[0]}"
        else:
            who = "Give the model itself, gx.linen(...) or an nnx.Module, whose modules say it"
        leaf = escape(next(iter(found)))
        raise LayoutError(
            f"the number of heads of {escape(around)} is not known: {leaf} merges them",
            next=f"{who}; or select the rows of one head with {option('each', 'leaf')}: {leaf}[0:64].",
        )
    return found


def _facts(
    tree: Checkpoint, module: str, roles: Mapping[str, LeafRole]
) -> tuple[str, int | None, int | None, int | None]:
    """(the module that says it, heads, head_dim, heads x head_dim) of the innermost module at or around `module` that
    says how many heads it has; None where nothing says it."""
    parts = module.split("/")
    for stop in range(len(parts), 0, -1):
        path = "/".join(parts[:stop])
        live = tree.live.modules.get(path)
        if live is None:
            continue
        queries = [leaf for leaf in live.leaves.values() if projection_letter(leaf) == "q" and leaf in tree]
        query = next((role for leaf in queries if (role := role_of(tree, leaf)) is not None), None)
        out = [axis for axis in query.parts if axis.kind == "out"] if query is not None and len(queries) == 1 else []
        width = math.prod(axis.size for axis in out) if out else None
        heads = next((axis.size for axis in out if axis.name == "heads"), None) or _setting(live.settings, HEADS)
        if heads:
            return path, heads, _setting(live.settings, _HEAD_DIM), width
    return module, None, None, None


def _setting(settings: Mapping[str, object], names: Sequence[str]) -> int | None:
    """The number that the settings have under these names; None if there is none, or several that differ."""
    found = {value for name in names if isinstance(value := settings.get(name), int) and not isinstance(value, bool)}
    return found.pop() if len(found) == 1 else None
