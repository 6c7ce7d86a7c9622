"""From a divergence to causes: what is tried, in which order, and that nothing is named that was not tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from graftax.errors import ReplayError
from graftax.parity.causes import find_causes
from graftax.parity.causes.activations import apply
from graftax.parity.causes.numbers import relative
from graftax.parity.divergence import Divergence
from graftax.parity.pairing import ModulePair
from graftax.parity.records import Record, Reference, Site
from graftax.parity.report.model import LayerRow
from graftax.plans import Entry
from graftax.tree import Module

X = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32) * np.float32(0.1)
KERNEL = np.random.default_rng(2).normal(size=(12, 12)).astype(np.float32)
SCALE = np.random.default_rng(3).normal(size=12).astype(np.float32)


def norm(x: np.ndarray, scale: np.ndarray, epsilon: float, fast: bool = False) -> np.ndarray:
    x = x.astype(np.float64)
    variance = x.var(-1, keepdims=True)
    if fast:
        y = x.astype(np.float32)
        variance = (y * y).mean(-1, keepdims=True) - y.mean(-1, keepdims=True) ** 2
    return ((x - x.mean(-1, keepdims=True)) / np.sqrt(variance + epsilon) * scale).astype(np.float32)


@dataclass
class Fake:
    """A Flax model of one module `layer`: a LayerNorm or a Dense that can be run alone."""

    kind: str
    settings: dict[str, Any]
    leaves: dict[str, Any] = field(default_factory=dict)
    alone: bool = True
    tried: list[Any] = field(default_factory=list)

    @property
    def modules(self) -> Mapping[str, Module]:
        bases = (f"flax.linen.{self.kind}",) if self.kind in ("LayerNorm", "Dense", "Embed") else (f"own.{self.kind}",)
        return {"layer": Module("layer", self.kind, bases, self.settings)}

    def replay(self, path: str, args: Any, kwargs: Any, *, settings: Any = None, leaves: Any = None) -> Any:
        if not self.alone:
            raise ReplayError("no")
        self.tried.append((settings, leaves))
        return self.run(args[0], {**self.settings, **(settings or {})}, {**self.leaves, **(leaves or {})})

    def run(self, x: np.ndarray, settings: Mapping[str, Any], leaves: Mapping[str, Any]) -> np.ndarray:
        if self.kind == "Dense":
            out = x.astype(np.float64) @ leaves["layer/kernel"]
            half = settings.get("dtype") in ("bfloat16", ml_dtypes.bfloat16)
            return out.astype(ml_dtypes.bfloat16 if half else np.float32)
        return norm(x, leaves["layer/scale"], settings["epsilon"], settings.get("use_fast_variance", False))


def diverging(where: str, flax: Fake, want: Any, have: Any, torch: Module, **more: Any) -> Divergence:
    """The layer `layer`. For 'out': its outputs; for 'in': what arrives."""
    entries = more.pop("entries", ())
    pair = ModulePair("layer", "layer", entries, more.pop("leaf", True), kinds=(torch.kind, flax.kind))
    given = more.pop("given", X)
    site = Site("layer")
    error = relative(have, want) if np.asarray(have).dtype.kind in "fV" else 1.0
    out = where == "out"
    errors = (0.0, 0.0, error, 0.0) if out else (error, 0.0, 0.0, 0.0)
    row = LayerRow(pair, site, site, "/".join(pair.kinds), *errors, error, 0.0, "diverges")
    record = Record((given if out else want,), {}, want if out else given)
    records = {site: record, **more.pop("records", {})}
    reference = Reference({"layer": torch}, tuple(records), records, None, None)
    args = (given,) if out else (want,)
    return Divergence(
        row, where, reference, (given,) if out else (have,), {}, have if out else None, args, {},
        want if out else None, flax, flax, flax, None, **more,
    )  # fmt: skip


LAYER_NORM = Module("layer", "LayerNorm", ("torch.nn.modules.normalization.LayerNorm",), {"eps": 1e-12})
LINEAR = Module("layer", "Linear", ("torch.nn.modules.linear.Linear",), {"in_features": 12, "out_features": 12})


def names(it: Divergence) -> list[str]:
    return [cause.name for cause in find_causes(it)]


def test_a_setting_that_torch_declares_is_tried_first():
    flax = Fake("LayerNorm", {"epsilon": 1e-6}, {"layer/scale": SCALE})
    it = diverging("out", flax, norm(X, SCALE, 1e-12), norm(X, SCALE, 1e-6), LAYER_NORM)
    (cause,) = find_causes(it)
    assert (cause.name, cause.layer, cause.fix) == ("epsilon", "layer", "nn.LayerNorm(epsilon=1e-12)")
    assert flax.tried[1][0] == {"epsilon": 1e-12}
    assert cause.error_after < 1e-7 < cause.error_before


def test_a_setting_that_does_not_help_is_not_named():
    flax = Fake("LayerNorm", {"epsilon": 1e-6}, {"layer/scale": SCALE})
    have = norm(X, SCALE, 1e-6) * np.float32(1.001)
    assert names(diverging("out", flax, norm(X, SCALE, 1e-12), have, LAYER_NORM)) == []


def test_a_norm_by_hand_that_cannot_be_run_alone():
    flax = Fake("MyNorm", {}, {"layer/scale": SCALE}, alone=False)
    torch = Module("layer", "OwnNorm", ("own.OwnNorm",))
    leaves = {"flax_weights": {"layer/scale": SCALE}, "expected": {"layer/scale": SCALE}}
    entries = (Entry(("layer.weight",), ("layer/scale",)),)
    it = diverging("out", flax, norm(X, SCALE, 1e-5), norm(X, SCALE, 1e-6), torch, entries=entries, **leaves)
    (cause,) = find_causes(it)
    assert cause.name == "epsilon"
    assert cause.fix == "epsilon=1e-05"
    centred = norm(X, 1 + SCALE, 1e-5)
    it = diverging("out", flax, centred, norm(X, SCALE, 1e-5), torch, entries=entries, **leaves)
    assert names(it) == ["zero-centred norm"]
    far = (X + np.float32(30)).astype(np.float32)
    want, have = norm(far, SCALE, 1e-5), norm(far, SCALE, 1e-5, fast=True)
    it = diverging("out", flax, want, have, torch, entries=entries, given=far, **leaves)
    assert names(it) == ["fast variance"]
    noise = (want * (1 + 1e-3 * np.random.default_rng(0).normal(size=want.shape))).astype(np.float32)
    assert names(diverging("out", flax, want, noise, torch, entries=entries, given=far, **leaves)) == []


def dense(have: np.ndarray, **more: Any) -> Divergence:
    flax = Fake("Dense", {"dtype": more.pop("dtype", None)}, {"layer/kernel": have}, more.pop("alone", True))
    out = flax.run(X, flax.settings, flax.leaves)
    want = (X.astype(np.float64) @ KERNEL).astype(np.float32)
    entries = (Entry(("layer.weight",), ("layer/kernel",)),)
    return diverging(
        "out", flax, want if out.dtype == np.float32 else want.astype(out.dtype), out, LINEAR, entries=entries,
        flax_weights={"layer/kernel": have}, expected={"layer/kernel": KERNEL},
        torch_weights={"layer.weight": KERNEL.T}, **more,
    )  # fmt: skip


@pytest.mark.parametrize("alone", [True, False])
def test_weights_are_named_with_the_error_that_is_left(alone: bool):
    (cause,) = find_causes(dense(np.ascontiguousarray(KERNEL.T), alone=alone))
    assert cause.name == "kernel not transposed"
    assert cause.error_before > 0.1
    assert cause.error_after < 1e-6


def test_one_bit_of_a_weight_is_not_what_is_wrong_with_a_layer():
    bit = KERNEL.copy()
    bit[0, 0] = np.nextafter(bit[0, 0], np.float32(9))
    assert names(wide(dense(bit, dtype="bfloat16"))) == ["bfloat16 accumulation"]


def wide(it: Divergence) -> Divergence:
    """The reference in float32, and the error against it."""
    out = (X.astype(np.float64) @ KERNEL).astype(np.float32)
    records = {it.row.site_torch: Record((X,), {}, out)}
    row = replace(it.row, out_error=relative(it.flax_out, out))
    return replace(it, row=row, reference=replace(it.reference, records=records))


def test_a_module_in_bfloat16_is_judged_against_the_reference_before_it_was_rounded():
    (cause,) = find_causes(wide(dense(KERNEL, dtype="bfloat16")))
    assert cause.name == "bfloat16 accumulation"
    assert "float32" in cause.fix


def before(output: np.ndarray, kind: str = "Linear / Dense") -> tuple[tuple[LayerRow, Any], ...]:
    row = LayerRow(ModulePair("fc1", "fc1"), Site("fc1"), Site("fc1"), kind, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return ((row, output),)


def test_code_between_layers():
    z = np.random.default_rng(7).normal(size=(5, 12)).astype(np.float32)
    want, have = (apply(name, z.astype(np.float64)).astype(np.float32) for name in ("gelu erf", "gelu tanh"))
    flax = Fake("Dense", {})
    (cause,) = find_causes(diverging("in", flax, want, have, LINEAR, before=before(z)))
    assert cause.name == "activation"
    assert cause.fix == "nn.gelu(x, approximate=False)"
    assert names(diverging("in", flax, want, (have * 1.01).astype(np.float32), LINEAR, before=before(z))) == []
    assert names(diverging("in", flax, want, have, LINEAR)) == []


def test_the_factor_of_an_embedding():
    z = np.random.default_rng(7).normal(size=(5, 12)).astype(np.float32)
    flax = Fake("Dense", {})
    scaled = (z * np.float64(12**0.5)).astype(np.float32)
    it = diverging("in", flax, scaled, z, LINEAR, before=before(z, "Embedding / Embed"))
    (cause,) = find_causes(it)
    assert cause.name == "embedding scale"
    assert "sqrt(12)" in cause.detail


def test_positions_that_arrive():
    flax = Fake("Embed", {"num_embeddings": 20})
    torch = Module("layer", "Embedding", ("torch.nn.modules.sparse.Embedding",))
    ids = np.broadcast_to(np.arange(8), (2, 8))
    assert names(diverging("in", flax, ids + 2, ids.astype(np.int32), torch)) == ["position ids"]


def test_a_table_that_belongs_to_no_layer():
    table = np.random.default_rng(4).normal(size=(5, 12)).astype(np.float32)
    flax = Fake("Dense", {})
    entries = (Entry(("pos",), ("params/pos",)),)
    nothing = SimpleNamespace(specs={})
    plan = SimpleNamespace(entries=entries, source=nothing, like=nothing)
    zeros = np.zeros_like(table)
    it = diverging(
        "in", flax, X + table, X, LINEAR, flax_weights={"params/pos": zeros}, expected={"params/pos": table}
    )  # fmt: skip
    (cause,) = find_causes(replace(it, plan=plan))
    assert cause.name == "initial value"
    assert "params/pos" in cause.detail


def test_the_code_of_a_container():
    z = np.random.default_rng(7).normal(size=(5, 12)).astype(np.float32)
    flax = Fake("Block", {}, alone=False)
    torch = Module("layer", "OwnBlock", ("own.OwnBlock",))
    it = diverging("out", flax, X + z, z, torch, leaf=False, before=before(z))
    (cause,) = find_causes(it)
    assert cause.name == "missing residual"
    assert "the input of layer" in cause.detail


def test_no_time_no_causes():
    flax = Fake("LayerNorm", {"epsilon": 1e-6}, {"layer/scale": SCALE})
    have = norm(X, SCALE, 1e-6) * np.float32(1.001)
    assert find_causes(diverging("out", flax, norm(X, SCALE, 1e-12), have, LAYER_NORM), 0.0) == ()
