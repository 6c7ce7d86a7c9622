"""from_checkpoint: a donor arrives in the layout of the leaf it goes into, or the error says what to state."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import linen as nn
from flax import nnx

import graftax as gx
from graftax.errors import FormatError, PlanError, StorageError, UsageError
from graftax.surgery import replace_checkpoint, write_replacement

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


LINEAR, SQUARE, CONV, SQUARE_CONV = normal(5, 3), normal(4, 4), normal(6, 4, 3, 2), normal(4, 4, 3, 3)
STATE = {
    "fc1.weight": LINEAR,
    "fc1.bias": normal(5),
    "sq.weight": SQUARE,
    "conv.weight": CONV,
    "sqconv.weight": SQUARE_CONV,
    "conv1.weight": normal(6, 4, 3),
    "embed.weight": normal(7, 4),
    "sqembed.weight": normal(4, 4),
    "norm.running_mean": normal(4),
    "half.weight": LINEAR.astype(ml_dtypes.bfloat16),
    "steps": np.array(3, np.int64),
}


@pytest.fixture(scope="module", params=["pt", "safetensors"])
def donor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("donor") / f"donor.{request.param}"
    if request.param == "pt":
        torch.save(
            OrderedDict(
                (
                    k,
                    torch.from_numpy(v.view(np.uint16)).view(torch.bfloat16)
                    if v.dtype.kind == "V"
                    else torch.from_numpy(v),
                )
                for k, v in STATE.items()
            ),
            path,
        )
    else:
        safetensors.numpy.save_file(STATE, path, metadata={"format": "pt"})
    return path


def tree(**shapes: Any) -> dict[str, Any]:
    return {"params": {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}}


def put(shape: tuple[int, ...], *args: Any, leaf: str = "kernel", **options: Any) -> np.ndarray:
    variables = {"params": {"layer": {leaf: jnp.zeros(shape)}}}
    out = gx.replace(variables, f"params/layer/{leaf}", gx.from_checkpoint(*args, **options), expect=1)
    return np.asarray(out["params"]["layer"][leaf])


def refused(shape: tuple[int, ...], *args: Any, leaf: str = "kernel", **options: Any) -> str:
    with pytest.raises(PlanError) as caught:
        put(shape, *args, leaf=leaf, **options)
    assert caught.value.failures[0].key == f"params/layer/{leaf}"
    return str(caught.value)


# ---------------------------------------------------------------- torch -> Flax


def test_a_linear_weight_arrives_transposed(donor: Path) -> None:
    np.testing.assert_array_equal(put((3, 5), donor, "fc1.weight"), LINEAR.T)


def test_a_donor_linear_computes_what_it_did(donor: Path) -> None:
    x = normal(2, 3)
    layer = nn.Dense(5)
    variables = layer.init(jax.random.key(0), x)
    out = gx.replace(
        variables,
        {
            "params/kernel": gx.from_checkpoint(donor, "fc1.weight"),
            "params/bias": gx.from_checkpoint(str(donor), "fc1.bias"),
        },
    )
    with jax.default_matmul_precision("highest"):
        y = np.asarray(layer.apply(out, x))
    expected = torch.nn.functional.linear(*(torch.from_numpy(a) for a in (x, LINEAR, STATE["fc1.bias"])))
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_square_linear_weight_needs_its_layout(donor: Path) -> None:
    text = refused((4, 4), donor, "sq.weight")
    assert 'layout="linear"' in text
    assert 'layout="identity"' in text
    np.testing.assert_array_equal(put((4, 4), donor, "sq.weight", "linear"), SQUARE.T)
    np.testing.assert_array_equal(put((4, 4), donor, "sq.weight", layout="identity"), SQUARE)


def test_a_matrix_that_only_an_unusual_layout_explains_needs_it_stated(donor: Path) -> None:
    """(5, 3) into (5, 3): a Linear weight would be (3, 5); stored (in, out) already, or the wrong tensor."""
    text = refused((5, 3), donor, "fc1.weight")
    assert 'layout="identity"' in text
    np.testing.assert_array_equal(put((5, 3), donor, "fc1.weight", "identity"), LINEAR)


def test_a_convolution_arrives_as_flax_stores_it(donor: Path) -> None:
    np.testing.assert_array_equal(put((3, 2, 4, 6), donor, "conv.weight"), CONV.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(put((3, 4, 6), donor, "conv1.weight"), STATE["conv1.weight"].transpose(2, 1, 0))


def test_a_convolution_of_equal_channels_needs_its_layout(donor: Path) -> None:
    text = refused((3, 3, 4, 4), donor, "sqconv.weight")
    assert 'layout="conv"' in text
    assert "conv_transpose" in text
    np.testing.assert_array_equal(put((3, 3, 4, 4), donor, "sqconv.weight", "conv"), SQUARE_CONV.transpose(2, 3, 1, 0))


def test_an_embedding_is_never_transposed(donor: Path) -> None:
    np.testing.assert_array_equal(put((7, 4), donor, "embed.weight", leaf="embedding"), STATE["embed.weight"])
    np.testing.assert_array_equal(put((4, 4), donor, "sqembed.weight", leaf="embedding"), STATE["sqembed.weight"])
    assert "transpose" in refused((4, 7), donor, "embed.weight", leaf="embedding")


def test_vectors_go_in_as_they_are(donor: Path) -> None:
    np.testing.assert_array_equal(put((5,), donor, "fc1.bias", leaf="bias"), STATE["fc1.bias"])
    np.testing.assert_array_equal(put((4,), donor, "norm.running_mean", leaf="mean"), STATE["norm.running_mean"])


def test_heads_are_split_after_the_transpose() -> None:
    weight = normal(6, 12)
    state = {"q.weight": torch.from_numpy(weight)}
    out = put((12, 3, 2), state, "q.weight")
    np.testing.assert_array_equal(out, weight.T.reshape(12, 3, 2))
    square = normal(12, 12)
    state = {"q.weight": torch.from_numpy(square)}
    assert 'layout="linear"' in refused((12, 3, 4), state, "q.weight")
    np.testing.assert_array_equal(put((12, 3, 4), state, "q.weight", "linear"), square.T.reshape(12, 3, 4))
    live = torch.nn.ModuleDict({"q": torch.nn.Linear(12, 12)})
    weight = live["q"].weight.detach().numpy()
    np.testing.assert_array_equal(put((12, 3, 4), live, "q.weight"), weight.T.reshape(12, 3, 4))


@pytest.mark.parametrize(
    ("shape", "key", "words"),
    [((4, 5), "fc1.weight", "does not fit"), ((3, 7, 5), "fc1.weight", "fit"), ((6,), "fc1.bias", "does not fit")],
)
def test_a_misfit_is_refused(donor: Path, shape: tuple[int, ...], key: str, words: str) -> None:
    text = refused(shape, donor, key, leaf="bias" if key.endswith("bias") else "kernel")
    assert words in text
    assert key in text


def test_a_live_module_knows_its_layout() -> None:
    """A square Linear, transposed; a square embedding and HF's Conv1D, not; no layout needed."""
    module = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4), "conv": torch.nn.Conv2d(4, 4, 3)})
    weight = module["fc"].weight.detach().numpy()
    np.testing.assert_array_equal(put((4, 4), module, "fc.weight"), weight.T)
    conv = module["conv"].weight.detach().numpy()
    np.testing.assert_array_equal(put((3, 3, 4, 4), module, "conv.weight"), conv.transpose(2, 3, 1, 0))


