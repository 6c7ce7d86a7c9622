"""What the layer table settles before names are read: a tree that is one layer, and layers whose leaves have no
one-to-one reading (weight and spectral norm) if only one pairing is possible or the names are equal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from graftax.errors import Failure
from graftax.layers import Part, known_kind
from graftax.match.choose import says_transposed
from graftax.match.kinds import OF_TWO
from graftax.match.names import concepts, lexicon
from graftax.match.units import EQUAL, Fit, assigned, connected, fits_of, plain, proposal, refused, torch_layers
from graftax.plans import Entry, Proposal
from graftax.tree import Checkpoint, Module, Side, split_path, whole_words

ONE_LAYER = 64
"""A tree of at most this many leaves may be one layer (a bidirectional LSTM of four layers has 32)."""
_REPARAMETRISED = re.compile(
    r"(?:weight|bias)_(?:g|v|orig|u)|parametrizations[./]weight[./](?:original[01]?|0[./]_[uv])"
)


def by_table(source: Checkpoint, like: Checkpoint, source_side: Side, like_side: Side, settled: Proposal) -> Proposal:
    """Entries source -> like for what the layer table settles; a refusal of the table is a failure that holds its keys.

    `settled`: what rules have decided; its keys are left alone. Nothing is proposed if both ends are of one side.
    """
    if source_side == like_side:
        return Proposal()
    turned = source_side == "flax"
    torch, flax = (like, source) if turned else (source, like)
    known = (*settled.entries, *settled.broken)
    one = _one_layer(torch, flax, turned) if not known and 0 < max(len(torch), len(flax)) <= ONE_LAYER else None
    return one or _normed(torch, flax, known, turned)


# ---------------------------------------------------------------- a tree that is one layer


def _one_layer(torch_end: Checkpoint, flax_end: Checkpoint, turned: bool) -> Proposal | None:
    torch, flax = _whole(torch_end, "torch"), _whole(flax_end, "flax")
    named = _words(torch), _words(flax)
    if named[0] != named[1] and all(named):
        return None
    found = connected(torch, flax)
    if isinstance(found, Failure):
        return refused(found, torch, flax, turned)
    if found is None or (found.by != "modules" and _open_layout(torch, flax)) or _heads(torch, flax):
        return None
    return proposal([Fit(torch, flax, found)], turned)


def _heads(torch: Part, flax: Part) -> bool:
    """True if fused rows are split into heads: no kind of module shows whether they lie part by part or head by
    head."""
    fused = {"qkv", "kv"} & {concept for part in (torch, flax) for concept in concepts(_words(part), lexicon())}
    return bool(fused) and any(len(shape) > 2 for shape in flax.shapes().values())


def _open_layout(torch: Part, flax: Part) -> bool:
    """True if another reading of the one layer fits too, so that a question must decide: a square convolution whose
    name says that it may be transposed, a norm over a map (which may be the matrix of an unknown class), or the window
    of a convolution as a matrix."""
    shapes, others = torch.shapes(), flax.shapes()
    if any(len(shape) == 3 for shape in shapes.values()) and not OF_TWO.isdisjoint((*_words(torch), *_words(flax))):
        return True
    if _may_be_transposed(torch, flax):
        return True
    matrix, window = sorted((max(some.values(), key=len) for some in (shapes, others)), key=len)
    if len(matrix) == 2 and len(window) > 3 and {window[0], window[-1]} & set(matrix):
        return True  # the columns of the matrix may run over (c h w) or over (h w c)
    norms = [shape for role, shape in others.items() if {"scale", "weight"} & whole_words(role.rpartition("/")[2])]
    return any(len(shape) > 1 for shape in norms)


def _may_be_transposed(torch: Part, flax: Part) -> bool:
    """True for a square convolution if a name says that it may be a transposed one."""
    names = [[word for word in _words(part) if not word.isdigit()] for part in (torch, flax)]
    square = any(len(shape) > 2 and shape[0] == shape[1] for shape in torch.shapes().values())
    return square and any(map(says_transposed, names))


def _whole(end: Checkpoint, side: Side) -> Part:
    """The whole tree as one module: the module that all its leaves lie below."""
    separator = "/" if side == "flax" else "."
    names = {plain(name) if side == "flax" else name: name for name in end}
    path: list[str] = []
    for level in zip(*(name.split(separator)[:-1] for name in names), strict=False):
        if len(set(level)) > 1 or level[0] == "parametrizations":
            break
        path.append(level[0])
    # the innermost module that the table knows, else the root
    places = [separator.join(path[:n]) for n in (*range(len(path), 0, -1), 0)]
    at = next((at for at in places if known_kind(end.live.modules.get(at), side)), places[0])
    start = len(at) + 1 if at else 0
    return _unit(at, {name[start:]: leaf for name, leaf in names.items()}, end, side)


def _unit(path: str, leaves: dict[str, str], end: Checkpoint, side: Side) -> Part:
    module = end.live.modules.get(path)
    return Part(path, side, leaves, end.specs, _inner_kind(module, leaves, end) if side == "flax" else module)


def _inner_kind(module: Module | None, leaves: dict[str, str], end: Checkpoint) -> Module | None:
    """The live module that shows the kind of a Flax unit: its own, or one inside it if only one kind there is known."""
    if module is not None and known_kind(module, "flax"):
        return module
    paths = set(leaves.values())
    inside = [m for m in end.live.modules.values() if m.leaves and paths.issuperset(m.leaves.values())]
    known = [m for m in inside if known_kind(m, "flax")]
    outer = [m for m in known if not any(m is not n and set(m.leaves.values()) < set(n.leaves.values()) for n in known)]
    kinds = {known_kind(m, "flax") for m in outer}
    covered = {path for m in outer for path in m.leaves.values()}
    alone = len(outer) == 1 or all(kind.endswith("Cell") for kind in kinds)
    return outer[0] if alone and len(kinds) == 1 and covered == paths else None


def _words(part: Part) -> list[str]:
    return [w for piece in split_path(part.path, part.side) for w in re.findall(r"[a-z]+|\d+", piece.lower())]


# ---------------------------------------------------------------- reparametrised layers


def _normed(torch: Checkpoint, flax: Checkpoint, ruled: Sequence[Entry], turned: bool) -> Proposal:
    """Reparametrised layers with the layers of Flax that keep a norm, or into which it can be folded. A pair is taken
    if it is the only one on both sides, or the only one with equal names. If rules have settled a part of a layer
    (`ruled`) as the table pairs it, the rest of the layer is taken."""
    said = {name for entry in ruled for name in (*entry.sources, *entry.targets)}
    left = torch_layers(torch, _REPARAMETRISED.fullmatch, said)
    if not left:
        return Proposal()
    kept, folded = _flax_layers(flax)
    right = [part for part in (*kept, *folded) if not said.issuperset(part.leaves.values())]
    fits, refusals = fits_of(left, right, ruled, lexicon())
    out = Proposal()
    taken = assigned(replace(fit, alike=fit.alike if fit.alike >= EQUAL else min(fit.alike, 0.0)) for fit in fits)
    for fit in taken:
        if fit.connection.by != "modules" and _may_be_transposed(fit.torch, fit.flax):
            failure = _either_convolution(torch.label, fit.torch.path)
            out = out.joined(refused(failure, fit.torch, fit.flax, turned))
        else:
            out = out.joined(proposal([fit], turned))
    # that a norm cannot be folded into one of many layers refuses nothing
    some = (
        [one for one in refusals if not any(one[2] is part for part in folded)] if not fits and len(left) == 1 else []
    )
    return out.joined(refused(*some[0], turned)) if some else out


def _either_convolution(label: str, path: str) -> Failure:
    return Failure(
        "a normed square kernel may be a convolution's or a transposed one's, and only a live module shows which",
        label,
        path,
        next="Give the torch module itself, or fold the norm into its weight first.",
    )


def _flax_layers(end: Checkpoint) -> tuple[list[Part], list[Part]]:
    """(layers that keep a norm, plain layers into which one may be folded). In Linen the layer `conv` lies beside its
    wrapper: `wn/conv~1kernel~1scale`. In NNX it lies inside, beside its scales."""
    layers: dict[str, dict[str, str]] = {}
    for name in end:
        path, _, role = plain(name).rpartition("/")
        layers.setdefault(path, {})[role] = name
    kept: dict[str, dict[str, str]] = {}
    for path, roles in layers.items():
        for role, name in roles.items():
            layer, between, _ = role.partition("~1kernel~1")
            above = path.rpartition("/")[0]
            if between:
                at = f"{above}/{layer}" if above else layer
                kept.setdefault(at, dict(layers.get(at, {})))[role] = name
            elif (role.endswith(("kernel~1u", "~1scale")) or path.endswith("scales")) and above not in kept:
                start = len(above) + 1 if above else 0
                kept[above] = {plain(n)[start:]: n for n in end if not above or plain(n).startswith(f"{above}/")}
    held = {name for roles in kept.values() for name in roles.values()}
    folded = {
        path: roles
        for path, roles in layers.items()
        if path and "kernel" in roles and roles.keys() <= {"kernel", "bias"} and held.isdisjoint(roles.values())
    }
    made = [[_unit(path, roles, end, "flax") for path, roles in some.items()] for some in (kept, folded)]
    return made[0], made[1]
