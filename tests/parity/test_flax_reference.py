"""gx.check_parity with a Flax model as its reference: Linen against NNX, scanned against unscanned, both ways; what it
finds, and what its float64 run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import graftax as gx
from graftax.errors import ParityError, UsageError
from graftax.parity.flax_float64 import Float64Runner, in_a_row
from graftax.parity.linen_runner import LinenRunner
from graftax.parity.metrics import relative_l2

from .flax_taps import Listener

X = np.random.default_rng(0).normal(size=(4, 6)).astype("f4")


class Block(nn.Module):
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        x = x.astype(self.dtype or x.dtype)
        return x + nn.Dense(x.shape[-1], name="fc")(nn.LayerNorm(epsilon=self.epsilon, name="norm")(x)), None


class Linen(nn.Module):
    """Blocks in a scan, or one after the other."""

    scanned: bool = True
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8, name="first")(x)
        if self.scanned:
            stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(self.epsilon, self.dtype, name="layers")(x, None)
        else:
            for i in range(3):
                x, _ = Block(self.epsilon, self.dtype, name=f"layers_{i}")(x)
        return nn.Dense(5, name="head")(nn.gelu(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm, self.fc = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.fc(self.norm(x))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(jax.nn.gelu(x))


SCANNED, UNROLLED = gx.linen(Linen(), X), gx.linen(Linen(False), X)


@pytest.fixture(scope="module")
def stacked() -> Any:
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: Linen().init(jax.random.key(0), X))
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype("f4") * 0.5 + 0.1, shapes)


@pytest.fixture(scope="module")
def apart(stacked: Any) -> Any:
    return gx.port(stacked, UNROLLED)


@pytest.fixture(scope="module")
def net(apart: Any) -> Net:
    return gx.port(apart, nnx.eval_shape(lambda: Net(nnx.Rngs(0))))


def test_scanned_and_unscanned(stacked: Any, apart: Any):
    for report in (
        gx.check_parity(SCANNED, UNROLLED, X, apart, source=stacked),
        gx.check_parity(UNROLLED, Linen(), X, stacked, source=apart),
    ):
        assert report, str(report)
        assert len(report.layers) == 12
        assert max(row.out_ratio for row in report.layers) < 3
        assert not report.not_traced
        assert report.paired[1:] in ((4, 4), (8, 8))
    pairs = {(str(row.site_torch), str(row.site_flax)) for row in report.layers}
    assert {
        ("layers_0/fc", "layers/fc"),
        ("layers_2/fc", "layers/fc (call 3)"),
        ("layers_1", "layers (call 2)"),
    } <= pairs


def test_linen_and_nnx(net: Net, apart: Any):
    report = gx.check_parity(UNROLLED, net, X)
    assert report, str(report)
    assert "the reference's weights are those of the Flax model, ported by the plan" in report.notes
    assert gx.check_parity(net, Linen(False).bind(apart), X)  # nothing is given: the reference's weights are ported
    wrong = gx.replace(net, "layers/1/fc/kernel", lambda leaf: np.asarray(leaf).T.copy())
    report = gx.check_parity(Linen(False).bind(apart), wrong, X)
    assert not report
    assert (report.first.site_torch.path, report.first.site_flax.path, report.where) == (
        "layers_1/fc",
        "layers/1/fc",
        "out",
    )
    assert [row.path for row in report.weights] == ["layers/1/fc/kernel"]


def test_a_setting_is_found(apart: Any, tmp_path: Path):
    report = gx.check_parity(Linen(False).bind(apart), gx.linen(Linen(False, epsilon=1e-2), X), X, apart)
    text = str(report)
    assert report.first.site_flax.path == "layers_0/norm"
    assert text.startswith("Parity fails: Linen (reference) and Linen (Flax) diverge.\n")
    assert "epsilon is 0.01, should be 1e-06" in text
    assert "torch" not in text.replace("explained against torch", "")
    assert json.loads(json.dumps(report.as_json()))["reference"] == "flax"
    report.save_html(tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "<small>reference</small>" in page
    assert page.count("torch") == 1  # where the cause is not looked for
    with pytest.raises(ParityError, match=r"\(reference\)"):
        gx.assert_parity(Linen(False).bind(apart), gx.linen(Linen(False, epsilon=1e-2), X), X, apart)


def test_float64_follows_a_model_that_computes_in_bfloat16(stacked: Any):
    half = gx.linen(Linen(dtype=jnp.bfloat16), X)
    plain, wide = (Float64Runner(LinenRunner(like, stacked)).run((X,), {}) for like in (SCANNED, half))
    np.testing.assert_array_equal(plain, wide)
    assert relative_l2(LinenRunner(half, stacked).run((X,), {}), plain) > 1e-4
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, "f8"), stacked)
        exact = Linen().apply(weights, jnp.asarray(X, "f8"))
    assert relative_l2(plain, np.asarray(exact)) < 2**-23
    report = gx.check_parity(half, SCANNED, X, stacked, source=stacked)
    assert report  # within the reference's own error
    assert any("half precision" in note for note in report.notes)


def test_float64_sees_the_calls_that_float32_sees(stacked: Any):
    narrow, wide = Listener(), Listener()
    runner = LinenRunner(SCANNED, stacked)
    runner.run((X,), {}, watch=list(runner.modules), tap=narrow)
    Float64Runner(runner).run((X,), {}, watch=list(runner.modules), tap=wide)
    assert narrow.order == wide.order
    assert all(
        out.dtype == np.float32 for out in (wide.outputs[site] for site in wide.outputs) if hasattr(out, "dtype")
    )


def test_float64_takes_loops_and_branches():
    class Loops(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            scale = self.param("scale", nn.initializers.ones, ())
            x = jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x * scale)
            _, x = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 1.1), (0, x))
            x = jnp.sort(x.at[1].add(2.0), -1)[:, ::-1] * jnp.where(x > 0, 1.0, 0.5)
            x = nn.max_pool(nn.Conv(3, (3,))(x[..., None]), (2,), (2,))
            return jax.lax.scan(lambda c, row: (c + row, c * row), x[0], x, reverse=True), jnp.argmax(x, 1)

    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf), Loops().init(jax.random.key(0), X))
    runner = LinenRunner(gx.linen(Loops(), X), weights)
    got, want = Float64Runner(runner).run((X,), {}), runner.run((X,), {})
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_error_of_summing_is_that_of_a_sequential_sum():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(1, 512)), draw.normal(size=(512, 400))
    partial = np.cumsum(a[0][:, None] * b, 0)
    exact = (partial**2).sum(0)
    assert np.median(in_a_row(a, b)[0] / exact) == pytest.approx(1, abs=0.1)


def test_a_reference_without_weights_is_refused():
    with pytest.raises(UsageError, match="has no values"):
        gx.check_parity(SCANNED, UNROLLED, X)
