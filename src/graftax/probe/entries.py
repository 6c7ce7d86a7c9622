"""What a search found, as entries of a plan: leaves that share a tensor belong to one entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftax.ops import (
    Concat,
    Copy,
    FoldWeightNorm,
    Op,
    Rearrange,
    RearrangeEach,
    Same,
    Split,
    Stack,
    Sum,
    Unstack,
    apply_chain,
)
from graftax.plans import Entry
from graftax.probe.choices import Choice
from graftax.probe.record import Source
from graftax.probe.rewrite import Unknown

Part = tuple[Any, ...]


class NoOps(Exception):
    """What was found cannot be said with graftax's ops."""


@dataclass(frozen=True, slots=True)
class Node:
    """A leaf, or a part of one: a source in its reading, or nodes that are stacked or side by side."""

    source: Source | None = None
    ops: tuple[Op, ...] = ()
    how: str = ""
    axis: int = 0
    children: tuple[Node, ...] = ()

    def slots(self) -> list[Node]:
        return [self] if not self.children else [slot for child in self.children for slot in child.slots()]


def nodes_of(unknowns: Sequence[Unknown], choices: Mapping[int, Choice], sources: Sequence[Source]) -> dict[str, Node]:
    """path -> node, for every leaf of which all pieces are decided."""
    rows: dict[str, list[tuple[Unknown, Node]]] = {}
    lacking: set[str] = set()
    for n, unknown in enumerate(unknowns):
        if n in choices:
            rows.setdefault(unknown.path, []).append((unknown, _chosen(choices[n], sources)))
        else:
            lacking.add(unknown.path)
    return {path: _joined(parts, 0) for path, parts in rows.items() if path not in lacking}


def _chosen(choice: Choice, sources: Sequence[Source]) -> Node:
    if not choice.sources:
        return Node(ops=choice.ops[0], how="fill")
    parts = tuple(Node(sources[s], ops) for s, ops in zip(choice.sources, choice.ops, strict=True))
    return parts[0] if choice.join is None else Node(how=choice.join[0], axis=choice.join[1], children=parts)


def _joined(parts: Sequence[tuple[Unknown, Node]], depth: int) -> Node:
    if len(parts) == 1 and len(parts[0][0].cuts) == depth:
        return parts[0][1]
    groups: dict[Any, list[tuple[Unknown, Node]]] = {}
    for unknown, node in parts:
        groups.setdefault(unknown.cuts[depth], []).append((unknown, node))
    cuts = sorted(groups, key=lambda cut: cut.start)
    how = "stack" if cuts[0].element else "concat"
    return Node(how=how, axis=cuts[0].axis, children=tuple(_joined(groups[cut], depth + 1) for cut in cuts))


def entries_of(
    nodes: Mapping[str, Node], shapes: Mapping[str, tuple[int, ...]], evidence: Mapping[str, str]
) -> tuple[list[Entry], dict[str, str]]:
    """(entries, path -> why a leaf that was found has none). shapes: of the tensors, by key."""
    entries: list[Entry] = []
    failed: dict[str, str] = {}
    for paths in _components(_named_apart(nodes)):
        group = dict(paths)
        try:
            entries.append(_entry(group, shapes, evidence))
        except NoOps as error:
            failed.update(dict.fromkeys(group, str(error)))
    return entries, failed