def test_a_live_leaf_does_not_guess_a_square_donor(donor: Path) -> None:
    net = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(PlanError, match="layout"):
        gx.replace(net, "kernel", gx.from_checkpoint(donor, "sq.weight"))
    out = gx.replace(net, "kernel", gx.from_checkpoint(donor, "sq.weight", "linear"))
    np.testing.assert_array_equal(out.kernel.get_value(), SQUARE.T)


# ---------------------------------------------------------------- Flax -> torch, and one side only


@pytest.fixture(scope="module")
def flax_donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flax") / "flax.safetensors"
    arrays = {"params/fc/kernel": normal(3, 5), "params/sq/kernel": SQUARE, "params/conv/kernel": normal(3, 2, 4, 6)}
    safetensors.numpy.save_file(arrays, path)
    return path


def test_a_flax_donor_goes_into_a_flax_leaf_as_it_is(flax_donor: Path) -> None:
    np.testing.assert_array_equal(put((4, 4), flax_donor, "params/sq/kernel"), SQUARE)
    assert "Its transpose would fit" in refused((5, 3), flax_donor, "params/fc/kernel")
    with pytest.raises(UsageError, match="both flax"):
        put((4, 4), flax_donor, "params/sq/kernel", "linear")
    np.testing.assert_array_equal(put((4, 4), flax_donor, "params/sq/kernel", "identity"), SQUARE)


