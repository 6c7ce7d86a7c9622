"""An nnx.Module holds what it was given and its code gets that value, or an error is raised and nothing has changed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import graftax as gx
from graftax.errors import PlanError


class Twice(nnx.Param):
    def get_value(self, **index: Any) -> Any:
        return super().get_value(**index) * 2


class Clipped(nnx.Param):
    def set_value(self, value: Any, **index: Any) -> Any:
        return super().set_value(jnp.clip(value, 0, 1.5), **index)


class Plain(nnx.Param):
    def get_value(self, **index: Any) -> Any:
        return super().get_value(**index)


class Two(nnx.Module):
    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


def held(net: Two) -> list[np.ndarray]:
    return [np.asarray(variable.get_raw_value()[...]) for variable in (net.a, net.b)]


GIVEN = {"a": np.full(3, 1, np.float32), "b": np.full(3, 2, np.float32)}


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nnx.Param(jnp.zeros(3)), ""),
        (lambda: nnx.Param(jnp.zeros(3), ref=True), ""),
        (lambda: Plain(jnp.zeros(3)), ""),
        (lambda: nnx.Param(jnp.zeros(3), on_get_value=lambda _, x: x, on_set_value=lambda _, x: x), ""),
        (
            lambda: nnx.Param(jnp.zeros(3), on_get_value=lambda _, x: x * 2),
            "b: the model reads another value than the stored one",
        ),
        (lambda: nnx.Param(jnp.zeros(3), on_set_value=lambda _, x: x * 2), "b: does not read back"),
        (lambda: Twice(jnp.zeros(3)), "b: the model reads another value than the stored one"),
        (lambda: Clipped(jnp.zeros(3)), "b: does not read back"),
    ],
)
def test_what_a_variable_shows_is_what_it_was_given(make: Any, words: str) -> None:
    net = Two(nnx.Param(jnp.zeros(3)), make())
    if not words:
        gx.load_into(net, {path: jnp.asarray(array) for path, array in GIVEN.items()})
        assert [net.a.get_value().tolist(), net.b.get_value().tolist()] == [[1] * 3, [2] * 3]
        return
    with pytest.raises(PlanError, match=words):
        gx.load_into(net, {path: jnp.asarray(array) for path, array in GIVEN.items()})
    assert not np.any(held(net))


def test_array_references_stay_the_same_objects() -> None:
    """A jitted function may hold them."""
    net = Two(nnx.Param(jnp.zeros(3), ref=True), nnx.Param(jnp.zeros(3)))
    ref = net.a.get_raw_value()
    gx.load_into(net, {path: jnp.asarray(array) for path, array in GIVEN.items()})
    assert net.a.get_raw_value() is ref
    assert np.array_equal(ref[...], GIVEN["a"])


def test_values_that_the_model_does_not_see_are_not_ported() -> None:
    net = Two(nnx.Param(jnp.ones(3)), Twice(jnp.ones(3)))
    like = {path: jnp.zeros(3) for path in GIVEN}
    with pytest.raises(PlanError, match="b: the model reads another value than the stored one"):
        gx.port(net, like)
    with pytest.raises(PlanError, match="b: the model reads another value than the stored one"):
        gx.port({path: jnp.asarray(array) for path, array in GIVEN.items()}, net)
    with pytest.raises(PlanError, match="b: the model reads another value than the stored one"):
        gx.port(nnx.state(net), like)
