"""Module pairs from the plan: leaves, containers, fused projections, loops over cells, scans, shared and tied ones."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import torch
from flax import linen as fn
from flax import nnx
from torch import nn

import graftax as gx
from graftax.execute.opening import open_tree
from graftax.parity.pairing import CallMap, ModulePair, find_pairs
from graftax.parity.records import Site


def pairs_of(module: Any, like: Any, **options: Any) -> tuple[ModulePair, ...]:
    plan = gx.plan(module, like, **options)
    assert plan.complete, str(plan)
    a, b = open_tree(module), open_tree(like)
    return find_pairs(plan.entries, a.live.modules, b.live.modules, a.storage.aliases, b.storage.aliases)


def names(pairs: tuple[ModulePair, ...]) -> list[tuple[str, str, bool]]:
    return [(pair.torch, pair.flax, pair.leaf) for pair in pairs]


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Mlp(fn.Module):
    @fn.compact
    def __call__(self, x):
        return fn.Dense(6, name="down")(fn.gelu(fn.Dense(8, name="up")(x)))


class FlaxBlock(fn.Module):
    @fn.compact
    def __call__(self, x, _=None):
        return x + Mlp(name="mlp")(fn.LayerNorm(name="norm")(x)), None


class FlaxStack(fn.Module):
    @fn.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = FlaxBlock(name=f"block_{i}")(x)
        return x


class FlaxScan(fn.Module):
    @fn.compact
    def __call__(self, x):
        loop = fn.scan(FlaxBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return loop(name="blocks")(x, None)[0]


def test_leaves_and_containers():
    found = pairs_of(nn.Sequential(Block(), Block()), gx.linen(FlaxStack(), jnp.ones((2, 6))))
    assert names(found) == [
        ("", "", False),
        ("0", "block_0", False),
        ("0.norm", "block_0/norm", True),
        ("0.mlp", "block_0/mlp", False),
        ("0.mlp.0", "block_0/mlp/up", True),
        ("0.mlp.2", "block_0/mlp/down", True),
        ("1", "block_1", False),
        ("1.norm", "block_1/norm", True),
        ("1.mlp", "block_1/mlp", False),
        ("1.mlp.0", "block_1/mlp/up", True),
        ("1.mlp.2", "block_1/mlp/down", True),
    ]
    assert found[2].kinds == ("LayerNorm", "LayerNorm")
    assert {name for entry in found[2].entries for name in entry.sources} == {"0.norm.weight", "0.norm.bias"}


class TorchStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))


def test_the_steps_of_a_scan():
    found = pairs_of(TorchStack(), gx.linen(FlaxScan(), jnp.ones((2, 6))))
    steps = {(pair.torch, pair.flax): (pair.step, pair.steps) for pair in found}
    assert steps["blocks.0", "blocks"] == (0, 2)
    assert steps["blocks.1", "blocks"] == (1, 2)
    assert steps["blocks.1.mlp.0", "blocks/mlp/up"] == (1, 2)
    order = [Site("blocks.0"), Site("blocks.0.mlp.0"), Site("blocks.1"), Site("blocks.1.mlp.0")]
    calls = CallMap.of(found, order)
    assert calls.sites[Site("blocks/mlp/up", 1)] == Site("blocks.1.mlp.0")
    assert calls.pairs[Site("blocks", 0)].torch == "blocks.0"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)


class FlaxAttention(fn.Module):
    @fn.compact
    def __call__(self, x):
        q, k, v = (fn.Dense(6, name=name)(x) for name in ("q", "k", "v"))
        return fn.Dense(6, name="out")(q + k + v)


def test_fused_projections_leave_the_container():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()
            self.head = nn.Linear(6, 3)

    class Flax(fn.Module):
        @fn.compact
        def __call__(self, x):
            return fn.Dense(3, name="head")(FlaxAttention(name="attn")(x))

    rule = """rules = [
      { torch = "attn.qkv.weight", flax = ["attn/q/kernel", "attn/k/kernel", "attn/v/kernel"], fused = "block" },
      { torch = "attn.qkv.bias", flax = ["attn/q/bias", "attn/k/bias", "attn/v/bias"], fused = "block" },
    ]"""
    found = pairs_of(Model(), gx.linen(Flax(), jnp.ones((2, 6))), rules=rule)
    assert names(found) == [("", "", False), ("attn", "attn", False), ("attn.out", "attn/out", True),
                            ("head", "head", True)]  # fmt: skip


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)


def test_a_recurrent_module_is_the_loop_and_not_the_cell():
    class Linen(fn.Module):
        @fn.compact
        def __call__(self, x):
            return fn.Dense(3, name="head")(fn.RNN(fn.OptimizedLSTMCell(5), name="lstm")(x))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(6, 5, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(5, 3, rngs=rngs)

    for like in (gx.linen(Linen(), jnp.ones((2, 4, 6))), Nnx(nnx.Rngs(0))):
        assert names(pairs_of(Tagger(), like)) == [("", "", False), ("lstm", "lstm", True), ("head", "head", True)]


def test_attention_layers_are_layers_whatever_they_hold():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, 3)

    class Flax(fn.Module):
        @fn.compact
        def __call__(self, x):
            return fn.Dense(3, name="head")(fn.MultiHeadDotProductAttention(2, name="mha")(x, x))

    found = pairs_of(Model(), gx.linen(Flax(), jnp.ones((2, 4, 6))))
    assert names(found) == [("", "", False), ("mha", "mha", True), ("head", "head", True)]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


class FlaxTied(fn.Module):
    def setup(self):
        self.embed = fn.Embed(11, 6)
        self.mid = fn.Dense(6)

    def __call__(self, ids):
        return self.embed.attend(self.mid(self.embed(ids)))


def test_a_tied_head_is_another_call_of_the_embedding():
    found = pairs_of(Tied(), gx.linen(FlaxTied(), jnp.ones((2, 4), jnp.int32)))
    assert {(pair.torch, pair.flax) for pair in found} == {("", ""), ("embed", "embed"), ("mid", "mid"),
                                                           ("head", "embed")}  # fmt: skip
    calls = CallMap.of(found, [Site(""), Site("embed"), Site("mid"), Site("head")])
    assert calls.sites[Site("embed", 0)] == Site("embed")
    assert calls.sites[Site("embed", 1)] == Site("head")


def test_calls_of_a_shared_layer_go_by_order():
    shared = ModulePair("layer", "layer")
    calls = CallMap.of([shared], [Site("layer", i) for i in range(3)])
    assert [calls.sites[Site("layer", i)].call for i in range(3)] == [0, 1, 2]
    copies = [ModulePair("layer", "layer_0"), ModulePair("layer", "layer_1")]
    calls = CallMap.of(copies, [Site("layer", 0), Site("layer", 1)])
    assert calls.sites == {Site("layer_0"): Site("layer", 0), Site("layer_1"): Site("layer", 1)}


def test_a_wrapper_with_the_same_leaves_pairs_inside_and_outside():
    class Wrapped(fn.Module):
        @fn.compact
        def __call__(self, x):
            return fn.Dense(5, name="inner")(x)

    class Flax(fn.Module):
        @fn.compact
        def __call__(self, x):
            return fn.Dense(3, name="head")(Wrapped(name="body")(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 5))
            self.head = nn.Linear(5, 3)

    found = pairs_of(Model(), gx.linen(Flax(), jnp.ones((2, 6))))
    assert names(found) == [("", "", False), ("body", "body", False), ("body.0", "body/inner", True),
                            ("head", "head", True)]  # fmt: skip


class TorchHead(nn.Module):
    """A head whose decoder shares the embedding's weight and the head's own bias."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self.mid = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = embed.weight


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = TorchHead(self.embed)


