"""Solved pairs to mutate: those of a folder, and small ones made here (experts, cycles of layers)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(slots=True)
class Case:
    """One pair: the source's arrays, and like's arrays as they must come out.

    assumed: Flax names its modules by their calls, and nothing in the files shows in which order; a plan that states
             this and relies on it is counted apart
    gone: ids of like's arrays that no source holds any more
    """

    name: str
    torch: Arrays
    flax: Arrays
    assumed: bool = False
    gone: frozenset[int] = field(default_factory=frozenset[int])


def load_cases(folder: Path | None) -> list[Case]:
    """The cases of a folder (torch.safetensors, truth.safetensors: like as the source fills it), and the made ones."""
    from graftax.formats import open_path

    out = made_cases()
    found = sorted(p for p in folder.iterdir() if (p / "truth.safetensors").exists()) if folder else []
    for path in found:
        ends: dict[str, Arrays] = {}
        for name in ("torch", "truth"):
            opened = open_path(str(path / f"{name}.safetensors"))
            ends[name] = {key: opened.read(key) for key in opened}
        out.append(Case(path.name, ends["torch"], ends["truth"]))
    return out


# ---------------------------------------------------------------- made cases

D, F, HALF, VOCAB = 16, 40, 8, 50


def made_cases() -> list[Case]:
    return [_experts(), _cycle(), _sequence()]


class _Maker:
    """Collects leaves: each a random torch tensor and its Flax form."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.torch: Arrays = {}
        self.flax: Arrays = {}

    def add(self, torch: str, flax: str, *shape: int) -> None:
        array = self.rng.standard_normal(shape).astype("f4")
        self.torch[torch] = array
        self.flax[flax] = np.ascontiguousarray(array.T) if flax.endswith("kernel") else array

    def norm(self, torch: str, flax: str) -> None:
        self.add(f"{torch}.weight", f"params/{flax}/scale", D)

    def linear(self, torch: str, flax: str, out: int, in_: int) -> None:
        self.add(f"{torch}.weight", f"params/{flax}/kernel", out, in_)

    def attention(self, torch: str, flax: str) -> None:
        for a, b, out in (("q_proj", "query", D), ("k_proj", "key", HALF), ("v_proj", "value", HALF)):
            self.linear(f"{torch}.{a}", f"{flax}/{b}", out, D)
        self.linear(f"{torch}.o_proj", f"{flax}/out", D, D)

    def gated(self, torch: str, flax: str, width: int = F) -> None:
        for name in ("gate", "up"):
            self.linear(f"{torch}.{name}_proj", f"{flax}/{name}_proj", width, D)
        self.linear(f"{torch}.down_proj", f"{flax}/down_proj", D, width)

    def ends(self, layers: str = "model") -> None:
        self.add(f"{layers}.embed_tokens.weight", "params/embed_tokens/embedding", VOCAB, D)
        self.norm(f"{layers}.norm", "final_norm")
        self.linear("lm_head", "lm_head", VOCAB, D)


def _experts() -> Case:
    """Three layers of four experts beside a router."""
    made = _Maker(1)
    made.ends()
    for i in range(3):
        t, f = f"model.layers.{i}", f"layers_{i}"
        made.attention(f"{t}.self_attn", f"{f}/self_attn")
        made.norm(f"{t}.input_layernorm", f"{f}/input_layernorm")
        made.norm(f"{t}.post_attention_layernorm", f"{f}/post_attention_layernorm")
        made.linear(f"{t}.mlp.router", f"{f}/mlp/router", 4, D)
        for e in range(4):
            made.gated(f"{t}.mlp.experts.{e}", f"{f}/mlp/experts_{e}")
    return Case("made-experts", made.torch, made.flax)


def _cycle() -> Case:
    """Six layers in cycles of three: attention, recurrence, attention of half the width."""
    made = _Maker(2)
    made.ends()
    for i in range(6):
        cycle, place = divmod(i, 3)
        t, f = f"model.layers.{i}", f"cycles_{cycle}/layer_{place}"
        made.norm(f"{t}.input_layernorm", f"{f}/input_layernorm")
        made.norm(f"{t}.post_attention_layernorm", f"{f}/post_attention_layernorm")
        if place == 1:
            made.linear(f"{t}.recurrent.in_proj", f"{f}/recurrent/in_proj", 2 * D, D)
            made.add(f"{t}.recurrent.decay", f"params/{f}/recurrent/decay", 2 * D)
            made.linear(f"{t}.recurrent.out_proj", f"{f}/recurrent/out_proj", D, 2 * D)
        else:
            made.attention(f"{t}.self_attn", f"{f}/self_attn")
        made.gated(f"{t}.mlp", f"{f}/mlp", F if place < 2 else F // 2)
    return Case("made-cycles", made.torch, made.flax)


def _sequence() -> Case:
    """Linears of distinct widths, numbered as torch.nn.Sequential does and as Flax's auto-names do."""
    made = _Maker(3)
    sizes = (12, 20, 28, 36, 10)
    for n, (i, o) in enumerate(pairwise(sizes)):
        made.linear(f"net.{2 * n}", f"Dense_{n}", o, i)
        made.add(f"net.{2 * n}.bias", f"params/Dense_{n}/bias", o)
    return Case("made-sequence", made.torch, made.flax)
