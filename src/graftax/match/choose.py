"""Choose the reading of a pair's leaves where several fit: by the kind of the leaf, by its siblings, else by a
question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from graftax.layers.patterns import EACH_LAST, FUSED, FUSED_ROWS, LAST, SPLIT_IN, SPLIT_OUT
from graftax.match.flatten import Suspect
from graftax.match.names import concepts, lexicon
from graftax.match.pairs import Label, Link, Pair, Scope
from graftax.match.sides import Module

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
    order = ("linear", "conv", "identity", "reshape")
    return (order.index(label[1]) if label[1] in order else 9, label)


@dataclass(slots=True)
class Habits:
    """What the rectangular leaves of the whole match show. votes: `linear` or `identity` by (scope, kinds); transposed:
    paths without numbers whose convolution can only be a transposed one; convs: whether there are convolutions;
    stacked: (leaf, True on the Flax end) -> the axes on which a trace shows it stacked, if one does."""

    votes: dict[tuple[object, str, str], set[str]] = field(default_factory=dict[tuple[object, str, str], set[str]])
    axes: dict[int, Choice] = field(default_factory=dict[int, Choice])
    transposed: set[tuple[str, ...]] = field(default_factory=set[tuple[str, ...]])
    convs: bool = False
    stacked: Callable[[str, bool], tuple[int, ...] | None] = lambda leaf, flax: None

    def learn(self, scope: Scope, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            table = _is_table(pair, scope)
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
                        key = (where, link.torch.kind, link.flax.kind)
                        self.votes.setdefault(key, set()).update(labels)

    def orientation(self, scope: Scope, link: Link) -> tuple[set[str], set[str]]:
        """(what siblings in the same blocks show, what the whole match shows)"""
        kinds = (link.torch.kind, link.flax.kind)
        return self.votes.get((id(scope), *kinds), set()), self.votes.get((None, *kinds), set())


_TABLES = frozenset(("embed", "pos", "tok", "seg", "table", "cls"))
_LOOKUPS = frozenset(("embed", "tok"))
_DECONV = frozenset(("deconv", "transpose", "transposed"))
_UP = frozenset(("up", "upsample", "ups", "dec", "upsampler", "upsamplers", "gen", "generator", "upscale"))
_UP_LAST = _UP | {"upsampling", "decoder", "trans", "convt", "tconv"}


def _is_table(pair: Pair, scope: Scope) -> bool:
    """True if its last word names a lookup table: `pos_embed`, not `pos_proj`."""
    return bool({scope.name(pair.torch, True).last, scope.name(pair.flax, False).last} & _TABLES)


def _both_tables(pair: Pair, scope: Scope) -> bool:
    return all(name.last in _TABLES for name in (scope.name(pair.torch, True), scope.name(pair.flax, False)))


def says_transposed(words: Sequence[str]) -> bool:
    """True if a convolution of this name may be a transposed one."""
    return bool(words) and (words[-1] in _UP_LAST or not _DECONV.isdisjoint(concepts(words, lexicon())))


def words_of(module: Module) -> tuple[str, ...]:
    """The words of a module's path."""
    return tuple(token for token in (*module.outer, *module.tokens) if isinstance(token, str))


