"""Ports of arrays by rules alone, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graftax.errors import Failure
from graftax.ops import apply_chain, same_bits
from graftax.plans import End, Plan
from graftax.rules import RuleOutcome, apply_rules, load_rules
from graftax.tree import Checkpoint, Side, TensorSpec
from graftax.tree.dtypes import spec_of

Arrays = Mapping[str, np.ndarray[Any, Any]]
Shapes = Mapping[str, tuple[int, ...]]


def tensors(shapes: Shapes, dtype: str = "float32") -> dict[str, np.ndarray[Any, Any]]:
    """Arrays whose values are all different."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    start = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        out[name] = np.arange(start, start + size).reshape(shape).astype(dtype)
        start += size
    return out


def checkpoint(arrays: Arrays, side: Side, label: str = "") -> Checkpoint:
    return Checkpoint(label or f"{side}.safetensors", side, {name: spec_of(a) for name, a in arrays.items()})


def abstract(shapes: Shapes, side: Side, label: str = "") -> Checkpoint:
    return Checkpoint(label or f"{side}.safetensors", side, {n: TensorSpec(s, "float32") for n, s in shapes.items()})


def outcome(rules: Any, source: Checkpoint, like: Checkpoint | None, to: Side | None = None) -> RuleOutcome:
    assert source.side is not None
    side = like.side if like is not None else to
    assert side is not None
    return apply_rules(load_rules(rules), source, like, source.side, side)


def failures(rules: Any, torch: Shapes, flax: Shapes) -> tuple[Failure, ...]:
    """What is wrong, torch to Flax."""
    return outcome(rules, abstract(torch, "torch"), abstract(flax, "flax")).proposal.failures


def run(rules: Any, arrays: Arrays, source_side: Side, like: Shapes, like_side: Side) -> dict[str, Any]:
    """The arrays that the rules make, every key of both sides accounted for."""
    source, target = checkpoint(arrays, source_side), abstract(like, like_side)
    found = outcome(rules, source, target)
    plan = Plan.build(End.of(source, source_side), End.of(target, like_side), found.proposal)
    assert plan.complete, str(plan)
    return execute(plan, arrays)


def execute(plan: Plan, arrays: Arrays) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for entry in plan.entries:
        made = apply_chain(entry.ops, tuple(arrays[name] for name in entry.sources))
        out.update(zip(entry.targets, made, strict=True))
    return out


def both_ways(rules: Any, torch: Shapes, wanted: Any) -> dict[str, Any]:
    """Port arrays of these shapes torch -> Flax, compare with `wanted(arrays)`, port back, compare bit for bit; and the
    plan's own inverse gives the same."""
    arrays = tensors(torch)
    expected = {name: np.asarray(a) for name, a in wanted(arrays).items()}
    shapes = {name: a.shape for name, a in expected.items()}
    made = run(rules, arrays, "torch", shapes, "flax")
    assert sorted(made) == sorted(expected)
    for name, array in expected.items():
        assert same_bits(np.ascontiguousarray(made[name]), np.ascontiguousarray(array)), name
    back = run(rules, made, "flax", {name: a.shape for name, a in arrays.items()}, "torch")
    source, like = checkpoint(arrays, "torch"), checkpoint(expected, "flax")
    plan = Plan.build(End.of(source, "torch"), End.of(like, "flax"), outcome(rules, source, like).proposal)
    inverse = execute(plan.inverse, made)
    for name, array in arrays.items():
        assert same_bits(np.ascontiguousarray(back[name]), array), name
        assert same_bits(np.ascontiguousarray(inverse[name]), array), name
    return made
