"""Recurrent layers: the layer table connects torch's matrices of all gates with one or more Flax cells."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

from graftax.layers.base import Connection, Part
from graftax.match.flatten import CELL, Suspect, recurrent_inputs
from graftax.match.names import Lexicon
from graftax.match.units import assigned, fits_of, plain, proposal, question, refused, torch_layers
from graftax.plans import Candidate, Entry, Proposal, Question
from graftax.rules.text import rule_line
from graftax.tree import Checkpoint

_GATES = frozenset(
    ("ii", "if", "if_", "ig", "io", "hi", "hf", "hg", "ho", "ir", "iz", "in", "hr", "hz", "hn", "dense_i", "dense_h")
)
_COUNTED = re.compile(r"(.*?)_?(\d+)")
_MAP = "o (c p) -> (p c) o"
_INPUTS = re.compile(r"(?:.*\.)?weight_ih(?:_l0)?(?:_reverse)?")
"""The matrices that take a layer's inputs."""
_MOST = 16  # cells that one recurrent layer may have


def recurrent(torch: Checkpoint, flax: Checkpoint, ruled: Iterable[Entry], turned: bool, lex: Lexicon) -> Proposal:
    """Connect the recurrent layers of both sides. `ruled`: settled entries; `turned`: the torch end is like."""
    ruled = list(ruled)
    said = {name for entry in ruled for name in (*entry.sources, *entry.targets)}
    left = torch_layers(torch, lambda role: "_" in role and CELL.fullmatch(role), said, only=True)
    right = flax_cells(flax, said) if left else []
    if not right:
        return Proposal()
    fits, refusals = fits_of(left, right, ruled, lex)
    taken = assigned(fits)
    out = Proposal()
    for fit in taken:
        entries = fit.connection.entries
        maps = [(entry, map_) for entry in entries if (map_ := _map(entry, torch, lex)) is not None]
        waiting = [entry for entry, _ in maps]
        rest = tuple(entry for entry in entries if entry not in waiting)
        out = out.joined(proposal([replace(fit, connection=replace(fit.connection, entries=rest))], turned))
        if maps:
            out = out.joined(_flattened(waiting, maps[-1][1], turned))
    others = [path for part in right for path in part.leaves.values() if path not in said]
    others = [path for path in others if not any(path in fit.flax.leaves.values() for fit in taken)]
    for part in left:
        if any(fit.torch is part for fit in taken):
            continue
        some = [fit for fit in fits if fit.torch is part and not any(fit.meets(other) for other in taken)]
        for failure, _, other in [one for one in refusals if one[1] is part and not some][:1]:
            out = out.joined(refused(failure, part, other, turned))
        out = out.joined(question(part, some, others, _lines, turned))
    return out


def _map(entry: Entry, torch: Checkpoint, lex: Lexicon) -> Suspect | None:
    """The flattened map that may be the inputs of this matrix."""
    name = entry.sources[0]
    return recurrent_inputs(torch.specs, name, lex) if _INPUTS.fullmatch(name) else None


def _flattened(entries: Iterable[Entry], trap: Suspect, turned: bool) -> Proposal:
    """Ask how the inputs of a layer are flattened: the matrices of all directions take the same ones."""
    entries = list(entries)
    torch, flax = (tuple(n for e in entries for n in getattr(e, end)) for end in ("sources", "targets"))
    sources, targets = (flax, torch) if turned else (torch, flax)
    answers = {f"the inputs are a flattened map (C={c}, P)": {"ops": _MAP, "c": c} for c, _, _ in trap.maps()}
    answers["the layout is linear"] = {"layout": "linear"}
    found = [Candidate(_input_rules(entries, **how), sources, said) for said, how in answers.items()]
    text = (
        f"{', '.join(torch)}: the layer has {trap.channels} channels x {trap.positions} positions as inputs; if a "
        "flattened convolution map feeds it, their order may differ between the models"
    )
    asked = Question("flatten", text, targets, sources, tuple(found))
    return Proposal(questions=(asked,), broken=(Entry(sources, targets),))


def _input_rules(entries: Iterable[Entry], **how: Any) -> str:
    lines: list[str] = []
    for entry in entries:
        flax = list(entry.targets)
        several = {"fused": "block"} if len(flax) > 1 else {}
        lines.append(rule_line(torch=entry.sources[0], flax=flax if several else flax[0], **several, **how))
    return ", ".join(lines)


def _lines(connection: Connection) -> str:
    """The rule lines for the weights of the inputs; the rest of the layer follows from them."""
    inputs = [entry for entry in connection.entries if "weight_ih" in entry.sources[0].rpartition(".")[2]]
    return _input_rules(inputs, layout="linear")


# ---------------------------------------------------------------- units


def flax_cells(end: Checkpoint, said: Set[str]) -> list[Part]:
    """A unit for every cell, one for all numbered cells of one parent, and one for the cells of each module around
    them (the two directions of a layer), the innermost that holds them. Cells that rules settle are left out."""
    cells: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for path in end.specs:
        pieces = plain(path).split("/")
        if len(pieces) > 1 and pieces[-2] in _GATES:
            cells["/".join(pieces[:-2])]["/".join(pieces[-2:])] = path
    left = {p: leaves for p, leaves in cells.items() if len(leaves) > 1 and not set(leaves.values()) <= said}
    together: defaultdict[str, list[str]] = defaultdict(list)
    around: defaultdict[str, list[str]] = defaultdict(list)
    for path in left:
        parent, _, name = path.rpartition("/")
        if counted := _COUNTED.fullmatch(name):
            together[f"{parent}/{counted[1]}" if parent and counted[1] else parent or counted[1]].append(path)
        pieces = path.split("/")
        for n in range(len(pieces) - 1):
            around["/".join(pieces[:n])].append(path)
    out = [_unit(path, leaves, end) for path, leaves in left.items()]
    for mark, paths in together.items():
        if len(paths) > 1:
            out.append(replace(_unit(mark, _below(paths[0].rpartition("/")[0], paths, left), end), module=None))
    inner = {tuple(paths): path for path, paths in sorted(around.items()) if 1 < len(paths) <= _MOST}
    return out + [_unit(path, _below(path, paths, left), end) for paths, path in inner.items()]


def _below(path: str, members: Iterable[str], cells: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The leaves of cells, by their paths from a module around them."""
    start = len(path) + 1 if path else 0
    return {f"{member[start:]}/{role}": leaf for member in members for role, leaf in cells[member].items()}


def _unit(path: str, leaves: Mapping[str, str], end: Checkpoint) -> Part:
    return Part(path, "flax", leaves, end.specs, end.live.modules.get(path))
