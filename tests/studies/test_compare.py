"""gx.compare: which modules move, by how much, what is refused, and the text, the JSON and the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from safetensors.numpy import save_file

import graftax as gx
from graftax.cli import run
from graftax.errors import PlanError, StorageError, UsageError
from graftax.parity.metrics import cosine, kl_of_rows, relative_l2
from graftax.studies.comparison import Comparison, ModuleRow

X = np.random.default_rng(0).normal(size=(4, 6)).astype("f4")


class Block(nn.Module):
    dtype: Any = None
    branch: bool = True

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        if not self.branch:
            return x, None
        return x + nn.Dense(x.shape[-1], name="out", dtype=self.dtype)(nn.LayerNorm(name="norm")(x)), None


class Model(nn.Module):
    """Compact and setup, a scan of rematerialised blocks, a shared module, a method besides `__call__`, a nest."""

    dtype: Any = None
    branch: bool = True

    def setup(self) -> None:
        self.embed = nn.Embed(6, 5)
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        self.layers = stack(self.dtype)
        self.block = Block(self.dtype, self.branch)
        self.shared = nn.Dense(5)

    def __call__(self, x: Any) -> Any:
        h, _ = self.layers(x @ self.embed.embedding, None)
        h, _ = self.block(self.shared(h))
        return {"logits": self.embed.attend(self.shared(h)), "hidden": (h, jnp.argmax(h, -1))}


def linear(draw: np.random.Generator, *stack: int) -> nnx.Linear:
    """A Linear with drawn weights, stacked along a first axis; nothing is compiled for it."""
    made = nnx.eval_shape(lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    made.kernel = nnx.Param(jnp.asarray(draw.normal(size=(*stack, 4, 4)), "f4"))
    made.bias = nnx.Param(jnp.asarray(draw.normal(size=(*stack, 4)), "f4"))
    return made


class Net(nnx.Module):
    """A scanned stack, an ensemble inside vmap, a list, a module at two paths."""

    def __init__(self) -> None:
        draw = np.random.default_rng(2)
        self.layers, self.members = linear(draw, 3), linear(draw, 2)
        self.blocks = nnx.List([linear(draw), linear(draw)])
        self.again = self.blocks[0]

    def __call__(self, x: Any) -> Any:
        x = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        x = nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x).mean(0)
        for block in self.blocks:
            x = block(x)
        return self.again(x)


def drawn(like: Any) -> Any:
    """Variables with another value in every place; nothing is compiled for it."""
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: like.module.init(jax.random.key(0), *like.args))
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) * 0.5 + 0.1, leaf.dtype), shapes)


LIKE = gx.linen(Model(), X)


@pytest.fixture(scope="module")
def variables() -> Any:
    return drawn(LIKE)


@pytest.fixture(scope="module")
def net() -> Net:
    return Net()


@pytest.fixture(scope="module")
def edited(variables: Any) -> Comparison:
    """One kernel inside the scan, halved in its second iteration alone."""
    kernel = variables["params"]["layers"]["out"]["kernel"]
    b = gx.replace(variables, {"params/layers/out/kernel": kernel.at[1].multiply(0.5)})
    return gx.compare(variables, b, like=LIKE, logits=lambda out: out["logits"])


def row(found: Comparison, path: str, call: int = 0) -> ModuleRow:
    return next(one for one in found.rows if (one.path, one.call) == (path, call))


def moved(found: Comparison) -> set[str]:
    """The calls whose own output moves."""
    return {one.name for one in found.rows if one.itself is not None and one.itself.error > 0}


# ---------------------------------------------------------------- which modules move


def test_equal_weights_move_nothing(variables: Any, net: Net):
    again = jax.tree.map(jnp.array, variables)
    for found in (
        gx.compare(variables, again, like=LIKE, logits=True),
        gx.compare(net, nnx.clone(net), inputs=X[:, :4]),
    ):
        assert found.equal
        assert not found.leaves
        assert {(s.error, s.cosine) for one in found.rows for s in (one.itself, one.free) if s} == {(0.0, 1.0)}
        assert all(one.itself is not None and one.free is not None for one in found.rows)
        assert found.logits is None or (found.logits.kl, found.logits.flips) == (0.0, 0)


def test_only_the_edited_module_and_those_around_it_move(edited: Comparison):
    assert moved(edited) == {"(the model)", "layers (call 2)", "layers/out (call 2)"}
    assert [one.name for one in edited.rows] == [
        "(the model)", "layers", "layers/norm", "layers/out", "layers (call 2)", "layers/norm (call 2)",
        "layers/out (call 2)", "shared", "block", "block/norm", "block/out", "shared (call 2)", "embed",
    ]  # fmt: skip
    assert row(edited, "layers/out").free == row(edited, "layers").free == row(edited, "layers/norm", 1).free
    assert all(one.free is not None and one.free.error > 0 for one in edited.rows[6:])
    assert [one.path for one in edited.leaves] == ["params/layers/out/kernel"]
    assert edited.leaves[0].differing == 25
    assert {one.name for one in edited.rows if one.edited} == {"layers/out", "layers/out (call 2)"}
    assert not edited.equal


def test_a_shared_module_moves_in_each_of_its_calls(variables: Any):
    b = gx.replace(
        variables, {"params/shared/bias": gx.add_normal(1.0, seed=0), "params/embed/embedding": gx.scaled(2.0)}
    )
    found = gx.compare(variables, b, like=LIKE)
    assert moved(found) == {"(the model)", "shared", "shared (call 2)", "embed"}
    assert row(found, "embed").itself.error == pytest.approx(1.0, rel=1e-5)  # twice the embedding, twice the logits
    assert row(found, "embed").itself.cosine == pytest.approx(1.0)


def test_nnx_scan_vmap_and_a_module_at_two_paths(net: Net):
    x = X[:, :4]
    found = gx.compare(net, gx.replace(net, "layers/kernel", gx.scaled(0.5)), inputs=x)
    assert moved(found) == {"(the model)", "layers", "layers (call 2)", "layers (call 3)"}
    assert found.not_traced == {"members": "inside vmap"}
    inside = gx.compare(
        nnx.state(net), nnx.state(gx.replace(net, "members/bias", gx.constant(1.0))), like=net, inputs=x
    )
    assert moved(inside) == {"(the model)"}
    twice = gx.compare(net, gx.replace(net, "again/bias", gx.constant(1.0)), inputs=x)
    assert moved(twice) == {"(the model)", "again", "again (call 2)"}


def test_bfloat16_compute(variables: Any):
    like = gx.linen(Model(jnp.bfloat16), X)
    b = gx.replace(variables, "params/block/out/kernel", gx.scaled(0.5))
    found = gx.compare(variables, b, like=like)
    assert moved(found) == {"(the model)", "block", "block/out"}


# ---------------------------------------------------------------- by how much


def test_errors_are_those_of_the_runs_done_by_hand(variables: Any, edited: Comparison):
    kernel = variables["params"]["layers"]["out"]["kernel"]
    b = gx.replace(variables, {"params/layers/out/kernel": kernel.at[1].multiply(0.5)})
    with jax.default_matmul_precision("highest"):
        ours, theirs = (LIKE.module.apply(one, X) for one in (variables, b))
        first = jax.tree.map(lambda leaf: leaf[0], variables["params"]["layers"])
        second = jax.tree.map(lambda leaf: leaf[1], variables["params"]["layers"])
        changed = jax.tree.map(lambda leaf: leaf[1], b["params"]["layers"])
        arrives = Block().apply({"params": first}, X @ variables["params"]["embed"]["embedding"])[0]
        block = [Block().apply({"params": one}, arrives)[0] for one in (second, changed)]
    outputs = {one.path: one for one in edited.outputs}
    assert list(outputs) == ["logits", "hidden/0", "hidden/1"]
    close = {"rel": 1e-4}
    assert outputs["logits"].shift.error == pytest.approx(relative_l2(theirs["logits"], ours["logits"]), **close)
    assert outputs["logits"].shift.cosine == pytest.approx(cosine(theirs["logits"], ours["logits"]), abs=1e-6)
    assert outputs["hidden/0"].max_abs == pytest.approx(np.abs(theirs["hidden"][0] - ours["hidden"][0]).max(), **close)
    assert row(edited, "layers", 1).itself.error == pytest.approx(relative_l2(block[1], block[0]), **close)
    assert row(edited, "").free.error == row(edited, "").itself.error == max(one.shift.error for one in edited.outputs)
    a, b = (np.asarray(jax.nn.log_softmax(one["logits"])) for one in (ours, theirs))
    kl = (np.exp(a) * (a - b)).sum(-1)
    assert edited.logits is not None
    assert edited.logits.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert edited.logits.kl_most == pytest.approx(kl.max(), rel=1e-3)
    assert edited.logits.flips == int((a.argmax(-1) != b.argmax(-1)).sum())
    assert edited.logits.positions == 4


def test_a_branch_of_zeros_is_no_branch(variables: Any):
    b = gx.replace(variables, "params/block/out/*", gx.zeros(), expect=2)
    found = gx.compare(variables, b, like=LIKE)
    bare = {"params": {name: leaf for name, leaf in variables["params"].items() if name != "block"}}
    with jax.default_matmul_precision("highest"):
        without = Model(branch=False).apply(bare, X)["logits"]
        whole = LIKE.module.apply(variables, X)["logits"]
    assert found.outputs[0].shift.error == pytest.approx(relative_l2(without, whole), rel=1e-5)
    assert row(found, "block/out").itself.error == 1.0
    assert row(found, "block/out").itself.cosine == 0.0


def test_nan_is_infinite(variables: Any):
    b = gx.replace(variables, {"params/shared/bias": np.full(5, np.nan, "f4")})
    found = gx.compare(variables, b, like=LIKE, logits=True)
    assert row(found, "shared").itself.error == np.inf
    assert np.isnan(row(found, "shared").itself.cosine)
    assert found.outputs[0].max_abs == np.inf
    assert found.logits is not None
    assert found.logits.kl == np.inf
    json.dumps(found.as_json(), allow_nan=False)


def test_measures():
    a = np.array([[1.0, 0, 0], [0, np.inf, 0]], "f4")
    assert cosine(a, a) == 1.0
    assert cosine(np.zeros(3), np.ones(3)) == 0.0
    assert cosine(-np.ones(3, "f2"), np.ones(3)) == pytest.approx(-1)
    assert cosine(np.full(2, 1e30), np.full(2, 1e-30)) == pytest.approx(1)
    assert np.isnan(cosine(np.array([np.nan, 1]), np.ones(2)))
    assert np.isnan(cosine(np.ones(2), np.ones(3)))
    assert kl_of_rows(np.array([[0.0, -np.inf]]), np.array([[0.0, -np.inf]])).tolist() == [0.0]
    assert kl_of_rows(np.array([[0.0, 0]]), np.array([[0.0, -np.inf]])).tolist() == [np.inf]
    assert kl_of_rows(np.array([[0.0, 0]]), np.array([[0.0, np.nan]])).tolist() == [np.inf]


# ---------------------------------------------------------------- what is refused


def refused(match: str, *given: Any, error: Any = UsageError, **options: Any) -> None:
    with pytest.raises(error, match=match):
        gx.compare(*given, **options)


def test_an_example_that_is_no_batch_is_refused(variables: Any):
    for value in (np.ones((4, 6), "f4"), jnp.zeros((4, 6))):
        refused("argument 0 holds one value everywhere", variables, variables, like=gx.linen(Model(), value))
    refused("only the shape", variables, variables, like=gx.linen(Model(), jax.ShapeDtypeStruct((4, 6), "float32")))
    refused("no example", variables, variables, like=gx.linen(Model()))
    refused("has a shape, but no values", variables, variables, like=LIKE, inputs=jax.ShapeDtypeStruct((4, 6), "f4"))
    refused("an nnx.Module has no example", Net(), Net())
    constant = gx.linen(Model(), np.ones((4, 6), "f4"))
    assert gx.compare(variables, variables, like=constant, inputs=np.ones((4, 6), "f4")).equal  # they are meant


def test_a_mask_of_ones_beside_a_real_batch_is_an_example():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x: Any, mask: Any, train: bool = True) -> Any:
            assert not train
            return nn.Dense(2)(x) * mask[:, None]

    like = gx.linen(Masked(), X, np.ones(4, "i4"), train=False)
    weights = drawn_of(Masked(), X, np.ones(4, "i4"), train=False)
    assert gx.compare(weights, weights, like=like).equal


def drawn_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), shapes)


def test_weights_that_do_not_fit_are_refused(variables: Any, tmp_path: Path):
    params = variables["params"]
    less = {name: leaf for name, leaf in params.items() if name != "shared"}
    refused("like is missing", variables, variables)
    refused("b does not hold.*\n.*shared/kernel.* is a missing key", variables, less, like=LIKE, error=PlanError)
    refused("extra.*unexpected key", {**params, "extra": X}, params, like=LIKE, error=PlanError)
    wrong = gx.replace(variables, {"params/shared/bias": np.zeros(5, "f4")})
    wrong["params"]["shared"]["bias"] = np.zeros(6, "f4")
    refused("has another shape", variables, wrong, like=LIKE, error=PlanError)
    save_file({"shared.weight": np.zeros((5, 5), "f4")}, tmp_path / "torch.safetensors", {"format": "pt"})
    refused("is a torch checkpoint", tmp_path / "torch.safetensors", variables, like=LIKE, error=PlanError)
    abstract = jax.eval_shape(lambda: variables)
    refused("no values", abstract, variables, like=LIKE, error=PlanError)


def test_an_abstract_nnx_model_whose_attributes_are_called_module_and_rngs():
    class Holder(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.module = nnx.Linear(4, 2, rngs=rngs)
            self.rngs = rngs

        def __call__(self, x: Any) -> Any:
            return self.module(x)

    weights = nnx.state(Holder(nnx.Rngs(0)), nnx.Param)
    like = nnx.eval_shape(lambda: Holder(nnx.Rngs(0)))
    found = gx.compare(weights, weights, like=like, inputs=X[:, :4])
    assert (found.model, found.equal) == ("Holder", True)


def test_two_nnx_models_are_refused():
    def norm(epsilon: float) -> nnx.Module:
        return nnx.LayerNorm(4, epsilon=epsilon, rngs=nnx.Rngs(0))

    refused("epsilon differs.*expected 1e-06.*found 1e-05", norm(1e-6), norm(1e-5), inputs=X[:, :4])
    assert gx.compare(norm(1e-6), norm(1e-6), inputs=X[:, :4]).equal


def test_logits_must_be_one_array(variables: Any, net: Net):
    class Pair(nnx.Module):
        def __init__(self) -> None:
            self.scale = nnx.Param(jnp.ones(4))

        def __call__(self, x: Any) -> Any:
            return x * self.scale, x

    refused("which of the 2 floating arrays", Pair(), Pair(), inputs=X[:, :4], logits=True)
    refused("KeyError", Pair(), Pair(), inputs=X[:, :4], logits=lambda out: {}["logits"])
    refused("must return one array", Pair(), Pair(), inputs=X[:, :4], logits=lambda out: out)
    refused("two classes or more", Pair(), Pair(), inputs=X[:, :4], logits=lambda out: out[0][:, :1])


def test_a_comparison_has_no_truth_value(edited: Comparison):
    with pytest.raises(TypeError, match=r"ask \.equal"):
        bool(edited)


# ---------------------------------------------------------------- text, JSON, page


def test_text_and_json(edited: Comparison):
    text = str(edited)
    assert text.startswith("Model with two sets of weights: 1 of 11 leaves differs.\nThe outputs move, ")
    assert re.search(r"^  ●  layers/out \(call 2\) +Dense +[1-9.]+e-01 +0\.[0-9]+ +[1-9.]+e-01 ", text, re.MULTILINE)
    assert re.search(r"^     block/norm +LayerNorm +0 +1 +[1-9]", text, re.MULTILINE)
    assert "params/layers/out/kernel  2×5×5  float32  25 of 50" in text
    assert repr(edited) == "<Comparison: Model with two sets of weights: 1 of 11 leaves differs>"
    data = json.loads(json.dumps(edited.as_json(), allow_nan=False))
    assert data["equal"] is False
    assert [one["module"] for one in data["rows"]] == [one.path for one in edited.rows]
    assert data["rows"][6]["itself"] == row(edited, "layers/out", 1).itself.error
    assert data["leaves"] == {"differ": [edited.leaves[0].as_json()], "of": 11}


def test_a_long_table_shows_what_moves():
    from dataclasses import replace

    from graftax.studies.comparison import Shift
    from graftax.studies.comparison_text import comparison_text

    still, far = Shift(0.0, 1.0), Shift(0.25, 0.9)
    rows = [
        ModuleRow(f"layer_{i}", 0, "Dense", 1, far if i == 70 else still, far if i > 69 else still) for i in range(99)
    ]
    found = Comparison("Deep", tuple(rows), ())
    text = comparison_text(found, width=100)
    assert "layer_70 " in text
    assert re.search(r"… 69 calls, at most +0 +0$", text, re.MULTILINE)
    assert re.search(r"… 28 calls, at most +0 +2\.5e-01$", text, re.MULTILINE)
    assert len(text.splitlines()) < 12
    assert comparison_text(replace(found, rows=()), ascii=True).isascii()


def test_the_page(edited: Comparison, tmp_path: Path):
    page = tmp_path / "out.html"
    edited.save_html(page)
    edited.save_html(page)  # its own page is replaced
    text = page.read_text()
    assert text.count('<tr class="row leaf"') == len(edited.rows)
    links = set(re.findall(r'href="#([^"]+)"', text))
    assert links  # the marks of the chart
    assert links <= set(re.findall(r'id="([^"]+)"', text))
    assert "http" not in text.replace("http-equiv", "")
    assert "●" in text
    other = tmp_path / "mine.html"
    other.write_text("mine")
    with pytest.raises(StorageError):
        edited.save_html(other)


# ---------------------------------------------------------------- the command line

FACTORY = """
import numpy as np
import graftax as gx
from flax import linen as nn

