"""A user's rule against what the models do: a wrong one is refused with its line, a right one is kept."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

import graftax as gx
from graftax.errors import RulesError

from .pairs import BY_NAME, Pair

FAST = 12
ALL = 72


@dataclass(frozen=True, slots=True)
class Link:
    """torch keys and the Flax leaves that they fill, and the rule options that say how."""

    torch: tuple[str, ...]
    flax: tuple[str, ...]
    how: dict[str, Any]
    kind: str

    def line(self, **other: Any) -> str:
        ends = {"torch": self.torch, "flax": self.flax}
        options = {name: value for name, value in {**self.how, **other}.items() if value is not None}
        sides = {side: names[0] if len(names) == 1 else list(names) for side, names in ends.items()}
        return "{ " + ", ".join(f"{name} = {_toml(value)}" for name, value in {**sides, **options}.items()) + " }"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _linear(torch: str, flax: str) -> list[Link]:
    return [
        Link((f"{torch}.weight",), (f"{flax}/kernel",), {"layout": "linear"}, "kernel"),
        Link((f"{torch}.bias",), (f"{flax}/bias",), {"layout": "identity"}, "vector"),
    ]


def _norm(torch: str, flax: str, bias: bool = True) -> list[Link]:
    made = [Link((f"{torch}.weight",), (f"{flax}/scale",), {"layout": "identity"}, "vector")]
    return made + [Link((f"{torch}.bias",), (f"{flax}/bias",), {"layout": "identity"}, "vector")] * bias


def _stacked(torch: str, flax: str, count: int, kind: str, **how: Any) -> Link:
    return Link(tuple(torch.format(n) for n in range(count)), (flax,), {"stack": {"list": 0}, **how}, kind)


GATES = tuple("ifgo")
GATED = {"fused": "block", "layout": "linear"}
LINKS: dict[str, list[Link]] = {
    "mlp": [
        *_linear("fc1", "params/lin_a"),
        *_linear("fc2", "params/lin_b"),
        *_linear("fc3", "params/lin_c"),
        *_norm("bn1", "params/norm_a"),
        *_norm("bn2", "params/norm_b"),
    ],
    "conv": [
        Link(("c1.weight",), ("params/k/kernel",), {"layout": "conv"}, "conv"),
        Link(("c2.weight",), ("params/m/kernel",), {"layout": "conv"}, "conv"),
        Link(("c1.bias",), ("params/k/bias",), {"layout": "identity"}, "vector"),
        Link(("c2.bias",), ("params/m/bias",), {"layout": "identity"}, "vector"),
        *_norm("norm", "params/b"),
        Link(("head.weight",), ("params/z/kernel",), {"flatten": "C=4 H=4 W=4"}, "flatten"),
        Link(("head.bias",), ("params/z/bias",), {"layout": "identity"}, "vector"),
    ],
    "block": [
        Link(("qkv.weight",), tuple(f"params/{n}/kernel" for n in "srt"), {"fused": "block"}, "fused"),
        Link(("qkv.bias",), tuple(f"params/{n}/bias" for n in "srt"), {"fused": "block"}, "fused"),
        *_linear("proj", "params/o"),
        *_linear("up", "params/up"),
        *_linear("down", "params/down"),
        *_norm("n1", "params/pre"),
        *_norm("n2", "params/post"),
    ],
    "tagger": [
        Link(("table.weight",), ("params/e/embedding",), {"layout": "identity"}, "table"),
        Link(("rnn.weight_ih_l0",), tuple(f"params/c/i{g}/kernel" for g in GATES), GATED, "fused"),
        Link(("rnn.weight_hh_l0",), tuple(f"params/c/h{g}/kernel" for g in GATES), GATED, "fused"),
        *_linear("out", "params/y"),
    ],
    "stack": [
        *(
            _stacked(f"layers.{{}}.{n}.weight", f"params/l/{n[0]}/kernel", 3, "stack", layout="linear")
            for n in ("gate", "up", "down")
        ),
        *(
            _stacked(f"layers.{{}}.{n}.bias", f"params/l/{n[0]}/bias", 3, "stacked vector")
            for n in ("gate", "up", "down")
        ),
        _stacked("layers.{}.norm.weight", "params/l/n/scale", 3, "stacked vector"),
        *_norm("ends.norm", "params/n"),
        Link(("ends.head.weight",), ("params/h/kernel",), {"layout": "linear"}, "kernel"),
    ],
    "experts": [
        *(
            _stacked(f"experts.{{}}.{n}.weight", flax, 3, "stack", layout="linear")
            for n, flax in (("w1", "wa"), ("w3", "wb"), ("w2", "wc"))
        ),
        Link(("router.weight",), ("gate/kernel",), {"layout": "linear"}, "kernel"),
        *_norm("norm", "pre"),
    ],
}
"""The right rules of every pair."""


# ---------------------------------------------------------------- wrong rules


def _shuffled(names: Sequence[str], draw: random.Random) -> tuple[str, ...]:
    while True:
        made = tuple(draw.sample(list(names), len(names)))
        if made != tuple(names):
            return made


def _crossed(link: Link, links: Sequence[Link], draw: random.Random) -> str | None:
    """With the target of another leaf of the same shape."""
    others = [o for o in links if o is not link and o.kind == link.kind and len(o.flax) == len(link.flax)]
    if not others:
        return None
    other = draw.choice(others)
    bare = draw.random() < 0.3 and len(link.torch) == 1 == len(link.flax)
    return Link(link.torch, other.flax, {} if bare else link.how, link.kind).line()


def _transposed(link: Link, links: Sequence[Link], draw: random.Random) -> str | None:
    return {
        "kernel": lambda: link.line(layout="identity"),
        "table": lambda: link.line(layout="linear"),
        "stack": lambda: link.line(layout="identity"),
        "conv": lambda: link.line(layout=None, ops=draw.choice(("o i h w -> w h i o", "o i h w -> h w o i"))),
        "fused": lambda: link.line(layout=None, ops="o i -> o i") if link.flax[0].endswith("kernel") else None,
    }.get(link.kind, lambda: None)()


def _reordered(link: Link, links: Sequence[Link], draw: random.Random) -> str | None:
    if link.kind == "fused":
        return Link(link.torch, _shuffled(link.flax, draw), link.how, link.kind).line()
    if link.kind.startswith("stack"):
        return Link(_shuffled(link.torch, draw), link.flax, link.how, link.kind).line()
    if link.kind == "flatten":
        axes = draw.choice(("(h w c) -> (h w c)", "(c h w) -> (c h w)", "(c h w) -> (w h c)", "(c w h) -> (h c w)"))
        before, after = axes.split(" -> ")
        return link.line(flatten=None, ops=f"o {before} -> {after} o", c=4, h=4, w=4)
    return None


def _heads(link: Link, links: Sequence[Link], draw: random.Random) -> str | None:
    if link.kind != "fused":
        return None
    return link.line(fused="interleaved", heads=draw.choice((2, 4)))


def _changed(link: Link, links: Sequence[Link], draw: random.Random) -> str | None:
    if len(link.torch) > 1 or len(link.flax) > 1 or link.kind == "flatten":
        return None
    return link.line(
        **draw.choice(({"scale": 2.0}, {"scale": 0.5}, {"scale": -1.0}, {"offset": 1.0}, {"offset": 1e-2}))
    )


WRONG: tuple[Callable[..., str | None], ...] = (_crossed, _transposed, _reordered, _heads, _changed)


def wrong_rules(pair: str, seed: int) -> tuple[list[str], int]:
    """Rules of which one is wrong, and its line."""
    draw = random.Random(f"{pair} {seed}")
    links = LINKS[pair]
    while True:
        link = draw.choice(links)
        line = draw.choice(WRONG)(link, links, draw)
        if line is not None:
            break
    used = set(link.torch) | set(link.flax)
    spoken = set(re.findall(r'"([^"]+)"', line))
    right = [o for o in links if not (set(o.torch) | set(o.flax)) & (used | spoken)]
    lines = [o.line() for o in draw.sample(right, min(draw.randrange(3), len(right)))]
    at = draw.randrange(len(lines) + 1)
    return [*lines[:at], line, *lines[at:]], at + 1


def judged(pair: Pair, lines: list[str], wrong: int) -> str:
    """refused (an error, or a misfit of a plan that cannot run; both name the line) or harmless. Fails for all else."""
    text = "rules = [\n" + "".join(f"  {line},\n" for line in lines) + "]\n"
    try:
        plan = gx.plan(pair.torch_model(), pair.like(), rules=text, inputs=pair.call())
    except RulesError as error:
        said = str(error)
        assert re.search(rf"line {wrong + 1}\b", said), f"another line than {wrong + 1} is named:\n{text}\n{said}"
        return "refused"
    if not plan.complete:
        said = "\n".join(map(str, plan.failures))
        assert re.search(rf"line {wrong + 1}\b", said), (
            f"incomplete, and line {wrong + 1} is not blamed:\n{text}\n{plan}"
        )
        return "refused"
    assert pair.right(plan), f"a wrong rule gave a complete plan:\n{text}\n{plan}"
    return "harmless"


def cases(count: int) -> list[tuple[str, int]]:
    names = list(LINKS)
    return [(names[n % len(names)], n // len(names)) for n in range(count)]


@pytest.mark.parametrize(("name", "seed"), cases(FAST))
def test_a_wrong_rule_is_refused_with_its_line(name: str, seed: int) -> None:
    judged(BY_NAME[name], *wrong_rules(name, seed))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), cases(ALL)[FAST:])
def test_none_of_many_wrong_rules_is_obeyed(name: str, seed: int) -> None:
    judged(BY_NAME[name], *wrong_rules(name, seed))


@pytest.mark.parametrize("name", LINKS)
def test_right_rules_are_kept(name: str) -> None:
    pair, links = BY_NAME[name], LINKS[name]
    lines = [link.line() for link in links]
    plan = gx.plan(pair.torch_model(), pair.like(), rules="rules = [\n" + ",\n".join(lines) + "\n]", inputs=pair.call())
    assert plan.complete, str(plan)
    assert pair.right(plan)
    by_target = {target: entry for entry in plan.entries for target in entry.targets}
    for number, link in enumerate(links, 2):
        entry = by_target[link.flax[0]]
        assert entry.sources == link.torch
        assert any(re.search(rf"line {number}\b", text) for text in entry.evidence), (link, entry.evidence)


def test_one_right_rule_beside_what_running_decides() -> None:
    pair = BY_NAME["block"]
    for link in LINKS["block"][:3]:
        plan = gx.plan(pair.torch_model(), pair.like(), rules=f"rules = [{link.line()}]", inputs=pair.call())
        assert plan.complete
        assert pair.right(plan)
        assert plan.proof is not None


def test_what_holds_is_offered_and_holds() -> None:
    """The line that a refusal offers is a rule that is accepted."""
    pair = BY_NAME["conv"]
    wrong = '{ torch = "head.weight", flax = "params/z/kernel", layout = "linear" }'
    with pytest.raises(RulesError) as caught:
        gx.plan(pair.torch_model(), pair.like(), rules=f"rules = [{wrong}]", inputs=pair.call())
    offered = re.search(r"What holds: (\{.*\})", str(caught.value))
    assert offered is not None, str(caught.value)
    plan = gx.plan(pair.torch_model(), pair.like(), rules=f"rules = [{offered[1]}]", inputs=pair.call())
    assert plan.complete
    assert pair.right(plan)
