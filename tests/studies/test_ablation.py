"""gx.ablate: rows against the edit and the forward done by hand, one compilation, memory, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import graftax as gx
from graftax.errors import ModelError, PlanError, UsageError
from graftax.parity.metrics import relative_l2
from graftax.studies.study_text import study_text

X = np.random.default_rng(0).normal(size=(4, 3)).astype("f4")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=True, name="norm")(nn.relu(nn.Dense(7, name="up")(x)))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(5, name="head")(Block(name="block")(x))


MODEL = Model()


@pytest.fixture(scope="module")
def params() -> Any:
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), X)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.uniform(0.1, 1, leaf.shape), leaf.dtype), shapes)


VALUES = [gx.zeros(), gx.scaled(0.5), gx.add_normal(0.1, seed=3)]


def kept(outputs: list[np.ndarray]) -> Any:
    """A metric that keeps what it is given."""

    def keep(out: Any) -> float:
        outputs.append(np.array(out))
        return 0.0

    return keep


# ---------------------------------------------------------------- the rows


def test_every_row_has_the_bits_of_the_edit_and_the_jitted_forward_by_hand(params):
    seen: list[np.ndarray] = []
    study = gx.ablate(gx.linen(MODEL, X), params, "**/kernel", VALUES, metric=kept(seen))
    forward = jax.jit(lambda weights: MODEL.apply(weights, X))
    assert len(study) == 1 + 2 * len(VALUES)
    del seen[0]  # the baseline runs twice
    edits = [params] + [
        gx.replace(params, row.path, value) for row, value in zip(study.rows[1:], VALUES * 2, strict=True)
    ]
    for got, edited in zip(seen, edits, strict=True):
        assert got.tobytes() == np.asarray(forward(edited)).tobytes()


def test_outputs_are_compared_with_those_of_the_unchanged_weights(params):
    study = gx.ablate(gx.linen(MODEL, X), params, "**/kernel", VALUES)
    own = np.asarray(MODEL.apply(params, X))
    assert (study.baseline.numbers, study.baseline.path) == ({"relative_l2": 0.0, "cosine": 1.0}, "")
    for row, value in zip(study.rows[1:], VALUES * 2, strict=True):
        out = np.asarray(jax.jit(MODEL.apply)(gx.replace(params, row.path, value), X))
        assert row.numbers["relative_l2"] == pytest.approx(relative_l2(out, own), rel=1e-3)
        assert row.numbers["cosine"] == pytest.approx(
            np.vdot(out, own) / np.linalg.norm(out) / np.linalg.norm(own), abs=1e-6
        )
        assert row.value == value.text


def test_the_table_has_the_baseline_on_top_and_then_the_largest_effect(params):
    study = gx.ablate(gx.linen(MODEL, X), params, "**/kernel", VALUES)
    sizes = [row.numbers["relative_l2"] for row in study.ranked]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    lines = str(study).splitlines()
    assert lines[0] == "Model: 6 runs, one leaf at a time"
    assert [line.split()[0] for line in lines[2:]] == ["baseline", *(row.path for row in study.ranked)]


def test_all_floating_weights_of_a_module_change_together(params):
    study = gx.ablate(gx.linen(MODEL, X), params, ["block/*", "head"], gx.zeros(), each="module")
    assert [row.path for row in study] == ["", "block/norm", "block/up", "head"]
    names = ("params/block/norm/scale", "params/block/norm/bias", "batch_stats/block/norm/mean")
    assert set(study.rows[1].leaves) == {*names, "batch_stats/block/norm/var"}
    assert study.rows[3].numbers == {"relative_l2": 1.0, "cosine": 0.0}
    without = gx.ablate(lambda tree: 0, params, "**", gx.zeros(), each="module", exclude="**/norm/*")
    assert [row.path for row in without] == ["", "block", "block/up", "head"]
    alone = gx.ablate(gx.linen(MODEL, X), params, "params/block/norm", gx.zeros(), each="module", exclude="**/bias")
    assert alone.rows[1].leaves == ("params/block/norm/scale",)


def test_integers_stay_as_they_are_in_a_module():
    weights = {"layer": {"kernel": np.ones(3, "f4"), "steps": np.arange(3)}}
    (_, row) = gx.ablate(lambda tree: tree["layer"]["kernel"].sum(), weights, "layer", gx.scaled(2.0), each="module")
    assert (row.leaves, row.numbers) == (("layer/kernel",), {"<lambda>": 6.0})


def test_bare_params_are_taken_as_they_are():
    model, bare = nn.Dense(2), {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    (_, row) = gx.ablate(gx.linen(model, X), bare, "kernel", gx.zeros())
    assert (row.path, row.numbers["relative_l2"]) == ("kernel", 1.0)


def test_an_nnx_module_and_a_part_of_its_state():
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
            hidden = self.a(x)
            return {"hidden": hidden, "out": self.b(hidden)}

    net = Net(nnx.Rngs(0))
    whole = gx.ablate(net, net, "**/kernel", gx.zeros(), inputs=X)
    part = gx.ablate(net, nnx.state(net, nnx.Param), "**/kernel", gx.zeros(), inputs=X)
    assert [row.numbers for row in whole] == [row.numbers for row in part]
    assert [row.path for row in whole] == ["", "a/kernel", "b/kernel"]
    seen: list[Any] = []
    gx.ablate(net, net, "b/kernel", gx.scaled(3.0), inputs=X, metric=lambda out: seen.append(out) or 0.0)
    by_hand = nnx.jit(lambda module, x: module(x))(gx.replace(net, "b/kernel", gx.scaled(3.0)), X)
    assert all(np.array_equal(seen[-1][name], by_hand[name]) for name in by_hand)


# ---------------------------------------------------------------- functions of the weights


def test_a_function_gives_numbers_and_their_change(params):
    def evaluate(weights: Any) -> dict[str, Any]:
        out = MODEL.apply(weights, X)
        return {"loss": (out**2).mean(), "best": out.max()}

    study = gx.ablate(evaluate, params, "head/*", gx.zeros())
    own = {name: float(value) for name, value in evaluate(params).items()}
    assert study.baseline.numbers == own
    for row in study.rows[1:]:
        new = evaluate(gx.replace(params, row.path, gx.zeros()))
        assert row.numbers == {name: float(value) for name, value in new.items()}
        assert row.change == {name: float(value) - own[name] for name, value in new.items()}
    assert study.name == "evaluate"


def test_a_function_of_a_torch_state_dict_changes_tied_tensors_together():
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    x = torch.from_numpy(X)

    def forward(weights: Any) -> Any:
        return torch.func.functional_call(module, weights, (x,), tie_weights=False)

    study = gx.ablate(forward, module.state_dict(), "*.weight", gx.zeros())
    assert [row.leaves for row in study.rows[1:]] == [("0.weight", "1.weight")]
    assert study.rows[1].numbers["relative_l2"] > 0.1


def test_a_baseline_that_changes_is_marked(params):
    calls = iter(range(100))
    study = gx.ablate(lambda weights: next(calls), params, "head/*", gx.zeros())
    assert (study.deterministic, study.baseline.numbers, study.baseline.change) == (
        False,
        {"<lambda>": 0},
        {"<lambda>": 1},
    )
    assert "differ" in str(study)
    assert gx.ablate(lambda weights: 1, params, "head/*", gx.zeros()).deterministic


def test_values_that_are_not_finite_are_shown_and_rank_first(params):
    like = gx.linen(MODEL, X)
    study = gx.ablate(like, params, "head/*", [gx.zeros(), gx.constant(float("nan"))])
    assert [row.not_finite for row in study.ranked] == [20, 20, 0, 0]
    assert "20 values NaN or infinite" in study_text(study, width=110)
    assert json.loads(json.dumps(study.as_json(), allow_nan=False))["rows"][2]["numbers"] == {
        "relative_l2": "inf",
        "cosine": "nan",
    }


# ---------------------------------------------------------------- closed forms

WIDE = {"branch": {"kernel": np.eye(3) * 2, "bias": np.ones(3)}}  # float64


def residual(weights: Any) -> np.ndarray:
    return X + X @ weights["branch"]["kernel"] + weights["branch"]["bias"]


def distance(got: np.ndarray) -> float:
    return float(np.linalg.norm(got - residual(WIDE)) / np.linalg.norm(residual(WIDE)))


def test_a_leaf_that_takes_its_own_value_changes_nothing():
    own = [lambda old: old, gx.scaled(1.0), gx.mix(WIDE["branch"]["kernel"], 0.0)]
    study = gx.ablate(residual, WIDE, "branch/kernel", own)
    assert [row.numbers for row in study] == [{"relative_l2": 0.0, "cosine": 1.0}] * 4


def test_a_zeroed_branch_is_a_removed_one():
    seen: list[np.ndarray] = []
    gx.ablate(residual, WIDE, "branch", gx.zeros(), each="module", metric=kept(seen))
    np.testing.assert_array_equal(seen[-1], X)


def test_a_constant_kernel_gives_every_column_the_sum_of_its_row():
    (_, row) = gx.ablate(residual, WIDE, "branch/kernel", gx.constant(0.5))
    want = X + 0.5 * X.astype(np.float64).sum(1, keepdims=True) + 1.0
    assert row.numbers["relative_l2"] == pytest.approx(distance(want), rel=1e-12)


def test_noise_in_a_linear_layer_scales_the_effect():
    study = gx.ablate(residual, WIDE, "branch/kernel", [gx.add_normal(scale, seed=1) for scale in (0.25, 0.5, 2.0)])
    sizes = [row.numbers["relative_l2"] for row in study.rows[1:]]
    np.testing.assert_allclose(np.divide(sizes, sizes[0]), [1, 2, 8], rtol=1e-12)


# ---------------------------------------------------------------- cost


@contextmanager
def compilations() -> Iterator[list[str]]:
    """What XLA compiled."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.clear_event_listeners()


