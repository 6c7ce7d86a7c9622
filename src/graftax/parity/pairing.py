"""Pair torch modules with Flax modules by the plan: its entries say which leaves hold the same weights.

Two modules are a pair if the same entries run through both, and every leaf of those entries lies inside them. An entry
that stacks the leaves of several torch modules (a scan over layers) pairs each of them with one Flax module, call by
call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graftax.ops import Copy, Same, Stack
from graftax.parity.records import Site
from graftax.plans import Entry
from graftax.tree import Module

OPAQUE = frozenset({"torch.nn.modules.activation.MultiheadAttention", "torch.nn.modules.rnn.RNNBase"})
"""torch modules that use their children without calling them: each counts as one layer."""
NEVER_CALLED = frozenset(
    f"torch.nn.modules.container.{name}" for name in ("ModuleList", "ModuleDict", "ParameterList", "ParameterDict")
)
"""torch modules that only hold others."""
HOLDERS = frozenset({"flax.nnx.helpers.List", "flax.nnx.helpers.Dict"})
"""NNX modules that only hold others."""
RECURRENT = frozenset({"torch.nn.modules.rnn.RNNBase"})
WRAPPERS: Mapping[str, int] = {
    "flax.linen.recurrent.RNN": 1,
    "flax.linen.recurrent.Bidirectional": 2,
    "flax.nnx.nn.recurrent.RNN": 1,
    "flax.nnx.nn.recurrent.Bidirectional": 2,
}
"""Flax modules that loop over cells -> how many cells. The weights of the cells may stand beside the module (Linen)."""
CELLS = frozenset({"flax.linen.recurrent.RNNCellBase"})

Atoms = frozenset[tuple[int, int]]
"""(entry, step in its stack; -1 for the whole entry) of every entry that runs through a module."""


@dataclass(frozen=True, slots=True)
class ModulePair:
    """A torch module and the Flax module that does the same, by their paths ('' is the model itself).

    entries      the plan's entries that join their leaves
    leaf         no smaller pair lies inside: the pair is a layer, not a container
    step, steps  the Flax module stacks `steps` torch modules (a scan), of which this is number `step`
    kinds        the two class names
    """

    torch: str
    flax: str
    entries: tuple[Entry, ...] = ()
    leaf: bool = True
    step: int = 0
    steps: int = 1
    kinds: tuple[str, str] = ("", "")

    def flax_call(self, torch_call: int) -> int:
        """The Flax module's call that corresponds to this call of the torch module, if nothing else is stacked
        there."""
        return torch_call * self.steps + self.step


@dataclass(slots=True)
class _ModuleGroups:
    """Modules of one side, grouped by the entries that run through them, outermost first."""

    groups: dict[Atoms, list[str]] = field(default_factory=lambda: defaultdict(list))


def find_pairs(
    entries: Sequence[Entry],
    torch: Mapping[str, Module],
    flax: Mapping[str, Module],
    torch_aliases: Mapping[str, str] | None = None,
    flax_aliases: Mapping[str, str] | None = None,
    dot: str = ".",
) -> tuple[ModulePair, ...]:
    """The pairs, in the order of the torch modules; the two models themselves are the first.

    torch, flax   module path -> Module of either side
    aliases       another path of a leaf -> the path that the plan uses
    dot           what separates the parts of the first side's paths
    """
    rows = [entry for entry in entries if entry.sources and entry.targets]
    settled = {name for entry in entries for name in (*entry.sources, *entry.targets)}
    torch_aliases, flax_aliases = torch_aliases or {}, flax_aliases or {}
    callable_ = {path: module for path, module in torch.items() if not NEVER_CALLED & set(module.bases)}
    theirs = _torch_side(rows, _settled(callable_, settled, torch_aliases), torch_aliases)
    ours = _flax_side(rows, _settled(flax, settled, flax_aliases), flax_aliases)
    found: dict[tuple[str, str], ModulePair] = {}
    _add_pairs(found, theirs, ours, rows, torch, flax, dot)
    # A module that is still unpaired may hold a weight tied to another module's, for which Flax holds no leaf.
    paths = {one for one, _ in found}, {other for _, other in found}
    left = _torch_side(
        rows,
        {path: module for path, module in _settled(callable_, settled, torch_aliases).items() if path not in paths[0]},
        torch_aliases,
        own=True,
    )
    rest = _ModuleGroups({atoms: [p for p in group if p not in paths[1]] for atoms, group in ours.groups.items()})
    _add_pairs(found, left, rest, rows, torch, flax, dot)
    if "" in torch and "" in flax:
        found["", ""] = ModulePair("", "", tuple(rows), True, 0, 1, (torch[""].kind, flax[""].kind))
    order = {path: i for i, path in enumerate(torch)}
    ranked = sorted(found.values(), key=lambda pair: order[pair.torch])
    holders = [path for path, module in torch.items() if OPAQUE & set(module.bases)]
    ranked = [pair for pair in ranked if not any(_below(pair.torch, path, dot) for path in holders)]
    return tuple(_with_leaf(ranked, dot))


def find_flax_pairs(
    entries: Sequence[Entry],
    inverse: Sequence[Entry],
    reference: Mapping[str, Module],
    flax: Mapping[str, Module],
    reference_aliases: Mapping[str, str] | None = None,
    flax_aliases: Mapping[str, str] | None = None,
) -> tuple[ModulePair, ...]:
    """The pairs of two Flax models. Either side may stack what the other holds apart (a scan over layers), so they are
    looked for in both directions. inverse: the entries from `flax` to `reference`, if there are any."""
    ours, theirs = (
        {path: module for path, module in side.items() if not HOLDERS & set(module.bases)} for side in (flax, reference)
    )
    there = find_pairs(entries, theirs, ours, reference_aliases, flax_aliases, dot="/")
    back = find_pairs(inverse, ours, theirs, flax_aliases, reference_aliases, dot="/") if inverse else ()
    turned = [
        replace(p, torch=p.flax, flax=p.torch, kinds=(p.kinds[1], p.kinds[0]), step=0, steps=1)
        for p in sorted(back, key=lambda pair: pair.step)
    ]
    found = {(pair.torch, pair.flax): pair for pair in there}
    found |= {(pair.torch, pair.flax): pair for pair in turned if (pair.torch, pair.flax) not in found}
    order = {path: i for i, path in enumerate(theirs)}
    return tuple(_with_leaf(sorted(found.values(), key=lambda pair: order[pair.torch]), "/"))


def _add_pairs(
    found: dict[tuple[str, str], ModulePair],
    theirs: _ModuleGroups,
    ours: _ModuleGroups,
    rows: Sequence[Entry],
    torch: Mapping[str, Module],
    flax: Mapping[str, Module],
    dot: str,
) -> None:
    """Add the pairs of modules with the same entries."""
    for atoms, paths in theirs.groups.items():
        there, steps = ours.groups.get(atoms), 1
        if there is None:  # one step of a stack
            whole = frozenset((entry, -1) for entry, _ in atoms)
            there = ours.groups.get(whole) if len({step for _, step in atoms} - {-1}) == 1 else None
            steps = max(_stacked(rows[entry]) for entry, _ in atoms)
        if not there:
            continue
        step = max(0, *(step for _, step in atoms))
        used = tuple(rows[entry] for entry in sorted({entry for entry, _ in atoms}))
        for one, other in _joined(paths, there, torch, flax, dot):
            if not (one and other):  # find_pairs adds the two models themselves
                continue
            kinds = (torch[one].kind, flax[other].kind)
            found[one, other] = ModulePair(one, other, used, True, step, steps, kinds)


def _settled(modules: Mapping[str, Module], names: set[str], aliases: Mapping[str, str]) -> dict[str, Module]:
    """The modules whose leaves the plan settles completely. For other modules the plan does not tell the layout of the
    weights, so the layout of the activations is unknown."""
    return {
        path: module
        for path, module in modules.items()
        if all(name in names or aliases.get(name, name) in names for name in module.leaves.values())
    }


def _torch_side(
    rows: Sequence[Entry], modules: Mapping[str, Module], aliases: Mapping[str, str], own: bool = False
) -> _ModuleGroups:
    """Group the torch modules. own: without weights that are tied to those of a module outside."""
    where: dict[str, tuple[int, int]] = {}
    sizes: dict[tuple[int, int], int] = defaultdict(int)
    for i, entry in enumerate(rows):
        steps = _stacked(entry)
        for j, name in enumerate(entry.sources):
            step = j // (len(entry.sources) // steps) if steps > 1 else -1
            where[name] = i, step
            sizes[i, step] += 1
    tied = {i for i, entry in enumerate(rows) if any(isinstance(op, Same) for op in entry.ops)}
    side = _ModuleGroups()
    for path, module in modules.items():
        names = {aliases.get(name, name) if name not in where else name for name in module.leaves.values()}
        if own:
            names &= set(module.leaves.values())
        held: dict[tuple[int, int], int] = defaultdict(int)
        for name in names & where.keys():
            held[where[name]] += 1
        if own:
            held = {atom: count for atom, count in held.items() if sizes[atom] == count or atom[0] not in tied}
        if held and all(sizes[atom] == count or atom[0] in tied for atom, count in held.items()):
            side.groups[_folded(frozenset(held), rows)].append(path)
    return side


def _folded(atoms: Atoms, rows: Sequence[Entry]) -> Atoms:
    """Replace all steps of an entry by the whole entry."""
    by_entry: dict[int, set[int]] = defaultdict(set)
    for entry, step in atoms:
        by_entry[entry].add(step)
    out: set[tuple[int, int]] = set()
    for entry, steps in by_entry.items():
        whole = len(steps) == _stacked(rows[entry])
        out |= {(entry, -1)} if whole else {(entry, step) for step in steps}
    return frozenset(out)


def _flax_side(rows: Sequence[Entry], modules: Mapping[str, Module], aliases: Mapping[str, str]) -> _ModuleGroups:
    where = {name: i for i, entry in enumerate(rows) for name in entry.targets}
    copied = {i for i, entry in enumerate(rows) if any(isinstance(op, Copy) for op in entry.ops)}
    side = _ModuleGroups()
    of_cells = _cell_leaves(modules)
    for path, module in modules.items():
        owned = of_cells.get(path) or set(module.leaves.values())
        names = {aliases.get(name, name) if name not in where else name for name in owned}
        held: dict[int, int] = defaultdict(int)
        for name in names & where.keys():
            held[where[name]] += 1
        if held and all(len(rows[i].targets) == count or i in copied for i, count in held.items()):
            side.groups[frozenset((i, -1) for i in held)].append(path)
    return side


def _cell_leaves(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """The leaves of Linen loops whose cell was made beside them. The cell is the next one that runs after the loop
    starts.

    A Bidirectional takes the leaves of its two loops.
    """
    out: dict[str, set[str]] = {}
    waiting: list[tuple[str, int]] = []
    for path, module in modules.items():
        loops = next((n for base, n in WRAPPERS.items() if base in module.bases), 0)
        if loops and not module.leaves:
            waiting.append((path, loops))
            out[path] = set()
        elif waiting and CELLS & set(module.bases):
            for i in range(len(waiting)):
                holder, left = waiting[i]
                out[holder] |= set(module.leaves.values())
                waiting[i] = holder, left - 1
            waiting = [(holder, left) for holder, left in waiting if left > 0]
    return {path: leaves for path, leaves in out.items() if leaves}


def _stacked(entry: Entry) -> int:
    """How many torch modules an entry stacks along the axis of a loop: the count of its outermost Stack."""
    counts = [op.count for op in entry.ops if isinstance(op, Stack)]
    return counts[-1] if counts and counts[-1] > 1 and len(entry.sources) % counts[-1] == 0 else 1


def _joined(
    ones: Sequence[str], others: Sequence[str], torch: Mapping[str, Module], flax: Mapping[str, Module], dot: str
) -> Iterable[tuple[str, str]]:
    """Pair modules with the same entries: nested modules by depth, several chains of them in order."""
    loops = [path for path in others if WRAPPERS.keys() & set(flax[path].bases)]
    if loops and any(RECURRENT & set(torch[path].bases) for path in ones):
        others = [path for path in others if path in loops or any(_below(loop, path, "/") for loop in loops)]
    elif loops:  # torch's own loop calls a cell, step by step: so does the Flax loop
        others = [path for path in others if path not in loops] or others
    left, right = _chains(ones, dot), _chains(others, "/")
    if len(left) == len(right):
        both = list(zip(left, right, strict=True))
    else:
        both = [(one, other) for one in left for other in right] if 1 in (len(left), len(right)) else []
    for one, other in both:
        yield from _by_depth(one, other)


def _chains(paths: Sequence[str], dot: str) -> list[list[str]]:
    """Group paths into chains, in which each path lies below the one before it."""
    out: list[list[str]] = []
    for path in sorted(paths, key=lambda p: p.count(dot) + bool(p)):
        chain = next((chain for chain in out if _below(path, chain[-1], dot)), None)
        if chain is None:
            out.append([path])
        else:
            chain.append(path)
    order = {path: i for i, path in enumerate(paths)}
    return sorted(out, key=lambda chain: order[chain[0]])


def _by_depth(one: Sequence[str], other: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Pair the innermost with the innermost, the outermost with the outermost."""
    yield one[-1], other[-1]
    rest = other[:-1]
    if len(one) > 1 and rest:
        yield from zip(one[:-1], rest, strict=False) if len(rest) <= len(one) - 1 else ((one[0], rest[0]),)


