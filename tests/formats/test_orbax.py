"""graftax.formats.orbax_folder: what Orbax saved is read, whatever devices it was saved on; what graftax saves is read
by Orbax; unfinished, damaged and hostile folders are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from graftax.errors import FormatError, PlanError, StorageError, UnsafeInputError
from graftax.formats import orbax_folder
from graftax.formats.base import Output
from graftax.formats.table import FORMATS
from graftax.tree import TensorSpec, flatten, join_path, nest
from graftax.tree.dtypes import numpy_dtype, pack, spec_of

HELD = sorted(FORMATS["orbax"].holds)


def every_bit_pattern(name, count=300):
    """An array of random bytes as dtype `name`: NaN payloads, -0.0 and subnormals are among them."""
    dtype = numpy_dtype(name)
    data = np.random.default_rng(0).integers(0, 256, count * dtype.itemsize, np.uint8)
    return (data % 2).view(bool) if name == "bool" else data.view(dtype)


def output(tree, containers=None):
    """An Output of a nested tree of arrays, with its keys that are not text."""
    flat = [(join_path(keys), np.asarray(leaf)) for keys, leaf in flatten(tree)]
    real = {join_path(keys[: i + 1]): keys[i] for keys, _ in flatten(tree) for i in range(len(keys))}
    specs = {path: spec_of(leaf) for path, leaf in flat}
    return Output(specs, flat, "flax", {p: k for p, k in real.items() if type(k) is not str}, containers or {})


def saved(path, tree, containers=None):
    orbax_folder.write(path, output(tree, containers))
    return path


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


# ---------------------------------------------------------------- what Orbax saved


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Folders that Orbax saved on eight devices, and their values."""
    root = tmp_path_factory.mktemp("theirs")
    script = Path(__file__).with_name("orbax_theirs.py")
    subprocess.run([sys.executable, script, root], check=True, capture_output=True)
    with np.load(root / "expected.npz") as loaded:
        return root, {key: value.view("bfloat16") if value.dtype == "V2" else value for key, value in loaded.items()}


@pytest.mark.parametrize(
    "name",
    [
        "linen",
        "sharded",
        "zarr3",
        "pytree",
        "folders",
        "lists",
        "boxed",
        "nnx_state",
        "nnx_pure",
        "one_step",
        "prefixed",
        "items",
    ],
)
def test_theirs(theirs, name):
    root, values = theirs
    got = orbax_folder.open(root / name)
    expected = {key.partition(":")[2]: value for key, value in values.items() if key.startswith(f"{name}:")}
    expected.pop("drop/rngs/count", None)
    assert orbax_folder.sniff(root / name, b"")
    assert set(got) == set(expected)
    for path, value in expected.items():
        assert got[path] == spec_of(value)
        assert same(got.read(path), value)
        assert got.read(path).flags.c_contiguous
    assert got.side == "flax"
    everything = {Path(here, file) for here, _, files in os.walk(root / name) for file in files}
    assert set(got.storage.files) == everything or name == "items"  # there a JSON item and an optimizer's are beside


def test_nnx_states(theirs):
    """Both ways to save an NNX state give one tree, with numbers as list indices and without its random streams."""
    root, _ = theirs
    state, pure = orbax_folder.open(root / "nnx_state"), orbax_folder.open(root / "nnx_pure")
    assert dict(state.specs) == dict(pure.specs)
    for got in (state, pure):
        assert got.real_keys == {f"blocks/{i}": i for i in range(11)}
        notes = {path.removesuffix("/value"): note for path, note in got.storage.metadata.items()}
        assert "random key" in notes["drop/rngs/key"]
        assert "counter" in notes["drop/rngs/count"]


def test_kinds_of_keys_and_values(theirs):
    root, _ = theirs
    lists = orbax_folder.open(root / "lists")
    assert lists.containers == {"l": "list", "l/1": "list"}
    assert lists.real_keys == {"l/0": 0, "l/1": 1, "l/1/0": 0}
    assert lists["step"] == TensorSpec((), "int64")
    assert lists.storage.metadata == {"step": "a Python number", "rate": "a Python number"}
    odd = orbax_folder.open(root / "pytree")
    assert set(odd.storage.metadata) == {"none", "empty", "text"}
    assert orbax_folder.open(root / "linen").real_keys == {}


