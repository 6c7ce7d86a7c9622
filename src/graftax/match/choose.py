"""Choose the reading of a pair's leaves where several fit: a table of ways to decide, and the first that knows does.
Nothing decides: a question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from graftax.layers.patterns import EACH_LAST, FUSED, FUSED_ROWS, LAST, PADDED, SPLIT_IN, SPLIT_OUT
from graftax.match.flatten import Suspect
from graftax.match.names import concepts, lexicon
from graftax.match.pairs import Label, Link, Pair, Scope
from graftax.match.sides import Module
from graftax.tree import split_words

_LINEAR = "a 2-D weight that becomes a kernel is a Linear"

# reading -> the evidence where it is the only reading
_ONLY = {
    "identity": "it fits as it is",
    "linear": _LINEAR,
    "conv": "it fits as a convolution",
    "conv_transpose default": "it fits as a transposed convolution",
    "reshape": "it fits after a reshape",
    LAST: "it is a map, and Flax stores maps channels last",
}


@dataclass(slots=True)
class Choice:
    """The label taken and the evidence, or the open labels if nothing decides between them. `parts`: the orders in
    which the two names list the parts of the fused tensor, if they differ."""

    label: Label | None
    why: str
    open: tuple[Label, ...] = ()
    kind: str = "layout"
    trap: Suspect | None = None
    parts: str = ""


def usual(label: Label) -> tuple[int, Label]:
    """A sort key: the field's convention comes first."""
    order = ("linear", "conv", "identity", SPLIT_OUT[0], SPLIT_IN[0], "window last", "reshape")
    return (order.index(label[1]) if label[1] in order else 9, label)


