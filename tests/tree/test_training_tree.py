"""Training state: what an optimizer puts beside the weights is told by its structure, and nothing else is."""

import numpy as np
import pytest

from graftax.tree import TensorSpec
from graftax.tree.training_tree import find_training_state, own_parts

WEIGHTS = {"Dense_0": {"kernel": (3, 4), "bias": (4,)}, "LayerNorm_0": {"scale": (4,), "bias": (4,)}}
COUNT = "int32"
KEY = TensorSpec((2,), "uint32")
ADAM = {"0": {"count": COUNT, "mu": WEIGHTS, "nu": WEIGHTS}}


def flat(tree, above=""):
    """path -> spec of a nest whose leaves are shapes (float32), dtypes (of a number) or specs."""
    out = {}
    for name, value in tree.items():
        path = f"{above}/{name}" if above else name
        if isinstance(value, dict):
            out |= flat(value, path)
        elif isinstance(value, str):
            out[path] = TensorSpec((), value)
        else:
            out[path] = value if isinstance(value, TensorSpec) else TensorSpec(tuple(value), "float32")
    return out


def weights_in(tree):
    specs = flat(tree)
    found = find_training_state(specs)
    assert not found.copies
    assert not found.doubtful
    return found, {path for path in specs if not found.leaves_out(path)}


@pytest.mark.parametrize(
    ("tree", "left", "prefix"),
    [
        ({"step": COUNT, "params": WEIGHTS, "opt_state": ADAM}, {"step", "opt_state"}, ""),
        ({"step": COUNT, "params": WEIGHTS}, {"step"}, ""),
        (
            {"params": WEIGHTS, "opt_state": ADAM, "rng": KEY, "dropout_rng": KEY},
            {"opt_state", "rng", "dropout_rng"},
            "",
        ),
        ({"params": WEIGHTS, "opt_state": {"0": {"trace": WEIGHTS}}}, {"opt_state"}, ""),
        ({"model": {"params": WEIGHTS}, "opt": ADAM, "step": COUNT}, {"opt", "step"}, "model"),
        ({"model": WEIGHTS, "optimizer": {"step": COUNT, "opt_state": ADAM}}, {"optimizer"}, "model"),
        ({"state": {"params": WEIGHTS, "opt_state": ADAM}, "epoch": COUNT}, {"state/opt_state", "epoch"}, "state"),
        ({"params": {"params": WEIGHTS}, "opt_state": {"mu": {"params": WEIGHTS}}}, {"opt_state"}, "params"),
        ({**WEIGHTS, "opt_state": ADAM}, {"opt_state"}, ""),
        ({"net": WEIGHTS, "anything": ADAM}, {"anything"}, "net"),
        ({"params": WEIGHTS, "opt_state": {"count": COUNT, "mu": (12 + 4 + 4 + 4,)}}, {"opt_state"}, ""),
        ({"params": WEIGHTS, "opt_state": ADAM, "best_loss": "float32"}, {"opt_state", "best_loss"}, ""),
        ({"params": WEIGHTS, "opt_state": ADAM, "metrics": {"loss": "float32"}}, {"opt_state", "metrics"}, ""),
        (
            {"params": WEIGHTS, "opt_state": ADAM, "dynamic_scale": {"scale": "float32"}},
            {"opt_state", "dynamic_scale"},
            "",
        ),
    ],
)
def test_training_state_is_left_out(tree, left, prefix):
    found, kept = weights_in(tree)
    assert set(found.left) == left
    assert found.prefix == prefix
    inside = {"/".join(path.split("/")[-2:]) for path in kept}
    assert inside == set(flat(WEIGHTS))


