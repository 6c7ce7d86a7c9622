"""What running cannot tell is never called proved, and a plan that is nearly right is never written."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graftax as gx
from graftax.errors import GraftaxError, ParityError
from graftax.ops import Concat, Fill, Flip, Rearrange, Scale, Split, Sum, apply_chain
from graftax.plans import Entry, Plan
from graftax.probe.limits import Limits
from graftax.probe.settle import Settled, settle

from .pairs import BLOCK, MLP, PAIRS, STACK, FlaxIdle, Pair, near, noise, other_inputs, redrawn, same, untrained

QUICK = Limits(seconds=6.0, evaluations=30_000)
FAST = 6
ALL = 42


# ---------------------------------------------------------------- judging


def filled(pair: Pair, entries: Sequence[Entry], state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """path -> value by the entries."""
    out: dict[str, np.ndarray] = {}
    for entry in entries:
        made = apply_chain(entry.ops, tuple(np.asarray(state[name]) for name in entry.sources))
        out |= dict(zip(entry.targets, map(np.asarray, made), strict=True))
    return out


def judge(pair: Pair, settled: Settled) -> None:
    """What is proved is right on other weights: each leaf as the true map has it, or else the outputs agree."""
    module = redrawn(pair.torch_model(), 11)
    state = pair.state(module)
    want, got = pair.true_map(state), filled(pair, settled.entries, state)
    if not settled.proved or all(same(got[path], want[path]) for path in got):
        return
    for seed in (3, 4):
        arrays = other_inputs(pair.inputs(), seed)
        values = {**want, **{path: leaf for path, leaf in got.items() if path in want}}
        wrong = [path for path in got if not same(got[path], want[path])]
        assert near(pair.flax_out(values, arrays), pair.torch_out(module, arrays)), f"proved, and wrong: {wrong}"


# ---------------------------------------------------------------- inputs that tell nothing


def hostile(pair: Pair, kind: str) -> tuple[np.ndarray, ...]:
    (x,) = pair.inputs()
    made = {
        "zeros": lambda: np.zeros_like(x),
        "ones": lambda: np.ones_like(x),
        "one of a batch": lambda: x[:1],
        "equal rows": lambda: np.repeat(x[:1], len(x), 0),
        "one token": lambda: x[:, :1] if x.ndim in (2, 3) and pair.name not in ("mlp", "experts") else x[:1],
        "one token, zero": lambda: np.zeros_like(x[:1, :1] if x.ndim == 3 or x.dtype.kind == "i" else x[:1]),
        "a ramp": lambda: np.broadcast_to(np.linspace(0, 1, x.shape[-1]), x.shape).astype(x.dtype),
    }
    return (np.ascontiguousarray(made[kind]()),)


KINDS = ("zeros", "ones", "one of a batch", "equal rows", "one token", "one token, zero", "a ramp")


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("kind", ["zeros", "one token, zero"])
def test_inputs_that_tell_nothing(pair: Pair, kind: str) -> None:
    judge(pair, settle(pair.torch_model(), pair.like(), pair.call(*hostile(pair, kind)), QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("kind", KINDS)
def test_more_inputs_that_tell_nothing_on_weights_before_training(pair: Pair, kind: str) -> None:
    judge(pair, settle(untrained(pair.torch_model()), pair.like(), pair.call(*hostile(pair, kind)), QUICK))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_weights_before_training(pair: Pair) -> None:
    """Biases that are all zero and norms that are all one decide nothing: they are redrawn."""
    found = settle(untrained(pair.torch_model()), pair.like(), pair.call(), QUICK)
    assert found.proved, found.stopped
    judge(pair, found)


def test_all_weights_zero_or_equal() -> None:
    module = BLOCK.torch_model()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.25)
    found = settle(module, BLOCK.like(), BLOCK.call(), QUICK)
    assert found.proved, found.stopped
    judge(BLOCK, found)


# ---------------------------------------------------------------- crossed layers, other models


@pytest.mark.parametrize("pair", [MLP, BLOCK, STACK], ids=lambda pair: pair.name)
def test_crossed_layers_are_followed_by_what_they_do(pair: Pair) -> None:
    """The Flax code uses two layers of equal shape in each other's place: names are wrong, and running is right."""
    module, like = pair.torch_model(), pair.like(crossed=True)
    found = settle(module, like, pair.call(), QUICK)
    assert found.proved, found.stopped
    other = redrawn(pair.torch_model(), 11)
    got, arrays = filled(pair, found.entries, pair.state(other)), other_inputs(pair.inputs())
    assert near(pair.flax_out(got, arrays, crossed=True), pair.torch_out(other, arrays))