def _below(path: str, holder: str, dot: str = ".") -> bool:
    return path != holder and (not holder or path.startswith(holder + dot))


def _with_leaf(pairs: Sequence[ModulePair], dot: str) -> list[ModulePair]:
    paths = {pair.torch for pair in pairs}
    holders = {
        path[: i if i > 0 else 0] for path in paths if path for i in (0, *(j for j, c in enumerate(path) if c == dot))
    }
    return [replace(pair, leaf=pair.torch not in holders) for pair in pairs]


# ---------------------------------------------------------------- calls


@dataclass(frozen=True, slots=True)
class CallMap:
    """Maps each Flax call to a torch call, by the order of calls among all torch modules that are paired with one Flax
    module (tied heads, shared layers, the steps of a scan)."""

    pairs: Mapping[Site, ModulePair]
    sites: Mapping[Site, Site]
    """Flax site -> torch site; `pairs`: Flax site -> pair."""

    @classmethod
    def of(cls, pairs: Iterable[ModulePair], order: Sequence[Site]) -> CallMap:
        """order: the torch calls as they happened."""
        by_torch: dict[str, list[ModulePair]] = defaultdict(list)
        for pair in pairs:
            by_torch[pair.torch].append(pair)
        calls: dict[str, int] = defaultdict(int)
        chosen: dict[Site, ModulePair] = {}
        sites: dict[Site, Site] = {}
        for site in order:
            joined = by_torch.get(site.path)
            if not joined:
                continue
            # One torch module that is called several times may correspond to several Flax modules with copied weights.
            pair = joined[site.call] if len(joined) > 1 and site.call < len(joined) else joined[0]
            flax = Site(pair.flax, calls[pair.flax])
            calls[pair.flax] += 1
            chosen[flax], sites[flax] = pair, site
        return cls(chosen, sites)
