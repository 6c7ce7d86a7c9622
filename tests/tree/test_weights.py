"""graftax.tree.weights: a training state is planned from its weights, in every format that holds one."""

import flax.serialization
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import graftax as gx
from graftax.errors import PlanError, UsageError
from graftax.tree.weights import weights_of

RNG = np.random.default_rng(0)


def layers(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "Dense_0": {"kernel": (3, 4), "bias": (4,)},
        "LayerNorm_0": {"scale": (4,), "bias": (4,)},
        "Dense_1": {"kernel": (4, 2), "bias": (2,)},
    }
    return {m: {k: rng.standard_normal(s).astype("f4") for k, s in leaves.items()} for m, leaves in shapes.items()}


PARAMS = layers()
COUNT = np.array(3, "i4")
ADAM = {"0": {"count": COUNT, "mu": layers(1), "nu": layers(2)}, "1": {}}
STATE = {"step": COUNT, "params": PARAMS, "opt_state": ADAM, "rng": np.array([1, 2], "u4")}
INSIDE = {"step": COUNT, "model": {"params": PARAMS}, "opt": ADAM}
WANT = {
    f"{module}.{'bias' if leaf == 'bias' else 'weight'}": torch.from_numpy(np.ascontiguousarray(value.T))
    for module, leaves in PARAMS.items()
    for leaf, value in leaves.items()
}


def flat(tree, above=""):
    out = {}
    for name, value in tree.items():
        path = f"{above}/{name}" if above else name
        out |= flat(value, path) if isinstance(value, dict) else {path: np.asarray(value)}
    return out


def stored(kind, tree, folder):
    """The tree as a checkpoint of this kind."""
    if kind == "live":
        return tree
    if kind == "flat":
        return flat(tree)
    path = folder / f"state.{kind}"
    if kind == "msgpack":
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
    elif kind == "npz":
        np.savez(path, **flat(tree))
    elif kind == "safetensors":
        save_file(flat(tree), path)
    else:
        import orbax.checkpoint as ocp

        path = folder / "state"
        ocp.PyTreeCheckpointer().save(path, tree)
    return str(path)


def like():
    return {key: torch.zeros_like(value) for key, value in WANT.items()}


KINDS = ["live", "flat", "msgpack", "npz", "safetensors", "orbax"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", [STATE, INSIDE], ids=["params", "model"])
def test_a_plan_is_made_from_the_weights(tmp_path, tree, kind):
    source = stored(kind, tree, tmp_path)
    plan = gx.plan(source, like())
    assert plan.complete
    out = plan.run(source)
    assert all(torch.equal(out[key], value) for key, value in WANT.items())
    assert set(plan.source.left) == set(tree) - {"params", "model"}
    (line,) = [line for line in str(plan).splitlines() if line.startswith("left out of ")]
    assert "an optimizer's state, 13 leaves" in line
    plan.save(tmp_path / "plan.json")
    again = gx.load_plan(tmp_path / "plan.json")
    assert again.source.left == plan.source.left
    assert torch.equal(again.run(source)["Dense_0.weight"], WANT["Dense_0.weight"])


@pytest.mark.parametrize("kind", ["msgpack", "npz", "safetensors", "orbax"])
def test_a_part_is_named(tmp_path, kind):
    path = stored(kind, STATE, tmp_path)
    assert torch.equal(gx.port(f"{path}::params", like())["Dense_0.weight"], WANT["Dense_0.weight"])
    assert list(weights_of(gx.open_checkpoint(f"{path}::opt_state/0/mu"))) == list(
        gx.open_checkpoint(f"{path}::opt_state/0/mu")
    )
    whole = gx.open_checkpoint(f"{path}::.")
    assert set(weights_of(whole)) == set(whole) == set(flat(STATE))


@pytest.mark.parametrize("kind", ["msgpack", "live"])
def test_an_average_of_the_weights_is_a_question(tmp_path, kind):
    source = stored(kind, STATE | {"ema_params": layers(5)}, tmp_path)
    with pytest.raises(PlanError, match="2 containers") as info:
        gx.plan(source, like())
    names = ["params", "ema_params"]
    keys = [f'["{name}"]' for name in names] if kind == "live" else [f"{source}::{name}" for name in names]
    assert [failure.key for failure in info.value.failures] == keys
    chosen = STATE["params"] if kind == "live" else f"{source}::params"
    assert torch.equal(gx.port(chosen, like())["Dense_0.weight"], WANT["Dense_0.weight"])


@pytest.mark.parametrize("kind", ["msgpack", "live"])
def test_an_optimizer_of_another_structure_is_asked_about(tmp_path, kind):
    source = stored(kind, {"params": PARAMS, "opt_state": {"0": {"count": COUNT, "odd": np.ones((5, 7))}}}, tmp_path)
    with pytest.raises(PlanError, match="1 leaves match no weight") as info:
        gx.plan(source, like())
    assert ('tree["params"]' if kind == "live" else f"{source}::params") in str(info.value)


def test_like_keeps_its_training_state():
    for tree, path in ((STATE, ("params",)), (INSIDE, ("model", "params"))):
        target = {**tree, path[0]: layers(7) if len(path) == 1 else {"params": layers(7)}}
        out = gx.port(WANT, target)
        assert list(out) == list(target)
        made = out[path[0]] if len(path) == 1 else out["model"]["params"]
        assert np.array_equal(made["Dense_0"]["kernel"], PARAMS["Dense_0"]["kernel"])
        state = "opt_state" if tree is STATE else "opt"
        assert out[state]["0"]["mu"]["Dense_0"]["kernel"] is target[state]["0"]["mu"]["Dense_0"]["kernel"]
        assert out["step"] is target["step"]


def test_inspect_sees_all_and_says_what_is_left_out(tmp_path):
    from graftax.report.inspecting import inspection, inspection_text

    data = inspection(gx.open_checkpoint(stored("msgpack", STATE | {"step": 3}, tmp_path)))
    assert set(data["tensors"]) == set(flat(STATE))
    assert set(data["left"]) == {"opt_state", "rng", "step"}
    last = inspection_text(data).splitlines()[-1]
    assert last.startswith("beside the weights, not ported: ")
    assert {"opt_state", "rng", "step"} == set(last.partition(": ")[2].split(", "))


def test_items_of_an_orbax_step(tmp_path):
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(tmp_path / "run")
    items = {"params": PARAMS, "opt_state": {"mu": layers(1)}}
    manager.save(1, args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()}))
    manager.wait_until_finished()
    manager.close()
    plan = gx.plan(str(tmp_path / "run"), like())
    assert plan.complete
    assert plan.source.left == {"opt_state": "an item of the checkpoint"}
    assert set(gx.open_checkpoint(f"{tmp_path}/run::opt_state")) == set(flat({"mu": PARAMS}))
    assert set(gx.open_checkpoint(f"{tmp_path}/run::params")) == set(flat(PARAMS))