def test_factored_moments_and_the_old_optimizers():
    rows = {m: {k: shape[:-1] or (1,) for k, shape in leaves.items()} for m, leaves in WEIGHTS.items()}
    params = {m: {k: {"v_row": (1,), "m": shape} for k, shape in leaves.items()} for m, leaves in WEIGHTS.items()}
    found, _ = weights_in({"params": WEIGHTS, "opt_state": {"0": {"count": COUNT, "v_row": rows, "v_col": rows}}})
    assert set(found.left) == {"opt_state"}
    found, _ = weights_in({"optimizer": {"target": WEIGHTS, "state": {"step": COUNT, "param_states": params}}})
    assert set(found.left) == {"optimizer/state"}
    assert found.prefix == "optimizer/target"


@pytest.mark.parametrize(
    "tree",
    [
        WEIGHTS,
        {"params": WEIGHTS},
        {"params": WEIGHTS, "batch_stats": {"BatchNorm_0": {"mean": (4,), "var": (4,)}}},
        {"params": {"optimizer": WEIGHTS["Dense_0"], "step": WEIGHTS["LayerNorm_0"], "opt_state": WEIGHTS["Dense_0"]}},
        {"model": WEIGHTS, "optimizer": WEIGHTS},
        {"model": {"mu": WEIGHTS}, "optimizer": {"mu": WEIGHTS}},
        {"optimizer": {"kernel": (3, 4)}, "step": {"kernel": (4, 4)}, "model": {"kernel": (4, 5)}},
        {"encoder": {"mu": {"kernel": (3, 4)}, "logvar": {"kernel": (3, 4)}}, "head": {"kernel": (3, 4)}},
        {"base": {"encoder": WEIGHTS}, "moco": {"momentum": {"encoder": WEIGHTS}}},
        {"params": {"upscaler": WEIGHTS}, "logit_scale": "float32"},
        {"model": WEIGHTS, "step": COUNT},
        {"params": WEIGHTS, "rng": {"kernel": (2, 2)}},
        {"params": WEIGHTS, "key": {"kernel": (4, 4), "bias": (4,)}},
        {"opt_state": ADAM, "step": COUNT},
        {"teacher": WEIGHTS, "student": WEIGHTS},
    ],
)
def test_names_alone_leave_nothing_out(tree):
    found, kept = weights_in(tree)
    assert not found.left
    assert kept == set(flat(tree))


def test_batch_stats_stay_beside_params():
    stats = {"BatchNorm_0": {"mean": (4,), "var": (4,)}}
    found, kept = weights_in({"params": WEIGHTS, "batch_stats": stats, "opt_state": ADAM, "step": COUNT})
    assert set(found.left) == {"opt_state", "step"}
    assert kept == set(flat({"params": WEIGHTS, "batch_stats": stats}))


@pytest.mark.parametrize("name", ["ema_params", "params_ema", "ema", "target_params", "polyak_weights"])
def test_copies_of_the_weights_are_a_question(name):
    assert find_training_state(flat({"params": WEIGHTS, name: WEIGHTS, "opt_state": ADAM})).copies == ("params", name)
    assert (
        find_training_state(flat({"params": WEIGHTS, name: {"Dense_9": {"kernel": (5, 5)}}, "opt_state": ADAM})).copies
        == ()
    )