def model():
    return gx.linen(nn.Dense(3), np.random.default_rng(0).normal(size=(5, 2)).astype("f4"))
"""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "dense_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    draw = np.random.default_rng(0)
    a = {"params/kernel": draw.normal(size=(2, 3)).astype("f4"), "params/bias": np.zeros(3, "f4")}
    save_file(a, "a.safetensors")
    save_file({**a, "params/kernel": -a["params/kernel"]}, "b.safetensors")
    save_file({"params/kernel": a["params/kernel"]}, "c.safetensors")
    given = ["compare", "--flax", "dense_factory:model", "a.safetensors"]
    assert run([*given, "b.safetensors", "--logits", "--report", "out.html", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["result"]["rows"][0]["itself"] == pytest.approx(2.0)
    assert document["result"]["rows"][0]["itself_cosine"] == pytest.approx(-1.0)
    assert document["result"]["logits"]["positions"] == 5
    assert Path("out.html").is_file()
    np.savez("x.npz", arg0=np.ones((2, 2), "f4"))
    assert run([*given, "a.safetensors", "--inputs", "x.npz"]) == 0
    assert "all leaves are equal" in capsys.readouterr().out
    assert run([*given, "c.safetensors"]) == 1
    assert "c.safetensors" in (error := capsys.readouterr().err)
    assert "params/bias" in error
    assert run([*given, "missing.safetensors"]) == 5
    assert run(["compare", "--flax", "a.safetensors", "a.safetensors", "b.safetensors"]) == 2
    assert run([*given, "b.safetensors", "--report", "a.safetensors"]) == 5
    sys.modules.pop("dense_factory", None)