def choose(link: Link, pair: Pair, scope: Scope, habits: Habits) -> Choice:
    """The reading of one leaf of a taken pair."""
    labels = link.labels
    if link.torch.stack or link.flax.stack:
        if link.told:
            return Choice(None, "", link.told)
        axes = habits.axes.get(id(link))
        if axes is not None and axes.label is None:
            return axes
        if axes is not None and axes.label is not None:
            labels = frozenset(label for label in labels if label[0] == axes.label[0])
    said = scope.name(pair.torch, True).concepts | scope.name(pair.flax, False).concepts
    rows = {label for concept, label in FUSED_ROWS.items() if concept in said}
    if any(word in rows for _, word in labels):
        both = (label for label in labels if label[1] in rows or label[1].startswith("(h d) i"))
        return Choice(None, "", tuple(sorted(both)), "fused")
    labels = frozenset(label for label in labels if label[1] not in FUSED_ROWS.values())
    told = tuple(label for label in link.told if label in labels)
    if told and not any(word.startswith(FUSED) for _, word in labels):  # no kind shows how fused parts lie
        return Choice(told[0], link.why) if len(told) == 1 else Choice(None, "", told)
    if len(labels) == 1:
        (label,) = labels
        return Choice(label, _ONLY.get(label[1], label[1]))
    if any(word in (LAST, EACH_LAST) for _, word in labels):
        if _may_be_map(link, pair) or any(word == "reshape" for _, word in labels):
            return Choice(None, "", tuple(sorted(labels, key=usual)))
        labels = frozenset(label for label in labels if label[1] != LAST)
        if len(labels) == 1:
            (label,) = labels
            return Choice(label, _ONLY.get(label[1], label[1]))
    by_reading = {label[1]: label for label in sorted(labels)}
    name_t, name_f = scope.name(pair.torch, True).concepts, scope.name(pair.flax, False).concepts
    if {"linear", "identity"} <= set(by_reading):
        return _square(link, by_reading, pair, scope, habits)
    if {"conv", "conv_transpose default"} <= set(by_reading):
        shape = next(iter(link.torch.shapes.values()))
        even = all(k % 2 == 0 for k in shape[2:])
        both = name_t | name_f
        says = any(map(says_transposed, (words_of(pair.torch), words_of(pair.flax))))
        if both & _DECONV or says or (even and both & _UP) or words_of(pair.torch) in habits.transposed:
            return Choice(None, "", tuple(sorted(labels, key=usual)))
        return Choice(by_reading["conv"], "a weight with 3 to 5 axes that becomes a kernel is a convolution")
    if {"conv", "identity"} <= set(by_reading):
        if link.flax.leaf == link.torch.leaf or link.flax.kind != "kernel":
            word = "identity" if link.torch.role in ("g", "v") else "conv"
            return Choice(
                by_reading[word],
                "a leaf of weight norm keeps its axes" if word == "identity" else "it is a convolution",
            )
        return Choice(by_reading["conv"], "it is a convolution")
    if any(word.startswith(FUSED) for word in by_reading):
        return Choice(None, "", tuple(sorted(labels, key=usual)), "fused")
    heads = _heads(by_reading, link, name_t | name_f)
    return heads or Choice(None, "", tuple(sorted(labels, key=usual)))


def _may_be_map(link: Link, pair: Pair) -> bool:
    """True for a norm over a map, its bias, or a bare map. A model without a convolution may hold one too: a learnt
    input, or a table of positions."""
    rank = len(next(iter(link.torch.shapes.values())))
    kinds = {other.flax.kind for other in pair.links if len(next(iter(other.torch.shapes.values()))) == rank}
    return "norm" in kinds or rank > 2


def _square(link: Link, by_reading: dict[str, Label], pair: Pair, scope: Scope, habits: Habits) -> Choice:
    """The reading of a square matrix: a Linear's, unless its kind or its siblings show another."""
    torch, flax = link.torch, link.flax
    near, far = habits.orientation(scope, link)
    if flax.kind != "kernel" and _is_table(pair, scope):
        if (torch.kind == "raw") != (flax.kind == "raw") and not _both_tables(pair, scope):
            return Choice(
                None, "", tuple(sorted(by_reading.values(), key=usual))
            )  # a bare parameter may put any axis first
        return Choice(by_reading["identity"], "a lookup table stays as it is")
    if torch.kind == "raw" and flax.kind == "raw":
        if "linear" in far:
            return Choice(None, "", tuple(sorted(by_reading.values(), key=usual)))
        return Choice(by_reading["identity"], "a bare parameter on both sides stays as it is")
    lookups = {scope.name(pair.torch, True).last, scope.name(pair.flax, False).last}
    if lookups <= _LOOKUPS or (not near and far == {"identity"}):
        return Choice(None, "", tuple(sorted(by_reading.values(), key=usual)))
    if len(near) == 1:
        (word,) = near
        return Choice(by_reading[word], f"it is square, and its rectangular siblings {_SAYS[word]}")
    if len(near) > 1 or (torch.kind == "raw" and "linear" not in far):
        return Choice(None, "", tuple(sorted(by_reading.values(), key=usual)))
    if flax.kind == "kernel" and torch.kind != "raw":
        return Choice(by_reading["linear"], _LINEAR)
    if len(far) == 1:
        (word,) = far
        return Choice(by_reading[word], f"it is square, and the rectangular matrices of this checkpoint {_SAYS[word]}")
    return Choice(None, "", tuple(sorted(by_reading.values(), key=usual)))


