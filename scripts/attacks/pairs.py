"""What an attack is, and the maker that collects its tensors on both sides."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Form = Callable[[Array], Array]


@dataclass(slots=True)
class Attack:
    """A pair of file trees and its truth: what every leaf of both sides must hold.

    back:     the plan goes from Flax to torch
    gone:     leaves of like that no source holds; a plan that fills one is wrong
    spare:    leaves that stand around what is attacked
    options:  more options of the plan
    excused:  a pattern; an assumption whose text has it excuses the leaves that it names: no file shows the truth
    loose:    values may differ by rounding (folded weights)
    """

    kind: str
    torch: Arrays
    flax: Arrays
    back: bool = False
    gone: frozenset[str] = frozenset()
    spare: frozenset[str] = frozenset()
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    excused: str = ""
    loose: bool = False

    @property
    def source(self) -> Arrays:
        return self.flax if self.back else self.torch

    @property
    def like(self) -> Arrays:
        return self.torch if self.back else self.flax


def same(array: Array) -> Array:
    return array


def linear(array: Array) -> Array:
    return array.T


def conv(array: Array) -> Array:
    """(o, i, ...) -> (..., i, o)."""
    return array.transpose(*range(2, array.ndim), 1, 0)


def flipped(array: Array) -> Array:
    """A transposed convolution's (i, o, ...) -> (..., i, o), its window turned."""
    return array.transpose(*range(2, array.ndim), 0, 1)[tuple(slice(None, None, -1) for _ in range(array.ndim - 2))]


def last(array: Array) -> Array:
    """(1, C, H, W) -> (1, H, W, C)."""
    return np.moveaxis(array, 1, -1)