def test_a_flax_donor_goes_into_a_torch_leaf_transposed(flax_donor: Path) -> None:
    donor = gx.open_checkpoint(flax_donor)
    shapes = {"fc.weight": (5, 3), "c.weight": (6, 4, 3, 2), "s.weight": (4, 4)}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    out = gx.replace(
        state,
        {
            "fc.weight": gx.from_checkpoint(donor, "params/fc/kernel"),
            "c.weight": gx.from_checkpoint(donor, "params/conv/kernel"),
            "s.weight": gx.from_checkpoint(donor, "params/sq/kernel", "linear"),
        },
        expect=3,
    )
    np.testing.assert_array_equal(out["fc.weight"].numpy(), donor.read("params/fc/kernel").T)
    np.testing.assert_array_equal(out["c.weight"].numpy(), donor.read("params/conv/kernel").transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(out["s.weight"].numpy(), SQUARE.T)
    with pytest.raises(PlanError, match='layout="linear"'):
        gx.replace(state, "s.weight", gx.from_checkpoint(donor, "params/sq/kernel"))


def test_a_torch_donor_goes_into_a_torch_leaf_as_it_is(donor: Path) -> None:
    state = {"a.weight": torch.zeros(4, 4)}
    out = gx.replace(state, "a.weight", gx.from_checkpoint(donor, "sq.weight"))
    np.testing.assert_array_equal(out["a.weight"].numpy(), SQUARE)


def test_a_live_flax_donor() -> None:
    variables = nn.Dense(5).init(jax.random.key(0), jnp.ones((1, 3)))
    np.testing.assert_array_equal(put((3, 5), variables, "params/kernel"), variables["params"]["kernel"])
    net = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(put((3, 5), net, "kernel"), net.kernel.get_value())


def test_names_that_do_not_tell_the_side(tmp_path: Path) -> None:
    """An npz of `w`: as it is, or as torch stores it, if only one fits; a square one needs its layout."""
    path = tmp_path / "donor.npz"
    np.savez(path, w=LINEAR, s=SQUARE, v=normal(4))
    np.testing.assert_array_equal(put((3, 5), path, "w"), LINEAR.T)
    np.testing.assert_array_equal(put((4,), path, "v", leaf="bias"), np.load(path)["v"])
    assert 'layout="identity"' in refused((4, 4), path, "s")
    np.testing.assert_array_equal(put((5, 3), path, "w"), LINEAR)
    np.testing.assert_array_equal(put((4, 4), path, "s", "linear"), SQUARE.T)


# ---------------------------------------------------------------- which tensor


def test_without_a_key_the_path_itself_or_the_only_tensor(flax_donor: Path, donor: Path, tmp_path: Path) -> None:
    variables = {"params": {"fc": {"kernel": jnp.zeros((3, 5))}, "sq": {"kernel": jnp.zeros((4, 4))}}}
    out = gx.replace(variables, "**/kernel", gx.from_checkpoint(flax_donor), expect=2)
    np.testing.assert_array_equal(out["params"]["sq"]["kernel"], SQUARE)
    one = tmp_path / "one.pt"
    torch.save({"fc.weight": torch.from_numpy(LINEAR)}, one)
    np.testing.assert_array_equal(put((3, 5), one), LINEAR.T)
    assert "key=" in refused((3, 5), donor)


def test_a_key_that_is_not_there_says_what_is_near(donor: Path) -> None:
    assert "fc1.weight" in refused((3, 5), donor, "fc1.wieght")


def test_a_container_inside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"ema": {"fc.weight": torch.zeros(5, 3)}, "model": {"fc.weight": torch.from_numpy(LINEAR)}}, path)
    np.testing.assert_array_equal(put((3, 5), f"{path}::model", "fc.weight"), LINEAR.T)


# ---------------------------------------------------------------- dtype, and bad donors


def test_another_dtype_is_refused_with_both_names(donor: Path) -> None:
    text = refused((3, 5), donor, "half.weight")
    assert "bfloat16" in text
    assert "float32" in text
    assert "cast=True" in text
    out = put((3, 5), donor, "half.weight", cast=True)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, STATE["half.weight"].astype(np.float32).T)
    assert "int64" in refused((), donor, "steps", leaf="scale", cast=True)


