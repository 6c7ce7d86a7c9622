"""Whatever a rules file says: an error of ours with exit code 2, or rules that apply without an exception and whose
entries give the shapes that the plan says."""

from __future__ import annotations

import contextlib

from hypothesis import event, given, settings
from hypothesis import strategies as st

from graftax.errors import PlanError, RulesError
from graftax.ops import apply_chain
from graftax.plans import End, Plan
from graftax.rules import Rules, apply_rules, load_rules, schema

from .harness import abstract, checkpoint, tensors

TORCH = {"a.weight": (4, 6), "a.bias": (4,), "l.0.w": (2, 3), "l.1.w": (2, 3), "qkv.weight": (12, 4),
         "c.weight": (4, 2, 3, 3), "x": (), "q.0.1": (4, 4), "q.0.2": (4, 4)}  # fmt: skip
FLAX = {"a/kernel": (6, 4), "a/bias": (2, 2), "l/w": (2, 3, 2), "q/kernel": (4, 2, 2), "k/kernel": (4, 2, 2),
        "v/kernel": (4, 2, 2), "c/kernel": (3, 3, 2, 4), "params/x": (), "p/1/2/0": (4, 4)}  # fmt: skip
KEYS = st.sampled_from([
    "a.weight", "a.bias", "l.{l}.w", "l.*.w", "qkv.weight", "c.weight", "x", "q.{i}.{j}", "q.0.{2*i+j}", "**",
    "**.weight", "a/kernel", "a/bias", "l/w", "q/kernel", "k/kernel", "v/kernel", "c/kernel", "params/x",
    "p/{j}/{i+1}/{i}", "**/kernel", "{{", "nothing", "l.{l+1}.w",
])  # fmt: skip
WORDS = [
    "o i -> i o", "i o", "(h d) i -> i h d", "l i o", "list o i", "o h d", "C H W", "C=2 H W", "linear", "identity",
    "conv", "block", "interleaved", "tied", "sum", "keep", "zeros", "0..1", "h", "o", "why",
]  # fmt: skip
VALUE = st.recursive(
    st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4) | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["l", "h", "o", "i", "list", "C", "H", "W", "0", "-1"]), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = st.lists(KEYS, min_size=1, max_size=3)
ENDS = st.sampled_from([("torch", "flax"), ("source", "target"), ("torch",), ("flax",)])
OTHER = [name for name in schema.KEYS if name not in ("torch", "flax", "source", "target")]


@st.composite
def tables(draw):
    table = {}
    for name in draw(ENDS):
        names = draw(NAMES)
        table[name] = names[0] if len(names) == 1 else names
    for name in draw(st.lists(st.sampled_from([*OTHER, *OTHER, "h", "l", "i", "d", "o", "heds"]), max_size=3)):
        table[name] = draw(VALUE)
    return table


@settings(max_examples=600, deadline=None)
@given(st.lists(tables(), min_size=1, max_size=2), st.sampled_from(["forth", "back", "alone", "same"]))
def test_any_table(table, way):
    rules = loaded(table)
    if rules is not None:
        check(rules, way)


# Tables that are well formed: what is drawn fits often enough to reach the ops.
GOOD = st.sampled_from([
    {"ops": "o i -> i o"}, {"ops": "i o"}, {"ops": "(h d) i -> i h d", "h": 2}, {"heads": 2}, {"layout": "linear"},
    {"layout": "identity"}, {"transpose": False}, {"flatten": "C=2 H W"}, {"flatten": "C H W"}, {"scale": 2.0},
    {"offset": 1}, {"pad": "o"}, {"pad": {0: 2}}, {"repeat": {"o": 2}}, {"repeat": "i"}, {},
])  # fmt: skip
PAIRS = st.sampled_from([
    ("a.weight", "a/kernel", {}), ("a.bias", "a/bias", {}), ("c.weight", "c/kernel", {}), ("x", "params/x", {}),
    ("x", "x", {}), ("a.weight", "nothing", {}),
    ("l.{l}.w", "l/w", {"stack": {"l": 0}}), ("l.{l}.w", "l/w", {"stack": -1}), ("l.{l}.w", "l/w", {"ops": "l o i"}),
    ("qkv.weight", ["q/kernel", "k/kernel", "v/kernel"], {"fused": "block"}), ("q.{i}.{j}", "p/{j}/{i+1}/{i}", {}),
    ("qkv.weight", ["q/kernel", "k/kernel", "v/kernel"], {"fused": "interleaved"}), ("**.weight", "**/kernel", {}),
    (["l.0.w", "l.1.w"], "l/w", {"stack": 0}), (["l.0.w", "l.1.w"], "l/w", {"fused": "sum"}),
    (["q.0.1", "q.0.2"], "p/1/2/0", {"fused": "tied"}), ("*.weight", "*/kernel", {}),
])  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(PAIRS, GOOD, GOOD, st.sampled_from(["forth", "back", "alone", "alone back"]))
def test_tables_that_are_nearly_right(pair, one, other, way):
    torch, flax, keys = pair
    rules = loaded([{"torch": torch, "flax": flax, **keys, **one, **other}])
    if rules is not None:
        check(rules, way)


def loaded(rules: object) -> Rules | None:
    try:
        return load_rules(rules)
    except RulesError as error:
        event("refused")
        return None if error.exit_code == 2 and error.failures else _wrong(error)


def _wrong(error: RulesError) -> None:
    raise AssertionError(f"exit {error.exit_code}, no failure: {error}")


def check(rules: Rules, way: str) -> None:
    """Applied without an exception; entries without a failure run and give the shapes of the plan, both ways."""
    shapes, side = (FLAX, "flax") if way in ("back", "alone back") else (TORCH, "torch")
    arrays = tensors(shapes)
    source = checkpoint(arrays, side)
    to = "torch" if side == "flax" else "flax"
    like = {"forth": abstract(FLAX, "flax"), "back": abstract(TORCH, "torch"), "same": abstract(TORCH, "torch")}.get(
        way
    )
    to = like.side if like is not None else to
    found = apply_rules(rules, source, like, side, to)
    for failure in found.proposal.failures:
        assert failure.key
        assert failure.next or "rules" in str(failure)
    ends = End.of(source, side), End("like", to, like.specs if like is not None else found.targets)
    plan = Plan.build(*ends, found.proposal, partial=True)
    new = [f for f in plan.failures if f not in found.proposal.failures]
    assert not new, "an entry without a failure fits"
    assert str(plan)
    for entry in plan.entries:
        try:
            made = apply_chain(entry.ops, tuple(arrays[name] for name in entry.sources))
        except PlanError:  # tied values that differ, rows that do not repeat
            continue
        event(f"{way}: an entry runs")
        assert [a.shape for a in made] == [ends[1].specs[name].shape for name in entry.targets]


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from(list("rules=[]{},\"'#\n abtorchflax.0/*{}")), max_size=80))
def test_any_text(text):
    with contextlib.suppress(RulesError):
        load_rules("rules = [\n" + text + "\n]")
