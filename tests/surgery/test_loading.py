"""load_arrays: everything is checked, then everything is assigned, in place; or nothing has changed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

import graftax as gx
from graftax.errors import PlanError, UsageError
from graftax.execute.opening import open_tree
from graftax.surgery.loading import load_arrays, require_module


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def torch_net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))


MAKERS = {"torch": torch_net, "nnx": lambda: Net(nnx.Rngs(0))}


@pytest.fixture(params=MAKERS)
def module(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]()


def new_values(module: Any) -> dict[str, np.ndarray]:
    tree = open_tree(module)
    return {
        path: (np.random.default_rng(i).normal(size=spec.shape) * 9).astype(spec.dtype)
        for i, (path, spec) in enumerate(tree.items())
    }


def snapshot(module: Any) -> dict[str, np.ndarray]:
    tree = open_tree(module)
    return {path: np.array(tree.read(path)) for path in tree}


def test_everything_is_assigned_in_place(module: Any) -> None:
    arrays = new_values(module)
    given = {path: array.copy() for path, array in arrays.items()}
    parts = [module.fc, module.fc.kernel, module.norm.mean] if isinstance(module, Net) else list(module.parameters())
    assert load_arrays(module, arrays) is module
    after = snapshot(module)
    for path, array in given.items():
        np.testing.assert_array_equal(after[path], array)
        np.testing.assert_array_equal(arrays[path], array)
    now = [module.fc, module.fc.kernel, module.norm.mean] if isinstance(module, Net) else list(module.parameters())
    assert all(a is b for a, b in zip(parts, now, strict=True))
    for array in arrays.values():  # nothing is shared with what was given
        array.flags.writeable and array.fill(0)
    for path, array in given.items():
        np.testing.assert_array_equal(snapshot(module)[path], array)


def broken(arrays: dict[str, Any], how: str) -> dict[str, Any]:
    last = list(arrays)[-1]
    matrix = next(path for path, array in arrays.items() if array.ndim == 2)
    if how == "missing":
        del arrays[last]
    elif how == "unknown":
        arrays["fc.wieght"] = arrays[last]
    elif how == "shape":
        arrays[matrix] = arrays[matrix].T
    elif how == "dtype":
        arrays[matrix] = arrays[matrix].astype(np.float64)
    elif how == "no array":
        arrays[last] = 0.5
    else:
        arrays[matrix] = arrays[matrix][None]
        arrays[last] = np.zeros(77, np.float32)
        arrays["other"] = arrays.pop(next(path for path in arrays if path not in (matrix, last)))
    return arrays


@pytest.mark.parametrize(
    ("how", "count", "words"),
    [
        ("missing", 1, "missing key: no array is given for it"),
        ("unknown", 1, "unexpected key: no weight of the module has this name"),
        ("shape", 1, "Its transpose would fit"),
        ("dtype", 1, "expected float32.*found float64"),
        ("no array", 1, "no array"),
        ("all", 4, "another shape"),
    ],
)
def test_nothing_changes_on_a_failure(module: Any, how: str, count: int, words: str) -> None:
    before = snapshot(module)
    with pytest.raises(PlanError, match=words) as caught:
        load_arrays(module, broken(new_values(module), how))
    assert len(caught.value.failures) == count
    for path, array in snapshot(module).items():
        np.testing.assert_array_equal(array, before[path])


def test_random_state_stays() -> None:
    net = Net(nnx.Rngs(3))
    before = jax.random.key_data(net.drop.rngs.key.get_value()) if hasattr(net.drop.rngs, "key") else None
    load_arrays(net, new_values(net))
    if before is not None:
        np.testing.assert_array_equal(jax.random.key_data(net.drop.rngs.key.get_value()), before)


def test_an_optimizer_keeps_its_parameters() -> None:
    net = torch_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    load_arrays(net, new_values(net))
    held = optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(held, net.parameters(), strict=True))
    assert all(p.requires_grad for p in net.parameters())


def test_jax_arrays_and_tensors_are_taken() -> None:
    for module, make in ((torch_net(), jnp.asarray), (torch_net(), torch.from_numpy), (Net(nnx.Rngs(0)), jnp.asarray)):
        arrays = {k: v if v.dtype == np.int64 else make(v) for k, v in new_values(module).items()}
        load_arrays(module, arrays)
        for path, array in snapshot(module).items():
            np.testing.assert_array_equal(array, np.asarray(arrays[path]))


def test_a_tied_weight_takes_one_value() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(7, 3)
            self.head = torch.nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

    net = Tied()
    one = np.ones((7, 3), np.float32)
    load_arrays(net, {"embed.weight": one, "head.weight": one.copy()})
    assert net.head.weight is net.embed.weight
    with pytest.raises(PlanError):
        load_arrays(net, {"embed.weight": one, "head.weight": one * 2})
    assert (net.embed.weight == 1).all()


VARIABLES = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (VARIABLES, "port.* returns new variables"),
        (gx.linen(nn.Dense(2), jnp.ones((1, 3))), "returns new variables"),
        (nnx.state(Net(nnx.Rngs(0))), "State"),
        (torch_net().state_dict(), "state_dict"),
        ("model.pt", "file"),
        (nn.Dense(2), "gx.linen"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_is_not_changed_in_place_is_a_usage_error(target: Any, words: str) -> None:
    for call in (require_module, lambda t: load_arrays(t, {})):
        with pytest.raises(UsageError, match=words) as caught:
            call(target)
        assert caught.value.exit_code == 2


def test_an_abstract_module_is_refused() -> None:
    meta = torch.nn.Linear(3, 5, device="meta")
    with pytest.raises(UsageError, match="meta"):
        load_arrays(meta, {"weight": np.zeros((5, 3), np.float32), "bias": np.zeros(5, np.float32)})
