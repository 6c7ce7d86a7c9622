"""Ports within one side: what the settings and classes of both live modules say about the axes of a leaf."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graftax as gx

torch = pytest.importorskip("torch")
nn = torch.nn


def holder(layer: Any) -> Any:
    made = nn.Module()
    made.fc = layer
    return made


def own(turned: bool, i: int = 6, o: int = 6) -> Any:
    """A layer of a class of the user's own: the setting `turned` says how its matrix lies."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned = turned
            self.weight = nn.Parameter(torch.randn(o, i) if turned else torch.randn(i, o))
            self.bias = nn.Parameter(torch.randn(o))

        def forward(self, x: Any) -> Any:
            return x @ (self.weight.T if self.turned else self.weight) + self.bias

    return Own()


class Closed:
    """Two classes of one name, whose code is equal and whose closures differ."""

    @staticmethod
    def made(turned: bool) -> Any:
        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(6, 6))

            def forward(self, x: Any) -> Any:
                return x @ (self.weight.T if turned else self.weight)

        return Layer()


SAME = {
    "linear": (nn.Linear(6, 6), nn.Linear(6, 6)),
    "own class, defined twice": (own(True), own(True)),
    "transposed convolution of another stride": (nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2, stride=2)),
    "attention": (nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, batch_first=True)),
    "table": (nn.Embedding(6, 6), nn.Embedding(6, 6, padding_idx=0)),
    "recurrent": (nn.LSTM(4, 4), nn.LSTM(4, 4, batch_first=True)),
    "layer that the table does not list": (nn.Bilinear(4, 4, 4), nn.Bilinear(4, 4, 4)),
}


@pytest.mark.parametrize("name", SAME)
def test_what_one_class_stores_alike_is_copied(name: str) -> None:
    plan = gx.plan(*map(holder, SAME[name]))
    assert plan.complete, str(plan)
    assert not any(entry.ops for entry in plan.entries)


APART = {
    "own class into Linear": lambda: (own(False), nn.Linear(6, 6)),
    "Linear into own class": lambda: (nn.Linear(6, 6), own(True)),
    "settings": lambda: (own(True), own(False)),
    "closures": lambda: (Closed.made(True), Closed.made(False)),
    "a convolution and a transposed one": lambda: (nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)),
}


@pytest.mark.parametrize("name", APART)
def test_matrices_of_classes_that_differ_are_asked_about(name: str) -> None:
    source, like = map(holder, APART[name]())
    plan = gx.plan(source, like)
    (question,) = plan.questions
    assert (question.kind, question.targets) == ("layout", ("fc.weight",))
    weight = source.fc.weight.detach().numpy()
    for candidate in question.candidates:
        answered = gx.plan(source, like, rules=candidate.rule)
        assert answered.complete, str(answered)
    kept, turned = (gx.plan(source, like, rules=c.rule).run(source)["fc.weight"] for c in question.candidates[:2])
    np.testing.assert_array_equal(kept, weight)
    assert not np.array_equal(turned, weight)


def test_the_one_order_that_fits_is_taken() -> None:
    source, like = holder(own(False, 4, 6)), holder(nn.Linear(4, 6))
    x = torch.randn(3, 4)
    want = source.fc(x)
    like.load_state_dict(gx.port(source, like))
    torch.testing.assert_close(like.fc(x), want)


def test_one_class_of_another_size_does_not_fit() -> None:
    class Product(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(i, o))

        def forward(self, x: Any) -> Any:
            return x @ self.weight

    plan = gx.plan(holder(Product(4, 6)), holder(Product(6, 4)))
    assert not plan.complete
    assert not plan.entries


def _up(kind: str, transpose: bool, outs: int) -> Any:
    jnp = pytest.importorskip("jax.numpy")
    linen, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")
    how: Any = {"padding": "SAME", "transpose_kernel": transpose}
    if kind == "nnx":
        return nnx.eval_shape(lambda: nnx.ConvTranspose(4, outs, (3, 2), (2, 2), **how, rngs=nnx.Rngs(0)))
    return gx.linen(linen.ConvTranspose(outs, (3, 2), (2, 2), **how), jnp.zeros((1, 3, 3, 4)))


@pytest.mark.parametrize("outs", [4, 6], ids=["square", "rectangular"])
@pytest.mark.parametrize(("one", "other"), [("nnx", "nnx"), ("linen", "nnx"), ("nnx", "linen"), ("linen", "linen")])
def test_a_transposed_convolution_obeys_its_setting(one: str, other: str, outs: int) -> None:
    for first in (True, False):
        plans = [
            gx.plan(_up(one, first, outs), _up(other, second, outs), inputs=False) for second in (first, not first)
        ]
        assert all(plan.complete for plan in plans), str(plans[1])
        assert not any(entry.ops for entry in plans[0].entries)
        (kernel,) = [entry for entry in plans[1].entries if "kernel" in entry.targets[0]]
        assert [op.name for op in kernel.ops] == ["rearrange", "flip"]


def test_the_converted_kernel_makes_the_same_outputs() -> None:
    jax = pytest.importorskip("jax")
    x = np.random.default_rng(0).standard_normal((1, 3, 3, 4)).astype(np.float32)
    first, second = (_up("linen", transpose, 4) for transpose in (True, False))
    weights = {"params": {"kernel": np.random.default_rng(1).standard_normal((3, 2, 4, 4)).astype(np.float32)}}
    weights["params"]["bias"] = np.arange(4, dtype=np.float32)
    with jax.default_matmul_precision("highest"):
        for one, other in ((first, second), (second, first)):
            made = gx.plan(one, other, inputs=False).run(weights)
            np.testing.assert_allclose(other.module.apply(made, x), one.module.apply(weights, x), atol=1e-5)