def test_all_rows_are_one_compilation_and_one_trace(params):
    traces: list[int] = []

    class Counted(Model):
        def __call__(self, x: jax.Array) -> jax.Array:
            traces.append(1)
            return super().__call__(x)

    with compilations() as seen:
        study = gx.ablate(gx.linen(Counted(), X), params, ["**/kernel", "**/bias"], VALUES)
    assert len(study) == 1 + 5 * 3
    assert (len(seen), len(traces)) == (1, 1)


def test_one_leaf_is_held_beside_the_weights():
    x = np.arange(512, dtype="f4")[None]
    layers = {name: {"kernel": jnp.asarray(np.eye(512, dtype="f4")), "bias": jnp.asarray(x[0])} for name in "abcd"}
    weights = {"params": layers}

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for name in "abcd":
                x = nn.Dense(512, name=name)(x)
            return x

    leaf = 512 * 512 * 4
    held: list[int] = []

    def measure(out: Any) -> float:
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return 0.0

    before = sum(array.nbytes for array in jax.live_arrays())
    gx.ablate(gx.linen(Deep(), x), weights, "**/kernel", [gx.zeros(), gx.scaled(2.0)], metric=measure)
    assert max(held) - before < 1.1 * leaf


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"selector": "**/nothing"}, PlanError, "matches nothing"),
        ({"selector": "**/kernel", "exclude": "**"}, PlanError, "excluded"),
        ({"selector": "**/kernel", "each": "module"}, PlanError, "selects leaves, not modules"),
        ({"selector": "blok", "each": "module"}, PlanError, "Near: block"),
        ({"selector": lambda path, leaf: True, "each": "module"}, UsageError, "selects no modules"),
        ({"selector": "block/up", "each": "module", "exclude": "**/block/**"}, PlanError, "no floating weights"),
        ({"each": "layer"}, UsageError, "'leaf', 'module', 'head'"),
        ({"values": []}, UsageError, "no value"),
        ({"what": MODEL}, UsageError, "holds no example"),
        ({"what": Model}, UsageError, "the class Model"),
        ({"what": gx.linen(MODEL, jnp.ones((2, 3)))}, UsageError, "is no batch"),
        ({"what": gx.linen(MODEL, jax.ShapeDtypeStruct((2, 3), "float32"))}, UsageError, "only the shape"),
        ({"what": lambda weights: 1.0, "inputs": X}, UsageError, "its own inputs"),
        ({"what": lambda weights: "text"}, UsageError, "nothing to compare"),
        ({"metric": lambda out: out}, UsageError, "the metric gives"),
        ({"what": gx.linen(MODEL, np.eye(9, dtype="f4"))}, PlanError, "does not hold the weights of the model"),
    ],
)
def test_what_cannot_be_run_is_refused(params, arguments, error, words):
    given = {"what": gx.linen(MODEL, X), "params": params, "selector": "**/kernel", "values": gx.zeros()} | arguments
    with pytest.raises(error, match=words):
        gx.ablate(**given)


