"""The role of a leaf that `quantized` is to go into: which of its axes are outputs, inputs, a stack."""

from __future__ import annotations

from types import EllipsisType
from typing import Any

from graftax.errors import PlanError, UsageError, escape, option
from graftax.layers import LeafRole, role_of
from graftax.surgery.donors import same_leaf
from graftax.surgery.places import Place
from graftax.surgery.values import Quantized
from graftax.tree import Checkpoint, nearest


def open_like(like: Any) -> Checkpoint:
    """`like` of replace, opened. UsageError if it shows no modules."""
    from graftax.execute.opening import open_tree

    opened = open_tree(like)
    if not opened.live.modules:
        raise UsageError(
            f"{option('like')}: {escape(opened.label)} has no live modules, which alone tell what axes are",
            next="Give gx.linen(module, *example_args), an nnx.Module or a torch Module, or pkg.mod:factory.",
        )
    return opened


def role_in(place: Place, value: Quantized) -> LeafRole | EllipsisType | None:
    """What the axes of a leaf are, or of the part of it; None if nothing tells, `...` if only the leaf's own name can.
    `place.home` gives `like` of replace, whose modules tell, or the tree itself, whose modules or names tell.

    PlanError if like has no such leaf, or if `axis` would leave every value as it is.
    """
    spec, index = place.spec, place.index
    rank = len(spec.shape)
    if rank and value.axis is not None and {axis % rank for axis in value.axis} == set(range(rank)):
        raise PlanError(
            f"{value.text}: {spec} would have a scale for each of its {spec.size} values, which changes nothing",
            next="Name the axes that keep their own scale; the values along the others share one.",
        )
    if not value.needs_role or not spec.floating:
        return ...
    tree = place.home()
    name = same_leaf(tree, place.path)
    if name is None and not tree.live.modules:
        return ...
    if name is None:
        near = nearest(place.path, tree)
        raise PlanError(
            f"{escape(tree.label)} has no such leaf among its weights, so nothing tells what its axes are",
            next=f"Near: {near}" if near else f"Say {option('axis')}.",
        )
    shape = tree[name].shape
    if (shape if index is None else index.part_shape(shape)) != spec.shape:
        raise PlanError(
            f"{escape(tree.label)}, given as {option('like')}, has a leaf of shape {shape} in this place",
            next="Give the module that these weights belong to.",
        )
    role = role_of(tree, name)
    return role if role is None or index is None else role.indexed(index.key)