def test_steps_and_items(theirs):
    root, _ = theirs
    with pytest.raises(PlanError, match=r"holds 2 steps") as info:
        orbax_folder.open(root / "steps")
    assert f"the latest is {root / 'steps' / '10'}" in str(info.value)
    assert [failure.key for failure in info.value.failures] == [str(root / "steps" / step) for step in ("9", "10")]
    assert len(orbax_folder.open(root / "steps" / "9")) == 2
    assert len(orbax_folder.open(root / "steps" / "9" / "default")) == 2
    with pytest.raises(PlanError, match="holds 2 items"):
        orbax_folder.open(root / "two_items")
    assert list(orbax_folder.open(root / "items" / "3" / "opt_state")) == ["mu"]


@pytest.mark.parametrize(("name", "items"), [("upscaler", 2), ("optics", 2), ("optimizer_head", 2), ("opt_state", 1)])
def test_an_item_is_not_an_optimizers_for_a_part_of_its_name(theirs, tmp_path, name, items):
    shutil.copytree(theirs[0] / "two_items", tmp_path / "x")
    (step,) = (path.parent for path in (tmp_path / "x").rglob("encoder"))
    for old, new in (("encoder", "generator"), ("decoder", name)):
        (step / old).rename(step / new)
    if items == 1:
        assert len(orbax_folder.open(tmp_path / "x"))
        return
    with pytest.raises(PlanError, match="holds 2 items"):
        orbax_folder.open(tmp_path / "x")


def test_text_digits_that_are_no_indices(tmp_path):
    """Digits stay text below `params`, and where they do not count from 0."""
    checkpointer = ocp.StandardCheckpointer()
    gap = {"l": {"1": np.ones(1), "2": np.ones(1)}}
    for name, tree in {"linen": {"params": {"0": {"k": np.ones(1)}}}, "gap": gap}.items():
        checkpointer.save(tmp_path / name, tree)
        checkpointer.wait_until_finished()
        assert orbax_folder.open(tmp_path / name).real_keys == {}


def test_reading_imports_no_jax(theirs):
    root, _ = theirs
    code = (
        "import sys\nfrom pathlib import Path\nfrom graftax.formats import orbax_folder\n"
        f"c = orbax_folder.open(Path({str(root / 'sharded')!r}))\nc.read('a/b')\n"
        "assert not {'jax', 'orbax', 'flax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- what graftax saved


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """One checkpoint with every dtype, as arrays and as scalars."""
    tree = {name: {"a": every_bit_pattern(name).reshape(4, 75).T, "s": every_bit_pattern(name, 1)[0]} for name in HELD}
    tree["int64"]["b"] = np.array([2**40, -(2**62)])
    return saved(tmp_path_factory.mktemp("ours") / "out", tree), tree


def test_every_dtype(ours):
    path, tree = ours
    back = ocp.StandardCheckpointer().restore(path)
    got = orbax_folder.open(path)
    assert list(got) == [join_path(keys) for keys, _ in flatten(tree)]
    for keys, leaf in flatten(tree):
        restored = back[keys[0]][keys[1]]
        assert same(np.asarray(restored), np.asarray(leaf)), keys
        assert same(got.read(join_path(keys)), np.asarray(leaf)), keys


def test_flax_users_read_it(tmp_path):
    """Linen: restore(path) and restore(path, target). NNX: into the pure dict of an abstract state."""
    variables = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 3)))
    saved(tmp_path / "linen", variables)
    checkpointer = ocp.StandardCheckpointer()
    plain = checkpointer.restore(tmp_path / "linen")
    assert jax.tree.all(jax.tree.map(same, plain, variables))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), variables)
    onto = checkpointer.restore(tmp_path / "linen", target)
    assert jax.tree.all(jax.tree.map(same, onto, variables))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(onto))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(11)])

    model = Model(nnx.Rngs(0))
    pure = nnx.to_pure_dict(nnx.state(model))
    saved(tmp_path / "nnx", pure)
    got = orbax_folder.open(tmp_path / "nnx")
    assert got.real_keys == {f"blocks/{i}": i for i in range(11)}
    assert nest(dict.fromkeys(got, 0), got.real_keys) == jax.tree.map(lambda _: 0, pure)
    restored = checkpointer.restore(tmp_path / "nnx", nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(model))))
    assert jax.tree.all(jax.tree.map(same, restored, pure))
    other = Model(nnx.Rngs(1))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(checkpointer.restore(tmp_path / "nnx")))
    nnx.update(other, state)
    assert same(other.blocks[10].kernel[...], model.blocks[10].kernel[...])