def test_a_model_that_fails_is_named(params):
    class Broken(Model):
        def __call__(self, x: jax.Array) -> jax.Array:
            raise ValueError("no such luck")

    with pytest.raises(ModelError, match="no such luck"):
        gx.ablate(gx.linen(Broken(), X), params, "**/kernel", gx.zeros())


# ---------------------------------------------------------------- the page


def test_the_page_shows_every_row_and_replaces_only_its_own_kind(params, tmp_path):
    study = gx.ablate(gx.linen(MODEL, X), params, "**/kernel", VALUES)
    page = tmp_path / "study.html"
    study.save_html(page)
    study.save_html(page)
    text = page.read_text()
    assert all(text.count(row.path) >= 3 and row.value in text for row in study.rows[1:])
    assert "http" not in text.replace("http-equiv", "")
    page.write_text("mine")
    with pytest.raises(gx.errors.StorageError, match="is not an ablation study"):
        study.save_html(page)


def test_values_that_do_not_fit_are_all_listed_before_anything_runs(params):
    runs: list[int] = []

    def forward(weights: Any) -> float:
        runs.append(1)
        return 0.0

    weights = {**params, "counters": {"step": jnp.zeros((3,), "int32")}}
    values = [gx.quantized(4), gx.zeros(), gx.scaled(2.0), np.zeros((7, 5), "f4"), 0.5]
    with pytest.raises(PlanError, match="values do not fit leaves") as caught:
        gx.ablate(forward, weights, ["counters/step", "head/*"], values)
    found = [(failure.key, failure.what.split(" ")[0]) for failure in caught.value.failures]
    assert runs == []
    assert sorted(found) == sorted(
        [
            *(("counters/step", word) for word in ("quantized(4):", "scaled(2):", "has", "got")),
            *(("params/head/bias", word) for word in ("quantized(4):", "has", "got")),
            ("params/head/kernel", "got"),
        ]
    )
    assert "exclude" in str(caught.value)


