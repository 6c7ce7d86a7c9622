"""A part of a model: the bits it has inside, alone; every kind of module; what cannot be taken out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx, struct
from flax.core import freeze

import graftax as gx
from graftax.errors import PlanError, ReplayError, UsageError

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


def same(one: Any, other: Any) -> bool:
    """Two nests of arrays, bit for bit."""
    a, b = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(map(jnp.asarray, a), map(jnp.asarray, b), strict=True)
    )


def applied(part: gx.Part, weights: Any = None) -> Any:
    """What the part gives alone, called by hand."""
    args, kwargs = part.inputs
    like = part.like
    return like.module.apply(part.weights if weights is None else weights, *args, method=like.method, **kwargs)


def made(model: Any, *args: Any) -> Any:
    """Variables of a Linen model, without running its init."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype), shapes)


# ---------------------------------------------------------------- Linen


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, scale: Any = 1.0) -> Any:
        return nn.Dense(4, name="out")(nn.gelu(nn.Dense(5, name="in")(nn.LayerNorm(name="norm")(x)))) * scale


class Block(nn.Module):
    """The body of a scan."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x + Mlp(name="mlp")(x), None


class Coder(nn.Module):
    """Modules made in setup, called through two methods, one of them on no path through `__call__`."""

    def setup(self) -> None:
        self.enter = nn.Dense(4)
        self.steps = [nn.Dense(4) for _ in range(2)]

    def encode(self, x: Any, *, scale: float = 1.0) -> Any:
        return self.enter(x) * scale

    def decode(self, x: Any) -> Any:
        return self.steps[1](nn.tanh(self.steps[0](x)))

    def __call__(self, x: Any) -> Any:
        return self.decode(self.encode(x))


class Holder(nn.Module):
    """Calls a module of its parent."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return self.inner(x) + nn.Dense(4)(x)


class Given(nn.Module):
    @nn.compact
    def __call__(self, x: Any, other: nn.Module) -> Any:
        return other(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        shared = nn.Dense(4, name="shared")
        x = shared(nn.tanh(shared(x)))
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        x = Mlp(name="mlp")(x, scale=jnp.float32(0.5))
        coder = Coder(name="coder")
        x = coder.decode(x) + coder.encode(x, scale=2.0)
        x = nn.remat(nn.Dense)(4, name="remat")(x)
        x = nn.Dropout(0.5, deterministic=not train, name="drop")(x)
        x = nn.Sequential([nn.Dense(4, name="s0"), nn.tanh], name="seq")(x)
        x = Holder(shared, name="holder")(x)
        x = Given(name="given")(x, shared)
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, mask=nn.make_causal_mask(x[..., 0]))


@pytest.fixture(scope="module")
def net() -> tuple[Any, Any]:
    model = Net()
    return gx.linen(model, X), made(model, X)


REFUSED = {"seq": "beside it.*s0", "holder": "beside it.*shared", "given": "takes a module"}


