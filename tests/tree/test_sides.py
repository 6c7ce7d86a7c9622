"""The side of a checkpoint: declared, told by all names, or asked for; the plan never depends on the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graftax as gx
from graftax.errors import FormatError, PlanError, UsageError
from graftax.execute.opening import open_tree
from graftax.tree.sides import Signs, separator_of, side_of_names

torch = pytest.importorskip("torch")

Arrays = dict[str, np.ndarray[Any, Any]]
LEAVES = ("weight", "kernel", "scale", "embedding", "bias", "gamma", "w", "running_mean", "alpha")
MODULES = ("fc", "layers.0", "layers.1", "enc.attn.q", "norm", "emb", "kernel", "heads.scale")
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def square(name: str) -> np.ndarray[Any, Any]:
    """Other values for every name; a vector for what is one anywhere."""
    rng = np.random.default_rng([*name.encode()])
    vector = name.rpartition(".")[2] in ("bias", "gamma", "running_mean", "alpha") or ".norm" in f".{name}"
    return rng.standard_normal(4 if vector else (4, 4)).astype("float32")


@st.composite
def torch_states(draw: st.DrawFn) -> Arrays:
    """A state_dict with whatever last parts; a parameter of the root may stand beside modules."""
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=5, unique=True))
    keys = [f"{m}.{leaf}" for m in modules for leaf in draw(st.sets(st.sampled_from(LEAVES), min_size=1, max_size=3))]
    keys += draw(st.lists(st.sampled_from(("cls_token", "scale", "weight")), max_size=1))
    return {key: square(key) for key in sorted(keys)}  # the order of safetensors


def like_of(state: Arrays) -> Any:
    """A Flax tree, of jax leaves, that is named after a state_dict; frozen, for `running_mean` speaks for torch."""
    names = {"weight": "kernel", "gamma": "scale"}
    flat = {tuple(names.get(p, p) for p in key.split(".")): jnp.asarray(value.T) for key, value in state.items()}
    return freeze(unflatten_dict({path: leaf for path, leaf in flat.items() if not _leads(path, flat)}))


def _leads(path: tuple[str, ...], flat: Any) -> bool:
    return any(other != path and other[: len(path)] == path for other in flat)


def sharded(folder: Path, arrays: Arrays, metadata: dict[str, str] | None) -> Path:
    folder.mkdir(exist_ok=True)
    names = list(arrays)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    parts = {file: keys for file, keys in parts.items() if keys}
    for file, keys in parts.items():
        safetensors.numpy.save_file({key: arrays[key] for key in keys}, folder / file, metadata)
    index = {"weight_map": {key: next(file for file, keys in parts.items() if key in keys) for key in arrays}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def facts(plan: Any) -> Any:
    """What a plan does: its entries, questions and misfits; nothing of where the source lies."""
    data = plan.as_json()
    label = data["source"]["label"]
    kept = {key: data[key] for key in ("entries", "questions", "failures") if key in data}
    return plan.source.side, json.loads(json.dumps(kept).replace(json.dumps(label)[1:-1], "SOURCE"))


def told(plan: Any) -> list[str]:
    return [a.text for a in plan.assumptions if a.text.startswith("side: ")]


def told_by_jax(source: Any) -> bool:
    return isinstance(source, dict) and any(isinstance(leaf, jax.Array) for leaf in flatten_dict(source).values())


def opened_side(source: Any) -> str | None:
    return open_tree(source).side


def same_or_asked(source: Any, like: Any, reference: Any, side: str) -> None:
    """Where nothing is declared: the plan of the declared file with an assumption, or a question; stated, that plan."""
    if opened_side(source) is None:
        assert not told_by_jax(source) or not Signs.of(open_tree(source)).allows("flax")
        with pytest.raises(UsageError, match='source_side="torch" or source_side="flax"'):
            gx.plan(source, like)
    else:
        plan = gx.plan(source, like)
        assert facts(plan) == facts(reference)
        assert len(told(plan)) == (not told_by_jax(source))
    stated = gx.plan(source, like, source_side=side)
    assert facts(stated) == facts(reference)
    assert not told(stated)


@FEW
@given(torch_states())
def test_a_torch_checkpoint_is_one_in_every_format(tmp_path: Path, state: Arrays):
    like = like_of(state)
    torch.save({key: torch.from_numpy(value) for key, value in state.items()}, tmp_path / "x.pt")
    reference = gx.plan(tmp_path / "x.pt", like)
    assert reference.source.side == "torch"
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    declared = (
        tmp_path / "x.safetensors",
        sharded(tmp_path / "set", state, {"format": "pt"}),
        {key: torch.from_numpy(value) for key, value in state.items()},
    )
    for source in declared:
        plan = gx.plan(source, like)
        assert facts(plan) == facts(reference), source
        assert not told(plan)
    np.savez(tmp_path / "x.npz", **state)
    safetensors.numpy.save_file(state, tmp_path / "n.safetensors", {"format": "np"})
    undeclared = (tmp_path / "x.npz", state, tmp_path / "n.safetensors", sharded(tmp_path / "none", state, None))
    for source in undeclared:
        same_or_asked(source, like, reference, "torch")


@st.composite
def flax_trees(draw: st.DrawFn) -> dict[str, Any]:
    modules = draw(
        st.lists(st.sampled_from([m for m in MODULES if m != "kernel"]), min_size=1, max_size=5, unique=True)
    )
    names = [f"{m}.{leaf}" for m in modules for leaf in draw(st.sets(st.sampled_from(LEAVES), min_size=1, max_size=3))]
    top = ("params",) if draw(st.booleans()) else ()
    return unflatten_dict({(*top, *name.split(".")): square(name) for name in sorted(names)})


@FEW
@given(flax_trees())
def test_a_flax_checkpoint_is_one_in_every_format(tmp_path: Path, tree: dict[str, Any]):
    state = {".".join(path): torch.from_numpy(leaf.copy()) for path, leaf in flatten_dict(tree).items()}
    (tmp_path / "x.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    reference = gx.plan(tmp_path / "x.msgpack", state)
    assert reference.source.side == "flax"
    slashed, dotted = flatten_dict(tree, sep="/"), flatten_dict(tree, sep=".")
    safetensors.numpy.save_file(slashed, tmp_path / "s.safetensors", {"format": "flax"})
    declared = [
        tmp_path / "s.safetensors",
        sharded(tmp_path / "set", slashed, {"format": "flax"}),
        freeze(dict(tree)),
    ]
    safetensors.numpy.save_file(dotted, tmp_path / "d.safetensors", {"format": "flax"})
    undeclared = [slashed, tree]
    live = unflatten_dict({path: jnp.asarray(leaf) for path, leaf in flatten_dict(tree).items()})
    (undeclared if Signs.of(slashed).torch else declared).append(live)
    if "running_mean" not in str(dotted.keys()):  # what no Flax module has speaks against format=flax
        declared += [tmp_path / "d.safetensors", sharded(tmp_path / "dots", dotted, {"format": "flax"})]
    for source in declared:
        plan = gx.plan(source, state)
        assert facts(plan) == facts(reference), source
        assert not told(plan)
    np.savez(tmp_path / "x.npz", **slashed)
    for source in (*undeclared, tmp_path / "x.npz"):
        same_or_asked(source, state, reference, "flax")
    assert facts(gx.plan(dotted, state, source_side="flax")) == facts(reference)


# ---------------------------------------------------------------- what names say


@pytest.mark.parametrize(
    ("names", "side"),
    [
        (("a.weight", "b.weight", "norm.scale"), "torch"),
        (("a.weight", "norm.scale"), "torch"),
        (("x.gamma", "x.beta"), None),
        (("params/a/kernel", "params/a/bias"), "flax"),
        (("params/norm/weight", "params/norm/bias"), None),
        (("a/kernel", "norm/weight"), "flax"),
        (("linear/w", "linear/b"), "flax"),
        (("kernel", "bias"), "flax"),
        (("a.kernel", "b.kernel"), None),
        (("a.weight", "b.kernel"), None),
        (("norm.scale", "norm.bias"), None),
        (("a/weight", "norm/scale"), None),
        (("a/kernel", "b.weight"), None),
        (("w1", "b1"), None),
        (("weight", "bias"), None),
        ((), None),
    ],
)
def test_names_speak_together(names: tuple[str, ...], side: str | None):
    assert side_of_names(names) == side
    assert side_of_names(reversed(names)) == side


def test_one_name_among_many_decides_nothing():
    many = [f"layers.{i}.fc.weight" for i in range(9)]
    for odd in ("pos.embedding", "rbf.kernel", "norm.scale"):
        assert side_of_names([*many, odd]) == side_of_names([odd, *many]) == "torch"
    assert side_of_names([*many, "norm/scale"]) is None


def test_selectors_read_undecided_names_at_their_separators():
    assert separator_of(["a.kernel", "b.kernel"]) == "torch"
    assert separator_of(["w1"]) == separator_of(["a/kernel", "b.weight"]) == "flax"


# ---------------------------------------------------------------- declarations


def test_shards_that_declare_both_sides_are_refused(tmp_path: Path):
    arrays = {"a.weight": square("a.weight"), "b.weight": square("b.weight")}
    folder = sharded(tmp_path / "set", arrays, {"format": "pt"})
    safetensors.numpy.save_file({"b.weight": arrays["b.weight"]}, folder / "b.safetensors", {"format": "flax"})
    with pytest.raises(FormatError, match="some shards declare torch, others Flax"):
        gx.open_checkpoint(folder)
    safetensors.numpy.save_file({"b.weight": arrays["b.weight"]}, folder / "b.safetensors", {"format": "np"})
    found = gx.open_checkpoint(folder)  # the others say nothing
    assert (found.side, found.side_by) == ("torch", "metadata")


def test_names_that_flatly_contradict_a_declaration_are_asked_about(tmp_path: Path):
    like = {"a": {"kernel": jnp.ones((4, 4))}}
    safetensors.numpy.save_file({"a/kernel": square("a.kernel")}, tmp_path / "x.safetensors", {"format": "pt"})
    for source in (tmp_path / "x.safetensors", {"a.weight": jnp.ones((4, 4))}, {"m": {"a.weight": jnp.ones((4, 4))}}):
        with pytest.raises(UsageError, match="contradicts itself"):
            gx.plan(source, like)
    assert gx.plan(tmp_path / "x.safetensors", like, source_side="flax").entries[0].ops == ()
    out = gx.port({"a.weight": jnp.asarray(square("a"))}, like, source_side="torch")
    np.testing.assert_array_equal(out["a"]["kernel"], square("a").T)


def test_what_is_said_does_not_outrank_what_is_declared(tmp_path: Path):
    like = {"a": {"kernel": jnp.ones((4, 4))}}
    torch.save({"a.weight": torch.ones(4, 4)}, tmp_path / "x.pt")
    safetensors.numpy.save_file({"a.weight": square("a")}, tmp_path / "x.safetensors", {"format": "pt"})
    for source in (tmp_path / "x.pt", tmp_path / "x.safetensors", {"a.weight": torch.ones(4, 4)}):
        with pytest.raises(UsageError, match=r'source_side="flax", but .* is a torch tree'):
            gx.plan(source, like, source_side="flax")
    with pytest.raises(UsageError, match="is not one of torch, flax"):
        gx.plan(tmp_path / "x.pt", like, source_side="jax")


def test_a_part_keeps_the_declaration(tmp_path: Path):
    arrays = {"norm.a.scale": square("norm.a.scale"), "norm.b.kernel": square("b"), "fc.weight": square("fc")}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    found = gx.open_checkpoint(f"{tmp_path}/x.safetensors::norm")
    assert (found.side, found.side_by, list(found)) == ("torch", "metadata", ["a.scale", "b.kernel"])
    np.savez(tmp_path / "x.npz", **{"torch.fc.weight": square("fc"), "flax/fc/kernel": square("fc").T})
    assert gx.open_checkpoint(tmp_path / "x.npz").side is None
    assert gx.open_checkpoint(f"{tmp_path}/x.npz::torch").side == "torch"
    assert gx.open_checkpoint(f"{tmp_path}/x.npz::flax").side == "flax"
    safetensors.numpy.save_file({"a/b/kernel": square("a")}, tmp_path / "y.safetensors", {"format": "pt"})
    assert gx.open_checkpoint(f"{tmp_path}/y.safetensors::a/b").side is None  # the contradiction stays


def test_a_spec_declares_what_its_checkpoint_did(tmp_path: Path):
    from graftax.formats.spec_file import dump_spec

    torch.save({"a.kernel": torch.ones(4, 4)}, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", **{"a.weight": square("a")})
    for name, told_by in (("x.pt", "kind"), ("x.npz", "names")):
        spec = tmp_path / f"{name}.json"
        spec.write_text(dump_spec(gx.open_checkpoint(tmp_path / name)))
        found = gx.open_checkpoint(spec)
        assert (found.side, found.side_by) == ("torch", told_by)


def test_nothing_is_transposed_or_not_where_both_ends_are_silent():
    array = square("w")
    with pytest.raises(UsageError, match="source_side"):
        gx.plan({"w": array}, {"fc": {"kernel": jnp.ones((4, 4))}})
    with pytest.raises(UsageError, match="to="):
        gx.plan({"a.weight": torch.ones(4, 4)}, {"w": array})
    tree = {"w1": array}
    donors: list[tuple[Any, str]] = [
        ({"a.weight": torch.ones(4, 4)}, "a.weight"),
        ({"a": {"kernel": jnp.ones((4, 4))}}, "a/kernel"),
    ]
    for donor, key in donors:
        with pytest.raises(PlanError, match=r"layout of the donor .* is unknown"):
            gx.replace(tree, "w1", gx.from_checkpoint(donor, key))
        out = gx.replace(tree, "w1", gx.from_checkpoint(donor, key, layout="identity"))
        assert (out["w1"] == 1).all()


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("form", ["npz", "dict", "nested", "safetensors"])
def test_an_undeclared_like_comes_back_as_it_was(tmp_path: Path, form: str):
    arrays = {"enc.fc.weight": square("fc"), "enc.norm.scale": square("norm.scale"), "enc.fc.bias": square("bias")}
    flax_tree = {"fc": {"kernel": jnp.asarray(square("fc").T), "bias": jnp.asarray(square("bias"))}}
    flax_tree = {"enc": flax_tree | {"norm": {"scale": jnp.asarray(square("norm.scale"))}}}
    like: Any = {key: np.zeros_like(value) for key, value in arrays.items()}
    if form == "npz":
        np.savez(tmp_path / "x.npz", **like)
        like = tmp_path / "x.npz"
    elif form == "safetensors":
        safetensors.numpy.save_file(like, tmp_path / "x.safetensors")
        like = tmp_path / "x.safetensors"
    elif form == "nested":
        like = {"enc": {key.removeprefix("enc."): value for key, value in like.items()}}
    out = gx.port(flax_tree, like)
    got = {f"enc.{key}": value for key, value in out["enc"].items()} if form == "nested" else out
    assert sorted(got) == sorted(arrays)
    for key, value in arrays.items():
        np.testing.assert_array_equal(got[key], value)
    assert form == "npz" or form == "safetensors" or type(got["enc.fc.weight"]) is np.ndarray
    back = gx.port(out, flax_tree, source_side="torch" if form in ("dict", "nested") else None)
    np.testing.assert_array_equal(back["enc"]["fc"]["kernel"], flax_tree["enc"]["fc"]["kernel"])


def test_a_plan_runs_on_what_it_was_told_about(tmp_path: Path):
    arrays = {"a.kernel": square("a"), "b.kernel": square("b")}
    np.savez(tmp_path / "x.npz", **arrays)
    like = {"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(4, 4)}
    plan = gx.plan(tmp_path / "x.npz", like, source_side="flax")
    plan.save(tmp_path / "p.json")
    for made in (plan, gx.load_plan(tmp_path / "p.json")):
        np.testing.assert_array_equal(made.run(tmp_path / "x.npz")["a.weight"], square("a").T)
    gx.port_file(tmp_path / "x.npz", None, tmp_path / "o.pt", plan=plan)
    np.testing.assert_array_equal(torch.load(tmp_path / "o.pt")["b.weight"], square("b").T)
    np.testing.assert_array_equal(plan.inverse.run(plan.run(tmp_path / "x.npz"))["a"]["kernel"], square("a"))


# ---------------------------------------------------------------- names joined by dots


DOTTED = {"enc.layer.0.fc1.kernel": square("k"), "enc.layer.0.fc1.bias": square("bias"), "a~b.embedding": square("e")}


@pytest.mark.parametrize("shards", [False, True])
def test_replace_leaves_the_names_of_transformers_as_they_are(tmp_path: Path, shards: bool):
    from graftax.surgery import write_replacement

    if shards:
        source, out = sharded(tmp_path / "set", DOTTED, {"format": "flax"}), tmp_path / "out"
    else:
        source, out = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
        safetensors.numpy.save_file(DOTTED, source, {"format": "flax", "note": "kept"})
    checkpoint = gx.open_checkpoint(source)
    assert set(checkpoint) == {"enc/layer/0/fc1/kernel", "enc/layer/0/fc1/bias", "a~0b/embedding"}
    write_replacement(checkpoint, "enc/**/kernel", gx.constant(2), out, format="hf_folder" if shards else None)
    names: Arrays = {}
    for file in sorted(out.glob("*.safetensors")) if shards else [out]:
        with safetensors.safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "flax"} | ({} if shards else {"note": "kept"})
            names |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert set(names) == set(DOTTED)
    assert (names["enc.layer.0.fc1.kernel"] == 2).all()
    for key in ("enc.layer.0.fc1.bias", "a~b.embedding"):
        np.testing.assert_array_equal(names[key], DOTTED[key])
    assert gx.open_checkpoint(out).side_by == "metadata"


def test_replace_declares_no_side_that_was_not_declared(tmp_path: Path):
    from graftax.surgery import write_replacement

    np.savez(tmp_path / "x.npz", **{"a.kernel": square("a")})
    found = gx.open_checkpoint(tmp_path / "x.npz")
    write_replacement(found, "*.kernel", gx.zeros(), tmp_path / "o.safetensors")
    assert gx.open_checkpoint(tmp_path / "o.safetensors").side is None
    for name in ("o.pt", "o.msgpack"):
        with pytest.raises(PlanError):
            write_replacement(found, "*.kernel", gx.zeros(), tmp_path / name)
        assert not (tmp_path / name).exists()


def test_our_own_files_keep_dots_in_keys(tmp_path: Path):
    tree = {"layer.0": {"kernel": jnp.asarray(square("k"))}, "top.w": jnp.ones(2)}
    gx.port_file(tree, tree, tmp_path / "x.safetensors")
    assert set(gx.open_checkpoint(tmp_path / "x.safetensors")) == {"layer.0/kernel", "top.w"}


def test_a_dict_that_safetensors_flax_loads_is_a_tree():
    loaded = {key: jnp.asarray(value) for key, value in DOTTED.items()}
    like = unflatten_dict({tuple(key.split(".")): jnp.zeros_like(value) for key, value in loaded.items()})
    out = gx.port(loaded, like)
    np.testing.assert_array_equal(out["enc"]["layer"]["0"]["fc1"]["kernel"], DOTTED["enc.layer.0.fc1.kernel"])
    back = gx.port(out, loaded)
    assert list(back) == list(loaded)
    np.testing.assert_array_equal(back["a~b.embedding"], DOTTED["a~b.embedding"])


def test_a_source_whose_names_show_nothing_is_the_other_side_of_a_stated_to_and_the_plan_says_so():
    trees = {"a": np.ones((4, 3), "f4")}, {"a": np.zeros((4, 3), "f4")}
    with pytest.raises(UsageError, match="declares no side"):
        gx.plan(*trees)
    plan = gx.plan(*trees, to="flax")
    assert (plan.source.side, plan.like.side) == ("torch", "flax")
    (said,) = (str(assumption) for assumption in plan.assumptions if assumption.text.startswith("side:"))
    assert 'source_side="torch"' in said
    assert not [a for a in gx.plan(*trees, to="flax", source_side="torch").assumptions if a.text.startswith("side:")]
    with pytest.raises(UsageError, match="do not show whether"):
        gx.plan({"a/kernel": np.ones(3, "f4"), "b.weight": np.ones(3, "f4")}, trees[1], to="flax")


# ---------------------------------------------------------------- jax arrays, tuples, parts, plans, donors


NETS = {
    "bare": {"weight": (4, 4), "bias": (4,)},
    "dotted": {"fc1.weight": (4, 4), "fc1.bias": (4,), "bn.running_mean": (4,)},
    "slashed": {"fc1/weight": (4, 4), "fc1/bias": (4,)},
    "a codebook": {"fc.weight": (4, 4), "fc.bias": (4,), "vq.embedding": (4, 4)},
    "its own words": {"proj.W": (4, 4), "proj.b": (4,)},
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("form", ["flat", "nested", "tuples", "params"])
def test_jax_arrays_under_the_names_of_torch_are_asked_about(net: str, form: str):
    tree: dict[Any, Any] = {name: jnp.ones(shape) for name, shape in NETS[net].items()}
    if form != "flat":
        tree = {tuple(name.replace("/", ".").split(".")): leaf for name, leaf in tree.items()}
    if form in ("nested", "params"):
        tree = unflatten_dict(tree)
    if form == "params":
        tree = {"params": tree}
    found = open_tree(tree)
    if (net == "its own words" and form != "flat") or (net == "a codebook" and form != "flat"):
        assert (found.side, found.side_by) == ("flax", "kind")
    else:
        assert (found.side, found.side_by) == (None, "metadata")
    for side in ("torch", "flax"):
        said = open_tree(tree, side=side)
        assert (said.side, said.side_by) == (side, "stated")
        assert len(said) == len(NETS[net])


def test_jax_arrays_of_a_torch_linear_are_transposed_once_it_is_said():
    state = {"weight": square("w"), "bias": square("bias")}
    loaded = {name: jnp.asarray(value) for name, value in state.items()}
    like = {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}
    with pytest.raises(UsageError, match="its names may be torch's"):
        gx.plan(loaded, like)
    np.testing.assert_array_equal(gx.port(loaded, like, source_side="torch")["kernel"], state["weight"].T)
    np.testing.assert_array_equal(gx.port(loaded, like, source_side="flax")["kernel"], state["weight"])
    with pytest.raises(PlanError, match="layout of the donor"):
        gx.replace(like, {"kernel": gx.from_checkpoint(loaded, "weight")})


def test_tuple_keys_are_paths_and_come_back_as_they_were():
    nested = {"l1": {"w": square("w"), "b": square("bias")}, "a/b": {"w": square("v")}}
    flat = flatten_dict(nested)
    found = open_tree(flat)
    assert (found.side, list(found)) == ("flax", ["l1/w", "l1/b", "a~1b/w"])
    out = gx.replace(flat, "l1/w", gx.constant(1))
    assert list(out) == list(flat)
    assert (out["l1", "w"] == 1).all()
    back = gx.port(freeze(nested), flat)
    assert list(back) == list(flat)
    np.testing.assert_array_equal(back["a/b", "w"], nested["a/b"]["w"])
    assert list(open_tree(flatten_dict({"fc": {"weight": square("w")}}), side="torch")) == ["fc.weight"]


def test_a_part_is_asked_for_its_own_names_where_names_decide(tmp_path: Path):
    arrays = {"net.Dense_0.kernel": square("k"), **{f"{name}.weight": square("norm.a") for name in "abc"}}
    np.savez(tmp_path / "x.npz", **arrays)
    for part, side in (("", "torch"), ("::a", "torch"), ("::net", None), ("::net.Dense_0", "flax")):
        found = gx.open_checkpoint(f"{tmp_path}/x.npz{part}")
        assert (found.side, found.side_by) == (side, "names"), part


def test_a_plan_refuses_a_source_that_declares_the_other_side(tmp_path: Path):
    arrays = {"weight": square("w"), "bias": square("bias")}
    like = {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}
    files = {"torch": tmp_path / "pt.safetensors", "flax": tmp_path / "fx.safetensors"}
    for side, file in files.items():
        safetensors.numpy.save_file(arrays, file, {"format": {"torch": "pt"}.get(side, side)})
    plans = {side: gx.plan(file, like) for side, file in files.items()}
    plans["flax"].save(tmp_path / "p.json")
    sources = [(plans["torch"], files["flax"]), (plans["flax"], files["torch"]), (plans["flax"], torch.nn.Linear(4, 4))]
    sources.append((gx.load_plan(tmp_path / "p.json"), files["torch"]))
    for plan, source in sources:
        with pytest.raises(PlanError, match="the plan expects a"):
            plan.run(source)
        with pytest.raises(PlanError, match="the plan expects a"):
            gx.port_file(source, None, tmp_path / "o.msgpack", plan=plan)
    np.testing.assert_array_equal(plans["torch"].run(arrays)["kernel"], arrays["weight"].T)  # it declares nothing
    np.testing.assert_array_equal(plans["flax"].run(arrays)["kernel"], arrays["weight"])


def test_a_side_by_names_alone_does_not_put_a_square_donor_in_as_it_is(tmp_path: Path):
    donor = {"l1.weight": torch.from_numpy(square("d"))}
    trees = {
        "l1.w": {"l1.w": square("w"), "l2.w": square("v")},
        "l2.w": {"l2.w": square("w"), "norm.weight": square("norm.a")},
        "l3.weight": {"l3.weight": square("w")},
    }
    for selector, tree in trees.items():
        for source in (donor, {"weight": square("d")}):
            key = next(iter(source))
            with pytest.raises(PlanError, match='layout="identity"'):
                gx.replace(tree, {selector: gx.from_checkpoint(source, key)})
        turned = gx.replace(tree, {selector: gx.from_checkpoint(donor, "l1.weight", layout="linear")})
        np.testing.assert_array_equal(turned[selector], square("d").T)
    wide = gx.replace({"a.weight": np.zeros((2, 3))}, {"a.weight": gx.from_checkpoint({"a.weight": np.ones((2, 3))})})
    assert (wide["a.weight"] == 1).all()
    kernels = {"a": {"kernel": square("k")}}
    out = gx.replace(kernels, {"a/kernel": gx.from_checkpoint({"b/kernel": square("d")}, "b/kernel")})
    np.testing.assert_array_equal(out["a"]["kernel"], square("d"))