def test_every_optimizer_of_optax(tmp_path):
    """States as optax makes them, and as flax.serialization stores them."""
    optax = pytest.importorskip("optax")
    mask = {module: {leaf: leaf == "kernel" for leaf in leaves} for module, leaves in PARAMS.items()}
    optimizers = [
        *(make(0.1) for make in (optax.adam, optax.adamw, optax.adafactor, optax.adagrad, optax.lamb, optax.lion)),
        *(make(0.1) for make in (optax.nadam, optax.rmsprop, optax.sgd)),
        optax.sgd(0.1, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 10))),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        optax.masked(optax.adam(0.1), mask),
        optax.flatten(optax.adam(0.1)),
        optax.lbfgs(),
        optax.contrib.muon(0.1),
        optax.contrib.schedule_free_adamw(),
        optax.adadelta(0.1),
        optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.1))),
    ]
    for number, optimizer in enumerate(optimizers):
        state = flax.serialization.to_state_dict(optimizer.init(PARAMS))
        path = tmp_path / f"{number}.msgpack"
        path.write_bytes(flax.serialization.to_bytes({"params": PARAMS, "opt_state": state, "step": COUNT}))
        found = weights_of(gx.open_checkpoint(path))
        assert set(found) == set(flat({"params": PARAMS})), number
        assert "step" in found.left


@pytest.mark.parametrize("kind", ["msgpack", "live"])
def test_networks_in_training_are_asked_about(tmp_path, kind):
    tree = {"actor": {k: v for k, v in STATE.items() if k != "rng"}, "critic": STATE | {"params": layers(5)}}
    source = stored(kind, tree, tmp_path)
    with pytest.raises(PlanError, match="2 containers") as info:
        gx.plan(source, like())
    assert "critic" in info.value.failures[1].key
    chosen = tree["actor"] if kind == "live" else f"{source}::actor"
    assert torch.equal(gx.port(chosen, like())["Dense_0.weight"], WANT["Dense_0.weight"])


def test_replace_reaches_the_weights_of_every_network_and_no_moments():
    runs = {"exp": {"actor": STATE, "critic": STATE}}
    for tree in (runs, {"params": PARAMS, "opt": {"m": layers(1), "v": layers(2), "t": COUNT}}):
        out = flat(gx.replace(tree, "**/kernel", gx.constant(0.5)))
        changed = {path for path, value in out.items() if value.size > 1 and (value == 0.5).all()}
        assert changed == {path for path in flat(tree) if path.endswith("kernel") and "params/" in path}


@pytest.mark.parametrize("tree", [{}, {"a": {}}, {"a": None}, {"a": {"b": []}}])
def test_a_tree_without_arrays_is_refused(tree):
    with pytest.raises(UsageError, match="holds no weights"):
        gx.plan(tree, like())