def test_every_module_of_a_model_has_alone_the_output_that_it_has_inside(net: Any):
    like, variables = net
    heard: dict[str, list[Any]] = {}

    def listen(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = proceed(*args, **kwargs)
        called = hasattr(type(context.module), context.method_name) and context.method_name != "setup"
        if called and context.module.scope is not None:
            heard.setdefault("/".join(context.module.path), []).append(out)
        return out

    with nn.intercept_methods(listen):
        like.module.apply(variables, X)
    assert {"shared", "coder", "coder/steps_1", "attention/query", "drop", "mlp/norm", "bn", ""} <= heard.keys()
    for path, outputs in heard.items():
        for call, output in enumerate(outputs):
            if path in REFUSED:
                with pytest.raises(ReplayError, match=f"{path} cannot be taken out of the model.*{REFUSED[path]}"):
                    gx.part(like, variables, path, call=call)
                continue
            part = gx.part(like, variables, path, call=call)
            if not path.startswith("remat"):  # its inside is traced: there is nothing to compare with by hand
                assert same(part.output, output), path
            assert same(applied(part), part.output), path


def test_a_part_names_its_weights_from_its_own_top_and_keeps_the_leaves(net: Any):
    like, variables = net
    part = gx.part(like, variables, "params/mlp")
    mine = variables["params"]["mlp"]
    assert part.weights["params"]["in"]["kernel"] is mine["in"]["kernel"]
    assert jax.tree.structure(part.weights) == jax.tree.structure({"params": mine})
    assert part.inputs[1].keys() == {"scale"}
    assert repr(part) == "Part(Mlp: float32[2, 3, 4], float32[] -> float32[2, 3, 4])"


def test_a_part_of_a_part(net: Any):
    like, variables = net
    whole = gx.part(like, variables, "mlp")
    inner = gx.part(whole.like, whole.weights, "norm")
    assert same(inner.output, gx.part(like, variables, "mlp/norm").output)
    again = gx.part(inner.like, inner.weights, "", inputs=inner.inputs)
    assert same(again.output, inner.output)


def test_a_part_called_through_a_method_holds_what_that_method_uses(net: Any):
    like, variables = net
    decode, encode = (gx.part(like, variables, "coder", call=call) for call in (0, 1))
    assert (decode.like.method, encode.like.method) == ("decode", "encode")
    assert decode.weights["params"].keys() == {"steps_0", "steps_1"}
    assert encode.weights["params"].keys() == {"enter"}
    assert encode.inputs[1] == {"scale": 2.0}


def test_replace_port_compare_and_parity_work_on_a_part(net: Any):
    like, variables = net
    part = gx.part(like, variables, "mlp/out")
    known = np.eye(5, 4, dtype=np.float32)
    good = gx.replace(part.weights, "kernel", known, expect=1)
    assert same(
        applied(part, good),
        nn.Dense(4).apply({"params": {"kernel": known, "bias": good["params"]["bias"]}}, *part.inputs[0]),
    )
    study = gx.compare(part.weights, good, like=part.like)
    assert not study.equal
    assert gx.compare(part.weights, part.weights, like=part.like).equal
    linear = torch.nn.Linear(5, 4)
    ported = gx.port(linear, part.like)
    assert gx.check_parity(linear, part.like, part.inputs, weights=ported)
    assert not gx.check_parity(linear, part.like, part.inputs, weights=part.weights, causes=False)


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = torch.nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.enter(x) * 2.0


def test_flags_that_torch_does_not_take_are_flaxs_alone(net: Any):
    like, variables = net
    part = gx.part(like, variables, "coder", call=1)
    module = Scaled()
    assert gx.check_parity(module, part.like, part.inputs, weights=gx.port(module, part.like))


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4, name="first")(x)
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 1}, split_rngs={"params": True}, length=4, reverse=True
        )
        return layers(name="layers")(x, None)[0]