def test_a_layer_that_torch_does_not_have_is_not_proved() -> None:
    """No output depends on Flax's idle layer, so no run can say what it holds: it is not another layer's weights."""
    found = settle(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), gx.linen(FlaxIdle(), noise(1, 4)), gx.Inputs(noise(3, 4))
    )
    filled_in = {target for entry in found.entries for target in entry.targets}
    assert filled_in == {"params/busy/kernel", "params/busy/bias"}
    assert set(found.open) == {"params/idle/kernel", "params/idle/bias"}


DIFFERENT = [(pair, n) for pair in PAIRS for n in range(len(pair.faults))]
QUICKLY = [(pair, n) for pair, n in DIFFERENT if n == 0]


def differs(pair: Pair, n: int, module: torch.nn.Module, arrays: tuple[np.ndarray, ...]) -> None:
    found = settle(module, pair.like(**pair.faults[n]), pair.call(*arrays), Limits(seconds=4.0, evaluations=10_000))
    assert not found.proved, f"another model, and proved: {pair.name} {pair.faults[n]}"


@pytest.mark.parametrize(("pair", "n"), QUICKLY, ids=lambda value: getattr(value, "name", value))
def test_a_model_that_differs_is_not_proved(pair: Pair, n: int) -> None:
    differs(pair, n, pair.torch_model(), pair.inputs())


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "n"), DIFFERENT, ids=lambda value: getattr(value, "name", value))
def test_no_model_that_differs_is_proved(pair: Pair, n: int) -> None:
    differs(pair, n, pair.torch_model(), pair.inputs())
    differs(pair, n, untrained(pair.torch_model()), pair.inputs())


# ---------------------------------------------------------------- plans that are nearly right

_PLANS: dict[str, Plan] = {}


def proved(pair: Pair) -> Plan:
    if pair.name not in _PLANS:
        _PLANS[pair.name] = gx.plan(pair.torch_model(), pair.like(), inputs=pair.call())
    return _PLANS[pair.name]


def moved(entry: Entry, axis: int, sizes: Sequence[int], draw: random.Random) -> Entry:
    """The entry with two neighbouring pieces of its one target in each other's place."""
    one = draw.randrange(len(sizes) - 1)
    order = [*range(one), one + 1, one, *range(one + 2, len(sizes))]
    pieces = tuple(sizes)
    return replace(entry, ops=(*entry.ops, Split(axis, pieces), Sum(tuple((n,) for n in order)), Concat(axis, pieces)))


