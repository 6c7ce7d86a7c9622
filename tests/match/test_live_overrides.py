"""Live modules of which the layer table says nothing, or only what their base does, are not taken by convention."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest

import graftax as gx
from graftax.ops import apply_chain
from graftax.tree import Checkpoint, TensorSpec

torch = pytest.importorskip("torch")

F = torch.nn.functional


class Scaled(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        return F.linear(x, self.weight * 0.3, self.bias)


class Wrapping(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 2


class Inherits(Scaled):
    pass


class Centred(torch.nn.Conv2d):
    def _conv_forward(self, x: Any, weight: Any, bias: Any) -> Any:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class ZeroCentred(torch.nn.LayerNorm):
    def forward(self, x: Any) -> Any:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)


class Lookup(torch.nn.Embedding):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 3


class InOut(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        return x @ self.weight + self.bias


class Turned(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        return F.linear(x, self.weight.t(), self.bias)


class Harmless(torch.nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)

    def extra_repr(self) -> str:
        return "harmless"

    def reset_parameters(self) -> None:
        super().reset_parameters()


class Pairwise(torch.nn.Bilinear):
    def forward(self, x: Any) -> Any:
        return super().forward(x, x)


def net(layer: Any) -> Any:
    out = torch.nn.Module()
    out.lay, out.other = layer, torch.nn.Linear(5, 7)
    return out


def like(**shapes: tuple[int, ...]) -> Checkpoint:
    leaves = {f"params/lay/{name}": shape for name, shape in shapes.items()}
    leaves |= {"params/other/kernel": (5, 7), "params/other/bias": (7,)}
    return Checkpoint("like", "flax", {path: TensorSpec(shape, "float32") for path, shape in leaves.items()})


def planned(source: Any, target: Any, rules: Any = None) -> gx.Plan:
    from graftax.execute.opening import open_tree
    from graftax.match.planning import make_plan
    from graftax.plans import PlanOptions

    ends = [end if isinstance(end, Checkpoint) else open_tree(end) for end in (source, target)]
    return make_plan(*ends, PlanOptions(rules=rules))


def said(plan: gx.Plan) -> list[str]:
    return [a.text for a in plan.assumptions if a.text.startswith("forward:")]


SQUARE = {"kernel": (8, 8), "bias": (8,)}


@pytest.mark.parametrize(
    ("layer", "shapes", "kind"),
    [
        (Scaled(8, 8), SQUARE, "Linear"),
        (Wrapping(8, 8), SQUARE, "Linear"),
        (Inherits(8, 8), SQUARE, "Linear"),
        (InOut(8, 6), {"kernel": (8, 6), "bias": (6,)}, "Linear"),
        (Centred(4, 4, 3), {"kernel": (3, 3, 4, 4), "bias": (4,)}, "Conv2d"),
        (ZeroCentred(8), {"scale": (8,), "bias": (8,)}, "LayerNorm"),
        (Lookup(8, 8), {"embedding": (8, 8)}, "Embedding"),
    ],
    ids=lambda item: type(item).__name__,
)
def test_a_call_that_is_overridden_is_an_assumption_that_names_class_and_leaves(layer: Any, shapes: Any, kind: str):
    plan = planned(net(layer), like(**shapes))
    assert plan.complete, str(plan)
    (text,) = said(plan)
    assert f"overrides the forward of {kind}" in text
    assert {name for a in plan.assumptions for name in a.targets} >= {f"params/lay/{leaf}" for leaf in shapes}


@pytest.mark.parametrize("kind", [torch.nn.Linear, Harmless])
def test_what_overrides_no_call_is_taken_as_its_base(kind: Any) -> None:
    plan = planned(net(kind(8, 8)), like(**SQUARE))
    assert plan.complete, str(plan)
    assert not said(plan)


@pytest.mark.parametrize("kind", [InOut, Turned])
def test_a_square_matrix_that_a_subclass_may_turn_is_asked_about(kind: Any) -> None:
    plan = planned(net(kind(8, 8)), like(**SQUARE))
    (question,) = plan.questions
    assert {candidate.rule.partition("layout")[2] for candidate in question.candidates} == {
        ' = "linear" }', ' = "identity" }'
    }  # fmt: skip
    for candidate in question.candidates:
        assert planned(net(kind(8, 8)), like(**SQUARE), rules=[candidate.rule]).complete


@pytest.mark.parametrize("kind", [torch.nn.Bilinear, Pairwise])
@pytest.mark.parametrize(("width", "out", "ways"), [(8, 6, 2), (8, 8, 6)])
def test_a_layer_whose_axes_no_convention_orders_is_asked_about(kind: Any, width: int, out: int, ways: int) -> None:
    source, target = net(kind(width, width, out)), like(kernel=(width, width, out), bias=(out,))
    (question,) = planned(source, target).questions
    rules = [candidate.rule for candidate in question.candidates]
    assert len(rules) == ways
    assert rules[0].endswith(('ops = "a b c -> b c a" }', 'ops = "o i j -> i j o" }'))
    for rule in rules:
        plan = planned(source, target, rules=[rule])
        assert plan.complete, str(plan)
    entries = {entry.targets: entry.ops for entry in planned(source, target, rules=rules[:1]).entries}
    (kernel,) = apply_chain(entries[("params/lay/kernel",)], (source.lay.weight.detach().numpy(),))
    assert (kernel == source.lay.weight.detach().numpy().transpose(1, 2, 0)).all()


def test_a_rule_that_says_no_layout_leaves_it_open() -> None:
    rule = '{ torch = "lay.weight", flax = "params/lay/kernel" }'
    plan = planned(net(torch.nn.Bilinear(8, 8, 6)), like(kernel=(8, 8, 6), bias=(6,)), rules=[rule])
    assert not plan.complete
    assert len(plan.questions[0].candidates) == 2


def test_a_pairing_that_is_asked_about_offers_every_order_of_axes() -> None:
    source = torch.nn.Module()
    source.left_one, source.right_one = torch.nn.Bilinear(8, 8, 6), torch.nn.Bilinear(8, 8, 6)
    shapes = {f"params/{name}/{leaf}": shape for name in ("x", "y")
              for leaf, shape in (("kernel", (8, 8, 6)), ("bias", (6,)))}  # fmt: skip
    plan = planned(source, Checkpoint("like", "flax", {k: TensorSpec(s, "float32") for k, s in shapes.items()}))
    rules = [candidate.rule for question in plan.questions for candidate in question.candidates]
    assert rules
    assert not any("conv" in rule for rule in rules)
    assert {"o i j -> i j o" in rule for rule in rules} == {True, False}


def test_one_framework_layer_alone_is_asked_about() -> None:
    target = Checkpoint("like", "flax", {"params/kernel": TensorSpec((8, 8, 6), "float32"),
                                         "params/bias": TensorSpec((6,), "float32")})  # fmt: skip
    assert not planned(torch.nn.Bilinear(8, 8, 6), target).complete


def test_two_ends_of_one_class_say_nothing() -> None:
    for make in (lambda: Scaled(8, 8), lambda: torch.nn.Bilinear(8, 8, 6)):
        plan = planned(net(make()), net(make()))
        assert plan.complete, str(plan)
        assert not said(plan)
    assert said(planned(net(Scaled(8, 8)), net(torch.nn.Linear(8, 8))))


def test_flax_subclasses_are_looked_at_too() -> None:
    import flax.linen as nn
    import jax.numpy as jnp
    from flax import nnx

    class Twice(nn.Dense):
        def __call__(self, inputs: Any) -> Any:
            return super().__call__(inputs) * 2

    class Model(nn.Module):
        kind: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.kind(8, name="lay")(x)

    class Own(nnx.Linear):
        def __call__(self, inputs: Any) -> Any:
            return inputs @ self.kernel[...].T

    class Holder(nnx.Module):
        def __init__(self, kind: Any) -> None:
            self.lay = kind(8, 8, rngs=nnx.Rngs(0))

    source = torch.nn.Module()
    source.lay = torch.nn.Linear(8, 8)
    assert not said(gx.plan(source, gx.linen(Model(nn.Dense), jnp.zeros((2, 8)))))
    plan = gx.plan(source, gx.linen(Model(Twice), jnp.zeros((2, 8))))
    assert plan.complete
    assert "Twice overrides the forward of Dense" in said(plan)[0]
    assert gx.plan(source, Holder(nnx.Linear)).complete
    assert not gx.plan(source, Holder(Own)).complete
    assert not gx.plan(Holder(Own), source).complete


class Middle(InOut):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 2


class ByName(Middle):
    def forward(self, x: Any) -> Any:
        return Middle.forward(self, x)


class Again(InOut):
    def forward(self, x: Any) -> Any:
        return F.linear(x, self.weight, self.bias) * 2


class MovesActivations(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        return torch.nn.Linear.forward(self, x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(("kind", "open_"), [(Middle, True), (ByName, True), (Again, False), (MovesActivations, False)])
def test_every_class_whose_call_runs_is_looked_at(kind: Any, open_: bool) -> None:
    plan = planned(net(kind(8, 8)), like(**SQUARE))
    assert bool(plan.questions) == open_
    assert said(plan)


def _turning(self: Any, x: Any) -> Any:
    return x @ self.weight


def _set(layer: Any, how: str) -> Any:
    old = layer.forward
    if how == "a method":
        layer.forward = types.MethodType(_turning, layer)
    elif how == "around it":
        layer.forward = lambda x: old(x) * 2
    elif how == "a hook":
        layer.register_forward_hook(lambda module, args, out: out * 2)
    elif how == "a hook before":
        layer.register_forward_pre_hook(lambda module, args: args)
    return layer


@pytest.mark.parametrize("how", ["a method", "around it", "a hook", "a hook before"])
def test_a_call_that_is_changed_on_the_module_is_stated(how: str) -> None:
    plan = planned(net(_set(torch.nn.Linear(8, 8), how)), like(**SQUARE))
    assert len(said(plan)) == 1
    assert plan.complete == (how != "a method")


def test_the_hooks_of_the_framework_are_no_override() -> None:
    for norm in (torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm):
        plan = planned(net(norm(torch.nn.Linear(8, 6))), like(kernel=(8, 6), bias=(6,)))
        assert plan.complete
        assert not said(plan)


def test_another_product_than_the_frameworks_is_stated() -> None:
    import jax
    from flax import nnx

    def turned(x: Any, kernel: Any, dims: Any, **_: Any) -> Any:
        return jax.lax.dot_general(x, kernel.T, dims)

    def doubled(*args: Any, **named: Any) -> Any:
        return 2 * jax.lax.dot_general(*args, **named)

    same = functools.partial(jax.lax.dot_general, precision="highest")
    for product, complete, texts in ((turned, False, 1), (doubled, True, 1), (same, True, 0)):
        target = nnx.Dict(lay=nnx.Linear(8, 8, rngs=nnx.Rngs(0), dot_general=product))
        source = torch.nn.ModuleDict({"lay": torch.nn.Linear(8, 8)})
        plan = gx.plan(source, target)
        assert (plan.complete, len(said(plan))) == (complete, texts), product


class SavesTurned(torch.nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t().contiguous()


def test_a_state_dict_of_other_tensors_than_the_module_holds_is_asked_about() -> None:
    source = {"lay/kernel": TensorSpec((8, 8), "float32"), "lay/bias": TensorSpec((8,), "float32")}
    flax = Checkpoint("flax", "flax", source)
    for kind, complete in ((SavesTurned, False), (torch.nn.Linear, True)):
        module = torch.nn.ModuleDict({"lay": kind(8, 8)})
        assert planned(flax, module).complete == complete
        assert planned(module, flax).complete == complete
