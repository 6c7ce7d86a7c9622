"""The library's front: containers come back as they were, nothing is mutated, all is checked before it is done."""

from __future__ import annotations

from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from flax.core import FrozenDict
from safetensors.numpy import load_file, save_file

import graftax as gx
from graftax.errors import PlanError, UsageError


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(3, 5)
        self.fc2 = torch.nn.Linear(5, 5)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="fc2")(nn.relu(nn.Dense(5, name="fc1")(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(3, 5, rngs=rngs)
        self.fc2 = nnx.Linear(5, 5, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(self.fc1(x)))


@pytest.fixture(scope="module")
def net() -> TorchNet:
    torch.manual_seed(0)
    return TorchNet().eval()


X = np.random.default_rng(1).normal(size=(4, 3)).astype("f4")


def agrees(net: TorchNet, out) -> None:
    with torch.no_grad():
        want = net(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(np.asarray(out), want, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def highest():
    with jax.default_matmul_precision("highest"):
        yield


def test_into_a_linen_wrapper(net):
    variables = gx.port(net, gx.linen(LinenNet(), X))
    agrees(net, LinenNet().apply(variables, X))


@pytest.mark.parametrize("freeze", [False, True])
def test_into_linen_variables(net, freeze):
    like = LinenNet().init(jax.random.key(0), X)
    like = FrozenDict(like) if freeze else like
    before = jax.tree.map(np.asarray, like)
    variables = gx.port(net.state_dict(), like)
    assert type(variables) is type(like)
    assert jax.tree.structure(variables) == jax.tree.structure(like)
    agrees(net, LinenNet().apply(variables, X))
    jax.tree.map(np.testing.assert_array_equal, before, like)


def test_into_bare_params_and_abstract_trees(net):
    params = LinenNet().init(jax.random.key(0), X)["params"]
    agrees(net, LinenNet().apply({"params": gx.port(net, params)}, X))
    abstract = jax.eval_shape(LinenNet().init, jax.random.key(0), X)
    tree = gx.port(net, abstract)
    assert type(tree) is dict
    agrees(net, LinenNet().apply(tree, X))


def test_into_nnx(net):
    module = NnxNet(nnx.Rngs(0))
    before = np.asarray(module.fc1.kernel[...])
    new = gx.port(net, module)
    assert isinstance(new, NnxNet)
    assert new is not module
    agrees(net, new(X))
    np.testing.assert_array_equal(before, module.fc1.kernel[...])
    abstract = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
    agrees(net, gx.port(net, abstract)(X))
    state = gx.port(net, nnx.state(module))
    assert isinstance(state, nnx.State)
    graphdef, old = nnx.split(module)
    agrees(net, nnx.merge(graphdef, gx.port(net, (graphdef, old)))(X))


def test_back_to_torch(net):
    variables = gx.port(net, gx.linen(LinenNet(), X))
    for like in (net, net.state_dict(), TorchNet().to("meta")):
        state = gx.port(variables, like)
        assert type(state) is OrderedDict
        assert list(state) == list(net.state_dict())
        assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    TorchNet().load_state_dict(gx.port(gx.port(net, NnxNet(nnx.Rngs(0))), net))


def test_linen_to_nnx_and_torch_to_torch(net):
    module = gx.port(gx.port(net, gx.linen(LinenNet(), X)), NnxNet(nnx.Rngs(0)))
    agrees(net, module(X))
    renamed = {k.replace("fc", "dense_"): torch.zeros_like(v) for k, v in net.state_dict().items()}
    assert torch.equal(gx.port(net, renamed, rules=[
        {"source": "fc{i}.weight", "target": "dense_{i}.weight"}, {"source": "fc{i}.bias", "target": "dense_{i}.bias"}
    ])["dense_2.weight"], net.fc2.weight)  # fmt: skip


def test_host_arrays(net):
    tree = gx.port(net, gx.linen(LinenNet(), X), sharding="host")
    assert type(tree["params"]["fc1"]["kernel"]) is np.ndarray


def test_load_into_is_all_or_nothing(net, tmp_path):
    module = NnxNet(nnx.Rngs(0))
    kernel = module.fc1.kernel
    assert gx.load_into(module, net) is module
    assert module.fc1.kernel is kernel
    agrees(net, module(X))

    other = TorchNet()
    gx.load_into(other, module)
    assert torch.equal(other.fc1.weight, net.fc1.weight)

    bad = dict(net.state_dict())
    bad["fc2.weight"] = torch.zeros(6, 5)
    before = np.asarray(module.fc1.kernel[...]).copy()
    bad["fc1.weight"] = torch.ones(5, 3)
    with pytest.raises(PlanError, match="fc2"):
        gx.load_into(module, bad)
    np.testing.assert_array_equal(before, module.fc1.kernel[...])
    with pytest.raises(UsageError):
        gx.load_into(gx.linen(LinenNet(), X), net)


def test_an_incomplete_plan_is_returned_by_plan_and_raised_by_port(net):
    short = {k: v for k, v in net.state_dict().items() if k != "fc2.bias"}
    plan = gx.plan(short, gx.linen(LinenNet(), X))
    assert not plan.complete
    assert any("params/fc2/bias" in q.targets for q in plan.questions)
    for go in (lambda: plan.run(short), lambda: gx.port(short, gx.linen(LinenNet(), X))):
        with pytest.raises(PlanError) as caught:
            go()
        assert "fc2/bias" in str(caught.value)
        assert caught.value.questions


def test_plans_run_invert_save_and_load(net, tmp_path):
    like = gx.linen(LinenNet(), X)
    plan = gx.plan(net, like)
    variables = plan.run(net)
    agrees(net, LinenNet().apply(variables, X))
    state = plan.inverse.run(variables)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    plan.save(tmp_path / "p.json")
    loaded = gx.load_plan(tmp_path / "p.json")
    assert loaded.complete
    assert loaded.entries == plan.entries
    agrees(net, LinenNet().apply(loaded.run(net.state_dict()), X))
    assert loaded.inverse.inverse.entries == plan.entries


def test_a_plan_refuses_another_source(net):
    plan = gx.plan(net, gx.linen(LinenNet(), X))
    other = {**net.state_dict(), "fc1.weight": torch.zeros(5, 4)}
    with pytest.raises(PlanError, match=r"fc1\.weight"):
        plan.run(other)


def test_dtype_policies(net):
    half = {k: v.to(torch.bfloat16) for k, v in net.state_dict().items()}
    like = gx.linen(LinenNet(), X)
    assert not gx.plan(half, like).complete
    kept = gx.port(half, like, dtype="source")
    assert kept["params"]["fc1"]["kernel"].dtype == jnp.bfloat16
    cast = gx.port(half, like, dtype="like")
    assert cast["params"]["fc1"]["kernel"].dtype == jnp.float32
    mixed = gx.port(half, like, dtype={"**/kernel": "source", "**/bias": "float32"})
    assert mixed["params"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert mixed["params"]["fc1"]["bias"].dtype == jnp.float32


def test_a_constant_extra_head_is_not_taken_for_tied(net):
    """Zero biases and unit scales are bit-identical without being tied."""
    source = dict(net.state_dict())
    source |= {"norm.weight": torch.ones(5), "norm.bias": torch.zeros(5)}
    source |= {"head.norm.weight": torch.ones(5), "head.norm.bias": torch.zeros(5)}
    like = jax.eval_shape(LinenNet().init, jax.random.key(0), X)
    like["params"]["norm"] = {k: jax.ShapeDtypeStruct((5,), jnp.float32) for k in ("scale", "bias")}
    plan = gx.plan(source, like)
    assert not plan.complete
    waiting = {s for q in plan.questions for s in q.sources}
    assert {"head.norm.weight", "head.norm.bias"} <= waiting


def test_int64_beyond_int32_keeps_its_value(tmp_path):
    save_file({"a.steps": np.array([2**40], "i8"), "a.weight": np.ones((2, 3), "f4")}, tmp_path / "m.safetensors")
    like = {"a": {"steps": np.zeros(1, "i8"), "kernel": np.zeros((3, 2), "f4")}}
    tree = gx.port(tmp_path / "m.safetensors", like)
    assert int(np.asarray(tree["a"]["steps"])[0]) == 2**40


def test_a_checkpoint_is_a_mapping_whose_key_errors_say_what_is_near(tmp_path):
    np.savez(tmp_path / "a.npz", **{"fc/kernel": np.ones((2, 2), np.float32), "fc/bias": np.ones(2, np.float32)})
    checkpoint = gx.open_checkpoint(tmp_path / "a.npz")
    for ask in (checkpoint.__getitem__, checkpoint.read):
        with pytest.raises(KeyError, match=r"has no 'fc/kernal'\nNear: fc/kernel"):
            ask("fc/kernal")
        with pytest.raises(PlanError, match="fc/kernel"):
            ask("fc/kernal")
    assert "fc/kernal" not in checkpoint
    assert 3 not in checkpoint
    assert checkpoint.get("fc/kernal") is None
    assert checkpoint.get("fc/kernal", 7) == 7
    assert checkpoint.get("fc/bias") == checkpoint["fc/bias"]


def test_port_file_and_open_checkpoint(net, tmp_path):
    receipt = gx.port_file(net, gx.linen(LinenNet(), X), tmp_path / "o.safetensors")
    assert receipt.lossless
    assert receipt.leaves == 4
    checkpoint = gx.open_checkpoint(tmp_path / "o.safetensors")
    assert checkpoint.side == "flax"
    np.testing.assert_array_equal(checkpoint.read("params/fc1/kernel"), net.fc1.weight.detach().numpy().T)
    assert set(load_file(tmp_path / "o.safetensors")) == set(checkpoint)


class OneBias(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="fc2", use_bias=False)(nn.Dense(5, name="fc1")(x))


def test_a_bias_on_one_side_only_is_asked_alone(net):
    """Its weight ports; the bias is missing or unused, and no other bias of the same shape takes its place."""
    source = {k: v for k, v in net.state_dict().items() if k != "fc1.bias"} | {"extra.bias": torch.ones(5)}
    like = gx.linen(LinenNet(), X)
    plan = gx.plan(source, like, unused="drop")
    assert [q.targets for q in plan.questions] == [("params/fc1/bias",)]
    assert not plan.questions[0].candidates
    params = gx.port(source, like, missing="zeros", unused="drop")["params"]
    np.testing.assert_array_equal(params["fc1"]["kernel"], net.fc1.weight.detach().numpy().T)
    assert not np.asarray(params["fc1"]["bias"]).any()

    plan = gx.plan(net, gx.linen(OneBias(), X))
    assert [q.sources for q in plan.questions] == [("fc2.bias",)]
    assert gx.plan(net, gx.linen(OneBias(), X), unused="drop").complete


class TiedTorch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(7, 5)
        self.fc = torch.nn.Linear(5, 5)
        self.head = torch.nn.Linear(5, 7, bias=False)
        self.head.weight = self.emb.weight


class TiedLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(7, 5, name="emb")
        return embed.attend(nn.Dense(5, name="fc")(embed(x)))


def test_a_tied_head_goes_there_and_back():
    module = TiedTorch()
    variables = gx.port(module, gx.linen(TiedLinen(), np.zeros(2, "i4")))
    state = gx.port(variables, module)
    assert set(state) == set(module.state_dict())
    assert state["head.weight"] is state["emb.weight"]
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())


def test_batch_norm_counters_come_back_without_a_question():
    torch_net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
    torch_net[1].num_batches_tracked.fill_(9)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(5)(x))
            return nn.Dense(2)(x)

    variables = gx.port(torch_net, gx.linen(Net(), X))
    assert int(gx.port(variables, torch_net)["1.num_batches_tracked"]) == 9
    with torch.device("meta"):
        abstract = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
    assert int(gx.port(variables, abstract)["1.num_batches_tracked"]) == 0
    again = gx.port(torch_net, {k: torch.zeros_like(v) for k, v in torch_net.state_dict().items()})
    assert int(again["1.num_batches_tracked"]) == 9


def test_buffers_that_both_ends_hold_are_ported():
    source = {
        "r.inv_freq": torch.tensor([1.0, 0.5]),
        "e.position_ids": torch.arange(10, 15),
        "w.weight": torch.ones(8, 5),
    }
    out = gx.port(source, {f"m.{k}": torch.zeros_like(v) for k, v in source.items()})
    assert all(torch.equal(out[f"m.{k}"], v) for k, v in source.items())


def test_a_leaf_that_some_unpaired_tensor_may_fill_is_never_filled_by_policy():
    source = {f"b.{i}.{k}.weight": torch.ones(8, 8) for i in range(3) for k in ("alpha", "omega")}
    like = {f"b_{i}": {k: {"kernel": jnp.zeros((8, 8))} for k in ("uno", "dos")} for i in range(3)}
    plan = gx.plan(source, like, missing="zeros", unused="drop")
    assert not plan.complete
    assert all(question.candidates for question in plan.questions)


def test_crossed_pairs_are_printed_one_by_one():
    source = {"fc1.weight": torch.ones(4, 3), "fc2.weight": torch.ones(5, 4)}
    like = {"Dense_1": {"kernel": jnp.zeros((3, 4))}, "Dense_0": {"kernel": jnp.zeros((4, 5))}}
    rules = [{"torch": "fc1.weight", "flax": "Dense_1/kernel"}, {"torch": "fc2.weight", "flax": "Dense_0/kernel"}]
    text = str(gx.plan(source, like, rules=rules))
    assert "fc1.weight -> Dense_1/kernel" in text
    assert "fc2.weight -> Dense_0/kernel" in text


def test_dir_lists_the_public_names() -> None:
    assert [name for name in dir(gx) if not name.startswith("__")] == sorted(gx.__all__)
    assert "__version__" in dir(gx)