def test_int4(tmp_path):
    """Below a byte Orbax has int4 alone."""
    codes = np.arange(-8, 8).astype("int4").reshape(2, 8)
    got = orbax_folder.open(saved(tmp_path / "out", {"a": codes}))
    assert got["a"] == TensorSpec((2, 8), "int4")
    assert got.read("a").tobytes() == pack(codes, 4).tobytes()
    back = ocp.StandardCheckpointer().restore(tmp_path / "out")["a"]
    # by value: tensorstore leaves the high bits of the bytes as it likes
    assert back.astype(np.int8).tolist() == codes.astype(np.int8).tolist()


def test_containers_and_order_come_back(tmp_path):
    tree = {"z": [np.ones(1), {"b": np.ones(2), "a": np.zeros(1)}], "t": (np.ones(3),), "f": {"x/y": np.ones(1)}}
    containers = {"z": "list", "t": "tuple", "f": "FrozenDict"}
    got = orbax_folder.open(saved(tmp_path / "out", tree, containers))
    assert list(got) == ["z/0", "z/1/b", "z/1/a", "t/0", "f/x~1y"]
    assert got.containers == containers
    assert got.real_keys == {"z/0": 0, "z/1": 1, "t/0": 0}
    restored = ocp.StandardCheckpointer().restore(tmp_path / "out")
    assert isinstance(restored["z"], list)
    assert restored["z"][1]["b"].tolist() == [1, 1]


def test_many_items_in_a_list(tmp_path):
    tree = {"l": [np.full(1, i) for i in range(12)]}
    restored = ocp.StandardCheckpointer().restore(saved(tmp_path / "out", tree, {"l": "list"}))
    assert [leaf.item() for leaf in restored["l"]] == list(range(12))


