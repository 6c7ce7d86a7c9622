"""Trees of classes that jax knows: their leaves have the names of their fields, and they come back as they were."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import graftax as gx
from graftax.adapters import live_leaves, optimizer_paths
from graftax.errors import PlanError, UsageError
from graftax.execute.opening import open_tree
from graftax.report.inspecting import inspection, inspection_text
from graftax.surgery import select


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: Any
    bias: Any
    name: str = dataclasses.field(default="linear", metadata={"static": True})


@flax.struct.dataclass
class Struct:
    fc1: Any
    fc2: Any
    act: Any = flax.struct.field(pytree_node=False, default=jax.nn.relu)


class Pair(NamedTuple):
    fc1: Any
    fc2: Any


@jax.tree_util.register_pytree_with_keys_class
class Keyed:
    """As equinox keeps a module: every field is a child, also those that are no arrays."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        self.act = fields["act"]

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey(name), value) for name, value in self.fields.items()], tuple(self.fields)

    @classmethod
    def tree_unflatten(cls, names: Any, children: Any) -> Keyed:
        return cls(**dict(zip(names, children, strict=True)))

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["fields"][name]


@jax.tree_util.register_pytree_node_class
class Nameless:
    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten(self) -> Any:
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Nameless:
        return cls(*children)


def dense(i: int, o: int) -> dict[str, Any]:
    return {"kernel": jnp.zeros((i, o)), "bias": jnp.zeros(o)}


