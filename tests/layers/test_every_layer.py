"""Every row of the layer table through the library's front: a live torch module into Linen and NNX and back, with no
configuration, by forward parity; and the same from a bare state_dict wherever names and shapes are enough."""

from __future__ import annotations

import numpy as np
import pytest

import graftax as gx
from graftax.tree import flatten, join_path

from .cases import CASES
from .harness import call, error_back, error_of, start, to_flax

SIDED = [
    pytest.param(case, api, id=f"{case.name} [{api}]")
    for case in CASES
    for api in ("linen", "nnx")
    if getattr(case, api) is not None and not (case.layout or case.rule)
]
FROM_FILES = [p for p in SIDED if p.values[0].layer != "HF Conv1D"]  # a square one reads as a Linear, by convention


def like_of(run, api):
    if api == "nnx":
        return run.side.module
    method = None if run.case.on_flax is call else run.case.on_flax
    return gx.linen(run.side.module, to_flax(run.case, run.x), method=method)


def flat(tree) -> dict[str, np.ndarray]:
    return {join_path(keys): np.asarray(leaf) for keys, leaf in flatten(tree)}


@pytest.mark.parametrize(("case", "api"), SIDED)
def test_a_live_layer_ports_with_no_configuration(case, api):
    run = start(case, api)
    plan = gx.plan(run.module, like_of(run, api))
    assert plan.complete, str(plan)
    arrays = flat(gx.port(run.module, like_of(run, api), sharding="host"))
    assert error_of(run, arrays) <= case.alarm

    check_back(run, gx.plan(run.module, like_of(run, api)).inverse, arrays)
    again = gx.plan(arrays, run.module, to="torch")  # names and shapes of the Flax side may leave a question
    if again.complete and case.file == "first":
        check_back(run, again, arrays)


def check_back(run, plan, arrays):
    back = {name: np.asarray(tensor) for name, tensor in plan.run(arrays).items()}
    assert set(back) == set(run.arrays)
    if run.case.exact:
        for name, array in run.arrays.items():
            if not name.endswith("num_batches_tracked"):
                assert back[name].tobytes() == array.tobytes(), name
    assert error_back(run, back) <= run.case.alarm


@pytest.mark.parametrize(("case", "api"), FROM_FILES)
def test_a_state_dict_ports_the_same_or_asks(case, api):
    """Without the torch module the answer is the same, or a question; never another one."""
    run = start(case, api)
    plan = gx.plan(run.module.state_dict(), like_of(run, api))
    if plan.complete:
        arrays = flat(plan.run(run.module.state_dict())) if api == "linen" else None
        arrays = arrays or flat(gx.port(run.module.state_dict(), like_of(run, api), sharding="host"))
        assert error_of(run, arrays) <= case.alarm
    else:
        assert case.file != "first" or "kdim" in case.name, str(plan)