class FlaxHead(fn.Module):
    @fn.compact
    def __call__(self, x, table):
        return fn.Dense(6, name="mid")(x) @ table.T + self.param("bias", fn.initializers.zeros, (11,))


class FlaxTiedHead(fn.Module):
    @fn.compact
    def __call__(self, ids):
        embed = fn.Embed(11, 6, name="embed")
        return FlaxHead(name="head")(embed(ids), embed.embedding)


def test_a_container_with_a_tied_weight_is_paired_without_it():
    rule = 'rules = [{ torch = "head.decoder.bias", flax = "head/bias" }]'
    found = pairs_of(TiedHead(), gx.linen(FlaxTiedHead(), jnp.ones((2, 4), jnp.int32)), rules=rule)
    assert {("embed", "embed"), ("head", "head"), ("head.mid", "head/mid")} < {(p.torch, p.flax) for p in found}


def test_lists_of_modules_are_no_layers():
    found = pairs_of(TorchStack(), gx.linen(FlaxStackOfBlocks(), jnp.ones((2, 6))))
    assert "blocks" not in {pair.torch for pair in found}
    assert ("blocks.1.norm", "blocks/block_1/norm") in {(pair.torch, pair.flax) for pair in found}


class FlaxStackOfBlocks(fn.Module):
    @fn.compact
    def __call__(self, x):
        return FlaxStack(name="blocks")(x)