TREES = {
    "dataclasses": lambda: Struct(Linear(jnp.zeros((4, 3)), jnp.zeros(4)), Linear(jnp.zeros((2, 4)), jnp.zeros(2))),
    "flax.struct": lambda: Struct(dense(3, 4), dense(4, 2)),
    "named tuple": lambda: Pair(dense(3, 4), dense(4, 2)),
    "beside what is no array": lambda: Keyed(
        fc1=dense(3, 4), act=jax.nn.relu, depth=3, rate=0.5, none=None, fc2=dense(4, 2)
    ),
    "in a dict": lambda: {"fc1": dense(3, 4), "fc2": Linear(jnp.zeros((2, 4)), jnp.zeros(2), "second")},
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_filled_and_comes_back_as_its_classes(name: str) -> None:
    like, rng = TREES[name](), np.random.default_rng(0)
    source = {f"fc{i}.weight": rng.normal(size=s).astype("float32") for i, s in ((1, (4, 3)), (2, (2, 4)))}
    source |= {f"fc{i}.bias": rng.normal(size=n).astype("float32") for i, n in ((1, 4), (2, 2))}
    out = gx.port(source, like)
    assert jax.tree.structure(out) == jax.tree.structure(like)
    for path, leaf in live_leaves(out).items():
        layer, role = path.split("/")
        given = source[f"{layer}.{'bias' if role == 'bias' else 'weight'}"]
        np.testing.assert_array_equal(leaf, given.T if role == "kernel" else given)
    back = gx.port(out, {key: np.zeros_like(value) for key, value in source.items()}, to="torch")
    assert all(np.array_equal(back[key], value) for key, value in source.items())


@pytest.mark.parametrize("name", TREES)
def test_replace_leaves_every_other_leaf_the_same_object(name: str) -> None:
    tree = TREES[name]()
    path = next(path for path in live_leaves(tree) if path.startswith("fc2/") and not path.endswith("bias"))
    out = gx.replace(tree, path, gx.constant(1.0), expect=1)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    before, after = live_leaves(tree), live_leaves(out)
    assert list(before) == list(after)
    assert [key for key in before if after[key] is not before[key]] == [path]
    assert np.all(after[path] == 1)


def test_what_is_no_array_stays() -> None:
    tree = TREES["beside what is no array"]()
    out = gx.replace(tree, "**/bias", gx.constant(1.0), expect=2)
    assert (out.act, out.depth, out.rate, out.none) == (jax.nn.relu, 3, 0.5, None)


def test_a_square_weight_of_an_unknown_class_is_asked_about() -> None:
    tree = Struct(Linear(jnp.zeros((4, 4)), jnp.zeros(4)), None)
    plan = gx.plan({"fc1.weight": np.ones((4, 4), "float32"), "fc1.bias": np.ones(4, "float32")}, tree)
    assert [question.targets for question in plan.questions] == [("fc1/weight",)]


def test_children_without_names_are_counted() -> None:
    tree = Nameless(jnp.zeros(2), {"w": jnp.zeros(3)})
    assert list(open_tree(tree)) == ["0", "1/w"]
    out = gx.replace(tree, "1/w", gx.constant(1.0))
    assert isinstance(out, Nameless)
    assert out.children[0] is tree.children[0]


def test_an_abstract_tree_of_classes() -> None:
    like = jax.eval_shape(TREES["flax.struct"])
    assert not open_tree(like).has_values
    assert isinstance(gx.port({"fc1": dense(3, 4), "fc2": dense(4, 2)}, like), Struct)


@pytest.mark.parametrize("thing", [Struct(1.0, None), jax.tree_util.Partial(len), object()])
def test_a_class_without_arrays_is_refused(thing: Any) -> None:
    with pytest.raises(UsageError, match="is not a tree of weights"):
        open_tree(thing)


# ---------------------------------------------------------------- what an optimizer keeps

TX = {
    "adam": (lambda: optax.adam(1.0), 5),
    "chain": (lambda: optax.chain(optax.clip(1.0), optax.adamw(1.0)), 5),
    "momentum": (lambda: optax.sgd(1.0, 0.9), 2),
    "several": (lambda: optax.multi_transform({"a": optax.adam(1.0)}, "a"), 5),
    "steps": (lambda: optax.MultiSteps(optax.adam(1.0), 4), 9),
    "hyperparameters": (lambda: optax.inject_hyperparams(optax.adam)(1.0), 11),
}


def train_state(tx: Any, params: Any = None) -> TrainState:
    params = params or {"Dense_0": dense(3, 4)}
    return TrainState.create(apply_fn=nn.Dense(4).apply, params=params, tx=tx)


@pytest.mark.parametrize("name", TX)
def test_an_optimizer_is_reached_by_a_part_of_its_own_only(name: str) -> None:
    make, count = TX[name]
    state = train_state(make())
    assert len(optimizer_paths(state)) == count
    assert list(open_tree(state)) == ["params/Dense_0/kernel", "params/Dense_0/bias"]
    assert select(state, "**/kernel") == ["params/Dense_0/kernel"]
    assert select(state, "**") == ["params/Dense_0/kernel", "params/Dense_0/bias"]
    assert select(state, "Dense_0/kernel") == ["params/Dense_0/kernel"]
    assert select(state, lambda path, leaf: leaf.ndim == 2) == ["params/Dense_0/kernel"]
    moment = "trace" if name == "momentum" else "mu"
    (path,) = select(state, f"**/{moment}/**/kernel")
    assert select(state, path) == select(state, lambda p, _: p == path) == [path]
    assert set(select(state, "opt_state/**")) == set(optimizer_paths(state))
    out = gx.replace(state, path, gx.constant(2.0), expect=1)
    assert jax.tree.structure(out) == jax.tree.structure(state)
    before, after = live_leaves(state), live_leaves(out)
    assert [key for key in before if after[key] is not before[key]] == [path]
    assert np.all(after[path] == 2)


def test_a_layer_called_mu_is_a_weight() -> None:
    """A VAE's: `**/mu/kernel` means the layer, not the moments of every layer, nor its own."""
    state = train_state(optax.adam(1.0), {"mu": dense(3, 4), "fc": dense(4, 2)})
    assert select(state, "**/mu/kernel") == ["params/mu/kernel"]
    assert select(state, "opt_state/0/mu/mu/kernel") == ["opt_state/0/mu/mu/kernel"]
    assert select(state, "**/nu/mu/*") == ["opt_state/0/nu/mu/bias", "opt_state/0/nu/mu/kernel"]


def test_a_train_state_is_filled_and_read_by_its_weights() -> None:
    state = train_state(optax.adam(1.0))
    source = {"Dense_0.weight": np.arange(12.0, dtype="float32").reshape(4, 3), "Dense_0.bias": np.ones(4, "float32")}
    out = gx.port(source, state)
    assert isinstance(out, TrainState)
    np.testing.assert_array_equal(out.params["Dense_0"]["kernel"], source["Dense_0.weight"].T)
    assert out.opt_state[0].mu["Dense_0"]["kernel"] is state.opt_state[0].mu["Dense_0"]["kernel"]
    assert (out.apply_fn, out.step) == (state.apply_fn, 0)
    back = gx.port(out, {key: np.zeros_like(value) for key, value in source.items()})
    assert all(np.array_equal(back[key], value) for key, value in source.items())
    assert "beside the weights, not read: opt_state" in inspection_text(inspection(open_tree(state)))


@pytest.mark.parametrize("as_state", [False, True])
def test_an_nnx_optimizer_opens_by_name(as_state: bool) -> None:
    optimizer = nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.adam(1.0), wrt=nnx.Param)
    tree = nnx.state(optimizer) if as_state else optimizer
    assert not open_tree(tree)
    out = gx.replace(tree, "**/mu/kernel", gx.constant(1.0), expect=1)
    state = out if as_state else nnx.state(out)
    assert np.all(state["opt_state"][0]["mu"]["kernel"].get_raw_value() == 1)
    before, after = live_leaves(tree), live_leaves(out)
    assert [path for path in before if after[path] is not before[path]] == ["opt_state/0/mu/kernel"]
    assert set(select(tree, nnx.optimizer.OptState)) == set(before)
    assert select(tree, nnx.PathContains("nu")) == ["opt_state/0/nu/bias", "opt_state/0/nu/kernel"]
    for selector in ("**", "**/kernel", ..., nnx.Param, nnx.Variable):
        with pytest.raises(PlanError):
            select(tree, selector)
    with pytest.raises(PlanError, match=r"Name a part of it, as in 'opt_state/\*\*'"):
        select(tree, "**/kernel")


