"""Layers that torch numbers through, and that Flax keeps stacked: in cycles, in stages, by kind, one alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import graftax as gx

D, F = 32, 48
SHAPES = {
    "attn.q": (D, D),
    "attn.k": (16, D),
    "attn.v": (16, D),
    "attn.o": (D, D),
    "mlp.up": (F, D),
    "mlp.down": (D, F),
}
Place = Callable[[int], tuple[str, int]]
"""The number of a layer -> the path of its stack, and its place in the stack."""


class Layers:
    """`count` layers, each in the stack that `place` says, on `axis`; layers for which `plain` is true have no
    attention."""

    def __init__(self, count: int, place: Place, axis: int = 1, plain: Callable[[int], bool] = lambda i: False) -> None:
        rng = np.random.default_rng(0)
        self.torch: dict[str, Any] = {"embed.weight": rng.standard_normal((99, D)).astype("f4")}
        self.flax: dict[str, Any] = {"params/embed/embedding": self.torch["embed.weight"]}
        stacks: dict[str, dict[int, Any]] = {}
        for i in range(count):
            stack, at = place(i)
            for name, shape in {**SHAPES, "norm": (D,)}.items():
                if plain(i) and name.startswith("attn"):
                    continue
                value = self.torch[f"layers.{i}.{name}.weight"] = rng.standard_normal(shape).astype("f4")
                leaf = f"{name.replace('.', '/')}/{'scale' if name == 'norm' else 'kernel'}"
                stacks.setdefault(f"params/{stack}/{leaf}", {})[at] = value.T
        for path, found in stacks.items():
            self.flax[path] = np.stack([found[at] for at in sorted(found)], min(axis, found[0].ndim))

    def plan(self, reverse: bool, rules: list[str]) -> gx.Plan:
        ends = (self.nested, self.torch) if reverse else (self.torch, self.nested)
        return gx.plan(*ends, rules=rules or None, to="torch" if reverse else None)

    def right(self, plan: gx.Plan, reverse: bool) -> bool:
        made = plan.run(self.nested if reverse else self.torch)
        got, want = (made, self.torch) if reverse else (_flat(made), self.flax)
        return all(np.array_equal(np.asarray(got[path]), leaf) for path, leaf in want.items())

    @property
    def nested(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for path, leaf in self.flax.items():
            *parts, last = path.split("/")
            at = out
            for part in parts:
                at = at.setdefault(part, {})
            at[last] = leaf
        return out


def _flat(tree: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, sub in tree.items():
        out |= _flat(sub, f"{start}{name}/") if isinstance(sub, Mapping) else {start + name: sub}
    return out


def by_kind(dense: Callable[[int], bool]) -> Place:
    """The dense layers in one stack, the others in another."""

    def place(i: int) -> tuple[str, int]:
        return ("dense_layers" if dense(i) else "moe_layers"), sum(dense(n) == dense(i) for n in range(i))

    return place


CASES: dict[str, Layers] = {
    "cycles": Layers(4, lambda i: (f"layers/layers_{i % 2}", i // 2)),
    "cycles under other names": Layers(12, lambda i: (f"decoder/blocks/block_{i % 3}", i // 3), axis=0),
    "cycles of two kinds": Layers(8, lambda i: (f"layers_{i % 4}", i // 4), plain=lambda i: i % 4 != 3),
    "a short last cycle": Layers(8, lambda i: (f"layers/layer_{i % 3}", i // 3)),
    "a short last cycle of two kinds": Layers(4, lambda i: (f"layers_{i % 3}", i // 3), plain=lambda i: i % 3 != 2),
    "one cycle": Layers(4, lambda i: (f"layers/layers_{i}", 0)),
    "stages": Layers(4, lambda i: (f"stage_{i // 2}/layers", i % 2)),
    "stages of unequal length": Layers(6, lambda i: (f"stage_{int(i > 1)}/layers", i - 2 * (i > 1))),
    "two kinds in two stacks": Layers(6, by_kind(lambda i: i < 2), plain=lambda i: i < 2),
    "one layer of its kind": Layers(6, by_kind(lambda i: i < 1), plain=lambda i: i < 1),
    "one layer of its kind, in front": Layers(6, by_kind(lambda i: i < 1), axis=0, plain=lambda i: i < 1),
    "one layer": Layers(1, lambda i: ("layers", 0)),
    "one layer, in front": Layers(1, lambda i: ("layers", 0), axis=0),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("name", CASES)
def test_layers_find_their_stack(name: str, reverse: bool) -> None:
    layers = CASES[name]
    plan = layers.plan(reverse, [])
    assert plan.complete, str(plan)
    assert layers.right(plan, reverse)


@pytest.mark.parametrize(
    ("name", "said"),
    [("cycles", "each cycle has 2 layers"), ("stages", "there are 2 stages"), ("cycles of two kinds", "")],
)
def test_what_only_the_path_of_a_stack_shows_is_an_assumption(name: str, said: str) -> None:
    plan = CASES[name].plan(False, [])
    texts = [assumption.text for assumption in plan.assumptions if assumption.text.startswith("layers:")]
    assert [said in text for text in texts] == ([True] if said else [])
    assert any(said in line for entry in plan.entries for line in entry.evidence)


@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("cycle", [True, False], ids=["a cycle", "stages"])
def test_a_cycle_or_stages_is_one_question_where_the_paths_do_not_tell(cycle: bool, reverse: bool) -> None:
    layers = Layers(6, lambda i: (f"layers_{i % 2 if cycle else i // 3}", i // 2 if cycle else i % 3))
    (question,) = layers.plan(reverse, []).questions
    assert [candidate.evidence for candidate in question.candidates] == [
        "each cycle has 2 layers",
        "there are 2 stages",
    ]
    plans = [layers.plan(reverse, [candidate.rule]) for candidate in question.candidates]
    assert all(plan.complete for plan in plans)
    assert [layers.right(plan, reverse) for plan in plans] == [cycle, not cycle]


def test_a_rule_line_names_the_layers_of_each_place() -> None:
    """Blocks of experts: the stack is over the experts of one layer, never over the layers."""
    rng = np.random.default_rng(0)
    torch = {
        f"layers.{i}.moe.experts.{e}.w{n}.weight": rng.standard_normal((4, 4)).astype("f4")
        for i in range(2)
        for e in range(4)
        for n in (1, 2, 3)
    }
    torch |= {f"layers.{i}.norm.weight": rng.standard_normal(4).astype("f4") for i in range(2)}
    flax = {f"layer_{i}_moe": {name: np.zeros((4, 4, 4), "f4") for name in ("wi_0", "wi_1", "wo")} for i in range(2)}
    flax |= {f"layer_{i}_norm": {"scale": np.zeros(4, "f4")} for i in range(2)}
    (question,) = gx.plan(torch, {"params": flax}).questions
    assert 'torch = "layers.{l}.moe.experts.{m}.w1.weight"' in question.candidates[0].rule
    assert 'flax = "params/layer_{l}_moe/wi_0"' in question.candidates[0].rule


def test_the_stack_of_one_part_of_the_tree_is_matched_by_itself() -> None:
    """Norms that only their order along the block tells apart, in an encoder and a decoder of the same widths."""
    rng = np.random.default_rng(0)
    torch: dict[str, Any] = {}
    flax: dict[str, Any] = {}
    for tower, parts in (("encoder", ("attn", "mlp")), ("decoder", ("attn", "cross", "mlp"))):
        names = {"attn": "self_attention" if "cross" in parts else "attention", "cross": "cross_attention"}
        for place, part in enumerate(parts):
            rows = {"layer_norm": ("", "scale", (D,)), "o" if part != "mlp" else "wo": ("m", "kernel", (D, D))}
            for leaf, (_, role, shape) in rows.items():
                inner = f"{names.get(part, part)}" if role == "kernel" else f"pre_{names.get(part, part)}_layer_norm"
                found = [rng.standard_normal(shape).astype("f4") for _ in range(3)]
                inside = f".{part}" if role == "kernel" else ""
                for i, value in enumerate(found):
                    torch[f"{tower}.block.{i}.layer.{place}{inside}.{leaf}.weight"] = value
                path = f"{inner}/{'wo' if part == 'mlp' else 'out'}" if role == "kernel" else inner
                flax[f"params/{tower}/{tower}/{path}/{role}"] = np.stack([value.T for value in found], 1)
    plan = gx.plan(torch, flax, to="flax")
    assert plan.complete, str(plan)
    made = plan.run(torch)
    assert all(np.array_equal(made[path], leaf) for path, leaf in flax.items())


@pytest.mark.parametrize("beside", ["moe_block", "mlp/routed_experts"])
def test_a_gate_beside_matrices_of_all_experts_is_their_router(beside: str) -> None:
    """The gate has no axis of experts; a gate that has one is a part of each expert."""
    shapes = {"gate_proj": (3, 4, 6, 8), "up_proj": (3, 4, 6, 8), "down_proj": (3, 4, 8, 6)}
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    gate, norm = rng.standard_normal((3, 4, 8)).astype("f4"), rng.standard_normal((3, 8)).astype("f4")
    torch = {f"layers.{i}.mlp.gate.weight": gate[i] for i in range(3)}
    torch |= {f"layers.{i}.norm.weight": norm[i] for i in range(3)}
    for name, value in values.items():
        torch |= {f"layers.{i}.mlp.experts.{e}.{name}.weight": value[i, e] for i in range(3) for e in range(4)}
    flax = {f"params/layers/{beside}/gate/kernel": gate.transpose(2, 0, 1), "params/layers/norm/scale": norm.T}
    for name, part in (("gate_proj", "wi_0"), ("up_proj", "wi_1"), ("down_proj", "wo")):
        flax[f"params/layers/{beside}/{part}"] = values[name].transpose(1, 0, 3, 2)
    plan = gx.plan(torch, flax, to="flax")
    assert plan.complete, str(plan)
    assert all(np.array_equal(plan.run(torch)[path], leaf) for path, leaf in flax.items())


@pytest.mark.parametrize("width", [4, 6])
def test_a_short_last_cycle_of_unlike_layers(width: int) -> None:
    """Layers 0 and 3 are place 0. That 0 and 1 are alike and stand first makes them no stage of two."""
    rng = np.random.default_rng(0)
    kinds = {"mlp": {"up": (width, 4), "down": (4, width)}, "attn": dict.fromkeys("qkvo", (4, 4))}
    torch: dict[str, Any] = {"embed.weight": rng.standard_normal((9, 4)).astype("f4")}
    flax: dict[str, Any] = {"params/embed/embedding": torch["embed.weight"]}
    stacks: dict[str, list[Any]] = {}
    for i, kind in enumerate(("mlp", "mlp", "attn", "mlp")):
        for part, shape in {**kinds[kind], "norm": (4,)}.items():
            name = part if part == "norm" else f"{kind}.{part}"
            value = torch[f"layers.{i}.{name}.weight"] = rng.standard_normal(shape).astype("f4")
            leaf = f"{name.replace('.', '/')}/{'scale' if part == 'norm' else 'kernel'}"
            stacks.setdefault(f"params/layer_{i % 3}/{leaf}", []).append(value.T)
    flax |= {path: np.stack(found, min(1, found[0].ndim)) for path, found in stacks.items()}
    plan = gx.plan(torch, flax, to="flax")
    assert plan.complete, str(plan)
    assert all(np.array_equal(plan.run(torch)[path], leaf) for path, leaf in flax.items())


def test_layers_of_one_fused_module_are_blocks() -> None:
    """Three layers hold nothing but a fused tensor: as many as its parts, so the stacks could be taken for parts."""
    torch = {f"h.{i}.attn.qkv.weight": np.zeros((3 * D, D), "f4") for i in range(3)}
    flax = {"h": {"attn": {n: {"kernel": np.zeros((3, D, D), "f4")} for n in "qkv"}}}
    (question,) = gx.plan(torch, flax).questions
    assert question.candidates
    for candidate in question.candidates:
        assert gx.plan(torch, flax, rules=[candidate.rule]).complete
        assert 'torch = "h.{l}.attn.qkv.weight"' in candidate.rule
        assert "stack = {l = 0}" in candidate.rule
