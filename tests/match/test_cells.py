"""Linen's recurrent cells against NNX's: a dense layer a gate, or one for all gates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import graftax as gx

IN, HIDDEN = 5, 7


class Linen(nn.Module):
    cells: tuple[Any, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i, (cell, name) in enumerate(self.cells):
            x = x + nn.Dense(HIDDEN, name=f"skip{i}")(x) if i else x
            x = nn.RNN(cell(HIDDEN, name=name))(x)
        return nn.Dense(3, name="head")(x)


class Nnx(nnx.Module):
    def __init__(self, *cells: tuple[Any, str]) -> None:
        rngs = nnx.Rngs(0)
        self.names = tuple(name for _, name in cells)
        for i, (cell, name) in enumerate(cells):
            setattr(self, name, nnx.RNN(cell(HIDDEN if i else IN, HIDDEN, rngs=rngs), rngs=rngs))
            if i:
                setattr(self, f"skip{i}", nnx.Linear(HIDDEN, HIDDEN, rngs=rngs))
        self.head = nnx.Linear(HIDDEN, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for i, name in enumerate(self.names):
            x = x + getattr(self, f"skip{i}")(x) if i else x
            x = getattr(self, name)(x)
        return self.head(x)


def _inputs() -> Any:
    return jax.random.normal(jax.random.key(1), (2, 6, IN))


def _variables(model: Linen) -> Any:
    made = model.init(jax.random.key(0), _inputs())
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), made)


@pytest.mark.parametrize(("linen", "fused"), [(nn.OptimizedLSTMCell, nnx.OptimizedLSTMCell)])
def test_gates_apart_and_side_by_side(linen: Any, fused: Any) -> None:
    model, x = Linen(((linen, "lstm"),)), _inputs()
    variables, other = _variables(model), Nnx((fused, "lstm"))
    with jax.default_matmul_precision("highest"):
        there = gx.port(variables, other)
        np.testing.assert_allclose(there(x), model.apply(variables, x), rtol=1e-5, atol=1e-6)
        back = gx.port(other, variables)
        np.testing.assert_allclose(model.apply(back, x), other(x), rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(gx.port(there, variables)), jax.tree.leaves(variables), strict=True):
        assert (a == b).all()


def test_a_bias_that_the_other_cell_lacks_is_left_over() -> None:
    """nnx.GRUCell has no bias b_hn."""
    model = Linen(((nn.GRUCell, "gru"),))
    variables, x = _variables(model), _inputs()
    plan = gx.plan(variables, Nnx((nnx.GRUCell, "gru")))
    assert [question.sources for question in plan.questions] == [("params/gru/hn/bias",)]
    variables["params"]["gru"]["hn"]["bias"] = jnp.zeros(HIDDEN)
    with jax.default_matmul_precision("highest"):
        there = gx.port(variables, Nnx((nnx.GRUCell, "gru")), unused="drop")
        np.testing.assert_allclose(there(x), model.apply(variables, x), rtol=1e-5, atol=1e-6)


def test_cells_of_the_same_paths_are_no_question() -> None:
    """The second and the third have the same shapes."""
    cell, fused = nn.OptimizedLSTMCell, nnx.OptimizedLSTMCell
    model, x = Linen(((cell, "low"), (cell, "mid"), (cell, "top"))), _inputs()
    variables = _variables(model)
    with jax.default_matmul_precision("highest"):
        there = gx.port(variables, Nnx((fused, "low"), (fused, "mid"), (fused, "top")))
        np.testing.assert_allclose(there(x), model.apply(variables, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("back", [False, True], ids=["to nnx", "to linen"])
def test_cells_that_nothing_tells_apart_are_asked(back: bool) -> None:
    cell, fused = nn.OptimizedLSTMCell, nnx.OptimizedLSTMCell
    variables = _variables(Linen(((cell, "low"), (cell, "alpha"), (cell, "beta"))))
    other = Nnx((fused, "low"), (fused, "x"), (fused, "z"))
    source, like = (other, variables) if back else (variables, other)
    plan = gx.plan(source, like)
    assert not plan.complete
    asked = [question for question in plan.questions if question.candidates]
    assert len(asked) == 2
    for question in asked:
        assert len(question.candidates) == 2
        for candidate in question.candidates:
            answered = gx.plan(source, like, rules=f"rules = [{candidate.rule}]")
            assert not answered.failures, str(answered)
            assert answered.complete, str(answered)  # the other cell goes with what is left


@pytest.mark.parametrize("back", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_layers_of_torch_that_nothing_tells_apart_are_asked_with_lines_that_work(kind: str, back: bool) -> None:
    torch = pytest.importorskip("torch")
    cell = {"LSTM": nn.OptimizedLSTMCell, "GRU": nn.GRUCell}[kind]
    flax = _variables(Linen(((cell, "low"), (cell, "alpha"), (cell, "beta"))))
    del flax["params"]["low"]
    weights = {
        f"{name}.{key}": value
        for name in ("x", "z")
        for key, value in getattr(torch.nn, kind)(HIDDEN, HIDDEN).state_dict().items()
    } | {f"{a}.{b}": torch.zeros(s) for a, n in (("skip1", 7), ("skip2", 7), ("head", 3)) for b, s in
         (("weight", (n, 7)), ("bias", (n,)))}  # fmt: skip
    ends = (flax, weights) if back else (weights, flax)
    plan = gx.plan(*ends)
    asked = [question for question in plan.questions if question.candidates]
    assert not plan.complete
    assert len(asked) == 2
    for candidate in (candidate for question in asked for candidate in question.candidates):
        answered = gx.plan(*ends, rules=f"rules = [{candidate.rule}]")
        assert not answered.failures, str(answered)
        assert answered.complete, str(answered)


def test_two_directions_inside_of_nested_modules_are_one_layer() -> None:
    """The encoder and the tagger around it hold the same cells: they are no two candidates."""

    class Tagger(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            cells = (nnx.RNN(nnx.OptimizedLSTMCell(IN, HIDDEN, rngs=rngs)) for _ in range(2))
            self.encoder = nnx.Bidirectional(*cells)
            self.head = nnx.Linear(2 * HIDDEN, 3, rngs=rngs)

    torch = pytest.importorskip("torch")
    sides = torch.nn.ModuleDict(
        {"lstm": torch.nn.LSTM(IN, HIDDEN, bidirectional=True), "head": torch.nn.Linear(2 * HIDDEN, 3)}
    )
    found = gx.plan(sides.state_dict(), nnx.eval_shape(lambda: Tagger(nnx.Rngs(0))))
    assert not any("which cells" in question.text for question in found.questions)
    assert {"encoder/forward_rnn/cell/dense_i/kernel", "encoder/backward_rnn/cell/dense_h/kernel"} <= {
        target for entry in found.entries for target in entry.targets
    }
