"""The Linen runner: what it sees, what it puts in, and that the user's objects stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct

import graftax as gx
from graftax.errors import GraftaxError, ModelError, ReplayError
from graftax.parity.linen_runner import LinenRunner
from graftax.parity.records import Site

from .flax_taps import Changing, Forcing, Listener, close, same

MODES = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, scale: float = 1.0, train: bool = False) -> Any:
        x = nn.Dense(5, name="fc1")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(4, name="fc2")(nn.relu(x)) * scale


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        return x + nn.Dense(4, name="fc")(nn.LayerNorm(name="norm")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4, name="first")(x)
        block = nn.remat(Block)
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(4, name="last")(x)


class Tied(nn.Module):
    def setup(self) -> None:
        self.embed = nn.Embed(7, 4)
        self.shared = nn.Dense(4)

    def __call__(self, ids: Any) -> Any:
        x = self.shared(self.embed(ids))
        return self.embed.attend(self.shared(x))


class Tagger(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2, name="head")(nn.RNN(nn.LSTMCell(4), name="rnn")(x))


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        many = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        return many(4, name="many")(nn.Dense(4, name="one")(x))


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Inner(name="inner")(x)


@nn.jit
class Inner(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4, name="fc")(x)


def variables_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Variables of other values in every leaf; nothing of jax is compiled for it."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(value_of(rng, "var" in str(path[-1]), leaf)), shapes
    )


def value_of(rng: np.random.Generator, positive: bool, leaf: Any) -> Any:
    array = rng.normal(size=leaf.shape).astype(np.float32) * 0.5
    return abs(array) + 0.2 if positive else array


def runner_of(module: nn.Module, *args: Any, compiled: bool | None = None, **kwargs: Any) -> LinenRunner:
    return LinenRunner(gx.linen(module, *args, **kwargs), variables_of(module, *args, **kwargs), compiled=compiled)


def plain(runner: LinenRunner, *args: Any, **kwargs: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda: runner.module.apply(runner.variables, *args, **kwargs))()


# ---------------------------------------------------------------- what is seen


@MODES
def test_plain_modules_in_order(compiled: bool):
    runner = runner_of(Mlp(), X, compiled=compiled)
    tap = Listener()
    out = runner.run((X,), {"scale": 2.0}, watch=["", "fc1", "norm", "fc2"], tap=tap)
    assert close(out, plain(runner, X, scale=2.0))
    assert tap.order == [
        ("in", "(the model)"), ("in", "fc1"), ("out", "fc1"), ("in", "norm"), ("out", "norm"), ("in", "fc2"),
        ("out", "fc2"), ("out", "(the model)"),
    ]  # fmt: skip
    args, kwargs = tap.inputs[Site("")]
    assert same(args, (X,))
    assert kwargs == {"scale": 2.0}
    assert same(tap.inputs[Site("norm")][0][0], tap.outputs[Site("fc1")])
    assert runner.not_traced() == {}


def test_paths_are_those_of_the_checkpoint():
    for module, given in ((Mlp(), X), (Scanned(), X), (Tied(), np.ones((2, 3), int)), (Tagger(), X[None])):
        runner = runner_of(module, given)
        tap = Listener()
        runner.run((given,), {}, watch=list(runner.modules), tap=tap)
        assert {site.path for site in tap.inputs} == set(runner.modules) - runner.not_traced().keys()
        assert not runner.not_traced()


@MODES
def test_scan_and_remat_give_each_iteration_its_call(compiled: bool):
    runner = runner_of(Scanned(), X, compiled=compiled)
    tap = Listener()
    runner.run((X,), {}, watch=["first", "layers", "layers/fc", "last"], tap=tap)
    steps = [Site("layers", i) for i in range(3)]
    assert [site for site in tap.outputs if site.path == "layers"] == steps
    assert [site.call for site in tap.outputs if site.path == "layers/fc"] == [0, 1, 2]
    assert same(tap.inputs[steps[1]][0][0], tap.outputs[steps[0]][0])
    assert same(tap.inputs[Site("last")][0][0], tap.outputs[steps[2]][0])
    params = runner.variables["params"]["layers"]["fc"]
    for i in range(3):
        given = tap.inputs[Site("layers/fc", i)][0][0]
        assert close(tap.outputs[Site("layers/fc", i)], given @ params["kernel"][i] + params["bias"][i])


@MODES
def test_shared_modules_and_attend(compiled: bool):
    ids = np.array([[1, 2, 6]])
    runner = runner_of(Tied(), ids, compiled=compiled)
    tap = Listener()
    out = runner.run((ids,), {}, watch=["embed", "shared"], tap=tap)
    assert [path for way, path in tap.order if way == "in"] == [
        "embed", "shared", "shared (call 2)", "embed (call 2)",
    ]  # fmt: skip
    assert same(tap.outputs[Site("embed", 1)], out)
    assert runner.methods == {Site("embed", 1): "attend"}


@MODES
def test_a_weakly_typed_input_is_put_in_and_stays_weak(compiled: bool):
    class Gate(nn.Module):
        @nn.compact
        def __call__(self, mask: Any, x: Any) -> Any:
            assert mask.weak_type
            return (x.astype(jnp.bfloat16) * mask).astype(jnp.float32)  # a strong float32 mask would widen it

    class Gated(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Gate(name="gate")(jnp.where(x > 0, 1.0, 0.0), x)

    class Opened:
        """Puts a mask of ones in."""

        def enter(self, site: Site, args: Any, kwargs: Any) -> Any:
            return (np.ones_like(args[0]), args[1]), kwargs

        def leave(self, site: Site, output: Any) -> None:
            return None

    runner = LinenRunner(gx.linen(Gated(), X), {}, compiled=compiled)
    out = runner.run((X,), {}, watch=["gate"], tap=Opened())
    assert same(out, np.asarray(X.astype(jnp.bfloat16), np.float32))


def test_runners_of_other_weights_share_the_compiled_program():
    runner = runner_of(Mlp(), X)
    other = runner.with_weights(jax.tree.map(lambda leaf: leaf * 2, runner.variables))
    first = runner.run((X,), {})
    seconds = runner.compile_seconds
    assert seconds > 0
    assert close(other.run((X,), {}), plain(other, X))
    assert other.compile_seconds == seconds
    assert same(runner.run((X,), {}), first)


@MODES
def test_rnn_and_its_cell(compiled: bool):
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    runner = runner_of(Tagger(), x, compiled=compiled)
    tap = Listener()
    runner.run((x,), {}, watch=["rnn", "LSTMCell_0", "head"], tap=tap)
    assert [site.call for site in tap.outputs if site.path == "LSTMCell_0"] == [0, 1, 2, 3, 4]
    carry, y = tap.outputs[Site("LSTMCell_0", 4)]
    assert isinstance(carry, tuple)
    assert same(tap.outputs[Site("rnn")][:, 4], y)


@MODES
def test_what_cannot_be_seen_is_named(compiled: bool):
    runner = runner_of(Mapped(), X, compiled=compiled)
    tap = Listener()
    out = runner.run((X,), {}, watch=["one", "many", "nowhere"], tap=tap)
    assert close(out, plain(runner, X))
    assert runner.not_traced() == {"many": "inside vmap", "nowhere": "never called"}
    assert set(tap.outputs) == {Site("one")}


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        one, other = nn.Dense(4, name="one"), nn.Dense(4, name="other")
        if self.is_initializing():
            return one(x) + other(x)
        return nn.cond(x.sum() > 100, lambda m, x: one(x), lambda m, x: other(x), self, x)


@MODES
def test_a_branch_that_was_not_taken(compiled: bool):
    runner = runner_of(Branches(), X, compiled=compiled)
    tap = Listener()
    runner.run((X,), {}, watch=["one", "other"], tap=tap)
    assert set(tap.outputs) == {Site("other")}
    assert runner.not_traced() == {"one": "in a branch that was not taken, or a loop of no steps"}


@MODES
def test_nn_jit_that_was_traced_before(compiled: bool):
    runner = runner_of(Jitted(), X, compiled=compiled)
    runner.module.apply(runner.variables, X)
    for watch in (["inner/fc"], ["inner"], ["inner", "inner/fc"], []):
        tap = Listener()
        for _ in range(2):
            runner.run((X,), {}, watch=watch, tap=tap)
            assert {site.path for site in tap.outputs} == set(watch)
            assert {site.call for site in tap.outputs} <= {0}


class Rotary(nn.Module):
    def __call__(self, positions: Any) -> Any:
        return jnp.sin(positions)


class WithPositions(nn.Module):
    @nn.compact
    def __call__(self, x: Any, positions: Any) -> Any:
        return x + Rotary(name="rotary")(positions), None


class Broadcast(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        axes: Any = (nn.broadcast,)
        stack = nn.scan(WithPositions, variable_axes={"params": 0}, in_axes=axes, length=3)
        return stack(name="layers")(x, jnp.arange(4.0))[0]


@MODES
def test_a_scan_that_is_rehearsed_counts_no_call_twice(compiled: bool):
    runner = LinenRunner(gx.linen(Broadcast(), X), {}, compiled=compiled)
    tap = Listener()
    runner.run((X,), {}, watch=["layers/rotary"], tap=tap)
    assert [site.call for site in tap.outputs] == [0, 1, 2]


class Beside(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        long, _ = stack(name="layers")(jnp.tile(x, (20000, 1)), None)
        return long[: len(x)] + nn.Dense(4, name="side")(x)


@MODES
def test_calls_come_in_the_order_of_the_program(compiled: bool):
    runner = runner_of(Beside(), X, compiled=compiled)
    tap = Listener()
    runner.run((X,), {}, watch=["layers", "side"], tap=tap)
    assert [path for way, path in tap.order if way == "in"] == ["layers", "layers (call 2)", "layers (call 3)", "side"]


class Chain(nn.Module):
    width: int = 33

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(6):
            x = nn.Dense(self.width, use_bias=False, name=f"fc{i}")(x)
        return x


def test_what_a_tap_keeps_stays_as_it_was():
    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    runner = runner_of(Chain(256), x)
    first, then = Listener(), Listener()
    runner.run((x,), {}, watch=[f"fc{i}" for i in range(6)], tap=first)
    kept = {site: np.array(out) for site, out in first.outputs.items()}
    runner.run((x + 1,), {}, watch=[f"fc{i}" for i in range(6)], tap=then)
    assert all(same(first.outputs[site], out) for site, out in kept.items())
    assert all(close(first.inputs[Site(f"fc{i + 1}")][0][0], first.outputs[Site(f"fc{i}")]) for i in range(5))
    assert all(not np.shares_memory(first.outputs[site], then.outputs[site]) for site in kept)


# ---------------------------------------------------------------- what is put in


@MODES
@pytest.mark.parametrize(
    ("module", "given", "watch"),
    [
        (Mlp(), X, ["fc1", "norm", "fc2"]),
        (Scanned(), X, ["first", "layers/norm", "layers/fc", "last"]),
        (Tied(), np.array([[1, 2, 6]]), ["embed", "shared"]),
        (Tagger(), np.stack([X, X + 1]), ["LSTMCell_0", "head"]),
        (Jitted(), X, ["inner/fc"]),
    ],
    ids=["mlp", "scan", "tied", "rnn", "jit"],
)
def test_forced_values_replace(module: nn.Module, given: Any, watch: list[str], compiled: bool):
    good = runner_of(module, given, compiled=compiled)
    reference = Listener()
    want = good.run((given,), {}, watch=watch, tap=reference)
    worse = jax.tree.map(lambda leaf: leaf + 0.5, good.variables)
    bad = LinenRunner(good.module, worse, compiled=compiled)
    free = Listener()
    assert not close(bad.run((given,), {}, watch=watch, tap=free), want)
    tap = Forcing(reference)
    assert close(bad.run((given,), {}, watch=watch, tap=tap), want)
    assert tap.inputs.keys() == tap.outputs.keys() == reference.inputs.keys()
    first = next(iter(reference.inputs))
    for site in reference.inputs:
        if site == first:
            assert close(tap.inputs[site], reference.inputs[site])
    assert all(not close(tap.outputs[site], reference.outputs[site]) for site in reference.outputs)


@MODES
def test_forcing_the_right_values_shows_no_error(compiled: bool):
    runner = runner_of(Scanned(), X, compiled=compiled)
    reference = Listener()
    runner.run((X,), {}, watch=["layers/fc", "last"], tap=reference)
    tap = Forcing(reference)
    runner.run((X,), {}, watch=["layers/fc", "last"], tap=tap)
    assert all(close(tap.inputs[site], reference.inputs[site]) for site in reference.inputs)
    assert all(close(tap.outputs[site], reference.outputs[site]) for site in reference.outputs)


class ModulePair(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Two(nn.Dense(4, dtype=jnp.bfloat16, name="half")(x), {"ids": jnp.arange(3)}, "text")


@struct.dataclass
class Two:
    first: Any
    second: Any
    third: str = struct.field(pytree_node=False, default="")


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        two = ModulePair(name="pair")(x)
        assert isinstance(two, Two)
        assert two.third == "text"
        return [two.first, two.second["ids"], None]


@MODES
def test_nested_values_keep_their_structure_and_dtypes(compiled: bool):
    runner = runner_of(Nested(), X, compiled=compiled)
    tap = Listener()
    half, ids, nothing = runner.run((X,), {}, watch=["pair"], tap=tap)
    assert set(tap.outputs[Site("pair")]) == {"first", "second", "third"}
    assert (str(half.dtype), str(ids.dtype), nothing) == ("bfloat16", "int32", None)
    ones = np.ones((3, 4), np.float32)
    forced = Changing(lambda site, out: {"first": ones, "second": {"ids": np.array([3, 4, 5])}, "third": None})
    out = runner.run((X,), {}, watch=["pair"], tap=forced)
    assert same(out, [ones.astype(half.dtype), np.array([3, 4, 5], np.int32), None])


@MODES
def test_a_tap_that_fails_comes_through(compiled: bool):
    runner = runner_of(Scanned(), X, compiled=compiled)

    def fail(site: Site, out: Any) -> Any:
        raise LookupError(f"at {site}")

    for watch in (["first"], ["layers/fc"]):
        with pytest.raises(LookupError, match=watch[0]):
            runner.run((X,), {}, watch=watch, tap=Changing(fail))
    with pytest.raises(GraftaxError, match=r"Flax last.*shape \(3, 4\).*\(4, 3\)"):
        runner.run((X,), {}, watch=["last"], tap=Changing(lambda site, out: out.T))
    assert close(runner.run((X,), {}), plain(runner, X))


@MODES
def test_a_tap_may_run_the_model_itself(compiled: bool):
    runner, other = runner_of(Mlp(), X, compiled=compiled), runner_of(Mlp(), X, compiled=False)
    heard: list[Any] = []
    tap = Changing(lambda site, out: heard.append(site))
    tap.enter = lambda site, args, kwargs: heard.append(other.run((X,), {})) if not compiled else None  # type: ignore
    runner.run((X,), {}, watch=["fc1"], tap=tap)
    assert len([item for item in heard if isinstance(item, Site)]) == 1


# ---------------------------------------------------------------- the user's objects


@MODES
def test_nothing_of_the_users_changes(compiled: bool):
    module = Mlp()
    variables = variables_of(module, X)
    before = jax.tree.map(np.array, variables)
    kept = copy.copy(vars(module))
    runner = LinenRunner(gx.linen(module, X), variables, rngs={"dropout": 3}, compiled=compiled)
    runner.run((X,), {"train": True}, watch=["norm"], tap=Changing(lambda site, out: out * 0))
    with pytest.raises(ModelError):
        runner.run((X.T,), {}, watch=["norm"], tap=Listener())
    assert jax.tree.all(jax.tree.map(same, before, jax.tree.map(np.asarray, variables)))
    assert vars(module) == kept


@MODES
def test_batch_statistics_can_be_used(compiled: bool):
    runner = runner_of(Mlp(), X, compiled=compiled)
    runner.rngs = {"dropout": jax.random.key(0)}
    tap = Listener()
    runner.run((X,), {"train": True}, watch=["norm"], tap=tap)
    scale = runner.variables["params"]["norm"]
    given = tap.inputs[Site("norm")][0][0]
    want = (given - given.mean(0)) / np.sqrt(given.var(0) + 1e-5) * scale["scale"] + scale["bias"]
    assert close(tap.outputs[Site("norm")], want, 1e-3)


class Asks(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        if float(x.sum()) > 100:
            return x
        return nn.Dense(4, name="fc")(x)


def test_code_that_asks_for_values_runs_eagerly():
    runner = runner_of(Asks(), X)
    tap = Listener()
    assert close(runner.run((X,), {}, watch=["fc"], tap=tap), plain(runner, X))
    assert list(tap.outputs) == [Site("fc")]


class Broken(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4, name="fine")(x)
        return Wrong(name="wrong")(x)


class Wrong(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        raise RuntimeError("my mistake")


@MODES
def test_the_users_errors_name_module_and_line(compiled: bool):
    runner = LinenRunner(Broken(), {"params": {"fine": {"kernel": np.ones((4, 4)), "bias": np.ones(4)}}})
    with pytest.raises(ModelError) as caught:
        runner.run((X,), {}, watch=["fine"], tap=Listener(), compiled=compiled)
    text = str(caught.value)
    assert "Flax model failed in Wrong at wrong: RuntimeError: my mistake" in text
    assert "test_linen_runner.py" in text
    assert "float32[3, 4]" in text
    assert caught.value.exit_code == 70
    with pytest.raises(ModelError, match="Dense at fine"):
        runner.run((X[:, :3],), {}, compiled=compiled)


def test_other_methods_and_calls():
    ids = np.array([[1, 2, 6]])
    whole = runner_of(Tied(), ids)
    x = np.ones((1, 3, 4), np.float32)
    named = LinenRunner(Tied(), whole.variables, method="logits") if hasattr(Tied, "logits") else None
    assert named is None
    called = LinenRunner(Tied(), whole.variables, call=lambda bound, x: bound.embed.attend(x))
    tap = Listener()
    assert close(called.run((x,), {}, watch=["embed"], tap=tap), x @ whole.variables["params"]["embed"]["embedding"].T)
    assert list(tap.outputs) == [Site("embed")]
    bound = Tied().bind(whole.variables)
    assert close(LinenRunner(bound).run((ids,), {}), plain(whole, ids))


# ---------------------------------------------------------------- one module alone


def test_replay_with_other_settings_and_leaves():
    runner = runner_of(Mlp(), X)
    tap = Listener()
    runner.run((X,), {}, watch=["fc1", "norm"], tap=tap)
    given = tap.inputs[Site("norm")][0]
    assert close(runner.replay("norm", given, {}), tap.outputs[Site("norm")])
    mean, var = (np.asarray(runner.variables["batch_stats"]["norm"][k]) for k in ("mean", "var"))
    scale, bias = (np.asarray(runner.variables["params"]["norm"][k]) for k in ("scale", "bias"))
    want = (given[0] - mean) / np.sqrt(var + 0.5) * scale + bias
    assert close(runner.replay("norm", given, {}, settings={"epsilon": 0.5}), want)
    leaves = {"params/norm/bias": bias * 0, "batch_stats/norm/mean": mean * 0}
    want = given[0] / np.sqrt(var + 1e-5) * scale
    assert close(runner.replay("norm", given, {}, leaves=leaves), want)
    with pytest.raises(ReplayError, match="no setting eps"):
        runner.replay("norm", given, {}, settings={"eps": 0.5})
    with pytest.raises(ReplayError, match="params/fc1/bias is no leaf of norm"):
        runner.replay("norm", given, {}, leaves={"params/fc1/bias": bias})
    with pytest.raises(ReplayError, match="no module 'other'"):
        runner.replay("other", given, {})
    with pytest.raises(ReplayError, match="cannot be run alone"):
        runner.replay("fc1", (X.T,), {})


def test_replay_of_scanned_recurrent_and_shared_modules():
    runner = runner_of(Scanned(), X)
    tap = Listener()
    runner.run((X,), {}, watch=["layers", "layers/fc"], tap=tap)
    for site, out in tap.outputs.items():
        assert close(runner.replay(site.path, *tap.inputs[site], call=site.call), out)
    kernel = np.ones((4, 4), np.float32)
    site = Site("layers/fc", 1)
    given = tap.inputs[site][0]
    want = given[0] @ kernel + np.asarray(runner.variables["params"]["layers"]["fc"]["bias"][1])
    assert close(runner.replay("layers/fc", given, {}, leaves={"params/layers/fc/kernel": kernel}, call=1), want)

    x = np.stack([X, X + 1])
    runner = runner_of(Tagger(), x)
    tap = Listener()
    runner.run((x,), {}, watch=["rnn", "LSTMCell_0"], tap=tap)
    for site in (Site("rnn"), Site("LSTMCell_0", 1)):
        assert close(runner.replay(site.path, *tap.inputs[site]), tap.outputs[site])
    zero = {"params/LSTMCell_0/hi/bias": np.full(4, 9.0, np.float32)}
    assert not close(runner.replay("rnn", *tap.inputs[Site("rnn")], leaves=zero), tap.outputs[Site("rnn")])

    ids = np.array([[1, 2, 6]])
    runner = runner_of(Tied(), ids)
    tap = Listener()
    runner.run((ids,), {}, watch=["embed"], tap=tap)
    again = Site("embed", 1)
    assert close(runner.replay("embed", *tap.inputs[again], method=runner.methods[again]), tap.outputs[again])


def test_replay_of_a_container_with_given_layers():
    module = nn.Sequential([nn.Dense(4), nn.relu, nn.Sequential([nn.Dense(3)])])
    runner = runner_of(module, X)
    tap = Listener()
    runner.run((X,), {}, watch=list(runner.modules), tap=tap)
    for site, out in tap.outputs.items():
        assert close(runner.replay(site.path, *tap.inputs[site]), out)


# ---------------------------------------------------------------- weights on loan


class Own(nn.Module):
    def setup(self) -> None:
        self.shift = self.param("shift", nn.initializers.zeros, (4,))
        self.embed = nn.Embed(7, 4)
        self.body = Scanned()

    def __call__(self, ids: Any) -> Any:
        x = self.body(self.embed(ids) + self.shift)
        return self.embed.attend(x)


def test_weights_can_be_supplied_call_by_call():
    ids = np.array([[1, 2, 6]])
    full = runner_of(Own(), ids)
    want = full.run((ids,), {})
    arrays = {f"params/{'/'.join(str(k.key) for k in path[1:])}": np.asarray(leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(full.variables)}  # fmt: skip
    hollow = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), full.variables)
    runner = LinenRunner(gx.linen(Own(), ids), hollow)
    asked: list[str] = []

    def supply(path: str) -> Any:
        asked.append(path)
        return {key: array for key, array in arrays.items() if key.startswith(f"params/{path}/" if path else "params/")}

    for _ in range(2):
        tap = Listener()
        assert close(runner.run((ids,), {}, watch=["embed", "layers/fc"], tap=tap, supply=supply), want)
        assert len([site for site in tap.outputs if site.path == "embed"]) == 2
    assert asked.count("embed") == 4
    assert {"", "body/first", "body/last", "body/layers/fc"} <= set(asked)
    with pytest.raises(ModelError, match="no values"):
        runner.run((ids,), {})
    with pytest.raises(ModelError, match="The supply returned no array"):
        runner.run((ids,), {}, supply=lambda path: {})
    assert jax.tree.all(jax.tree.map(lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct), hollow))
    roles = {"embed": {"embedding": arrays["params/embed/embedding"]}}
    assert close(runner.run((ids,), {}, supply=lambda path: roles.get(path) or supply(path)), want)


def test_supplied_weights_are_let_go():
    x = np.ones((2, 33), np.float32)
    hollow = {"params": {f"fc{i}": {"kernel": jax.ShapeDtypeStruct((33, 33), np.float32)} for i in range(6)}}
    held: list[int] = []

    def supply(path: str) -> Any:
        held.append(sum(array.shape == (33, 33) for array in jax.live_arrays()))
        return {"kernel": np.eye(33, dtype=np.float32)}

    out = LinenRunner(gx.linen(Chain(), x), hollow).run((x,), {}, supply=supply)
    assert same(out, x)
    assert held == [0] * 6