def test_what_is_written_twice(tmp_path):
    """Names, values and graftax.json are the same; the time of the commit and the names of data files are Orbax's."""
    tree = {"params": {"a": np.ones(3), "b": np.arange(4)}}
    first, second = saved(tmp_path / "one", tree), saved(tmp_path / "two", tree)
    assert (first / "graftax.json").read_bytes() == (second / "graftax.json").read_bytes()
    assert (first / "_METADATA").read_bytes() == (second / "_METADATA").read_bytes()
    for file in first.rglob("*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes()
    assert {file for file in first.rglob("*") if file.is_file()} == set(orbax_folder.open(first).storage.files)


def test_leaves_called_value_stay(tmp_path):
    """In what graftax wrote nothing is taken for a State's `value` level."""
    got = orbax_folder.open(saved(tmp_path / "out", {"a": {"value": np.ones(1)}, "b": {"value": np.ones(1)}}))
    assert list(got) == ["a/value", "b/value"]


F32 = TensorSpec((2,), "float32")


@pytest.mark.parametrize(
    ("specs", "real_keys", "containers", "text"),
    [
        ({"a.b": F32, "a/b": F32}, {}, {}, r"a\.b: a key contains '\.'"),
        ({"a/x.y": F32}, {}, {}, r"a/x\.y: a key contains '\.'"),
        ({"a/0": F32, "a/x": F32}, {"a/0": 0}, {}, "one dict has numbers and text as keys"),
        ({"wn/scale": F32}, {"wn": ("a", "b")}, {}, "a key is a tuple"),
        ({"a": TensorSpec((0, 3), "float32")}, {}, {}, "arrays of size zero"),
        ({"a": TensorSpec((4,), "uint4")}, {}, {}, "Orbax cannot store uint4"),
        ({"a\udc80": F32}, {}, {}, "half of a surrogate pair"),
        ({"l/0": F32, "l/2": F32}, {"l/0": 0, "l/2": 2}, {"l": "list"}, "a list with the items 0, 2"),
        ({}, {}, {}, "cannot store an empty tree"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, specs, real_keys, containers, text):
    def tensors():
        pytest.fail("a tensor was asked for")
        yield

    with pytest.raises(PlanError, match=text) as info:
        orbax_folder.write(tmp_path / "out", Output(specs, tensors(), "flax", real_keys, containers))
    assert not list(tmp_path.iterdir())
    if specs and "uint4" not in text:
        assert "Formats that can: safetensors" in str(info.value)


# ---------------------------------------------------------------- unfinished, damaged, hostile


def test_unfinished(tmp_path, ours):
    whole, _ = ours
    cases = {
        "5.orbax-checkpoint-tmp-17": lambda path: None,
        "no_metadata": lambda path: (path / "_METADATA").unlink(),
        "no_manifest": lambda path: (path / "manifest.ocdbt").unlink(),
    }
    for name, change in cases.items():
        shutil.copytree(whole, tmp_path / name)
        change(tmp_path / name)
        assert orbax_folder.sniff(tmp_path / name, b"")
        with pytest.raises(FormatError, match="not finished") as info:
            orbax_folder.open(tmp_path / name)
        assert info.value.exit_code == 3
    only = tmp_path / "root" / "3.orbax-checkpoint-tmp-1"
    only.mkdir(parents=True)
    assert orbax_folder.sniff(tmp_path / "root", b"")
    with pytest.raises(FormatError, match="not finished"):
        orbax_folder.open(tmp_path / "root")
    shutil.copytree(whole, tmp_path / "root" / "2")
    assert len(orbax_folder.open(tmp_path / "root")) > 0  # what a stopped run left beside a finished step is no step
    about = json.loads((whole / "_CHECKPOINT_METADATA").read_text())
    (tmp_path / "root" / "2" / "_CHECKPOINT_METADATA").write_text(json.dumps(about | {"commit_timestamp_nsecs": None}))
    with pytest.raises(FormatError, match="has no commit time"):
        orbax_folder.open(tmp_path / "root")


def test_flipped_bits_are_seen(tmp_path):
    """In what graftax wrote, whatever byte of the data is changed; without graftax.json Orbax gives wrong values."""
    big = {"a": every_bit_pattern("float64", 4000), "b": every_bit_pattern("int8", 9000)}
    whole = saved(tmp_path / "whole", big)
    good = {path: array.tobytes() for path, array in big.items()}
    wrong_without = 0
    rng = np.random.default_rng(0)
    data_files = [file for file in whole.rglob("*") if file.is_file() and file.parent.name == "d"]
    assert data_files
    for file in data_files:
        data = file.read_bytes()
        for at in rng.integers(0, len(data), 25):
            changed = bytearray(data)
            changed[at] ^= 1 << int(rng.integers(0, 8))
            file.write_bytes(changed)
            for manifest in (True, False):
                if not manifest:
                    (whole / "graftax.json").rename(tmp_path / "aside")
                try:
                    got = orbax_folder.open(whole)
                    values = {path: got.read(path).tobytes() for path in got}
                except (FormatError, UnsafeInputError):
                    values = None
                if manifest:
                    assert values in (None, good)
                else:
                    (tmp_path / "aside").rename(whole / "graftax.json")
                    wrong_without += values not in (None, good)
        file.write_bytes(data)
    assert wrong_without > 0


def test_missing_data(tmp_path):
    whole = saved(tmp_path / "out", {"a": np.arange(64.0)})
    for file in whole.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.unlink()
    with pytest.raises(FormatError, match="missing or damaged"):
        orbax_folder.open(whole).read("a")


def test_missing_chunk(tmp_path, theirs):
    """A part of an array that is not there is an error, not zeros."""
    path = tmp_path / "out"
    shutil.copytree(theirs[0] / "folders", path)
    (path / "a.b" / "3.0").unlink()
    got = orbax_folder.open(path)
    with pytest.raises(FormatError, match=r"a\.b is missing or damaged"):
        got.read("a/b")


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def entry(*keys, kind="np.ndarray", key_type=2):
    steps = [{"key": key, "key_type": key_type} for key in keys]
    return {"key_metadata": steps, "value_metadata": {"value_type": kind, "skip_deserialize": False}}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda t: t.update(tree_metadata=[]), FormatError, "does not describe a tree"),
        (lambda t: t["tree_metadata"].update(x={}), FormatError, "leaf without keys"),
        (lambda t: t["tree_metadata"].update(x=entry("a", key_type=3)), FormatError, "not a key of a dict"),
        (lambda t: t["tree_metadata"].update(x=entry("a", key_type=1)), FormatError, "not a key of a dict"),
        (lambda t: t["tree_metadata"].update(x=entry(5)), FormatError, "not a key of a dict"),
        (lambda t: t["tree_metadata"].update(x=entry("a.b"), y=entry("a", "b")), FormatError, r"clash"),
        (lambda t: t["tree_metadata"].update(x=entry("absent")), FormatError, "absent is missing or damaged"),
        (lambda t: t["tree_metadata"].update(x=entry("a", kind=None)), FormatError, "has no value type"),
        (lambda t: t["tree_metadata"].update(x=entry(*"a" * 65)), UnsafeInputError, "levels of nesting"),
        (lambda t: t.update(use_zarr3=True), FormatError, "missing or damaged"),
        (lambda t: t["tree_metadata"].clear(), FormatError, "holds no arrays|does not list"),
    ],
)
def test_tree_metadata(tmp_path, change, error, text):
    path = saved(tmp_path / "out", {"a": np.ones(2), "c": {"d": np.ones(1)}})
    edit(path / "_METADATA", change)
    with pytest.raises(error, match=text):
        orbax_folder.open(path)
    (path / "graftax.json").unlink()
    with pytest.raises(error, match=text):
        orbax_folder.open(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(schema=2), "schema 1"),
        (lambda m: m["sha256"].update(x="0"), "does not list"),
        (lambda m: m["sha256"].pop("a"), "does not list"),
        (lambda m: m.update(keys={"a": 3}), "cannot end in the key"),
        (lambda m: m["sha256"].update(a="0" * 64), "a is damaged"),
    ],
)
def test_our_manifest(tmp_path, change, text):
    path = saved(tmp_path / "out", {"a": np.ones(2), "b": np.ones(1)})
    edit(path / "graftax.json", change)
    with pytest.raises(FormatError, match=text):
        orbax_folder.open(path).read("a")