@dataclass(slots=True)
class Habits:
    """What the rectangular leaves of the whole match show. votes: `linear` or `identity`, by scope and by what the
    leaves are called; transposed: paths without numbers whose convolution can only be a transposed one; convs: whether
    there are convolutions; stacked: (leaf, True on the Flax end) -> the axes on which a trace shows it stacked, if one
    does."""

    votes: dict[tuple[object, str, str], set[str]] = field(default_factory=dict[tuple[object, str, str], set[str]])
    axes: dict[int, Choice] = field(default_factory=dict[int, Choice])
    transposed: set[tuple[str, ...]] = field(default_factory=set[tuple[str, ...]])
    convs: bool = False
    stacked: Callable[[str, bool], tuple[int, ...] | None] = lambda leaf, flax: None

    def learn(self, scope: Scope, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            table = _last_words(pair, scope) & _TABLES
            for link in pair.links:
                labels = {label for _, label in link.labels}
                self.convs = self.convs or bool(labels & {"conv", "conv_transpose default"})
                if labels == {"conv_transpose default"}:
                    self.transposed.add(words_of(pair.torch))
                if table:
                    continue
                if link.torch.role in ("weight", "value") and len(labels) == 1 and labels <= {"linear", "identity"}:
                    if any(len(shape) < 2 for shape in link.torch.shapes.values()):
                        continue
                    for where in (id(scope), None):
                        self.votes.setdefault((where, *_spelled(link)), set()).update(labels)

    def orientation(self, scope: Scope, link: Link) -> tuple[set[str], set[str]]:
        """(what siblings in the same blocks show, what the whole match shows)"""
        kinds = _spelled(link)
        return self.votes.get((id(scope), *kinds), set()), self.votes.get((None, *kinds), set())


def _spelled(link: Link) -> tuple[str, str]:
    """What the leaves are called, on which their layout depends: a bare `w` says nothing about the weight of a
    Linear. A bare parameter has a name of its own."""
    torch, flax = (column.leaf if column.kind == "free" else column.kind for column in (link.torch, link.flax))
    return torch, flax


_TABLES = frozenset(("embed", "pos", "tok", "seg", "table", "cls"))
_LOOKUPS = frozenset(("embed", "tok"))
_DECONV = frozenset(("deconv", "transpose", "transposed"))
_UP = frozenset(("up", "upsample", "ups", "dec", "upsampler", "upsamplers", "gen", "generator", "upscale"))
_UP_LAST = _UP | {"upsampling", "decoder", "trans", "convt", "tconv"}


def _last_words(pair: Pair, scope: Scope) -> frozenset[str]:
    """The last word of each name: `pos_embed` is a lookup table, and `pos_proj` is not."""
    return frozenset((scope.name(pair.torch).last, scope.name(pair.flax).last))


def says_transposed(words: Sequence[str]) -> bool:
    """True if a convolution of this name may be a transposed one."""
    return bool(words) and (words[-1] in _UP_LAST or not _DECONV.isdisjoint(concepts(words, lexicon())))


def words_of(module: Module) -> tuple[str, ...]:
    """The words of a module's path."""
    return tuple(token for token in (*module.outer, *module.tokens) if isinstance(token, str))


@dataclass(slots=True)
class _Case:
    """One leaf of a taken pair, and the readings that are left. names: the concepts of both names."""

    link: Link
    pair: Pair
    scope: Scope
    habits: Habits
    labels: frozenset[Label]

    @property
    def names(self) -> frozenset[str]:
        return self.scope.name(self.pair.torch).concepts | self.scope.name(self.pair.flax).concepts

    @property
    def lasts(self) -> frozenset[str]:
        return _last_words(self.pair, self.scope)

    @property
    def readings(self) -> dict[str, Label]:
        return {label[1]: label for label in sorted(self.labels)}

    def take(self, reading: str, why: str) -> Choice:
        return Choice(self.readings[reading], why)

    def ask(self, kind: str = "layout") -> Choice:
        return Choice(None, "", tuple(sorted(self.labels, key=usual)), kind)


def choose(link: Link, pair: Pair, scope: Scope, habits: Habits) -> Choice:
    """The reading of one leaf of a taken pair."""
    case = _Case(link, pair, scope, habits, link.labels)
    if link.torch.stack or link.flax.stack:
        if link.told:
            return Choice(None, "", link.told)
        axes = habits.axes.get(id(link))
        if axes is not None and axes.label is None:
            return axes
        if axes is not None and axes.label is not None:
            case.labels = frozenset(label for label in case.labels if label[0] == axes.label[0])
    return next(filter(None, (way(case) for way in _WAYS)), None) or case.ask()


def _padding(case: _Case) -> Choice | None:
    """No file shows that rows which one side lacks are padding."""
    return case.ask("padding") if any(word.endswith(PADDED) for _, word in case.labels) else None


def _fused_rows(case: _Case) -> Choice | None:
    """Only a fused tensor whose name says so has rows part by part that the other side stores head by head."""
    rows = {label for concept, label in FUSED_ROWS.items() if concept in case.names}
    if any(word in rows for _, word in case.labels):
        both = (label for label in case.labels if label[1] in rows or label[1].startswith("(h d) i"))
        return Choice(None, "", tuple(sorted(both)), "fused")
    case.labels = frozenset(label for label in case.labels if label[1] not in FUSED_ROWS.values())
    return None


def _told(case: _Case) -> Choice | None:
    """What live modules show. No kind shows how fused parts lie."""
    told = tuple(label for label in case.link.told if label in case.labels)
    if not told or any(word.startswith(FUSED) for _, word in case.labels):
        return None
    return Choice(told[0], case.link.why) if len(told) == 1 else Choice(None, "", told)


def _only(case: _Case) -> Choice | None:
    if len(case.labels) != 1:
        return None
    (label,) = case.labels
    return Choice(label, _ONLY.get(label[1], label[1]))


def _map(case: _Case) -> Choice | None:
    """A map that Flax stores channels last, or a tensor of another kind with such a shape."""
    return case.ask() if any(word in (LAST, EACH_LAST) for _, word in case.labels) else None


def _square(case: _Case) -> Choice | None:
    """A square matrix is a Linear's, unless its kind or its siblings show another reading."""
    if not {"linear", "identity"} <= case.readings.keys():
        return None
    ways = _square_table, _square_parameter, _as_siblings, _square_linear
    return next(filter(None, (way(case) for way in ways)), None) or case.ask()


def _square_table(case: _Case) -> Choice | None:
    """A lookup table keeps its rows. A bare parameter may put any axis first, as tables of relative positions do."""
    torch, flax = case.link.torch, case.link.flax
    if flax.kind == "kernel" or not case.lasts & _TABLES:
        return None
    bare = torch.kind == "raw", flax.kind == "raw"
    if (bare[0] != bare[1] and not case.lasts <= _TABLES) or (any(bare) and "rel" in case.names):
        return case.ask()
    return case.take("identity", "a lookup table stays as it is")


def _square_parameter(case: _Case) -> Choice | None:
    """A bare parameter that has one name on both sides stays as it is, unless its siblings are transposed."""
    torch, flax = case.link.torch, case.link.flax
    if not torch.kind == flax.kind == "raw":
        return None
    named = [set(concepts(split_words(column.leaf), case.scope.lex)) for column in (torch, flax)]
    if "linear" in case.habits.orientation(case.scope, case.link)[1] or named[0].isdisjoint(named[1]):
        return case.ask()
    return case.take("identity", "a bare parameter on both sides stays as it is")


def _as_siblings(case: _Case) -> Choice | None:
    near, far = case.habits.orientation(case.scope, case.link)
    if case.lasts <= _LOOKUPS or (not near and far == {"identity"}) or len(near) > 1:
        return case.ask()
    for word in near:
        return case.take(word, f"it is square, and its rectangular siblings {_SAYS[word]}")
    return None


def _square_linear(case: _Case) -> Choice | None:
    """By convention, a `weight` that becomes a kernel is a Linear's. No convention is about a leaf of another name."""
    torch, flax = case.link.torch, case.link.flax
    far = case.habits.orientation(case.scope, case.link)[1]
    if torch.kind == "raw" and "linear" not in far:
        return case.ask()
    if flax.kind == "kernel" and (torch.role == "v" or torch.leaf.endswith("weight")) and torch.kind != "raw":
        return case.take("linear", _LINEAR)
    return None


_SAYS = {"linear": "are transposed", "identity": "stay as they are"}


def _deconvolution(case: _Case) -> Choice | None:
    """A convolution with as many inputs as outputs, which may be a transposed one."""
    if not {"conv", "conv_transpose default"} <= case.readings.keys():
        return None
    even = all(k % 2 == 0 for k in next(iter(case.link.torch.shapes.values()))[2:])
    words = words_of(case.pair.torch), words_of(case.pair.flax)
    if (
        case.names & _DECONV
        or any(map(says_transposed, words))
        or (even and case.names & _UP)
        or words[0] in case.habits.transposed
    ):
        return case.ask()
    return case.take("conv", "a weight with 3 to 5 axes that becomes a kernel is a convolution")


def _fused(case: _Case) -> Choice | None:
    return case.ask("fused") if any(word.startswith(FUSED) for word in case.readings) else None


def _heads(case: _Case) -> Choice | None:
    """The reading that splits an axis into heads: the outputs of q, k and v, or the inputs of the output projection."""
    outs = [reading for reading in case.readings if reading.startswith("(h d) i")]
    ins = [reading for reading in case.readings if reading.startswith("o (h d)")]
    if not outs and not ins:
        return None
    parts, last = bool(case.names & {"q", "k", "v"}), "o" in case.names
    picks = outs if parts and not last else ins if last and not parts else outs + ins
    if len(picks) > 1 and case.link.flax.kind == "kernel":
        dense_general = [reading for reading in picks if reading in (SPLIT_OUT[0], SPLIT_IN[0])]
        if len(dense_general) == 1 and (parts or last):
            return case.take(dense_general[0], "a DenseGeneral kernel has its axes in this order")
    if len(picks) == 1:
        return case.take(picks[0], "the names tell which axis is split into heads")
    return Choice(None, "", tuple(case.readings[reading] for reading in picks or case.readings))


_WAYS: tuple[Callable[[_Case], Choice | None], ...] = (
    _padding,
    _fused_rows,
    _told,
    _only,
    _map,
    _square,
    _deconvolution,
    _fused,
    _heads,
)


def trapped(link: Link, choice: Choice, trap: Suspect) -> Choice:
    """The choice for a Linear that may take a flattened map, or for a norm between the two. It is open, unless the
    flatten concerns only the other end of the Linear."""
    if choice.label is None or (trap.raw is not None and _is_vector(link)):
        return choice
    if choice.label[1] != "linear" and trap.raw is None and not (trap.vector and _is_vector(link)):
        return choice
    return Choice(None, "", (choice.label,), "flatten", trap)


def _is_vector(link: Link) -> bool:
    return all(len(shape) == 1 for shape in link.torch.shapes.values())