def test_a_cast_that_overflows_is_refused() -> None:
    leaf = {"w": jnp.zeros(2, jnp.float16)}
    with pytest.raises(PlanError, match="do not fit float16"):
        gx.replace(leaf, "w", gx.from_checkpoint({"w": np.full(2, 1e6, np.float32)}, "w", cast=True))


def test_a_donor_file_that_cannot_be_read_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        put((3, 5), tmp_path / "missing.pt", "w")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(FormatError):
        put((3, 5), tmp_path / "bad.safetensors", "w")


def test_a_quantized_donor_is_refused_by_scheme(tmp_path: Path) -> None:
    path = tmp_path / "gptq.safetensors"
    arrays = {
        "fc.qweight": np.zeros((3, 5), np.int32),
        "fc.qzeros": np.zeros((1, 5), np.int32),
        "fc.scales": normal(1, 5),
    }
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(PlanError, match="GPTQ"):
        put((3, 5), path, "fc.qweight")


def test_an_abstract_donor_is_refused() -> None:
    with pytest.raises(PlanError, match=r"the donor Linear .* no values"):
        put((3, 5), torch.nn.Linear(3, 5, device="meta"), "weight")


def test_one_donor_opens_once(donor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftax import formats

    opened: list[Any] = []
    real = formats.open_path
    monkeypatch.setattr("graftax.formats.open_path", lambda path: opened.append(path) or real(path))
    value = gx.from_checkpoint(gx.open_checkpoint(donor), "fc1.weight")
    opened.clear()
    gx.replace(tree(a=(3, 5), b=(3, 5), c=(3, 5)), "**/kernel", value, expect=3)
    assert len(opened) <= 1


def test_the_donor_is_not_changed(donor: Path) -> None:
    before = donor.read_bytes()
    state = {"w.weight": torch.zeros(5, 3)}
    source = torch.from_numpy(LINEAR.copy())
    out = gx.replace(state, "w.weight", gx.from_checkpoint({"w.weight": source}))
    out["w.weight"].zero_()
    assert torch.equal(source, torch.from_numpy(LINEAR))
    put((3, 5), donor, "fc1.weight")
    assert donor.read_bytes() == before


# ---------------------------------------------------------------- tensors that are handed over by themselves


@pytest.mark.parametrize("kind", ["tensor", "parameter"])
@pytest.mark.parametrize(("shape", "layouts"), [((4, 4), {"linear", "identity"}), ((3, 3, 3, 3), {"conv", "identity"})])
def test_a_torch_tensor_with_two_readings_is_asked(kind, shape, layouts):
    array = normal(*shape)
    tensor = torch.nn.Parameter(torch.from_numpy(array)) if kind == "parameter" else torch.from_numpy(array)
    tree = {"params": {"layer": {"kernel": np.zeros(shape, "f4")}, "other": {"kernel": np.zeros((2, 3), "f4")}}}
    path = "params/layer/kernel"
    with pytest.raises(PlanError, match="more than one way") as error:
        gx.replace(tree, {path: tensor, "params/other/kernel": torch.zeros(3, 2)})
    assert [failure.key for failure in error.value.failures] == [path, "params/other/kernel"]
    assert 'gx.from_checkpoint({"weight": tensor}, layout=...)' in error.value.failures[0].next
    made = {}
    for layout in layouts:
        assert f'layout="{layout}"' in error.value.failures[0].next
        new = gx.replace(tree, {path: gx.from_checkpoint({"weight": tensor}, layout=layout)})
        made[layout] = np.asarray(new["params"]["layer"]["kernel"])
    np.testing.assert_array_equal(made.pop("identity"), array)
    turned = array.T if len(shape) == 2 else array.transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(next(iter(made.values())), turned)
    for given in (array, jnp.asarray(array)):
        np.testing.assert_array_equal(gx.replace(tree, {path: given})["params"]["layer"]["kernel"], array)


def test_a_square_tensor_into_a_module_and_a_file_is_asked(tmp_path):
    module = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(PlanError, match="more than one way"):
        gx.replace(module, "kernel", torch.zeros(4, 4))
    safetensors.numpy.save_file({"params/fc/kernel": np.zeros((4, 4), "f4")}, tmp_path / "f.safetensors")
    checkpoint = gx.open_checkpoint(tmp_path / "f.safetensors")
    _, tensors, _ = replace_checkpoint(checkpoint, {"params/fc/kernel": torch.zeros(4, 4)})
    with pytest.raises(PlanError, match="more than one way"):
        list(tensors)


def test_a_torch_tensor_with_one_reading_goes_in():
    square, wide = torch.from_numpy(normal(4, 4)), torch.from_numpy(normal(2, 3))
    params = {
        "fc": {"kernel": np.zeros((2, 3), "f4"), "bias": np.zeros(4, "f4")},
        "e": {"embedding": np.zeros((4, 4), "f4")},
    }
    edits = {"params/fc/kernel": wide, "params/fc/bias": square[0], "params/e/embedding": square}
    new = gx.replace({"params": params}, edits)["params"]
    np.testing.assert_array_equal(new["fc"]["kernel"], wide.numpy())
    np.testing.assert_array_equal(new["e"]["embedding"], square.numpy())
    state = gx.replace({"fc.weight": torch.zeros(4, 4)}, "fc.weight", square)
    assert torch.equal(state["fc.weight"], square)
    state = gx.replace({"fc.weight": np.zeros((4, 4), "f4")}, "fc.weight", square)
    np.testing.assert_array_equal(state["fc.weight"], square.numpy())
    again = gx.replace({"params": {"fc": {"kernel": jnp.zeros((4, 4))}}}, "**/kernel", lambda old: square)
    np.testing.assert_array_equal(again["params"]["fc"]["kernel"], square.numpy())


# ---------------------------------------------------------------- a plan tells key and layout


def test_a_plan_tells_key_and_layout_of_every_leaf() -> None:
    """A flatten and fused rows, which one tensor cannot show."""
    import jax.numpy as jnp

    source = {"fc.weight": torch.arange(24.0).reshape(2, 12), "qkv.weight": torch.arange(48.0).reshape(12, 4)}
    rules = [
        '{ torch = "fc.weight", flax = "params/fc/kernel", flatten = "3 2 2" }',
        '{ torch = "qkv.weight", flax = ["params/q/kernel", "params/k/kernel", "params/v/kernel"], fused = "block" }',
    ]
    shapes = {"fc": (12, 2), "q": (4, 4), "k": (4, 4), "v": (4, 4)}
    like = {"params": {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}}
    plan = gx.plan(source, like, rules=rules)
    ported = plan.run(source)["params"]
    donor = gx.from_checkpoint(source, plan=plan)
    out = gx.replace(like, "**/{fc,k}/kernel", donor, expect=2)["params"]
    for name in shapes:
        wanted = ported[name]["kernel"] if name in ("fc", "k") else np.zeros(shapes[name])
        np.testing.assert_array_equal(out[name]["kernel"], wanted)
    half = gx.replace(like["params"], "fc/kernel[:, 1]", gx.mix(donor, 0.5))  # a bare tree, and a part of a leaf
    np.testing.assert_array_equal(half["fc"]["kernel"][:, 1] * 2, ported["fc"]["kernel"][:, 1])
    assert not half["fc"]["kernel"][:, 0].any()
    for plan_given, tree, words in (
        (plan.inverse, source, "the other direction: give plan.inverse"),
        (plan, {"fc.weight": torch.zeros(2, 4)}, "takes fc.weight float32.2,12., and .* has float32.2,4."),
    ):
        with pytest.raises(PlanError, match=words):
            gx.replace(like, "**/fc/kernel", gx.from_checkpoint(tree, plan=plan_given))
    with pytest.raises(UsageError, match="tells key and layout"):
        gx.from_checkpoint(source, "fc.weight", plan=plan)
    with pytest.raises(UsageError, match="is no plan"):
        gx.from_checkpoint(source, plan="plan.json")  # type: ignore[arg-type]


def test_a_plan_tells_the_layout_on_a_file(tmp_path: Path) -> None:
    source = {"fc.weight": torch.arange(6.0).reshape(2, 3)}
    np.savez(tmp_path / "old.npz", **{"fc/kernel": np.zeros((3, 2), np.float32)})
    tree = gx.open_checkpoint(tmp_path / "old.npz")
    donor = gx.from_checkpoint(source, plan=gx.plan(source, tree))
    for value in (donor, gx.mix(donor, 1), gx.mix(gx.from_checkpoint(tmp_path / "old.npz"), 1 - 1)):
        wanted = 0 * source["fc.weight"].T if value is not donor and value.t == 0 else source["fc.weight"].T
        write_replacement(tree, "fc/kernel", value, tmp_path / "new.npz")
        np.testing.assert_array_equal(gx.open_checkpoint(tmp_path / "new.npz").read("fc/kernel"), wanted)
