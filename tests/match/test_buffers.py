"""Known buffers are listed before anything counts as tied; what may have been learned is never one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import graftax as gx
from graftax.tree import Checkpoint, Storage, TensorSpec

LAYERS = 3
D = 8


def table(dtype: str = "int64") -> np.ndarray:
    return np.arange(16).reshape(4, 4).astype(dtype)


def causal(dtype: str = "float32", *lead: int) -> np.ndarray:
    return np.tri(6).astype(dtype).reshape(*lead, 6, 6)


def rotary() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 1, 6, 4)).astype("f4")


def angles() -> np.ndarray:
    return (np.arange(6)[:, None] * 10.0 ** -np.arange(4)).astype("f4")[None, None]


def planned(name: str, value: np.ndarray, more: dict[str, Any] | None = None, **options: Any) -> gx.Plan:
    rng = np.random.default_rng(0)
    values = {f"blocks.{i}.attn.qkv.weight": rng.standard_normal((24, D)).astype("f4") for i in range(LAYERS)}
    values |= {f"blocks.{i}.{name}": value for i in range(LAYERS)}
    specs = {key: TensorSpec(array.shape, str(array.dtype)) for key, array in values.items()}
    like = {f"params/blocks_{i}/attn/qkv/kernel": TensorSpec((D, 24), "float32") for i in range(LAYERS)} | (more or {})
    source = Checkpoint("torch", "torch", specs, Storage(values.__getitem__))
    from graftax.match.planning import make_plan
    from graftax.plans import PlanOptions

    return make_plan(source, Checkpoint("like", "flax", like), PlanOptions(**options))


KNOWN = {
    "attn.relative_position_index": table(), "attn.rel_pos_idx": table(), "attn.relPosIndex": table("int32"),
    "attn.position_ids": table(), "attn.pos_bucket": table(), "attn.bias": causal("float32", 1, 1),
    "attn.causal_bias_mask": causal("bool", 1), "attn.mask": causal("uint8"), "attn.attention_mask": causal("bool"),
    "attn.tril": causal(), "attn.mask_buffer": causal("float32", 1, 1),
    "attn.rotary_emb.cos_cached": np.cos(angles()), "attn.rope.sin": np.sin(angles()),
    "attn.freqs_cos": np.cos(angles()), "attn.freqs_cis": np.exp(1j * angles()).astype("complex64"),
    "attn.rotary_emb.inv_freq": 1e4 ** -np.linspace(0, 1, 4, dtype="f4"), "attn.masked_bias": np.float32([-1e4]),
    "attn.attn_mask": -100 * (1 - causal()), "attn.causal_mask": np.where(causal(), 0, -np.inf).astype("f4"),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_buffer_of_every_layer_is_listed_and_dropped(name: str) -> None:
    plan = planned(name, KNOWN[name])
    assert plan.complete, str(plan)
    dropped = {entry.sources for entry in plan.entries if entry.dropped}
    assert dropped == {(f"blocks.{i}.{name}",) for i in range(LAYERS)}


LEARNED = {
    "attn.relative_position_bias_table": rotary()[0, 0], "attn.bias": np.zeros((1, 1, 6, 6), "f4"),
    "attn.mask": rotary()[0, 0, :4], "attn.relative_position_index_embed": table("float32"),
    "flow.mask": causal("bool")[::-1].copy(), "flow.permutation": table(), "attn.pos_ids_head": table(),
    "attn.attn_mask": rotary()[0, 0, :4], "attn.masked_bias": np.float32([0.3]), "rotary.sin": 0.1 * rotary(),
    "attn.rope.cos_cached": rotary(), "attn.freqs_cis": rotary()[0, 0], "attn.inv_freq": rotary()[0, 0, 0],
    "attn.relative_position_index": rotary()[0, 0], "attn.cos": rotary(), "freqs": rotary(),
    "made.masks": causal("int64")[::-1].copy(),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_what_may_have_been_learned_or_drawn_is_asked_about(name: str) -> None:
    plan = planned(name, LEARNED[name])
    assert not plan.complete
    assert {f"blocks.{i}.{name}" for i in range(LAYERS)} >= {n for q in plan.questions for n in q.sources} != set()


def test_whole_numbers_of_every_layer_are_not_tied() -> None:
    plan = planned("flow.permutation", table(), unused="drop")
    assert plan.complete
    assert not any("tied" in text for entry in plan.entries for text in entry.evidence)
    assert not plan.reads


@pytest.mark.parametrize("blocks", ["blocks_{}", "layer_{}"])
def test_a_known_buffer_that_like_has_too_comes_from_the_source(blocks: str) -> None:
    name = "attn/relative_position_index"
    more = {f"buffers/{blocks.format(i)}/{name}": TensorSpec((4, 4), "int64") for i in range(LAYERS)}
    plan = planned("attn.relative_position_index", table(), more)
    assert plan.complete, str(plan)
    found = {entry.targets: entry.sources for entry in plan.entries if any(name in path for path in entry.targets)}
    assert found == {(path,): (f"blocks.{i}.attn.relative_position_index",) for i, path in enumerate(more)}


def test_a_parameter_of_a_live_module_is_no_buffer() -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(5, 3)
            if kind is torch.nn.Parameter:
                self.attn_mask = kind(torch.ones(1, 4, 4))
            else:
                self.register_buffer("attn_mask", torch.ones(1, 4, 4))

    like = {"params": {"fc": {"kernel": np.zeros((5, 3), "f4"), "bias": np.zeros(3, "f4")}}}
    assert gx.plan(Net(None), like).complete
    assert not gx.plan(Net(torch.nn.Parameter), like).complete


def test_a_live_module_keeps_its_mask_though_parameters_share_its_last_name() -> None:
    net = torch.nn.Module()
    net.attn = torch.nn.Linear(6, 18)
    net.register_buffer("bias", torch.ones(1, 1, 8, 8).tril())
    plan = gx.plan({"params": {"attn": {"kernel": np.ones((6, 18), "f4"), "bias": np.ones(18, "f4")}}}, net)
    assert plan.complete, str(plan)
    kept = next(entry for entry in plan.entries if entry.targets == ("bias",))
    assert not kept.sources