RUN = {"step": COUNT, "params": WEIGHTS, "opt_state": ADAM}
OTHER = {"Dense_7": {"kernel": (5, 6)}}
BARE = {**WEIGHTS, "opt_state": ADAM}


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"actor": RUN, "critic": RUN}, ("actor/params", "critic/params")),
        ({"0": RUN, "1": RUN, "2": RUN}, ("0/params", "1/params", "2/params")),
        ({"state": RUN, "ema_params": WEIGHTS}, ("state/params", "ema_params")),
        ({"student": RUN, "teacher": {"params": WEIGHTS}}, ("student/params", "teacher/params")),
        ({"q": RUN, "target": WEIGHTS}, ("q/params", "target")),
        ({"state": RUN, "best_params": WEIGHTS}, ("state/params", "best_params")),
        ({"model": RUN, "optimizer": RUN}, ("model/params", "optimizer/params")),
        ({"a": BARE, "b": BARE}, ("a", "b")),
        ({"agents": {"a": RUN, "b": RUN}, "net": WEIGHTS}, ("agents/a/params", "agents/b/params", "net")),
        ({"exp": {"a": {"state": RUN}, "b": {"state": RUN}}}, ("exp/a/state/params", "exp/b/state/params")),
        ({"g": RUN, "d": {"params": OTHER, "opt_state": {"mu": OTHER}}}, ("g/params", "d/params")),
        (
            {
                name: {"params": {"mu": WEIGHTS}, "opt_state": {"0": {"count": COUNT, "nu": {"mu": WEIGHTS}}}}
                for name in "ab"
            },
            ("a/params", "b/params"),
        ),
    ],
)
def test_networks_in_training_side_by_side_are_a_question(tree, names):
    found = find_training_state(flat(tree))
    assert found.copies == names
    kept = {path for path in flat(tree) if not found.leaves_out(path)}
    assert all(path.startswith(tuple(f"{name}/" for name in names)) for path in kept)
    assert not any("opt_state" in path for path in kept)
    own = own_parts(flat(tree))
    moments = {path: path.split("/")[count:] for path, count in own.items() if path.endswith("kernel")}
    assert moments
    assert all("opt_state" not in rest and rest for rest in moments.values())


@pytest.mark.parametrize(
    ("tree", "left"),
    [
        ({"params": WEIGHTS, "opt_state": {"0": {"e_g": WEIGHTS, "e_x": WEIGHTS}}}, {"opt_state"}),
        ({"params": WEIGHTS, "opt": {"m": WEIGHTS, "v": WEIGHTS, "t": COUNT}}, {"opt"}),
        ({"params": WEIGHTS, "opt": {"m": WEIGHTS}}, {"opt"}),
        ({"model": WEIGHTS, "optimizer": {"m": WEIGHTS, "v": WEIGHTS}}, {"optimizer"}),
        ({"net": {"params": WEIGHTS}, "opt": {"s": {"m": {"params": WEIGHTS}, "t": COUNT}}}, {"opt"}),
    ],
)
def test_moments_need_no_known_name(tree, left):
    found, kept = weights_in(tree)
    assert set(found.left) == left
    assert len(kept) == len(flat(WEIGHTS))


def test_one_copy_under_an_optimizers_name_is_doubtful():
    assert find_training_state(flat({"encoder": WEIGHTS, "optimizer": {"mlp": WEIGHTS}})).doubtful == {"optimizer": ()}


def test_an_optimizer_of_another_structure_is_doubtful():
    found = find_training_state(flat({"params": WEIGHTS, "opt_state": {"0": {"count": COUNT, "precond": (5, 7)}}}))
    assert found.doubtful == {"opt_state": ("opt_state/0/precond",)}
    assert "opt_state" not in found.left


def test_a_logit_scale_beside_params_is_kept():
    _, kept = weights_in({"params": WEIGHTS, "opt_state": ADAM, "logit_scale": "float32"})
    assert "logit_scale" in kept


@pytest.mark.parametrize("seed", range(20))
def test_any_tree_is_mirrored(seed):
    """Whatever the names and shapes, moments that mirror the parameters are left out, and nothing else is."""
    rng = np.random.default_rng(seed)
    names = ["kernel", "mu", "step", "count", "optimizer", "0", "1", "block", "trace", "state", "ema", "scale"]

    def tree(depth):
        picked = rng.choice(names, rng.integers(1, 4), replace=False)
        return {
            str(n): tree(depth - 1) if depth and rng.random() < 0.6 else tuple(rng.integers(2, 5, rng.integers(1, 3)))
            for n in picked
        }

    params = tree(3)
    found, kept = weights_in({"params": params, "opt_state": {"0": {"count": COUNT, "mu": params, "nu": params}}})
    assert set(found.left) == {"opt_state"}
    assert kept == set(flat({"params": params}))
