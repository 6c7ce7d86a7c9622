"""The digits fixtures: what the files hold, and that the three models agree on them.

The conversion here is written out by hand with NumPy, so that it can judge the library's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from graftax import examples

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return load_file(FIXTURES / "digits.safetensors")


@pytest.fixture(scope="module")
def held_out() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "digits_test.npz") as data:
        return dict(data)


def by_hand(w: dict[str, np.ndarray], conv: str, norm: str, dense: str, first: int) -> dict[str, np.ndarray]:
    """'/'-paths without collection -> arrays, for modules named like `Conv_0` (first=0) or `conv1` (first=1)."""
    out = {}
    for i in (1, 2):
        out[f"{conv}{i - 1 + first}/kernel"] = w[f"conv{i}.weight"].transpose(2, 3, 1, 0)
        out[f"{conv}{i - 1 + first}/bias"] = w[f"conv{i}.bias"]
        for ours, theirs in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            out[f"{norm}{i - 1 + first}/{ours}"] = w[f"bn{i}.{theirs}"]
        out[f"{dense}{i - 1 + first}/bias"] = w[f"fc{i}.bias"]
    channels_last = w["fc1.weight"].reshape(48, 20, 2, 3).transpose(2, 3, 1, 0).reshape(120, 48)
    out[f"{dense}{first}/kernel"] = channels_last
    out[f"{dense}{1 + first}/kernel"] = w["fc2.weight"].T
    return out


def linen_variables(flat: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    out: dict[str, dict[str, dict[str, np.ndarray]]] = {"params": {}, "batch_stats": {}}
    for path, array in flat.items():
        module, leaf = path.split("/")
        collection = "batch_stats" if leaf in {"mean", "var"} else "params"
        out[collection].setdefault(module, {})[leaf] = np.ascontiguousarray(array)
    return out


def channels_last(images: np.ndarray) -> jax.Array:
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def test_record_describes_the_files() -> None:
    record = json.loads((FIXTURES / "digits.json").read_text())
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((FIXTURES / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) < 2_000_000


def test_accuracy_is_as_recorded(held_out: dict[str, np.ndarray]) -> None:
    record = json.loads((FIXTURES / "digits.json").read_text())
    right = int((held_out["logits"].argmax(1) == held_out["labels"]).sum())
    assert right == record["test_correct"]
    assert len(held_out["labels"]) == record["test_images"] == 450
    assert right / 450 >= 0.97


def test_no_weight_is_square(weights: dict[str, np.ndarray]) -> None:
    for key, array in weights.items():
        assert len(set(array.shape)) == array.ndim, key


def test_pt_and_safetensors_hold_the_same_state_dict(weights: dict[str, np.ndarray]) -> None:
    torch = pytest.importorskip("torch", reason="torch is an optional dependency")
    state = torch.load(FIXTURES / "digits.pt", weights_only=True)
    assert set(state) == set(weights)
    for key, tensor in state.items():
        assert tensor.numpy().dtype == weights[key].dtype, key
        assert tensor.numpy().tobytes() == weights[key].tobytes(), key
    assert state["bn1.num_batches_tracked"].item() > 0  # trained, and saved as torch saves it


def test_torch_gives_the_stored_logits(held_out: dict[str, np.ndarray]) -> None:
    torch = pytest.importorskip("torch", reason="torch is an optional dependency")
    model = examples.digits_torch().eval()
    model.load_state_dict(torch.load(FIXTURES / "digits.pt", weights_only=True))
    with torch.no_grad():
        logits = model(torch.from_numpy(held_out["images"])).numpy()
    np.testing.assert_allclose(logits, held_out["logits"], rtol=1e-4, atol=1e-4)


def test_linen_agrees_with_torch(weights: dict[str, np.ndarray], held_out: dict[str, np.ndarray]) -> None:
    model = examples.digits_linen()
    x = channels_last(held_out["images"])
    variables = linen_variables(by_hand(weights, "Conv_", "BatchNorm_", "Dense_", 0))
    made = jax.tree.map(jnp.shape, model.init(jax.random.key(0), x))
    assert jax.tree.map(np.shape, variables) == made  # the hand-written tree is the model's own tree
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model.apply(variables, x))
    np.testing.assert_allclose(logits, held_out["logits"], rtol=1e-4, atol=1e-4)


def test_nnx_agrees_with_torch(weights: dict[str, np.ndarray], held_out: dict[str, np.ndarray]) -> None:
    model = examples.digits_nnx(nnx.Rngs(1))
    flat = by_hand(weights, "conv", "norm", "linear", 1)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    leaves = dict(nnx.to_flat_state(state))
    assert {"/".join(map(str, path)) for path in leaves} == set(flat)
    for path, leaf in leaves.items():
        array = flat["/".join(map(str, path))]
        assert leaf.get_value().shape == array.shape
        leaf.set_value(jnp.asarray(array))
    nnx.update(model, state)
    model.eval()
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model(channels_last(held_out["images"])))
    np.testing.assert_allclose(logits, held_out["logits"], rtol=1e-4, atol=1e-4)


def test_flatten_order_matters(weights: dict[str, np.ndarray], held_out: dict[str, np.ndarray]) -> None:
    """The fixture must be able to show the flatten error: a plain transpose of fc1 has the right shape and is wrong."""
    flat = by_hand(weights, "Conv_", "BatchNorm_", "Dense_", 0)
    flat["Dense_0/kernel"] = weights["fc1.weight"].T
    logits = np.asarray(examples.digits_linen().apply(linen_variables(flat), channels_last(held_out["images"])))
    assert (logits.argmax(1) == held_out["labels"]).mean() < 0.5  # 0.16 when this was written