def test_a_module_beside_its_optimizer() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    both = nnx.ModelAndOptimizer(model, optax.adam(1.0), wrt=nnx.Param)
    assert list(open_tree(both)) == ["model/bias", "model/kernel"]
    assert open_tree(both).storage.metadata.keys() == {"opt_state", "step"}
    assert select(both, "**/kernel") == ["model/kernel"]
    gx.load_into(both, {"model": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
    assert np.all(model.kernel.get_value() == 1)
    assert not np.any(both.opt_state[0].mu["kernel"].get_value())


def test_moments_of_a_users_own_optimizer() -> None:
    class Moments(NamedTuple):
        mu: Any
        nu: Any

    tree = {"params": {"fc": dense(3, 4)}, "opt": (Moments({"fc": dense(3, 4)}, {"fc": dense(3, 4)}),)}
    assert list(open_tree(tree)) == ["params/fc/kernel", "params/fc/bias"]
    assert select(tree, "**/kernel") == ["params/fc/kernel"]
    assert select(tree, "**/mu/fc/kernel") == ["opt/0/mu/fc/kernel"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class OwnAdam:
    params: Any
    m: Any
    v: Any
    step: Any


class OwnMoments(NamedTuple):
    count: Any
    m: Any
    v: Any


def two() -> dict[str, Any]:
    return {"fc1": dense(3, 4), "fc2": dense(4, 2)}


COUNT = np.int32(0)
RUNS = {
    "fields of a dataclass": lambda: OwnAdam(two(), two(), two(), 0),
    "their counter an array": lambda: OwnAdam(two(), two(), two(), jnp.int32(0)),
    "a named tuple beside": lambda: (two(), OwnMoments(COUNT, two(), two())),
    "keys of a dict": lambda: {"params": two(), "mu": two(), "nu": two(), "count": COUNT},
    "a dict of moments": lambda: {"params": two(), "opt": {"m": two(), "v": two(), "t": COUNT}},
    "a field of a dataclass": lambda: Struct({"params": two(), "opt_state": optax.adam(1.0).init(two())}, None),
    "a chain beside": lambda: [two(), optax.chain(optax.clip(1.0), optax.adamw(1.0)).init(two())],
}


@pytest.mark.parametrize("name", RUNS)
def test_moments_are_reached_by_name_only(name: str) -> None:
    tree = RUNS[name]()
    weights = select(tree, "**/kernel")
    assert [path.split("/")[-2:] for path in weights] == [["fc1", "kernel"], ["fc2", "kernel"]]
    out = gx.replace(tree, "**/kernel", gx.constant(1.0), expect=2)
    before, after = live_leaves(tree), live_leaves(out)
    assert [path for path in before if after[path] is not before[path]] == weights
    first = next(path for path in before if path.endswith("fc1/kernel") and path not in weights)
    moment = first.split("/")[-3]
    assert first in select(tree, f"**/{moment}/**")


@pytest.mark.parametrize(
    "tree",
    [
        {"params": {name: dense(4, 4) for name in "qkvm"}},
        {name: dense(4, 4) for name in "qkvm"},
        {"params": {"mu": dense(3, 4), "nu": dense(3, 4), "count": np.ones(1, np.float32)}},
        {"model": dense(4, 4), "m": dense(4, 4), "v": dense(4, 4), "steps": np.ones((4, 4), np.float32)},
        OwnAdam(dense(4, 4), dense(4, 4), dense(4, 2), 0),
    ],
    ids=["qkvm of params", "qkvm", "layers mu and nu", "no counter", "another structure"],
)
def test_layers_that_are_called_as_moments_are_weights(tree: Any) -> None:
    if isinstance(tree, OwnAdam):
        del tree.v["bias"]
    assert len(select(tree, "**")) == len(live_leaves(tree))


def test_parameters_of_lookahead_are_weights() -> None:
    params = optax.LookaheadParams.init_synced(two())
    assert select(params, "**/fc1/kernel") == ["fast/fc1/kernel", "slow/fc1/kernel"]