def test_arrays_that_ask_for_too_much(tmp_path, theirs):
    root, _ = theirs
    for field, shape in (("shape", [2**20, 2**20]), ("chunks", [2**20, 2**20])):
        path = tmp_path / field
        shutil.copytree(root / "folders", path)
        edit(path / "a.b" / ".zarray", lambda zarray, field=field, shape=shape: zarray.update({field: shape}))
        with pytest.raises(UnsafeInputError, match="GRAFTAX_LIMIT_DENSE"):
            orbax_folder.open(path)


def test_out_of_its_folder(tmp_path, theirs):
    root, _ = theirs
    for i, keys in enumerate([["/secret"], ["a/"], ["a//b"], ["a\0"], ["a\\b"], ["x/", "", "/secret"], ["../secret"]]):
        path = tmp_path / str(i)
        shutil.copytree(root / "folders", path)
        edit(path / "_METADATA", lambda t, keys=keys: t["tree_metadata"].update(x=entry(*keys)))
        with pytest.raises(UnsafeInputError, match="names the folder"):
            orbax_folder.open(path)
    path = tmp_path / "links"
    shutil.copytree(root / "linen", path)
    (tmp_path / "secret").write_bytes((path / "manifest.ocdbt").read_bytes())
    (path / "manifest.ocdbt").unlink()
    (path / "manifest.ocdbt").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeInputError, match="must not link out of its folder"):
        orbax_folder.open(path)


def test_folder_that_changes(tmp_path):
    path = saved(tmp_path / "out", {"a": np.ones(2)})
    got = orbax_folder.open(path)
    shutil.rmtree(path)
    saved(path, {"a": np.zeros(2)})
    with pytest.raises(StorageError, match="changed"):
        got.read("a")


def test_other_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("x")
    assert not orbax_folder.sniff(tmp_path, b"")
    assert not orbax_folder.sniff(tmp_path / "absent", b"")
    assert not orbax_folder.sniff(tmp_path / "file", b"x")


FULL = """
import resource, sys
import numpy as np
from graftax.tree.dtypes import spec_of
from graftax.formats import Output, save
arrays = {f"l{i}/kernel": np.random.default_rng(i).standard_normal((512, 1024), "float32") for i in range(12)}
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
save(sys.argv[1], Output({k: spec_of(v) for k, v in arrays.items()}, arrays.items(), "flax"))
"""


@pytest.mark.parametrize("mebibytes", [1, 3])
def test_a_full_disk_leaves_nothing(tmp_path, mebibytes):
    """What Orbax had begun has ended before its folder is removed: nothing is made anew, and nothing is said."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "out"), str(mebibytes << 20)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "StorageError" in done.stderr.splitlines()[-2], done.stderr
    assert os.listdir(tmp_path) == []
    assert "Event loop is closed" not in done.stderr


def test_saving_where_an_event_loop_runs(tmp_path):
    """As in a notebook."""
    import asyncio

    policy = asyncio.get_event_loop_policy()

    async def cell():
        saved(tmp_path / "x", {"a": np.ones(3)})

    asyncio.run(cell())
    assert orbax_folder.open(tmp_path / "x").read("a").tolist() == [1, 1, 1]
    assert asyncio.get_event_loop_policy() is policy
