"""Settings that two live models declare and that do not agree."""

from __future__ import annotations

from typing import Any

import pytest

from graftax.execute.opening import open_tree
from graftax.parity.pairing import ModulePair
from graftax.parity.settings_lint import lint_settings
from graftax.tree import Module


def lint(torch: Module, flax: Module, leaf: bool = True) -> dict[str, tuple[str, Any, Any]]:
    rows = lint_settings([ModulePair("t", "f", leaf=leaf)], {"t": torch}, {"f": flax})
    return {row.setting: (row.severity, row.want, row.have) for row in rows}


def torch_of(module: Any) -> Module:
    return open_tree(module).live.modules[""]


def nnx_of(module: Any) -> Module:
    return open_tree(module).live.modules[""]


def own(**settings: Any) -> Module:
    return Module("", "Own", ("own.Own",), settings)


def test_live_norms():
    from flax import nnx
    from torch import nn

    rngs = nnx.Rngs(0)
    assert lint(torch_of(nn.LayerNorm(4)), nnx_of(nnx.LayerNorm(4, rngs=rngs))) == {"epsilon": ("error", 1e-5, 1e-6)}
    assert lint(torch_of(nn.LayerNorm(4)), nnx_of(nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs))) == {}
    batch = nnx.BatchNorm(4, momentum=0.1, use_running_average=True, rngs=rngs)
    found = lint(torch_of(nn.BatchNorm2d(4).eval()), nnx_of(batch))
    assert found == {"momentum": ("warning", 0.9, 0.1)}
    batch = nnx.BatchNorm(4, momentum=0.9, use_running_average=False, rngs=rngs)
    assert lint(torch_of(nn.BatchNorm2d(4).eval()), nnx_of(batch)) == {"use_running_average": ("error", True, False)}
    untracked = torch_of(nn.BatchNorm2d(4, track_running_stats=False))
    assert lint(untracked, nnx_of(batch)) == {}


def test_live_convolutions():
    from flax import nnx
    from torch import nn

    rngs = nnx.Rngs(0)

    def conv(**more: Any) -> Module:
        return nnx_of(nnx.Conv(3, 4, more.pop("size", (3, 3)), rngs=rngs, **more))

    three = torch_of(nn.Conv2d(3, 4, 3, stride=2, padding=1))
    assert lint(three, conv(strides=2, padding=((1, 1), (1, 1)))) == {}
    assert lint(three, conv(strides=2))["padding"] == ("warning", ((1, 1), (1, 1)), "SAME")
    assert lint(three, conv(strides=2, padding="VALID"))["padding"][0] == "error"
    assert lint(three, conv(padding=((1, 1), (1, 1))))["strides"] == ("error", (2, 2), (1, 1))
    assert lint(torch_of(nn.Conv2d(3, 4, 1, stride=2)), conv(size=(1, 1), strides=2)) == {}


def test_dtype_and_dropout():
    from flax import nnx
    from jax import numpy as jnp
    from torch import nn

    rngs = nnx.Rngs(0)
    half = nnx_of(nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=rngs))
    assert lint(torch_of(nn.Linear(3, 4)), half) == {"dtype": ("warning", "float32", "bfloat16")}
    drop = nnx.Dropout(0.5, deterministic=False, rngs=rngs)
    (row,) = lint_settings([], {}, {"drop": nnx_of(drop)})
    assert (row.flax, row.setting, row.severity) == ("drop", "deterministic", "warning")
    assert lint_settings([], {}, {"drop": nnx_of(nnx.Dropout(0.5, deterministic=True, rngs=rngs))}) == ()
    assert lint_settings([], {}, {"drop": nnx_of(nnx.Dropout(0.0, deterministic=False, rngs=rngs))}) == ()


@pytest.mark.parametrize(
    ("torch", "flax", "found"),
    [
        ({"variance_epsilon": 1e-6}, {"epsilon": 1e-5}, {"epsilon": ("error", 1e-6, 1e-5)}),
        ({"variance_epsilon": 1e-6}, {"epsilon": 1e-6}, {}),
        ({"n_heads": 4}, {"num_heads": 2}, {"heads": ("error", 4, 2)}),
        ({"rope_theta": 1e6}, {"rope_theta": 1e4}, {"rotary theta": ("error", 1e6, 1e4)}),
        ({"tie_word_embeddings": True}, {"tied": False}, {"ties": ("error", True, False)}),
        ({"approximate": "tanh"}, {"approximate": False}, {"activation": ("error", True, False)}),
        ({"approximate": "none"}, {"approximate": False}, {}),
        ({"heads": None}, {"heads": 2}, {}),
        ({"width": 4}, {"width": 5}, {}),
    ],
)
def test_hand_written_modules_by_the_names_of_their_attributes(torch: dict, flax: dict, found: dict):
    assert lint(own(**torch), own(**flax)) == found


def test_errors_come_first_and_nothing_twice():
    torch = own(variance_epsilon=1e-6, hidden_act="gelu")
    flax = own(epsilon=1e-5, hidden_act="relu")
    pairs = [ModulePair(f"t{i}", "f", step=i, steps=3) for i in range(3)]
    rows = lint_settings(pairs, {f"t{i}": torch for i in range(3)}, {"f": flax})
    assert [(row.severity, row.setting) for row in rows] == [("error", "epsilon"), ("warning", "activation")]