class Loops(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.RNN(nn.SimpleCell(4, name="cell"), name="rnn")(x)
        axes: Any = {"in_axes": None, "out_axes": 0, "variable_axes": {"params": 0}, "axis_size": 2}
        members = nn.vmap(nn.Dense, split_rngs={"params": True}, **axes)
        return members(4, name="members")(x).sum(0)


def test_index_is_the_iteration_of_a_scan():
    model = Stack()
    variables = made(model, X)
    like = gx.linen(model, X)
    x = nn.Dense(4).apply({"params": variables["params"]["first"]}, X)
    for index in reversed(range(1, 4)):
        own = {"params": jax.tree.map(lambda leaf, i=index: leaf[:, i], variables["params"]["layers"])}
        if index == 1:
            part = gx.part(like, variables, "layers", index=index)
            assert same(part.weights, own)
            np.testing.assert_allclose(np.asarray(part.inputs[0][0]), np.asarray(x), rtol=1e-5, atol=1e-6)
            assert same(applied(part), part.output)
            inner = gx.part(like, variables, "layers/mlp", index=index)
            assert same(applied(inner), inner.output)
            assert same(inner.inputs[0], part.inputs[0][:1])
        x = Block().apply(own, x, None)[0]  # pyright: ignore
    for path, index, what in [
        ("layers", None, "layers stands in a scan of 4"),
        ("layers/mlp", 4, r"index=4 is out of range.*\n.*0 to 3"),
        ("layers/mlp", (1, 1), "layers/mlp stands in a scan of 4"),
        ("layers", -1, "counts from 0"),
        ("layers", 1.0, "whole number"),
        ("first", 0, "first stands in no scan"),
    ]:
        with pytest.raises(UsageError, match=what):
            gx.part(like, variables, path, index=index)


def test_loops_of_steps_and_members():
    model = Loops()
    variables = made(model, X)
    like = gx.linen(model, X)
    first, second = (gx.part(like, variables, "cell", index=index) for index in (0, 1))
    assert same(second.inputs[0][0], first.output[0])
    assert not np.any(first.inputs[0][0])
    assert same(applied(second), second.output)
    member = gx.part(like, variables, "members", index=1)
    assert same(member.weights["params"], jax.tree.map(lambda leaf: leaf[1], variables["params"]["members"]))
    np.testing.assert_allclose(applied(member), member.output, rtol=1e-5, atol=1e-6)
    for index, what in [(None, "members stands in a vmap of 2"), (2, "out of range")]:
        with pytest.raises(UsageError, match=what):
            gx.part(like, variables, "members", index=index)
    with pytest.raises(ReplayError, match=r"rnn cannot be taken out.*RNN.*beside it.*cell"):
        gx.part(like, variables, "rnn")


@struct.dataclass
class Pair:
    x: Any
    weights: Any


class Inner(nn.Module):
    """Takes what is no array: a dataclass, a random key, a dict that its caller changes later."""

    @nn.compact
    def __call__(self, pair: Pair, notes: dict[str, Any], *, key: Any) -> Any:
        noise = jax.random.uniform(key, (4,), self.dtype_of(pair))
        return Pair(nn.Dense(4, dtype=jnp.bfloat16)(pair.x * pair.weights) + noise, notes["shift"])

    def dtype_of(self, pair: Pair) -> Any:
        return pair.x.dtype


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        notes = {"shift": x + 1}
        weak = jnp.broadcast_to(jnp.asarray(2.0), (4,))
        out = nn.remat(Inner)(name="inner")(Pair(x.astype(jnp.bfloat16), weak), notes, key=jax.random.key(3))
        out = Inner(name="again")(out.replace(weights=weak), notes, key=jax.random.key(4))
        notes["shift"] = None
        last = nn.Dense(4, name="last")
        y = nn.cond(x.sum() > 0, lambda module, x: last(x), lambda module, x: last(-x), self, out.x)
        return y.astype(x.dtype), None


def test_arguments_of_every_kind_arrive_as_they_are():
    scanned = nn.scan(Outer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    model = scanned()
    variables = made(model, X, None)
    like = gx.linen(model, X, None)
    for path in ("inner", "again"):
        part = gx.part(like, freeze(variables), path, index=1)
        (pair, notes), kwargs = part.inputs
        assert isinstance(pair, Pair)
        assert isinstance(part.output, Pair)
        assert (pair.x.dtype, pair.weights.weak_type, notes["shift"].shape) == (jnp.bfloat16, True, X.shape)
        assert same(
            jax.random.key_data(kwargs["key"]), jax.random.key_data(jax.random.key(3 if path == "inner" else 4))
        )
        assert same(applied(part), part.output)
    with pytest.raises(ReplayError, match=r"last cannot be taken out.*in a branch of a condition"):
        gx.part(like, variables, "last", index=1)


def test_wrong_paths_and_calls_say_what_there_is(net: Any):
    like, variables = net
    with pytest.raises(PlanError, match=r"no module attention/quer\nNearest: attention/query"):
        gx.part(like, variables, "attention/quer")
    with pytest.raises(PlanError, match=r"params/mlp/in/kernel is a leaf.*\n.*'mlp/in'"):
        gx.part(like, variables, "params/mlp/in/kernel")
    with pytest.raises(UsageError, match=r"call=2 is out of range: shared is called 2 times|shared is called"):
        gx.part(like, variables, "shared", call=9)
    only = gx.linen(like.module.clone(), jax.ShapeDtypeStruct(X.shape, X.dtype))
    with pytest.raises(UsageError, match="has only the shape of argument 0"):
        gx.part(only, variables, "mlp")
    assert same(gx.part(only, variables, "mlp", inputs=X).output, gx.part(like, variables, "mlp").output)
    with pytest.raises(UsageError, match="weights"):
        gx.part(like, None, "mlp")


def test_modules_that_the_inputs_do_not_reach_and_weights_that_do_not_fit():
    model = Coder()
    variables = made(model, X)
    like = gx.linen(model, X, method="encode")
    assert same(gx.part(like, variables, "enter").output, gx.part(gx.linen(model, X), variables, "enter").output)
    with pytest.raises(PlanError, match="steps_0 holds weights, but the inputs never reach"):
        gx.part(like, variables, "steps_0")
    with pytest.raises(PlanError):
        gx.part(like, {"params": {"other": {"kernel": X}}}, "enter")


class Placed(nn.Module):
    """Its output depends on its place in the model."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4, name="fc")(x) * len(self.path)


class Places(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Placed(name="placed")(x)


def test_a_module_that_gives_another_output_alone_is_refused():
    variables = made(Places(), X)
    like = gx.linen(Places(), X)
    assert same(gx.part(like, variables, "placed/fc").inputs, ((X,), {}))
    with pytest.raises(ReplayError, match=r"placed cannot be taken out.*another output \(relative L2 1\)"):
        gx.part(like, variables, "placed")


def test_random_numbers(net: Any):
    like, variables = net
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    training = gx.linen(like.module, X, train=True, rngs=keys)
    assert gx.part(training, variables, "bn").weights.keys() == {"params", "batch_stats"}
    with pytest.raises(ReplayError, match=r"drop cannot be taken out.*draws random numbers"):
        gx.part(training, variables, "drop")


# ---------------------------------------------------------------- NNX


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.drop(nnx.gelu(self.fc(self.norm(x))))

    def encode(self, x: Any, scale: float = 1.0) -> Any:
        return self.fc(x) * scale


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        make = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock))
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.layers = make(rngs)
        self.members = make(rngs)
        self.blocks = nnx.List([NnxBlock(rngs), NnxBlock(rngs)])
        self.again = self.first

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, reverse=True)
        @nnx.remat
        def loop(x: Any, layer: NnxBlock) -> Any:
            return layer(x)

        @nnx.vmap(in_axes=(None, 0), out_axes=0)
        def each(x: Any, layer: NnxBlock) -> Any:
            return layer(x)

        x = loop(self.bn(self.first(x)), self.layers)  # pyright: ignore
        x = each(x, self.members).mean(0)
        for block in self.blocks:
            x = block(x)
        return self.again(x) + self.blocks[0].encode(x, scale=2.0)


@pytest.fixture(scope="module")
def nnx_net() -> NnxNet:
    return NnxNet(nnx.Rngs(0))


def outputs_of(module: Any, x: Any) -> Iterator[tuple[str, Any]]:
    """The eager path through NnxNet outside its loops, by hand."""
    first = module.first(x)
    yield "first", first
    yield "bn", module.bn(first)


def test_parts_of_an_nnx_module(nnx_net: NnxNet):
    nnx_net.eval()
    for path, output in outputs_of(nnx.clone(nnx_net), jnp.asarray(X)):
        assert same(gx.part(nnx_net, None, path, inputs=X).output, output)
    state = nnx.state(nnx_net)
    for path, index in [("layers/norm", 2), ("members", 1), ("blocks/1/fc", None)]:
        part = gx.part(nnx_net, nnx_net, path, inputs=X, index=index)
        args, kwargs = part.inputs
        assert isinstance(part.like, nnx.Module)
        alone = part.like(*args, **kwargs)
        if path != "members":
            assert same(alone, part.output), path
        np.testing.assert_allclose(alone, part.output, rtol=1e-5, atol=1e-6)
    stacked = gx.part(nnx_net, state, "layers", inputs=X, index=1)
    assert same(stacked.weights["fc"]["kernel"].get_value(), nnx_net.layers.fc.kernel.get_value()[1])
    inner = gx.part(stacked.like, None, "fc", inputs=stacked.inputs)
    assert same(inner.output, stacked.like.fc(*inner.inputs[0]))
    linear = torch.nn.Linear(4, 4)
    assert gx.check_parity(linear, inner.like, inner.inputs, weights=gx.port(linear, inner.like))


def test_the_scan_of_an_nnx_module_runs_from_the_index_that_it_runs_from(nnx_net: NnxNet):
    nnx_net.eval()
    last, middle = (gx.part(nnx_net, None, "layers", inputs=X, index=index) for index in (2, 1))
    assert same(last.output, middle.inputs[0][0])  # it is a reverse scan


def test_shared_nnx_modules_methods_and_train_mode(nnx_net: NnxNet):
    nnx_net.eval()
    again = gx.part(nnx_net, None, "again", inputs=X, call=1)
    assert same(again.like(*again.inputs[0]), again.output)
    method = gx.part(nnx_net, None, "blocks/0", inputs=X, call=1)
    assert isinstance(method.inputs, gx.Inputs)
    args, kwargs = method.inputs.both
    assert same(method.like.encode(*args, **kwargs), method.output)
    torch_side = gx.Inputs(torch=(args, {}), flax=(args, kwargs), flax_call=method.inputs.flax_call)
    module = Scaled()
    rules = [{"torch": "enter.weight", "flax": "fc/kernel"}, {"torch": "enter.bias", "flax": "fc/bias"}]
    ported = gx.port(module, method.like, rules=rules, missing="keep", inputs=False)
    assert gx.check_parity(module, method.like, torch_side, weights=ported, rules=rules, layers=False)
    nnx_net.train()
    before = nnx.state(nnx_net)
    drop = gx.part(nnx_net, None, "blocks/1/drop", inputs=X)
    assert np.any(np.asarray(drop.output) == 0)
    assert same(jax.tree.leaves(nnx.split(nnx_net)[1])[0], jax.tree.leaves(before)[0])
    nnx_net.eval()


def test_what_an_nnx_module_cannot_give(nnx_net: NnxNet):
    for path, options, error, what in [
        ("layers", {}, UsageError, "layers stands in a scan of 3"),
        ("layers", {"index": 3}, UsageError, "out of range"),
        ("bn", {"index": 0}, UsageError, "no scan"),
        ("blocks", {}, PlanError, "never reach blocks"),
        ("blocks/0/fc/kernel", {}, PlanError, "is a leaf"),
        ("block/0", {}, PlanError, "Nearest: blocks/0"),
        ("first", {"call": 2}, UsageError, "called 2 times"),
    ]:
        with pytest.raises(error, match=what):
            gx.part(nnx_net, None, path, inputs=X, **options)
    with pytest.raises(UsageError, match="inputs="):
        gx.part(nnx_net, None, "bn")