_SAYS = {"linear": "are transposed", "identity": "stay as they are"}


def _heads(by_reading: dict[str, Label], link: Link, names: frozenset[str]) -> Choice | None:
    """The reading that splits an axis into heads: the outputs of q, k and v, or the inputs of the output projection."""
    splits_out = [r for r in by_reading if r.startswith("(h d) i")]
    splits_in = [r for r in by_reading if r.startswith("o (h d)")]
    if not splits_out and not splits_in:
        return None
    if names & {"q", "k", "v"} and "o" not in names:
        picks = splits_out
    elif "o" in names and not names & {"q", "k", "v"}:
        picks = splits_in
    else:
        picks = splits_out + splits_in
    if len(picks) > 1 and link.flax.kind == "kernel":
        usual = [r for r in picks if r in (SPLIT_OUT[0], SPLIT_IN[0])]
        if len(usual) == 1 and names & {"q", "k", "v", "o"}:
            return Choice(by_reading[usual[0]], "a DenseGeneral kernel has its axes in this order")
    if len(picks) == 1:
        return Choice(by_reading[picks[0]], "the names tell which axis is split into heads")
    return Choice(None, "", tuple(by_reading[r] for r in (picks or by_reading)))


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


# ---------------------------------------------------------------- stacks


def stack_axes(scope: Scope, pairs: Sequence[Pair], habits: Habits) -> None:
    """One axis for each stack, judged over all leaves of the scope: it is taken if exactly one axis fits them all."""
    groups: dict[tuple[object, ...], list[Link]] = {}
    for pair in pairs:
        for link in pair.links:
            if link.torch.stack or link.flax.stack:
                side = link.torch if link.torch.stack else link.flax
                mark = (side.stack, bool(link.torch.stack), pair.torch.outer if link.torch.stack else pair.flax.outer)
                groups.setdefault(mark, []).append(link)
    for links in groups.values():
        fits: set[tuple[int, ...]] | None = None
        for link in links:
            axes = {axes for axes, _ in link.labels}
            fits = axes if fits is None else fits & axes
        choice = _one_axis(links, fits or set(), habits)
        for link in links:
            habits.axes[id(link)] = choice


def _one_axis(links: list[Link], fits: set[tuple[int, ...]], habits: Habits) -> Choice:
    places = {tuple(_placed(link, axes) for link in links): axes for axes in sorted(fits, reverse=True)}
    if len(places) > 1:
        shown = {place: axes for place, axes in places.items() if _traced(links, place, habits)}
        if len(shown) == 1:
            ((_, axes),) = shown.items()
            return Choice((axes, ""), f"it is stacked on axis {', '.join(map(str, axes))}, as the traced model has it")
    if len(places) == 1:
        axes = max(fits, key=lambda a: (min(a) >= 0, a))
        return Choice(
            (axes, ""), f"it is stacked on axis {', '.join(map(str, axes))}, the only one that fits every leaf"
        )
    if places:
        return Choice(None, "", tuple((axes, "") for axes in sorted(places.values())), "stack")
    # No axis fits all leaves: each leaf is judged alone, and an open leaf is a question.
    return Choice(None, "", tuple(sorted({label for link in links for label in link.labels})), "stack")


def _traced(links: list[Link], places: Sequence[tuple[int, ...]], habits: Habits) -> bool:
    """True if a trace shows that every leaf is stacked on these axes."""
    for link, axes in zip(links, places, strict=True):
        side = link.flax if link.torch.stack else link.torch
        for paths in side.paths.values():
            if any(habits.stacked(path, bool(link.torch.stack)) != tuple(sorted(axes)) for path in paths):
                return False
    return True


def _placed(link: Link, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of the stacked end of this leaf, counted from the front."""
    side = link.flax if link.torch.stack else link.torch
    rank = len(next(iter(side.shapes.values())))
    return tuple(axis if axis >= 0 else rank + axis for axis in axes)
