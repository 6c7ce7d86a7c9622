"""Faults of the models without attention: MLP, CNN, tagger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np

from ..zoo.base import Arrays, Edit
from ..zoo.cnn import CNNSettings
from ..zoo.mlp import MLPSettings
from ..zoo.tagger import TaggerSettings
from . import base
from .making import Making

MLP_PATHS = {
    "linen": {
        "stem": "inp", "norm": "LinenBlock_{i}/LayerNorm_0", "fc1": "LinenBlock_{i}/Dense_0",
        "fc2": "LinenBlock_{i}/Dense_1", "block": "LinenBlock_{i}", "final": "final_norm", "head": "out",
    },
    "nnx": {
        "stem": "embed", "norm": "layers/{i}/ln", "fc1": "layers/{i}/up", "fc2": "layers/{i}/down",
        "block": "layers/{i}", "final": "final_norm", "head": "classifier",
    },
}  # fmt: skip


def mlp(api: str) -> Making:
    m = Making("mlp", api, MLP_PATHS[api])
    s = MLPSettings()

    def behind(i: int) -> list[str]:
        """What shows a wrong sum at the end of block i."""
        return [m.path("block", i), m.path("norm", i + 1) if i + 1 < s.depth else m.path("final")]

    for i in range(s.depth):
        for role in ("fc1", "fc2"):
            m.kernel("kernel not transposed", role, base.untransposed, i)
            m.kernel("bfloat16 weights", role, base.rounded, i)
            m.kernel("weights differ", role, lambda a: a + 0.01 * np.sin(np.arange(a.size)).reshape(a.shape), i)
            m.initial(role, "kernel", i)
        m.swap(m.path("fc1", i), m.path("fc2", i))
        m.initial("norm", "scale", i)
        m.initial("fc1", "bias", i)
    for role in ("stem", "head"):
        m.kernel("reshape before transpose", role, base.reshaped)
    m.swap(m.path("fc1", 0), m.path("fc1", 2))
    m.swap(m.path("norm", 0), m.path("norm", 1))
    for epsilon in (1e-6, 1e-3, 1e-12):
        m.blocks("epsilon", lambda i: [m.path("norm", i)], range(s.depth), epsilon=epsilon)
    m.wrong("epsilon", "1e-6 everywhere", [m.path("norm", 0), m.path("norm", 1)], s.but(epsilon=1e-6))
    for right, wrong in (("gelu", "gelu_tanh"), ("gelu", "relu"), ("silu", "gelu"), ("gelu_tanh", "gelu")):
        m.blocks(
            "activation", lambda i: [m.path("fc2", i)], range(s.depth), activation=wrong, right=s.but(activation=right)
        )
    m.blocks("missing residual", behind, range(s.depth), residual=False)
    for gain in (0.5, 2.0):
        m.blocks("scale factor", behind, range(s.depth), gain=gain)
    m.blocks(
        "fast variance", lambda i: [m.path("norm", i)], range(s.depth), right=s.but(fast=False), fast=True, loud=True
    )
    m.blocks("bfloat16 accumulation", lambda i: [m.path("fc1", i)], range(s.depth), dtype="bfloat16")
    return m


# ---------------------------------------------------------------- CNN

CNN_PATHS = {
    "linen": {
        "stem": "stem", "stem_norm": "stem_norm", "conv1": "block_{i}/conv1", "norm1": "block_{i}/norm1",
        "conv2": "block_{i}/conv2", "norm2": "block_{i}/norm2", "skip": "block_{i}/skip_conv",
        "skip_norm": "block_{i}/skip_norm", "block": "block_{i}", "head": "head",
    },
    "nnx": {
        "stem": "conv_in", "stem_norm": "norm_in", "conv1": "blocks/{i}/conv1", "norm1": "blocks/{i}/bn1",
        "conv2": "blocks/{i}/conv2", "norm2": "blocks/{i}/bn2", "skip": "blocks/{i}/shortcut/layers/0",
        "skip_norm": "blocks/{i}/shortcut/layers/1", "block": "blocks/{i}", "head": "fc",
    },
}  # fmt: skip


def cnn(api: str) -> Making:
    m = Making("cnn", api, CNN_PATHS[api])
    s = CNNSettings()
    convolutions = [("stem", None), *(("conv1", i) for i in range(3)), *(("conv2", i) for i in range(3))]
    for role, i in convolutions:
        for axes in ((0, 1), (0,), (1,)):
            m.kernel("kernel flipped", role, base.flipped(*axes), i, text=f" over {axes}")
        m.kernel("kernel axes swapped", role, base.spatial_swapped, i)
        m.kernel("reshape before transpose", role, base.reshaped, i)
        m.kernel("bfloat16 weights", role, base.rounded, i)
        m.initial(role, "kernel", i)
    for role, i in (("conv1", 0), ("conv1", 1), ("conv2", 0), ("conv2", 1), ("conv2", 2)):
        m.kernel("kernel not transposed", role, base.untransposed, i, also=("kernel axes swapped",))
    stats = "batch_stats"
    for i in range(3):
        m.initial("norm1", "mean", i, collection=stats)
        m.initial("norm2", "var", i, collection=stats)
        m.initial("norm1", "scale", i)
    m.swap(m.path("conv1", 0), m.path("conv2", 0))
    m.swap(m.path("conv1", 0), m.path("conv1", 1))
    m.swap(m.path("norm1", 1), m.path("norm2", 1))
    m.kernel("reshape before transpose", "head", base.reshaped)
    for epsilon in (1e-3, 1e-6):
        m.blocks("epsilon", lambda i: [m.path("norm1", i), m.path("norm2", i)], range(3), epsilon=epsilon)
    m.wrong("epsilon", "1e-3 everywhere", [m.path("stem_norm")], s.but(epsilon=1e-3))
    for momentum in (0.1, 0.99):
        m.blocks("momentum", lambda i: [m.path("norm1", i)], range(3), momentum=momentum)
    m.faults = [replace(f, by="settings") if f.kind == "momentum" else f for f in m.faults]
    m.blocks("train or eval statistics", lambda i: [m.path("norm1", i)], range(3), training=True)
    m.wrong("train or eval statistics", "everywhere", [m.path("stem_norm")], s.but(training=True))
    for padding in (((2, 0), (1, 1)), ((1, 1), (0, 2)), ((0, 2), (0, 2)), "CIRCULAR", "REFLECT"):
        for i in (0, 1):
            m.blocks("padding", lambda i: [m.path("conv1", i)], (i,), padding=padding)
        m.blocks("padding", lambda i: [m.path("conv2", i)], (2,), padding=padding)
    for padding in ("SAME", ((0, 1), (1, 1)), ((1, 1), (0, 1)), ((0, 1), (0, 1))):
        m.wrong(
            "stride alignment", f"down_padding={padding}", [m.path("conv1", 2)],
            s.but_block(2, down_padding=padding), also=("padding",),
        )  # fmt: skip
    for padding in ("SAME", ((0, 1), (0, 1)), ((0, 1), (1, 1))):
        m.wrong(
            "stride alignment", f"pool_padding={padding}", [m.path("conv1", 0)], s.but(pool_padding=padding),
            also=("padding",),
        )  # fmt: skip
    m.wrong("stride alignment", "the skip samples other rows", [m.path("skip", 2)], s.but_block(2, skip_offset=1))
    for right, wrong in (("relu", "gelu"), ("relu", "leaky_relu"), ("silu", "relu"), ("gelu", "gelu_tanh")):
        base_settings = s.but(activation=right)
        m.blocks("activation", lambda i: [m.path("conv2", i)], range(3), activation=wrong, right=base_settings)
    for order in ("CHW", "WHC", "HCW", "WCH", "CWH"):
        m.wrong("flatten order", f"{order} for HWC", [m.path("head")], s.but(flatten=order))
    m.edited("flatten order", "the head's rows as torch has them", [m.path("head")], rows_as_torch(m.leaf("head")))
    for i in (0, 1):
        m.blocks("missing residual", lambda i: [m.path("block", i), m.path("conv1", i + 1)], (i,), residual=False)
    m.blocks("bfloat16 accumulation", lambda i: [m.path("conv1", i)], range(3), dtype="bfloat16")
    return m


def rows_as_torch(path: str) -> Edit:
    """The head's kernel ported as if nothing had been flattened: rows (c h w), inputs (h w c)."""

    def change(kernel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return kernel.reshape(4, 3, -1, kernel.shape[1]).transpose(2, 0, 1, 3).reshape(kernel.shape)

    return base.at(path, change)


# ---------------------------------------------------------------- tagger

TAGGER_PATHS = {
    "linen": {"embed": "embed", "cell": "OptimizedLSTMCell_{i}", "norm": "norm", "dense": "dense", "head": "tags"},
    "nnx": {
        "embed": "embed", "cell": "lstm/{i}/cell", "norm": "norm", "dense": "dense", "head": "out",
    },
}  # fmt: skip
DIRECTIONS = {"linen": ("0", "1"), "nnx": ("forward_rnn", "backward_rnn")}
GATES = "ifgo"


def tagger(api: str) -> Making:
    m = Making("tagger", api, TAGGER_PATHS[api])
    s = TaggerSettings()
    for place, name in enumerate(DIRECTIONS[api]):
        cell = m.path("cell", name)  # pyright: ignore[reportArgumentType]
        prefix = f"params/{cell}/" if api == "linen" else f"{cell}/"
        layers = lstm_layers(api, cell)
        for order in list(permutations(GATES))[1::5]:
            m.edited("lstm gate order", f"{''.join(order)} {cell}", layers, gates(prefix, order))
        suffix = "l0_reverse" if place else "l0"
        for text in ("ih only", "hh only", "ih twice", "forget"):
            m.edited("lstm bias", f"{text} {cell}", layers, gate_bias(prefix, text, suffix))
        if api == "linen" and place == 0:  # NNX holds the four gates in one kernel
            for gate in "io":
                change = cell_kernel(prefix, gate, base.untransposed)
                m.edited("kernel not transposed", f"{cell} {gate}", layers, change)
        for leaf in ("hi/kernel", "ho/kernel") if api == "linen" else ("dense_i/kernel", "dense_h/kernel"):
            m.edited("bfloat16 weights", f"{cell}/{leaf}", layers, base.at(prefix + leaf, base.rounded))
            if api == "nnx":
                change = base.at(prefix + leaf, base.reshaped)
                m.edited("reshape before transpose", f"{cell}/{leaf}", layers, change)
    first, second = (m.path("cell", name) for name in DIRECTIONS[api])  # pyright: ignore[reportArgumentType]
    m.swap(first, second, [*lstm_layers(api, first), *lstm_layers(api, second)])
    m.kernel("kernel not transposed", "dense", base.untransposed)
    m.kernel("reshape before transpose", "head", base.reshaped)
    m.kernel("bfloat16 weights", "dense", base.rounded)
    m.initial("dense", "kernel")
    m.initial("norm", "scale")
    for epsilon in (1e-6, 1e-3):
        m.wrong("epsilon", str(epsilon), [m.path("norm")], s.but(epsilon=epsilon))
    for right, wrong in (("gelu", "gelu_tanh"), ("gelu", "relu"), ("tanh", "gelu"), ("silu", "gelu")):
        right_settings = s.but(activation=right)
        m.wrong(
            "activation", f"{wrong} for {right}", [m.path("head")], right_settings.but(activation=wrong), right_settings
        )
    for right, wrong in ((12**0.5, 1.0), (1.0, 12**0.5), (12**0.5, 12.0)):
        right_settings = s.but(embed_scale=right)
        m.wrong(
            "embedding scale", f"{wrong:.2f} for {right:.2f}", lstm_layers(api, first),
            right_settings.but(embed_scale=wrong), right_settings, also=("scale factor",),
        )  # fmt: skip
    m.wrong("bfloat16 accumulation", "dense", [m.path("dense")], s.but(dtype="bfloat16"))
    return m


def lstm_layers(api: str, cell: str) -> list[str]:
    """torch has one module for the whole LSTM: any Flax module around or inside the cell says as much."""
    outer = ["lstm", "lstm/**", "lstm_forward", "lstm_backward", "Bidirectional_0", "Bidirectional_0/**"]
    return [cell, f"{cell}/**", *outer]


def gate_leaf(arrays: Arrays, prefix: str, part: str, name: str) -> tuple[str, tuple[Any, ...]]:
    """Where one gate's leaf is: 'hi/kernel' in Linen; in NNX a quarter of 'dense_h/kernel', along its last axis."""
    split = f"{prefix}{part}/{name}"
    if split in arrays:
        return split, (...,)
    fused = f"{prefix}dense_{part[0]}/{name}"
    size = arrays[fused].shape[-1] // 4
    start = size * GATES.index(part[1])
    return fused, (..., slice(start, start + size))


def gate_edit(make: Callable[[Arrays, Arrays], dict[tuple[str, str], np.ndarray[Any, Any]]], prefix: str) -> Edit:
    """`make` gives new values for gates: (part, leaf) such as ('hf', 'bias') -> array."""

    def edit(arrays: Arrays, torch: Arrays) -> Arrays:
        out = {path: array.copy() for path, array in arrays.items()}
        for (part, name), value in make(arrays, torch).items():
            path, place = gate_leaf(arrays, prefix, part, name)
            out[path][place] = value
        assert any(not np.array_equal(out[path], arrays[path]) for path in arrays), (
            f"{prefix}: the fault changes nothing"
        )
        return out

    return edit


def read_gate(arrays: Arrays, prefix: str, part: str, name: str) -> np.ndarray[Any, Any]:
    path, place = gate_leaf(arrays, prefix, part, name)
    return arrays[path][place]


def gates(prefix: str, order: tuple[str, ...]) -> Edit:
    """Gates cut from torch's rows in another order."""
    leaves = (("i", "kernel"), ("h", "kernel"), ("h", "bias"))
    return gate_edit(
        lambda arrays, torch: {
            (start + want, name): read_gate(arrays, prefix, start + have, name)
            for start, name in leaves
            for have, want in zip(order, GATES, strict=True)
        },
        prefix,
    )


def gate_bias(prefix: str, text: str, torch_suffix: str) -> Edit:
    """torch has two biases, Flax their sum: one forgotten, counted twice, or a forget bias of 1 added on top."""

    def make(arrays: Arrays, torch: Arrays) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
        first, second = (torch[f"lstm.bias_{part}_{torch_suffix}"].reshape(4, -1) for part in ("ih", "hh"))
        made = {
            "ih only": lambda i, old: first[i],
            "hh only": lambda i, old: second[i],
            "ih twice": lambda i, old: first[i] * 2,
            "forget": lambda i, old: old + (GATES[i] == "f"),
        }[text]
        return {(f"h{g}", "bias"): made(i, read_gate(arrays, prefix, f"h{g}", "bias")) for i, g in enumerate(GATES)}

    return gate_edit(make, prefix)


def cell_kernel(prefix: str, gate: str, change: Callable[[Any], Any]) -> Edit:
    part = f"h{gate}"
    return gate_edit(
        lambda arrays, torch: {(part, "kernel"): change(read_gate(arrays, prefix, part, "kernel"))}, prefix
    )