class Maker:
    """Collects leaves on both sides, all of distinct random values. `square`: every width is the same."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self.values = np.random.default_rng(self.rng.randrange(2**32))
        self.torch: Arrays = {}
        self.flax: Arrays = {}
        self.gone: set[str] = set()
        self.spare: set[str] = set()
        self.options: dict[str, Any] = {}
        self.excused = ""
        self.loose = False
        self.square = self.rng.random() < 0.5
        self.width = self.rng.choice((6, 8, 12))
        self._widths = [w for w in (5, 7, 9, 10, 11, 13, 14, 15, 18, 20) if w != self.width]
        self.rng.shuffle(self._widths)
        self.top = "params/" if self.rng.random() < 0.7 else ""

    def other(self) -> int:
        """Another width; the same one in a square attack."""
        return self.width if self.square else self._widths.pop()

    def draw(self, *shape: int) -> Array:
        return self.values.standard_normal(shape).astype("f4")

    def coin(self, p: float = 0.5) -> bool:
        return self.rng.random() < p

    def pick(self, *words: Any) -> Any:
        return self.rng.choice(words)

    def put(self, torch: str, flax: str, *shape: int, form: Form = same) -> Array:
        """A torch tensor and its Flax form, under these names; the tensor."""
        array = self.draw(*shape)
        self.give(torch, array)
        self.take(flax, form(array))
        return array

    def give(self, torch: str, array: Array) -> None:
        assert torch not in self.torch, torch
        self.torch[torch] = array

    def take(self, flax: str, array: Array) -> None:
        path = self.top + flax
        assert path not in self.flax, path
        self.flax[path] = np.ascontiguousarray(array).reshape(array.shape)

    def drop(self, flax: str) -> None:
        self.gone.add(self.top + flax)

    def dense(self, torch: str, flax: str, out: int, into: int, bias: bool = True) -> None:
        self.put(f"{torch}.weight", f"{flax}/kernel", out, into, form=linear)
        if bias:
            self.put(f"{torch}.bias", f"{flax}/bias", out)

    def convolution(self, torch: str, flax: str, *shape: int, bias: bool = True) -> None:
        self.put(f"{torch}.weight", f"{flax}/kernel", *shape, form=conv)
        if bias:
            self.put(f"{torch}.bias", f"{flax}/bias", shape[0])

    def norm(self, torch: str, flax: str, width: int, bias: bool = False) -> None:
        self.put(f"{torch}.weight", f"{flax}/scale", width)
        if bias:
            self.put(f"{torch}.bias", f"{flax}/bias", width)

    def batch_norm(self, torch: str, flax: str, width: int) -> None:
        self.norm(torch, flax, width, bias=True)
        top, self.top = self.top, "batch_stats/" if self.top else ""
        self.put(f"{torch}.running_mean", f"{flax}/mean", width)
        self.put(f"{torch}.running_var", f"{flax}/var", width)
        self.top = top

    def attack(self, kind: str, back: bool | None = None) -> Attack:
        """The pair, its leaves in the order in which modules are made, or shuffled."""
        torch, flax = self.torch, self.flax
        if self.coin(0.3):
            torch, flax = self._shuffled(torch), dict(sorted(flax.items()))
        back = self.coin(0.25) if back is None else back
        gone, spare = frozenset(self.gone), frozenset(self.spare)
        return Attack(kind, torch, flax, back, gone, spare, self.options, self.excused, self.loose)

    def _shuffled(self, arrays: Arrays) -> Arrays:
        names = list(arrays)
        self.rng.shuffle(names)
        return {name: arrays[name] for name in names}


# ---------------------------------------------------------------- what stands around

ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("query", "key", "value", "out"),
    ("wq", "wk", "wv", "wo"),
    ("to_q", "to_k", "to_v", "to_out"),
)
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
PLAIN = (("fc1", "fc2"), ("up", "down"), ("linear1", "linear2"), ("dense_in", "dense_out"), ("c_fc", "c_proj"))
NORMS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("norm1", "norm2"),
    ("ln_1", "ln_2"),
    ("attn_norm", "mlp_norm"),
    ("pre_attention_norm", "pre_mlp_norm"),
)
LISTS = ("layers.{}", "blocks.{}", "h.{}", "encoder.layer.{}", "model.layers.{}", "transformer.blocks.{}")
TREES = ("layers_{}", "blocks_{}", "block_{}", "encoder/layer_{}", "layers/{}", "encoder/layers_{}")


def two(m: Maker, rows: Sequence[Sequence[str]], alike: float = 0.5) -> tuple[Sequence[str], Sequence[str]]:
    """The words of both sides: the same, or of two rows."""
    one = m.rng.choice(rows)
    return (one, one) if m.coin(alike) else (one, m.rng.choice(rows))


def block(m: Maker, torch: str, flax: str, alike: float = 0.5, attention: bool = True, mlp: bool = True) -> None:
    """A transformer's block: attention, an MLP and two norms, by words that both sides know."""
    d = m.width
    bias = m.coin(0.3)
    a, b = two(m, NORMS, alike)
    for one, other in zip(a, b, strict=True):
        m.norm(f"{torch}.{one}", f"{flax}/{other}", d, bias)
    if attention:
        a, b = two(m, ATTENTIONS, alike)
        where = m.pick("attn", "self_attn", "attention")
        for one, other in zip(a, b, strict=True):
            m.dense(f"{torch}.{where}.{one}", f"{flax}/{where}/{other}", d, d, bias)
    if mlp:
        f = d if m.square else 2 * d
        a, b = two(m, GATED if m.coin() else PLAIN, alike)
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            into, out = (f, d) if i == len(a) - 1 else (d, f)
            m.dense(f"{torch}.mlp.{one}", f"{flax}/mlp/{other}", out, into, bias)


def blocks(m: Maker, count: int, alike: float = 0.5, **parts: Any) -> list[tuple[str, str]]:
    """`count` blocks of one kind; the prefix of each on both sides."""
    torch, flax = m.rng.choice(LISTS), m.rng.choice(TREES)
    state = m.rng.getstate()
    out: list[tuple[str, str]] = []
    for i in range(count):
        m.rng.setstate(state)  # every block has the same words
        out.append((torch.format(i), flax.format(i)))
        block(m, *out[-1], alike, **parts)
    return out


def around(m: Maker, alike: bool = True) -> None:
    """Something beside what is attacked: nothing, a head, an embedding, a few blocks (if `alike`)."""
    needed = {*m.torch, *m.flax}
    if m.coin(0.4):
        m.dense("head", "head", m.pick(3, 10, m.width), m.width)
    if m.coin(0.3):
        m.put("embed_tokens.weight", "embed_tokens/embedding", 17, m.width)
    if m.coin(0.25) and alike:
        blocks(m, m.pick(1, 2), m.pick(0.5, 1.0))
    if m.coin(0.2):
        m.norm("norm", "norm", m.width)
    m.spare |= {*m.torch, *m.flax} - needed


def rows(order: Mapping[str, int], text: str) -> Array:
    """The rows of a flattened map in another order: `rows({'c': 4, 'h': 3, 'w': 3}, 'h w c')` gives, for each place of
    the new order, the place in the order of `order`."""
    names = list(order)
    grid = np.arange(int(np.prod(list(order.values())))).reshape(*order.values())
    return grid.transpose([names.index(name) for name in re.findall(r"\w+", text)]).reshape(-1)