def nearly(plan: Plan, draw: random.Random) -> tuple[Plan, list[Entry], str]:
    """The plan with one thing wrong, the wrong entries, and what is wrong."""
    places = [n for n, entry in enumerate(plan.entries) if entry.targets and entry.sources and not entry.dropped]
    while True:
        n = draw.choice(places)
        entry = plan.entries[n]
        spec = plan.like.specs[entry.targets[0]]
        axis = draw.randrange(len(spec.shape))
        size, alone = spec.shape[axis], len(entry.targets) == 1
        how = draw.choice(("row", "head", "flip", "scale", "dropped", "crossed", "turned", "targets"))
        new: dict[int, Entry] = {}
        if how == "row" and alone and size > 1:
            new[n] = moved(entry, axis, (1,) * size, draw)
        elif how == "head" and alone and size % 4 == 0 and size > 4:
            new[n] = moved(entry, axis, (4,) * (size // 4), draw)
        elif how == "flip" and size > 1:
            new[n] = replace(entry, ops=(*entry.ops, Flip((axis,))))
        elif how == "scale":
            new[n] = replace(entry, ops=(*entry.ops, Scale(draw.choice((1.01, -1.0, 2.0)))))
        elif how == "dropped" and alone and len(spec.shape) == 1:
            new[n] = replace(entry, sources=(), ops=(Fill(0.0, spec.shape, spec.dtype),))
        elif how == "turned" and alone and len(spec.shape) == 2 and spec.shape[0] == spec.shape[1]:
            new[n] = replace(entry, ops=(*entry.ops, Rearrange("a b -> b a")))
        elif how == "targets" and not alone:
            new[n] = replace(entry, targets=(*entry.targets[1:], entry.targets[0]))
        elif how == "crossed":
            m = draw.choice(places)
            other = plan.entries[m]
            if m != n and alone and len(other.targets) == 1 and plan.like.specs[other.targets[0]].shape == spec.shape:
                new = {n: replace(entry, targets=other.targets), m: replace(other, targets=entry.targets)}
        if new:
            entries = tuple(new.get(k, e) for k, e in enumerate(plan.entries))
            return replace(plan, entries=entries), list(new.values()), f"{how}: {[e.text for e in new.values()]}"


def near_misses(count: int) -> list[tuple[Pair, int]]:
    return [(PAIRS[n % len(PAIRS)], n // len(PAIRS)) for n in range(count)]


def never_written(pair: Pair, seed: int, folder: Path) -> None:
    plan, _, what = nearly(proved(pair), random.Random(f"{pair.name} {seed}"))
    out = folder / "out.safetensors"
    try:
        gx.port_file(pair.torch_model(), pair.like(), out, plan=plan)
    except ParityError as error:
        if list(folder.iterdir()):
            raise AssertionError("something was written") from error
        return
    state = pair.state(redrawn(pair.torch_model(), 11))
    arrays = other_inputs(pair.inputs())
    got = filled(pair, [e for e in plan.entries if e.targets], state)
    assert near(pair.flax_out(got, arrays), pair.torch_out(redrawn(pair.torch_model(), 11), arrays)), f"written: {what}"


def never_proved(pair: Pair, seed: int) -> None:
    """The wrong entry as a rule: no proof comes of it, unless it does no harm."""
    _, wrong, what = nearly(proved(pair), random.Random(f"{pair.name} {seed}"))
    if any(not entry.sources for entry in wrong):
        return
    found = settle(pair.torch_model(), pair.like(), pair.call(), Limits(seconds=3.0, evaluations=4000), forced=wrong)
    if found.proved:
        state = pair.state(redrawn(pair.torch_model(), 11))
        values = {**pair.true_map(state), **filled(pair, [*found.entries, *wrong], state)}
        arrays = other_inputs(pair.inputs())
        assert near(pair.flax_out(values, arrays), pair.torch_out(redrawn(pair.torch_model(), 11), arrays)), what


@pytest.mark.parametrize(("pair", "seed"), near_misses(FAST), ids=lambda value: getattr(value, "name", value))
def test_a_plan_that_is_nearly_right_is_not_written(pair: Pair, seed: int, tmp_path: Path) -> None:
    never_written(pair, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "seed"), near_misses(ALL)[FAST:], ids=lambda value: getattr(value, "name", value))
def test_no_plan_that_is_nearly_right_is_written(pair: Pair, seed: int, tmp_path: Path) -> None:
    never_written(pair, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "seed"), near_misses(ALL), ids=lambda value: getattr(value, "name", value))
def test_no_plan_that_is_nearly_right_is_proved(pair: Pair, seed: int) -> None:
    never_proved(pair, seed)


def crossed(plan: Plan, one: str, other: str) -> Plan:
    """The plan with two targets in each other's place."""
    names = {one: other, other: one}
    entries = [replace(e, targets=tuple(names.get(t, t) for t in e.targets)) for e in plan.entries]
    return replace(plan, entries=tuple(entries))


def test_a_changed_plan_does_not_keep_the_proof_of_another(tmp_path: Path) -> None:
    """Biases before training are all zero: the real weights cannot tell two crossed ones, so nothing may be claimed."""
    module, out = untrained(MLP.torch_model()), tmp_path / "out.safetensors"
    plan = gx.plan(module, MLP.like(), inputs=MLP.call())
    assert plan.proof is not None
    wrong = crossed(plan, "params/lin_a/bias", "params/lin_b/bias")
    try:
        gx.port_file(module, MLP.like(), out, plan=wrong)
    except GraftaxError:
        return
    assert _proof_of(out) is None, "a plan with crossed biases has the proof of the right one"


def test_a_saved_plan_that_was_edited_has_no_proof(tmp_path: Path) -> None:
    module, saved, out = MLP.torch_model(), tmp_path / "plan.json", tmp_path / "out.safetensors"
    gx.plan(module, MLP.like(), inputs=MLP.call()).save(saved)
    text = saved.read_text()
    data = json.loads(text)
    rows = {entry["targets"][0]: entry for entry in data["entries"] if entry["targets"]}
    one, other = rows["params/lin_a/bias"], rows["params/lin_b/bias"]
    one["sources"], other["sources"] = other["sources"], one["sources"]
    saved.write_text(json.dumps(data))
    try:
        loaded = gx.load_plan(saved)
        gx.port_file(module, MLP.like(), out, plan=loaded)
    except GraftaxError:
        return
    assert _proof_of(out) is None, "an edited plan has the proof of the right one"


def test_a_proof_is_void_for_other_weights(tmp_path: Path) -> None:
    """A loaded plan runs on any weights; what was compared on other bytes is not claimed for these."""
    saved, out = tmp_path / "plan.json", tmp_path / "out.safetensors"
    gx.plan(MLP.torch_model(), MLP.like(), inputs=MLP.call()).save(saved)
    first = tmp_path / "first.safetensors"
    gx.port_file(MLP.torch_model(), MLP.like(), first, inputs=MLP.call())
    gx.port_file(redrawn(MLP.torch_model(), 5), MLP.like(), out, plan=gx.load_plan(saved))
    one, other = _proof_of(first), _proof_of(out)
    assert one is not None
    assert one["source"]
    assert other is None or other["source"] != one["source"]
    assert other is None or other["ratio"] is None


def _proof_of(path: Path) -> dict[str, Any] | None:
    from graftax.formats import open_path
    from graftax.formats.safetensors_file import proof_in

    return proof_in(open_path(str(path)).storage.metadata)  # pyright: ignore[reportReturnType]
