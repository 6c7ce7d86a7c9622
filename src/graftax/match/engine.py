"""Match two sides: the best view of both, then the modules of each scope, then the readings of their leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from graftax.match.bare_rules import Unsaid
from graftax.match.blocks import Doubt, name_ties
from graftax.match.calls import torch_calls
from graftax.match.choose import Habits, choose, trapped
from graftax.match.flatten import Suspect, suspects
from graftax.match.idioms import has_experts
from graftax.match.match_inputs import Ends
from graftax.match.names import Lexicon
from graftax.match.orders import call_order, path_of
from graftax.match.pairs import Pair, Scope
from graftax.match.part_order import in_said_order
from graftax.match.partial import as_ruled
from graftax.match.scope_names import wrapper_words
from graftax.match.settle import Settled, crossed, settle_apart, settle_kinds, take_groups, take_rest
from graftax.match.stack_axes import stack_axes
from graftax.match.traced import Traces, by_trace, shown
from graftax.match.views import Views


@dataclass(slots=True, eq=False)
class Result:
    """All scopes, settled, and what they leave open."""

    settled: list[Settled]
    call_order: list[Pair] = field(default_factory=list[Pair])
    unsaid: list[Unsaid] = field(default_factory=list[Unsaid])
    habits: Habits = field(default_factory=Habits)
    traps: Mapping[int, Suspect] = field(default_factory=dict[int, Suspect])
    doubts: list[Doubt] = field(default_factory=list["Doubt"])


def match(ends: Ends, lex: Lexicon) -> Result:
    """Everything that names and shapes decide."""
    result = _match(ends, lex)
    renames = _torch_calls(result, ends)
    return result if renames is None else _match(replace(ends, renames=renames), lex)


def _torch_calls(result: Result, ends: Ends) -> Mapping[str, str] | None:
    """Other names for torch leaves. They are needed if numbers on both sides stand for calls, the Flax calls are
    traced, and torch's trace shows that torch's numbers are not in that order."""
    traced = [pair for pair in result.call_order if ends.calls.counts(path_of(pair.flax))]
    order = ends.traces.torch.order if traced and ends.kinds.ends is not None else {}
    if not order or ends.kinds.ends is None:
        return None
    calls = torch_calls(ends.kinds.ends[0], order)
    return calls.renames if any(path_of(pair.torch) in calls.renames for pair in traced) else None


def _match(ends: Ends, lex: Lexicon) -> Result:
    same = ends.torch_side == ends.flax_side
    found = Views(ends, lex).best()
    name_ties(found.torch, ends)
    all_t = [m for family in found.torch for m in family.modules]
    all_f = [m for family in found.flax for m in family.modules]
    wrappers = wrapper_words(all_t, all_f, lex) | wrapper_words(all_f, all_t, lex)
    experts = (has_experts(all_t, lex), has_experts(all_f, lex))
    root = found.scopes[0]
    result = Result([], doubts=found.doubts)
    habits = result.habits
    habits.stacked = ends.traces.stacked
    for scope in found.scopes:
        scope.wrappers, scope.experts = wrappers, experts
    ends = replace(ends, crossed=crossed(found.scopes, ends))
    for scope in found.scopes:
        result.settled += settle_kinds(scope, ends)
    apart = settle_apart(result.settled, root, ends)
    if apart is not None:
        result.settled.append(apart)
    for item in result.settled:
        habits.learn(item.scope, item.taken)
        stack_axes(item.scope, item.taken, habits)
        take_groups(item, ends, habits)
        if rest := take_rest(item):
            habits.learn(item.scope, rest)
            stack_axes(item.scope, item.taken, habits)
    traps = result.traps = {} if same else _traps(result.settled, root, lex, ends.traces if habits.convs else None)
    for item in result.settled:
        for pair in item.taken:
            for link in pair.links:
                choice = choose(link, pair, item.scope, habits)
                choice = as_ruled(link, choice, ends.ruled) if ends.ruled else choice
                trap = traps.get(id(pair.torch))
                if trap is not None:
                    choice = by_trace(link, item.scope, trapped(link, choice, trap), ends.traces)
                item.choices[id(link)] = in_said_order(choice, pair)
            if call_order(pair, item.scope):
                result.call_order.append(pair)
                if ends.calls.counts(path_of(pair.flax)):
                    pair.why += "; the calls are traced"
    result.unsaid += _unsaid(result.settled, ends, traps)
    return result


def _unsaid(settled: list[Settled], ends: Ends, traps: Mapping[int, Suspect]) -> list[Unsaid]:
    """Leaves that rules only name, that have no link, and whose values may be a flattened map."""
    linked = {id(link.torch) for item in settled for pair in item.taken for link in pair.links}
    out: list[Unsaid] = []
    for module in {id(m): m for item in settled for m in item.scope.torch}.values() if ends.named else ():
        trap = traps.get(id(module))
        if trap is None:
            continue
        for column in module.roles.values():
            ranks = {len(shape) for shape in column.shapes.values()}
            if id(column) in linked or not ((ranks == {2} and not trap.norm) or (ranks == {1} and trap.vector)):
                continue
            found = {id(said): said for paths in column.paths.values() for p in paths if (said := ends.named.get(p))}
            out += [Unsaid(said, trap, ranks == {2}) for said in found.values()]
    return out


def _traps(settled: list[Settled], root: Scope, lex: Lexicon, traces: Traces | None) -> Mapping[int, Suspect]:
    """The modules that may take a flattened map, or make one; and those for which torch's trace shows it."""
    outside = {id(module) for module in root.torch}
    inner = {id(m): m for item in settled for m in item.scope.torch if id(m) not in outside}
    tables = frozenset(
        id(pair.torch)
        for item in settled
        for pair in item.taken
        if any(link.flax.kind == "embedding" for link in pair.links)
    )
    live = traces is not None and (traces.torch_trace is not None or traces.flax_trace is not None)
    found = suspects(root.torch, inner.values(), lex, tables, live)
    if traces is None or traces.torch_trace is None:
        return found
    return {**found, **shown(traces.torch, (*root.torch, *inner.values()))}