def test_traced_weights_are_refused():
    with pytest.raises(UsageError, match="is traced, and an ablation runs on values"):
        jax.jit(lambda tree: gx.ablate(jnp.sum, tree, "w", gx.zeros()))({"w": jnp.ones(2)})


def test_the_model_tells_what_the_axes_of_a_leaf_are():
    model = nn.MultiHeadDotProductAttention(2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X[None, :, :2])
    draw = np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), shapes)
    like, seen = gx.linen(model, X[None, :, :2]), list[np.ndarray]()
    gx.ablate(like, weights, "**/query/kernel", gx.quantized(3), metric=kept(seen))
    edited = gx.replace(weights, "**/query/kernel", gx.quantized(3), like=like)
    assert seen[-1].tobytes() == np.asarray(jax.jit(model.apply)(edited, X[None, :, :2])).tobytes()
    with pytest.raises(PlanError, match="has no input channels"):
        gx.ablate(like, weights, "query", gx.quantized(3), each="module")
    with pytest.raises(PlanError, match=r"A function of the weights shows no modules: give gx\.linen"):
        gx.ablate(lambda weights: model.apply(weights, X[None, :, :2]), weights, "query/kernel", gx.quantized(3))


def test_a_donor_is_opened_once(params, tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    from graftax.surgery import donors

    flat = {f"params/head/{name}": np.asarray(leaf) * 2 for name, leaf in params["params"]["head"].items()}
    save_file(flat, tmp_path / "donor.safetensors")
    opened: list[Any] = []
    own = donors.FromCheckpoint.way
    monkeypatch.setattr(
        donors.FromCheckpoint, "way", lambda self, *rest: opened.append(self.source) or own(self, *rest)
    )
    study = gx.ablate(gx.linen(MODEL, X), params, "head/*", gx.from_checkpoint(tmp_path / "donor.safetensors"))
    assert len({id(source) for source in opened}) == 1
    assert [row.numbers["relative_l2"] > 0 for row in study] == [False, True, True]


def test_a_donor_of_the_whole_leaf_gives_a_part_of_itself(params):
    """A part in a selector: what is checked before the runs is what `replace` takes."""
    donor = jax.tree.map(lambda leaf: leaf * 2, params)
    for value in (gx.from_checkpoint(donor), gx.mix(donor, 0.5)):
        seen = list[np.ndarray]()
        gx.ablate(gx.linen(MODEL, X), params, "head/kernel[:, 0]", value, metric=kept(seen))
        edited = gx.replace(params, "head/kernel[:, 0]", value)
        assert seen[-1].tobytes() == np.asarray(jax.jit(MODEL.apply)(edited, X)).tobytes()
    with pytest.raises(PlanError, match="does not fit"):
        gx.ablate(gx.linen(MODEL, X), params, "head/kernel[:, 0]", gx.from_checkpoint(donor, "params/head/bias"))
