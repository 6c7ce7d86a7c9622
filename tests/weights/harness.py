"""Port a real checkpoint into a Flax model that was written for it, and judge the outcome: the model's outputs, the
bits on the way back, and what the library says without help."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import graftax as gx
from graftax.cli import run
from graftax.ops import apply_chain, same_bits
from graftax.types import Entry, Plan

UNIT = 2.0**-24
ALARM = 5.0
"""The largest error of Flax, in units of torch's own error in float32, or of float32's unit roundoff."""
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling costs more than running here."""


def channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def channels_first(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


@dataclass(frozen=True, slots=True)
class Case:
    """One checkpoint and one Flax model.

    torch     makes the torch module; its keys are the checkpoint's
    like      what gx.port is given: gx.linen(...) or an NNX module, abstract or not
    inputs    in torch's layout; images are moved to channels last for Flax, and outputs back
    linen     the module to apply; None: what gx.port gives is called
    rules     the fewest lines that complete the plan; '' for none
    options   further arguments of gx.plan
    summed    checkpoint keys that come back as their sum and zeros
    """

    name: str
    file: str
    torch: Callable[[], torch.nn.Module]
    like: Callable[[], Any]
    inputs: Callable[[np.random.Generator], Sequence[np.ndarray]]
    linen: Callable[[], Any] | None = None
    rules: str = ""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    summed: tuple[tuple[str, str], ...] = ()


class Ported:
    """A case after gx.plan and Plan.run. `source`: what is given as a source, a file or its folder."""

    def __init__(self, case: Case, source: Path) -> None:
        self.case, self.source = case, source
        self.like = case.like()
        rules = f"rules = [\n{case.rules}\n]" if case.rules else None
        self.plan: Plan = gx.plan(source, self.like, rules=rules, **case.options)
        assert self.plan.complete, f"{case.name}:\n{self.plan}"
        self.tree = self.plan.run(source)

    @cached_property
    def original(self) -> dict[str, torch.Tensor]:
        """The checkpoint as torch reads it."""
        return read_torch(self.source)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The torch module with the checkpoint's weights; keys that it lacks are the plan's dropped ones."""
        module = self.case.torch()
        found = module.load_state_dict(self.original, strict=False)
        assert not found.missing_keys
        dropped = {name for entry in self.plan.entries if entry.dropped is not None for name in entry.sources}
        assert set(found.unexpected_keys) <= dropped
        return module.eval()

    def flax(self, inputs: Sequence[np.ndarray]) -> Any:
        """The Flax model's outputs, compiled."""
        if self.case.linen is not None:
            model = self.case.linen()
            return jax.jit(model.apply, compiler_options=QUICK)(self.tree, *inputs)
        graph, state = nnx.split(self.tree)
        call = jax.jit(lambda state, *x: nnx.merge(graph, state)(*x), compiler_options=QUICK)
        return call(state, *inputs)


def read_torch(source: Path) -> dict[str, torch.Tensor]:
    """The state_dict that torch or safetensors reads, from inside its container."""
    from safetensors.torch import load_file

    if source.is_dir():
        return load_file(source / "model.safetensors")
    if source.suffix == ".safetensors":
        return load_file(source)
    loaded = torch.load(source, weights_only=True, map_location="cpu")
    return loaded.get("model_state", loaded)


# ---------------------------------------------------------------- parity


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative L2 distances to torch in float64, one for each output."""

    flax: tuple[float, ...]
    torch: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The worst output's error of Flax over that of torch; infinite for NaN."""
        return max(flax / max(torch, UNIT) for flax, torch in zip(self.flax, self.torch, strict=True))

    def __str__(self) -> str:
        pairs = zip(self.flax, self.torch, strict=True)
        return f"ratio {self.ratio:.2f}: " + ", ".join(f"flax {flax:.1e} torch {ours:.1e}" for flax, ours in pairs)


def distance(got: np.ndarray, wanted: np.ndarray) -> float:
    """||got - wanted|| / ||wanted||; infinite where a value is not finite."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted))


@contextmanager
def in_float64() -> Iterator[None]:
    """Tensors that a module makes for itself are float64 too."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


def errors(ported: Ported) -> Errors:
    """Torch in float32 and the ported Flax model, against torch in float64, on the case's inputs."""
    inputs = ported.case.inputs(np.random.default_rng(0))
    ours = _outputs(ported.module, inputs)
    with in_float64():
        wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in inputs]
        wanted = _outputs(copy.deepcopy(ported.module).double(), wide)
    with jax.default_matmul_precision("highest"):
        made = ported.flax([channels_last(x) for x in inputs])
    got = [channels_first(np.asarray(out)) for out in _several(made)]
    return Errors(
        tuple(distance(a, w) for a, w in zip(got, wanted, strict=True)),
        tuple(distance(a, w) for a, w in zip(ours, wanted, strict=True)),
    )


