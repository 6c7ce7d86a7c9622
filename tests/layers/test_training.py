"""One training step of BatchNorm: what agrees, and the documented difference in the running variance."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from flax import linen as fn
from flax import nnx


@pytest.mark.parametrize("momentum", [0.1, 0.25])
@pytest.mark.parametrize(("rows", "features"), [(6, 3), (3, 3), (2, 1)])
def test_batch_norm_step(rows, features, momentum):
    x = np.random.default_rng(rows).standard_normal((rows, features)).astype(np.float32) * 2 + 1
    module = torch.nn.BatchNorm1d(features, momentum=momentum).train()
    with torch.no_grad():
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
        before = {"mean": module.running_mean.numpy().copy(), "var": module.running_var.numpy().copy()}
        want = module(torch.from_numpy(x)).numpy()
    params = {"scale": np.ones(features, np.float32), "bias": np.zeros(features, np.float32)}
    linen = fn.BatchNorm(use_running_average=False, momentum=1 - momentum)
    out, after = linen.apply({"params": params, "batch_stats": before}, x, mutable=["batch_stats"])
    found = {"linen": (out, after["batch_stats"])}
    graph = nnx.BatchNorm(features, use_running_average=False, momentum=1 - momentum, rngs=nnx.Rngs(0))
    graph.mean.set_value(jax.numpy.array(before["mean"]))
    graph.var.set_value(jax.numpy.array(before["var"]))  # NNX would write into a NumPy array
    found["nnx"] = (graph(x), {"mean": graph.mean.get_value(), "var": graph.var.get_value()})
    for out, after in found.values():
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after["mean"], module.running_mean.numpy(), rtol=1e-5, atol=1e-6)
        biased = (np.asarray(after["var"]) - (1 - momentum) * before["var"]) / momentum
        unbiased = (module.running_var.numpy() - (1 - momentum) * before["var"]) / momentum
        np.testing.assert_allclose(unbiased, biased * rows / (rows - 1), rtol=1e-4)
        assert not np.allclose(unbiased, biased, rtol=0.05)
