"""The NNX runner: what it sees, what it puts in, and that the user's objects and classes stay as they are."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from graftax.adapters.nnx_tree import with_random_state
from graftax.errors import ModelError, ReplayError
from graftax.parity.nnx_runner import NnxRunner
from graftax.parity.records import Site

from .flax_taps import Changing, Forcing, Listener, close, same

MODES = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs, use_running_average=True)
        self.drop = nnx.Dropout(0.5, rngs=rngs, deterministic=True)
        self.fc2 = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x: Any, *, scale: float = 1.0) -> Any:
        return self.fc2(nnx.relu(self.drop(self.norm(self.fc1(x))))) * scale


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.fc(self.norm(x))


class Scanned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.layers = nnx.vmap(Block)(rngs.split(3) if hasattr(rngs, "split") else rngs)
        self.last = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def loop(x: Any, layer: Block) -> Any:
            return layer(x)

        return self.last(loop(self.first(x), self.layers))  # pyright: ignore


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.shared = nnx.Linear(4, 4, rngs=rngs)
        self.again = nnx.List([self.shared])

    def __call__(self, ids: Any) -> Any:
        return self.embed.attend(self.again[0](self.shared(self.embed(ids))))


class Tagger(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.LSTMCell(4, 4, rngs=rngs))
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.rnn(x))  # pyright: ignore


class Jitted(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.attn = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)

    @nnx.jit
    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.attn(x[None])[0]


class Mapped(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one = nnx.Linear(4, 4, rngs=rngs)
        self.many = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return nnx.vmap(lambda layer, row: layer(row), in_axes=(None, 0))(self.many, self.one(x))


class Mine(nnx.Linear):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x) + 1


class Coder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = Half(rngs)

    def __call__(self, x: Any) -> Any:
        return self.inner.decode(self.inner.encode(x))


class Half(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = Mine(4, 4, rngs=rngs)

    def encode(self, x: Any) -> Any:
        return self.fc(x)

    def decode(self, x: Any) -> Any:
        return self.encode(x) * 2


def made(kind: Any, seed: int = 0) -> Any:
    """A module whose leaves have values of this seed; nothing of jax is compiled for it."""
    module = nnx.eval_shape(lambda: kind(nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def value(path: Any, leaf: Any) -> Any:
        array = rng.normal(size=leaf.shape).astype(np.float32) * 0.5
        return jnp.asarray(abs(array) + 0.2 if "var" in str(path) else array)

    state = jax.tree_util.tree_map_with_path(value, nnx.state(module, (nnx.Param, nnx.BatchStat)))
    nnx.update(module, state, with_random_state(nnx.state(module, nnx.RngState), nnx.Rngs(0)))
    return module


def plain(module: Any, *args: Any, **kwargs: Any) -> Any:
    graphdef, state = nnx.split(module)
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda state: nnx.merge(graphdef, state)(*args, **kwargs))(state)


def values_of(module: Any) -> list[Any]:
    leaves = jax.tree.leaves(nnx.state(module))
    return [np.array(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v) for v in leaves]


# ---------------------------------------------------------------- what is seen


@MODES
def test_plain_modules_in_order(compiled: bool):
    module = made(Mlp)
    runner = NnxRunner(module, compiled=compiled)
    tap = Listener()
    out = runner.run((X,), {"scale": 2.0}, watch=["", "fc1", "norm", "fc2"], tap=tap)
    assert close(out, plain(module, X, scale=2.0))
    assert tap.order == [
        ("in", "(the model)"), ("in", "fc1"), ("out", "fc1"), ("in", "norm"), ("out", "norm"), ("in", "fc2"),
        ("out", "fc2"), ("out", "(the model)"),
    ]  # fmt: skip
    assert tap.inputs[Site("")][1] == {"scale": 2.0}
    assert same(tap.inputs[Site("norm")][0][0], tap.outputs[Site("fc1")])
    assert runner.not_traced() == {}


@MODES
def test_scan_and_remat_give_each_iteration_its_call(compiled: bool):
    module = made(Scanned)
    runner = NnxRunner(module, compiled=compiled)
    tap = Listener()
    out = runner.run((X,), {}, watch=["first", "layers", "layers/fc", "last"], tap=tap)
    assert close(out, plain(module, X))
    assert [site.call for site in tap.outputs if site.path == "layers"] == [0, 1, 2]
    assert same(tap.inputs[Site("layers", 1)][0][0], tap.outputs[Site("layers", 0)])
    for i in range(3):
        site = Site("layers/fc", i)
        kernel, bias = (np.asarray(leaf[...])[i] for leaf in (module.layers.fc.kernel, module.layers.fc.bias))
        assert close(tap.outputs[site], tap.inputs[site][0][0] @ kernel + bias)
        assert close(runner.replay("layers/fc", *tap.inputs[site], call=i), tap.outputs[site])


@MODES
def test_shared_modules_and_attend(compiled: bool):
    ids = np.array([[1, 2, 6]])
    runner = NnxRunner(made(Tied), compiled=compiled)
    shared = next(path for path in runner.modules if runner.modules[path].kind == "Linear")
    tap = Listener()
    out = runner.run((ids,), {}, watch=["embed", shared], tap=tap)
    assert [path for way, path in tap.order if way == "in"] == [
        "embed", shared, f"{shared} (call 2)", "embed (call 2)",
    ]  # fmt: skip
    assert same(tap.outputs[Site("embed", 1)], out)
    assert runner.methods == {Site("embed", 1): "attend"}
    again = Site("embed", 1)
    assert close(runner.replay("embed", *tap.inputs[again], method="attend"), tap.outputs[again])


@MODES
def test_rnn_and_its_cell(compiled: bool):
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    runner = NnxRunner(made(Tagger), compiled=compiled)
    tap = Listener()
    runner.run((x,), {}, watch=["rnn", "rnn/cell", "head"], tap=tap)
    assert [site.call for site in tap.outputs if site.path == "rnn/cell"] == [0, 1, 2, 3, 4]
    assert same(tap.outputs[Site("rnn")][:, 4], tap.outputs[Site("rnn/cell", 4)][1])
    assert runner.not_traced() == {}
    for site in (Site("rnn"), Site("rnn/cell", 2)):
        assert close(runner.replay(site.path, *tap.inputs[site]), tap.outputs[site])


@MODES
def test_nnx_jit_that_was_traced_before(compiled: bool):
    module: Any = made(Jitted)
    want = plain(module, X)
    runner = NnxRunner(module, compiled=compiled)
    for watch in (["blocks/1/fc"], ["", "attn", "attn/query"], [], ["blocks/1/fc"]):
        for _ in range(2):
            tap = Listener()
            assert close(runner.run((X,), {}, watch=watch, tap=tap), want)
            assert {site.path for site in tap.outputs} == set(watch)
            assert {site.call for site in tap.outputs} <= {0}
    assert close(module(X), want)


@MODES
def test_what_cannot_be_seen_is_named(compiled: bool):
    module = made(Mapped)
    runner = NnxRunner(module, compiled=compiled)
    tap = Listener()
    assert close(runner.run((X,), {}, watch=["one", "many", "nowhere"], tap=tap), plain(module, X))
    assert runner.not_traced() == {"many": "inside vmap", "nowhere": "never called"}


@MODES
def test_methods_and_super(compiled: bool):
    runner = NnxRunner(made(Coder), compiled=compiled)
    tap = Listener()
    runner.run((X,), {}, watch=["inner", "inner/fc"], tap=tap)
    assert set(tap.outputs) == {Site("inner"), Site("inner", 1), Site("inner/fc"), Site("inner/fc", 1)}
    assert runner.methods == {Site("inner"): "encode", Site("inner", 1): "decode"}


def test_another_method_or_call_of_the_model():
    half = made(Half)
    want = half.encode(X)
    assert close(NnxRunner(half, method="encode").run((X,), {}), want)
    assert close(NnxRunner(half, call=lambda m, x: m.decode(x) / 2).run((X,), {}), want)


# ---------------------------------------------------------------- what is put in


@MODES
@pytest.mark.parametrize(
    ("kind", "given", "watch"),
    [
        (Mlp, X, ["fc1", "norm", "fc2"]),
        (Scanned, X, ["first", "layers/norm", "layers/fc", "last"]),
        (Tied, np.array([[1, 2, 6]]), ["embed"]),
        (Tagger, np.stack([X, X + 1]), ["rnn/cell", "head"]),
        (Jitted, X, ["blocks/0/fc", "attn"]),
    ],
    ids=["mlp", "scan", "tied", "rnn", "jit"],
)
def test_forced_values_replace(kind: Any, given: Any, watch: list[str], compiled: bool):
    module = made(kind)
    good = NnxRunner(module, compiled=compiled)
    reference = Listener()
    want = good.run((given,), {}, watch=watch, tap=reference)
    bad = NnxRunner(made(kind, 1), compiled=compiled)
    assert not close(bad.run((given,), {}, watch=watch, tap=Listener()), want)
    tap = Forcing(reference)
    assert close(bad.run((given,), {}, watch=watch, tap=tap), want)
    assert tap.inputs.keys() == tap.outputs.keys() == reference.inputs.keys()
    assert all(not close(tap.outputs[site], reference.outputs[site]) for site in reference.outputs)


@MODES
def test_a_tap_that_fails_comes_through(compiled: bool):
    module = made(Scanned)
    runner = NnxRunner(module, compiled=compiled)

    def fail(site: Site, out: Any) -> Any:
        raise LookupError(f"at {site}")

    for watch in (["first"], ["layers/fc"]):
        with pytest.raises(LookupError, match=watch[0]):
            runner.run((X,), {}, watch=watch, tap=Changing(fail))
    assert close(runner.run((X,), {}), plain(module, X))


# ---------------------------------------------------------------- the user's objects


@MODES
def test_nothing_of_the_users_changes(compiled: bool):
    module = made(Mlp)
    module.train()
    before, attributes = values_of(module), {k: dict(vars(m)) for k, m in nnx.iter_modules(module)}
    methods = {cls: dict(vars(cls)) for cls in (Mlp, nnx.Linear, nnx.BatchNorm, nnx.Dropout)}
    runner = NnxRunner(module, compiled=compiled)
    tap = Listener()
    outs = [runner.run((X,), {}, watch=["norm"], tap=tap) for _ in range(2)]
    assert same(*outs)
    given = tap.inputs[Site("norm")][0][0]
    want = (given - given.mean(0)) / np.sqrt(given.var(0) + 1e-5)
    scale, bias = np.asarray(module.norm.scale[...]), np.asarray(module.norm.bias[...])
    assert close(tap.outputs[Site("norm")], want * scale + bias, 1e-3)
    runner.run((X,), {}, watch=["norm"], tap=Changing(lambda site, out: out * 0))
    with pytest.raises(ModelError, match="Linear at fc1"):
        runner.run((X.T,), {}, watch=["norm"], tap=tap)
    assert same(before, values_of(module))
    assert attributes == {k: dict(vars(m)) for k, m in nnx.iter_modules(module)}
    assert methods == {cls: dict(vars(cls)) for cls in methods}


@MODES
def test_other_threads_notice_nothing(compiled: bool):
    module, other = made(Scanned), made(Scanned, 1)
    want = plain(other, X)
    held = nnx.Linear.__dict__["__call__"]
    failed: list[Any] = []

    def work(i: int) -> None:
        runner = NnxRunner(module, compiled=compiled)
        tap = Listener()
        runner.run((X,), {}, watch=["layers/fc"], tap=tap)
        if len(tap.outputs) != 3 or not close(plain(other, X), want):
            failed.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert nnx.Linear.__dict__["__call__"] is held


class Wrong(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fine = nnx.Linear(4, 4, rngs=rngs)
        self.parts = nnx.List([Fails()])

    def __call__(self, x: Any) -> Any:
        return self.parts[0](self.fine(x))


class Fails(nnx.Module):
    def __call__(self, x: Any) -> Any:
        raise RuntimeError("my mistake")


@MODES
def test_the_users_errors_name_module_and_line(compiled: bool):
    runner = NnxRunner(made(Wrong), compiled=compiled)
    with pytest.raises(ModelError) as caught:
        runner.run((X,), {}, watch=["fine"], tap=Listener())
    text = str(caught.value)
    assert "Flax model failed in Fails at parts/0: RuntimeError: my mistake" in text
    assert "test_nnx_runner.py" in text
    assert "float32[3, 4]" in text


class Asks(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.fc(x) if float(x.sum()) < 100 else x


def test_code_that_asks_for_values_runs_eagerly():
    runner = NnxRunner(made(Asks))
    tap = Listener()
    runner.run((X,), {}, watch=["fc"], tap=tap)
    assert list(tap.outputs) == [Site("fc")]


# ---------------------------------------------------------------- one module alone


def test_replay_with_other_settings_and_leaves():
    module = made(Mlp)
    runner = NnxRunner(module)
    tap = Listener()
    runner.run((X,), {}, watch=["norm"], tap=tap)
    given = tap.inputs[Site("norm")][0]
    mean, var, scale, bias = (np.asarray(getattr(module.norm, k)[...]) for k in ("mean", "var", "scale", "bias"))
    assert close(runner.replay("norm", given, {}), tap.outputs[Site("norm")])
    want = (given[0] - mean) / np.sqrt(var + 0.5) * scale + bias
    assert close(runner.replay("norm", given, {}, settings={"epsilon": 0.5}), want)
    want = given[0] / np.sqrt(var + 1e-5) * scale
    assert close(runner.replay("norm", given, {}, leaves={"norm/bias": bias * 0, "norm/mean": mean * 0}), want)
    want = (given[0] - given[0].mean(0)) / np.sqrt(given[0].var(0) + 1e-5) * scale + bias
    assert close(runner.replay("norm", given, {}, settings={"use_running_average": False}), want, 1e-3)
    assert same(np.asarray(module.norm.mean[...]), mean)
    assert module.norm.epsilon == 1e-5
    with pytest.raises(ReplayError, match="no setting eps"):
        runner.replay("norm", given, {}, settings={"eps": 0.5})
    with pytest.raises(ReplayError, match="fc1/bias is no leaf of norm"):
        runner.replay("norm", given, {}, leaves={"fc1/bias": bias})
    with pytest.raises(ReplayError, match="no module 'other'"):
        runner.replay("other", given, {})
    with pytest.raises(ReplayError, match="cannot be run alone"):
        runner.replay("fc1", (X.T,), {})


# ---------------------------------------------------------------- weights on loan


class Own(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.shift = nnx.Param(jnp.ones(4))
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.body = Scanned(rngs)

    def __call__(self, ids: Any) -> Any:
        return self.embed.attend(self.body(self.embed(ids) + self.shift[...]))


def test_weights_can_be_supplied_call_by_call():
    ids = np.array([[1, 2, 6]])
    full = made(Own)
    want = NnxRunner(full).run((ids,), {})
    arrays = {"/".join(map(str, k)): np.asarray(v[...]) for k, v in nnx.to_flat_state(nnx.state(full, nnx.Param))}
    hollow = nnx.eval_shape(lambda: Own(nnx.Rngs(0)))
    runner = NnxRunner(hollow)
    asked: list[str] = []

    def supply(path: str) -> Any:
        asked.append(path)
        return {key: array for key, array in arrays.items() if key.startswith(f"{path}/" if path else "")}

    for _ in range(2):
        tap = Listener()
        assert close(runner.run((ids,), {}, watch=["embed", "body/layers/fc"], tap=tap, supply=supply), want)
        assert [site.call for site in tap.outputs if site.path == "body/layers/fc"] == [0, 1, 2]
    assert asked.count("embed") == 4
    with pytest.raises(ModelError, match="no values"):
        runner.run((ids,), {})
    with pytest.raises(ModelError, match="The supply returned no array"):
        runner.run((ids,), {}, supply=lambda path: {})
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(hollow, nnx.Param)))


class Chain(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(33, 33, use_bias=False, rngs=rngs) for _ in range(6)])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def test_supplied_weights_are_let_go():
    x = np.ones((2, 33), np.float32)
    held: list[int] = []

    def supply(path: str) -> Any:
        held.append(sum(array.shape == (33, 33) for array in jax.live_arrays()))
        return {"kernel": np.eye(33, dtype=np.float32)}

    assert same(NnxRunner(nnx.eval_shape(lambda: Chain(nnx.Rngs(0)))).run((x,), {}, supply=supply), x)
    assert held == [0] * 6
