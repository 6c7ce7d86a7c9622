"""Weight norm and spectral norm beside other layers: folded into a plain layer, kept by a wrapper, or refused; a part
of a weight is never taken for the weight."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import graftax as gx
from graftax.errors import PlanError
from graftax.execute.opening import open_tree
from graftax.match.unmerged import normed_parts

NEW = "parametrizations.weight.original0", "parametrizations.weight.original1"
OLD = "weight_g", "weight_v"


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("float32")


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "float32")


def torch_side(names: tuple[str, str]) -> dict[str, np.ndarray]:
    g, v = names
    return {
        f"conv.{g}": drawn(6, 1, 1),
        f"conv.{v}": drawn(6, 4, 3),
        "conv.bias": drawn(6),
        "head.weight": drawn(5, 6),
        "head.bias": drawn(5),
    }


def head() -> dict:
    return {"kernel": leaf(6, 5), "bias": leaf(5)}


@pytest.mark.parametrize("names", [NEW, OLD], ids=["new keys", "old keys"])
@pytest.mark.parametrize("name", ["conv", "c"])
def test_weight_norm_is_folded_into_a_plain_layer(names: tuple[str, str], name: str) -> None:
    source = torch_side(names)
    like = {"params": {name: {"kernel": leaf(3, 4, 6), "bias": leaf(6)}, "head": head()}}
    plan = gx.plan(source, like, to="flax")
    assert plan.complete, plan
    g, v = (source[f"conv.{n}"].astype("float64") for n in names)
    want = (g * v / np.sqrt((v**2).sum((1, 2), keepdims=True))).transpose(2, 1, 0)
    np.testing.assert_allclose(plan.run(source)["params"][name]["kernel"], want, rtol=1e-6)


@pytest.mark.parametrize("names", [NEW, OLD], ids=["new keys", "old keys"])
def test_weight_norm_is_kept_by_a_wrapper_beside_the_layer(names: tuple[str, str]) -> None:
    source = torch_side(names)
    params = {"conv": {"kernel": leaf(3, 4, 6), "bias": leaf(6)}, "wn": {"conv/kernel/scale": leaf(6)}, "head": head()}
    plan = gx.plan(source, {"params": params}, to="flax")
    assert plan.complete, plan
    made = plan.run(source)["params"]
    assert np.array_equal(made["wn"]["conv/kernel/scale"], source[f"conv.{names[0]}"].ravel())
    assert np.array_equal(made["conv"]["kernel"], source[f"conv.{names[1]}"].transpose(2, 1, 0))


@pytest.mark.parametrize("names", [NEW, OLD], ids=["new keys", "old keys"])
def test_a_normed_square_kernel_that_may_be_a_transposed_one_is_refused(names: tuple[str, str]) -> None:
    source = {f"up.{names[0]}": drawn(8, 1, 1), f"up.{names[1]}": drawn(8, 8, 3), "head.weight": drawn(5, 8)}
    like = {"params": {"up": {"kernel": leaf(3, 8, 8)}, "head": {"kernel": leaf(8, 5)}}}
    plan = gx.plan(source, like, to="flax", unused="drop")
    assert ["transposed" in failure.what for failure in plan.failures] == [True], plan
    source = {name.replace("up.", "conv."): array for name, array in source.items()}
    like["params"]["conv"] = like["params"].pop("up")
    assert gx.plan(source, like, to="flax").complete


def test_a_part_of_a_spectral_norm_is_no_weight() -> None:
    """Whatever is answered, a plain layer never gets the weight without its factor."""
    source = {
        "conv.weight_orig": drawn(6, 4, 3, 3),
        "conv.weight_u": drawn(6),
        "conv.weight_v": drawn(36),
        "conv.bias": drawn(6) + 1,
        "head.weight": drawn(5, 6),
        "head.bias": drawn(5),
    }
    like = {"params": {"conv": {"kernel": leaf(3, 3, 4, 6), "bias": leaf(6)}, "head": head()}}
    with pytest.raises(PlanError, match="spectrally normed"):
        gx.plan(source, like, to="flax", unused="drop")


def test_a_gate_beside_a_value_is_no_weight_norm() -> None:
    """Two matrices may have the names of the parts of a weight norm, as in a gated attention."""
    assert normed_parts(open_tree({"att.w_g": drawn(6, 4), "att.w_v": drawn(6, 4)})) == set()
    normed = {"rnn.weight_ih_l0_g": drawn(6, 1), "rnn.weight_ih_l0_v": drawn(6, 4)}
    assert normed_parts(open_tree(normed)) == normed.keys()


def test_a_part_of_a_weight_norm_is_no_weight() -> None:
    """Two layers of one shape, and names that do not tell: what is offered never takes v without g."""
    source = {f"{name}.{part}": drawn(*shape) for name in "ab" for part, shape in ((OLD[0], (6, 1)), (OLD[1], (6, 4)))}
    like = {"params": {name: {"kernel": leaf(4, 6)} for name in ("x", "y")}}
    plan = gx.plan(source, like, to="flax", unused="drop")
    assert not plan.complete
    assert not any(question.candidates for question in plan.questions), plan