def _named_apart(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """A tensor with several names (tied weights) that fills several leaves is taken by one name for each of them; names
    that are left go with the first."""
    uses: dict[str, int] = {}
    for node in nodes.values():
        if _tied(node.source):
            uses[node.source.keys[0]] = uses.get(node.source.keys[0], 0) + 1  # pyright: ignore
    taken: dict[str, int] = {}
    out: dict[str, Node] = {}
    for path, node in nodes.items():
        source = node.source
        if source is not None and _tied(source):
            names = (source.keys[0], *source.names)
            n = taken.get(names[0], 0)
            taken[names[0]] = n + 1
            if n < len(names):
                rest = names[uses[names[0]] :] if n == 0 else ()
                node = Node(Source((names[n],), source.array, names=rest), node.ops)
        out[path] = node
    return out


def _tied(source: Source | None) -> bool:
    return source is not None and source.how == "tensor" and source.rows is None and bool(source.names)


def _components(nodes: Mapping[str, Node]) -> list[list[tuple[str, Node]]]:
    """Leaves that share a tensor, together."""
    group: dict[str, int] = {}
    members: dict[int, list[tuple[str, Node]]] = {}
    for number, (path, node) in enumerate(nodes.items()):
        mine = [(path, node)]
        keys = {key for slot in node.slots() if slot.source is not None for key in slot.source.keys}
        for other in {group[key] for key in keys if key in group}:
            mine = members.pop(other) + mine
        members[number] = mine
        for _, item in mine:
            for slot in item.slots():
                if slot.source is not None:
                    group.update(dict.fromkeys(slot.source.keys, number))
    return list(members.values())


def _entry(group: Mapping[str, Node], shapes: Mapping[str, tuple[int, ...]], evidence: Mapping[str, str]) -> Entry:
    nodes = list(group.values())
    if len(nodes) == 1 and nodes[0].how == "fill":
        (path,) = group
        return Entry((), (path,), nodes[0].ops, (evidence[path],))
    if any(slot.source is None for node in nodes for slot in node.slots()):
        raise NoOps("a leaf holds constants beside tensors")
    error = NoOps("")
    for paths in (list(group), sorted(group, key=lambda path: _first_part(group[path]))):
        slots, joins = _arranged([group[path] for path in paths])
        try:
            keys, ops = _begun(slots, shapes)
        except NoOps as found:
            error = found
            continue
        also = slots[0].source.names if len(keys) == 1 and _tied(slots[0].source) and slots[0].source else ()
        if also:
            keys, ops = [*keys, *also], [Same(1 + len(also)), *ops]
        said = list(dict.fromkeys(evidence[path] for path in group if evidence.get(path)))
        return Entry(tuple(keys), tuple(paths), (*ops, *_each([slot.ops for slot in slots]), *joins), tuple(said))
    raise error


def _first_part(node: Node) -> Any:
    """What a leaf takes first: leaves in this order take the parts of their tensors in order."""
    source = node.slots()[0].source
    return (source.keys, source.rows or ()) if source is not None else ()


def _begun(slots: Sequence[Node], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[Op]]:
    """(the keys of an entry, the ops that make of its tensors what each slot takes)."""
    sources = [slot.source for slot in slots if slot.source is not None]
    keys = list(dict.fromkeys(key for source in sources for key in source.keys))
    hows = {source.how for source in sources}
    if "spectral_norm" in hows:
        raise NoOps("torch divides the weight by its spectral norm, and graftax has no op for w / (u W v)")
    if any(how.startswith("weight_norm") for how in hows):
        if len(sources) > 1:
            raise NoOps("a weight norm beside other tensors of one leaf")
        return keys, [FoldWeightNorm(int(sources[0].how.split()[1]))]
    for ops, pieces in _cuts(sources, keys, shapes):
        place = {piece: n for n, piece in enumerate(pieces)}
        wanted = [tuple(place[key, source.rows] for key in source.keys) for source in sources]
        used = [n for term in wanted for n in term]
        if len(set(used)) < len(pieces):
            raise NoOps("a part of a tensor fills no leaf")
        if any(len(term) > 1 for term in wanted):
            if len(set(used)) != len(used):
                raise NoOps("a tensor is a term of several sums")
            return keys, [*ops, Sum(tuple(wanted))]
        if len(pieces) == 1 and len(wanted) > 1:
            return keys, [*ops, Copy(len(wanted))]
        if used == list(range(len(pieces))):
            return keys, ops
        if len(set(used)) < len(used):
            raise NoOps("a tensor fills several leaves beside others")
    raise NoOps("the parts of a tensor are joined in another order")


def _arranged(nodes: Sequence[Node]) -> tuple[list[Node], list[Op]]:
    """The slots in the order in which the joining ops take them, and these ops."""
    if all(not node.children for node in nodes):
        return list(nodes), []
    first = nodes[0]
    count = len(first.children)
    if any(n.source is not None or (n.how, n.axis, len(n.children)) != (first.how, first.axis, count) for n in nodes):
        raise NoOps("leaves that are joined in different ways share a tensor")
    if first.how == "stack":
        inner = [node.children[i] for i in range(count) for node in nodes]
        slots, ops = _arranged(inner)
        return slots, [*ops, Stack(first.axis, count)]
    slots, ops = _arranged([child for node in nodes for child in node.children])
    sizes = [tuple(_extent(child, first.axis) for child in node.children) for node in nodes]
    if len(set(sizes)) > 1:
        raise NoOps("leaves are joined from parts of different sizes")
    return slots, [*ops, Concat(first.axis, sizes[0])]


def _extent(node: Node, axis: int) -> int:
    """The length of a node along an axis."""
    if node.source is not None:
        return apply_chain(node.ops, (node.source.array,))[0].shape[axis]
    if node.how == "concat":
        parts = [_extent(child, axis) for child in node.children]
        return sum(parts) if axis == node.axis else parts[0]
    if axis == node.axis:
        return len(node.children)
    return _extent(node.children[0], axis - (axis > node.axis))


def _cuts(
    sources: Sequence[Source], keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[list[Op], list[Part]]]:
    """Ops that cut every tensor into the rows that the slots take, and (key, rows) of each tensor they give: tensor
    by tensor, or part by part. All tensors of an entry are cut alike."""
    parts = sorted({source.rows for source in sources if source.rows is not None}, key=lambda rows: rows[0])
    if not parts:
        yield [], [(key, None) for key in keys]
        return
    if any(source.rows is None for source in sources):
        raise NoOps("a tensor is taken whole and in parts")
    axes = {(source.axis, source.element) for source in sources}
    extents = {shapes[key][axis] for key in keys for axis, _ in axes}
    if len(axes) > 1 or len(extents) > 1:
        raise NoOps("tensors that are cut in different ways share a leaf")
    ((axis, element),), (extent,) = axes, extents
    by_tensor = [(key, rows) for key in keys for rows in parts]
    by_part = [(key, rows) for rows in parts for key in keys]
    if any(rows != tuple(range(rows[0], rows[0] + len(rows))) for rows in parts):
        if axis:
            raise NoOps("rows of another axis than the first lie in no order")
        ops = _interleaved(parts, keys, shapes, extent)
        yield ops, by_part if isinstance(ops[-1], Unstack) else by_tensor
        return
    at = 0
    for rows in parts:
        if rows[0] != at:
            raise NoOps(
                "some rows of a tensor fill no leaf" if rows[0] > at else "rows of a tensor fill several leaves"
            )
        at = rows[-1] + 1
    if at != extent:
        raise NoOps("some rows of a tensor fill no leaf")
    sizes = tuple(map(len, parts))
    before, after = " ".join("opqrst"[:axis]), " ".join("uvwxyz"[: len(shapes[keys[0]]) - axis - 1])
    if element:
        yield [Unstack(axis, extent)], by_part
        if len({len(shapes[key]) for key in keys}) == 1:
            squeezed = Rearrange(f"{before} 1 {after} -> {before} {after}".strip())
            yield [Split(axis, sizes), squeezed], by_tensor
        return
    yield ([] if len(parts) == 1 else [Split(axis, sizes)]), by_tensor
    if len(set(sizes)) == 1 and len({len(shapes[key]) for key in keys}) == 1:
        opened = Rearrange(f"{before} (t d) {after} -> {before} t d {after}".strip(), (("t", len(parts)),))
        yield [opened, Unstack(axis, len(parts))], by_part


def _interleaved(
    parts: Sequence[tuple[int, ...]], keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]], extent: int
) -> list[Op]:
    """(heads, parts, d) rows: every part takes the same places of every head; the parts may have different numbers of
    places in a group (grouped queries)."""
    ranks = {len(shapes[key]) for key in keys}
    if len(ranks) > 1:
        raise NoOps("tensors of different ranks are cut together")
    (rank,) = ranks
    rest = " ".join("uvwxyz"[: rank - 1])
    for heads in range(2, extent // 2 + 1):
        if extent % heads:
            continue
        width = extent // heads
        inside = [tuple(row for row in rows if row < width) for rows in parts]
        if sorted(row for rows in inside for row in rows) != list(range(width)):
            continue
        if any(
            rows != tuple(h * width + row for h in range(heads) for row in one)
            for rows, one in zip(parts, inside, strict=True)
        ):
            continue
        if any(one != tuple(range(one[0], one[0] + len(one))) for one in inside):
            continue
        sizes = tuple(map(len, inside))
        opened = Rearrange(f"(h d) {rest} -> h d {rest}", (("h", heads),))
        closed = Rearrange(f"h d {rest} -> (h d) {rest}")
        if len(set(sizes)) == 1:
            patterns = Rearrange(f"(h t d) {rest} -> t (h d) {rest}", (("h", heads), ("t", len(parts))))
            return [patterns, Unstack(0, len(parts))]
        return [opened, Split(1, sizes), closed]
    raise NoOps("rows of a tensor lie in no order that heads explain")


def _each(chains: Sequence[tuple[Op, ...]]) -> list[Op]:
    """The ops of every slot: mapped over all of them if they are alike, else one pattern each."""
    if all(chain == chains[0] for chain in chains):
        return list(chains[0])
    steps = [chain[0] if chain else None for chain in chains]
    moved = [step for step in steps if step is None or isinstance(step, Rearrange)]
    if len(moved) == len(chains) and all(len(chain) <= 1 for chain in chains):
        patterns = tuple(step.pattern if step else "" for step in moved)
        return [RearrangeEach(patterns, tuple(step.sizes if step else () for step in moved))]
    raise NoOps("the parts of a leaf need different ops")