def _outputs(module: torch.nn.Module, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        return [out.numpy() for out in _several(module(*(torch.from_numpy(x) for x in inputs)))]


def _several(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def check_parity(ported: Ported) -> None:
    found = errors(ported)
    print(f"{ported.case.name}: {found}")
    assert found.ratio <= ALARM, f"{ported.case.name}: {found}\n{ported.plan}"


# ---------------------------------------------------------------- the way back


def check_back(ported: Ported) -> None:
    """Every tensor comes back bit for bit, but for dropped ones and summed biases, which the plan calls not exact."""
    back = ported.plan.inverse.run(ported.tree)
    dropped = {name for entry in ported.plan.entries if entry.dropped is not None for name in entry.sources}
    summed = {name for pair in ported.case.summed for name in pair}
    inexact = {name for entry in ported.plan.entries if not entry.exact for name in entry.sources}
    assert summed == inexact - dropped
    assert ported.plan.lossless is (not summed)
    lost = {name for entry in ported.plan.entries if entry.lost for name in entry.sources}
    assert list(back) == [name for name in gx.open_checkpoint(ported.source) if name not in lost]
    for name, tensor in ported.original.items():
        if name in lost:  # dropped for good: left out, never made up
            continue
        assert back[name].dtype == tensor.dtype, name
        assert back[name].shape == tensor.shape, name
        if name not in summed | dropped:
            assert same_bits(back[name].numpy(), tensor.contiguous().numpy()), name
    for first, second in ported.case.summed:
        assert torch.equal(back[first], ported.original[first] + ported.original[second])
        assert not back[second].any()


# ---------------------------------------------------------------- without help


def check_nothing_is_guessed(ported: Ported) -> None:
    """Without rules, what the plan does propose is what the rules say: it may ask, it may not be wrong. And each line
    that it offers works."""
    truth = carried(ported.plan.entries, ported.source)
    free = gx.plan(ported.source, ported.like, **ported.case.options)
    for target, array in carried(free.entries, ported.source).items():
        assert same_bits(array, truth[target]), f"{ported.case.name}: {target} is WRONG\n{free}"
    for question in free.questions:
        for candidate in question.candidates:
            answered = gx.plan(ported.source, ported.like, rules=_tables(candidate.rule), **ported.case.options)
            assert not answered.failures, f"{candidate.rule}: {answered.failures[0]}"
            assert question.text not in [other.text for other in answered.questions], candidate.rule


def _tables(line: str) -> list[dict[str, Any]]:
    """The rules of a candidate's line: one inline table, or several."""
    import tomllib

    return tomllib.loads(f"rules = [{line}]")["rules"]


def carried(entries: Sequence[Entry], source: Path) -> dict[str, np.ndarray]:
    """target -> its array, entry by entry."""
    checkpoint = gx.open_checkpoint(source)
    out: dict[str, np.ndarray] = {}
    for entry in entries:
        if entry.targets:
            arrays = apply_chain(entry.ops, tuple(checkpoint.read(name) for name in entry.sources))
            out |= zip(entry.targets, arrays, strict=True)
    return out


# ---------------------------------------------------------------- inspect


def inspect(capsys: pytest.CaptureFixture[str], path: object) -> dict[str, Any]:
    """What `graftax inspect --json` says. The plain form is printed too: below the first a line a leaf,
    and one that names what of a training checkpoint is not read."""
    assert run(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert run(["inspect", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    beside = result["format"] == "torch" and set(result["metadata"]) - {"container"}
    assert len(lines) == 1 + result["leaves"] + bool(beside)
    assert lines[-1].startswith("beside the weights, not read: ") == bool(beside)
    return result
