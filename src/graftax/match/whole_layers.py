"""What the layer table settles before names are read: a tree that is one layer, and layers whose leaves have no
one-to-one reading (weight and spectral norm) if only one pairing is possible or the names are equal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graftax.errors import Failure, LayoutError, escape
from graftax.layers import Connection, Part, connect, known_kind
from graftax.layers import settled as settled_connection
from graftax.match.choose import says_transposed
from graftax.match.kinds import OF_TWO
from graftax.match.names import concepts, lexicon
from graftax.match.recurrent import unruled
from graftax.match.unlike import unlike
from graftax.ops import invert_chain
from graftax.plans import PARITY, Assumption, Entry, Proposal, Question
from graftax.tree import Checkpoint, Module, Side, split_path, whole_words

ONE_LAYER = 64
"""A tree of at most this many leaves may be one layer (a bidirectional LSTM of four layers has 32)."""
BARE = "Bare parameter"

_REPARAMETRISED = re.compile(
    r"(?:weight|bias)_(?:g|v|orig|u)|parametrizations[./]weight[./](?:original[01]?|0[./]_[uv])"
)


@dataclass(frozen=True, slots=True)
class Owner:
    """A module whose leaves go together: `roles` below `path`."""

    path: str
    roles: Mapping[str, str]
    module: Module | None


def by_table(source: Checkpoint, like: Checkpoint, source_side: Side, like_side: Side, settled: Proposal) -> Proposal:
    """Entries source -> like for what the layer table settles; a refusal of the table is a failure that holds its keys.

    `settled`: what rules have decided; its keys are left alone. Nothing is proposed if both ends are of one side.
    """
    if source_side == like_side:
        return Proposal()
    turned = source_side == "flax"
    torch, flax = (like, source) if turned else (source, like)
    known = (*settled.entries, *settled.broken)
    taken = {name for entry in known for name in (*entry.sources, *entry.targets)}
    free_torch = [name for name in torch if name not in taken]
    free_flax = [name for name in flax if name not in taken]
    if not taken and 0 < len(torch) <= ONE_LAYER and 0 < len(flax) <= ONE_LAYER:
        whole, whole_flax = _whole(torch, "torch"), _whole(flax, "flax")
        named = _words(whole.path, "torch"), _words(whole_flax.path, "flax")
        found = _settled(whole, whole_flax, torch, flax) if named[0] == named[1] or not all(named) else None
        if isinstance(found, Failure):
            return _refused(found, whole, whole_flax, turned)
        if found is not None and not _open_layout(found, whole, whole_flax, torch, flax):
            return _proposal([found], turned)
    found = _composites(torch, flax, free_torch, free_flax, known, turned)
    spoken = {n for e in (*found.entries, *found.broken) for n in (*e.sources, *e.targets)}
    left_torch, left_flax = ([n for n in names if n not in spoken] for names in (free_torch, free_flax))
    return found.joined(_lone_biases(torch, flax, left_torch, left_flax, turned))


def _open_layout(found: Connection, torch: Owner, flax: Owner, torch_end: Checkpoint, flax_end: Checkpoint) -> bool:
    """True if another reading of the one layer fits too, so that a question must decide: a square convolution whose
    name says that it may be transposed, a norm over a map (which may be the matrix of an unknown class), the window of
    a convolution as a matrix, or fused rows that are split into heads."""
    shapes = [torch_end[name].shape for name in torch.roles.values()]
    others = [flax_end[name].shape for name in flax.roles.values()]
    words = [*_words(torch.path, "torch")], [*_words(flax.path, "flax")]
    fused = {"qkv", "kv"} & {concept for side in words for concept in concepts(side, lexicon())}
    if fused and any(len(flax_end[name].shape) > 2 for name in flax.roles.values()):
        return True  # rows lie part by part or head by head, and no kind of module shows which
    if found.by == "modules":
        return False
    if any(len(shape) == 3 for shape in shapes) and any(not OF_TWO.isdisjoint(side) for side in words):
        return True
    if _may_be_transposed(torch, flax, torch_end):
        return True
    matrix, window = sorted((max(some, key=len) for some in (shapes, others)), key=len)
    if len(matrix) == 2 and len(window) > 3 and {window[0], window[-1]} & set(matrix):
        return True  # the columns of the matrix may run over (c h w) or over (h w c)
    norms = [name for role, name in flax.roles.items() if {"scale", "weight"} & whole_words(role.rpartition("/")[2])]
    return any(len(flax_end[name].shape) > 1 for name in norms)


def _may_be_transposed(torch: Owner, flax: Owner, torch_end: Checkpoint) -> bool:
    """True for a square convolution if a name says that it may be a transposed one."""
    shapes = [torch_end[name].shape for name in torch.roles.values()]
    words = _words(torch.path, "torch"), _words(flax.path, "flax")
    return any(len(shape) > 2 and shape[0] == shape[1] for shape in shapes) and any(
        says_transposed([word for word in side if not word.isdigit()]) for side in words
    )


# ---------------------------------------------------------------- owners


def _whole(end: Checkpoint, side: Side) -> Owner:
    """The whole tree as one module: the module that all its leaves lie below."""
    separator = "/" if side == "flax" else "."
    parts = [(_plain(name) if side == "flax" else name).split(separator)[:-1] for name in end]
    path: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1 or level[0] == "parametrizations":
            break
        path.append(level[0])
    for n in (*range(len(path), 0, -1), 0):  # the innermost module that the table knows, else the root
        at = separator.join(path[:n])
        module = end.live.modules.get(at)
        if module is not None and known_kind(module, side):
            return Owner(at, _below(end, at, side), module)
    at = separator.join(path)
    return Owner(at, _below(end, at, side), end.live.modules.get(at))


def _below(names: Iterable[str], prefix: str, side: Side) -> dict[str, str]:
    """role -> full path of the leaves below `prefix`; a Flax role has no collection"""
    out: dict[str, str] = {}
    for name in names:
        plain = _plain(name) if side == "flax" else name
        start = prefix + ("/" if side == "flax" else ".") if prefix else ""
        if plain.startswith(start):
            out[plain[len(start) :]] = name
    return out


def _plain(path: str) -> str:
    head, slash, rest = path.partition("/")
    return rest if slash and head in ("params", "batch_stats") else path


def _torch_owners(names: list[str], pattern: re.Pattern[str], torch: Checkpoint) -> list[Owner]:
    """Modules that hold a leaf whose role fits the pattern."""
    prefixes: dict[str, None] = {}
    last: dict[str, bool] = {}  # many tensors share few leaf names
    for name in names:
        head, _, leaf = name.rpartition(".")
        if leaf not in last:
            last[leaf] = bool(pattern.fullmatch(leaf))
        if last[leaf]:
            prefixes[head] = None
        if "parametrizations" not in head:
            continue
        parts = name.split(".")
        for cut in (3, 4):  # parametrizations.weight.original0; parametrizations.weight.0._u
            if len(parts) >= cut and pattern.fullmatch(".".join(parts[-cut:])):
                prefixes[".".join(parts[:-cut])] = None
    return [Owner(p, _below(names, p, "torch"), torch.live.modules.get(p)) for p in prefixes]


def _ancestors(path: str) -> list[str]:
    """The path and everything above it, the root last."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:n]) for n in range(len(parts), -1, -1)]


# ---------------------------------------------------------------- composites


def _composites(
    torch: Checkpoint,
    flax: Checkpoint,
    free_torch: list[str],
    free_flax: list[str],
    ruled: Iterable[Entry],
    turned: bool,
) -> Proposal:
    """Reparametrised layers with the leaves below some Flax module. A pair is taken if it is the only one on both
    sides, or the only one with equal names. If rules have settled a part of a layer (`ruled`) as the table pairs it,
    the rest of the layer is taken."""
    if len(free_torch) < len(torch):
        free_torch, free_flax = _with_siblings(free_torch, torch, "torch"), _with_siblings(free_flax, flax, "flax")
    owners = _torch_owners(free_torch, _REPARAMETRISED, torch)
    if not owners:
        return Proposal()
    groups: dict[tuple[str, ...], Owner] = {}
    for top in dict.fromkeys(a for path in _scaled(free_flax) for a in _ancestors(path)):
        owner = Owner(top, _below(free_flax, top, "flax"), flax.live.modules.get(top))
        groups.setdefault(tuple(owner.roles.values()), owner)
    kept = _normed_layers(free_flax, flax)
    folded = _plain_layers(free_flax, flax, kept)
    for owner in (*kept, *folded):
        groups.setdefault(tuple(owner.roles.values()), owner)
    may_fold = set(map(id, folded))  # that a norm cannot be folded into one of many layers refuses nothing
    fits: list[tuple[Owner, Owner, Connection]] = []
    refusals: list[tuple[Failure, Owner, Owner]] = []
    for owner in owners:
        for group in groups.values():
            found = _settled(owner, group, torch, flax) if group.roles else None
            if isinstance(found, Failure):
                refusals += [(found, owner, group)] if id(group) not in may_fold else []
            elif found is not None:
                fits.append((owner, group, found))
    taken = _pairs(fits)
    rest: list[Connection | None] = []
    open_ = Proposal()
    for owner, group, connection in taken:
        if connection.by != "modules" and _may_be_transposed(owner, group, torch):
            open_ = open_.joined(_refused(_either_convolution(torch.label, owner.path), owner, group, turned))
        else:
            rest.append(unruled(connection, ruled))
    proposal = _proposal([connection for connection in rest if connection is not None], turned).joined(open_)
    if not fits and len(owners) == 1 and refusals:
        refused = _refused(*refusals[0], turned)
        return Proposal(proposal.entries, (), proposal.assumptions, refused.failures, (), refused.broken)
    return proposal


def _either_convolution(label: str, path: str) -> Failure:
    return Failure(
        "a normed square kernel may be a convolution's or a transposed one's, and only a live module shows which",
        label,
        path,
        next="Give the torch module itself, or fold the norm into its weight first.",
    )


def _with_siblings(free: list[str], end: Checkpoint, side: Side) -> list[str]:
    """The free leaves, and the settled leaves of modules (or cells) that have free ones, in the order of the end."""
    if len(free) == len(end):
        return free
    depth = 1 if side == "torch" else 2

    def home(name: str) -> str:
        return (name if side == "torch" else _plain(name)).rsplit("." if side == "torch" else "/", depth)[0]

    kept, homes = set(free), {home(name) for name in free}
    return [name for name in end if name in kept or home(name) in homes]


def _scaled(names: list[str]) -> list[str]:
    """Modules above Flax's weight-norm scales and spectral-norm vectors."""
    out: list[str] = []
    for name in names:
        parts = _plain(name).split("/")
        if parts[-1].endswith(("~1kernel~1scale", "~1kernel~1u", "kernel~1u", "~1scale")) or "scales" in parts[:-1]:
            out.append("/".join(parts[:-2]))
    return out


def _normed_layers(names: list[str], flax: Checkpoint) -> list[Owner]:
    """Layers with the leaves that a wrapper beside them adds: `wn/conv~1kernel~1scale` belongs to the layer `conv`."""
    added: dict[str, dict[str, str]] = {}
    for name in names:
        wrapper, _, role = _plain(name).rpartition("/")
        layer, between, _ = role.partition("~1kernel~1")
        if between:
            parent = wrapper.rpartition("/")[0]
            added.setdefault(f"{parent}/{layer}" if parent else layer, {})[role] = name
    out: list[Owner] = []
    for path, roles in added.items():
        below = _below(names, path, "flax")
        if below:
            out.append(Owner(path, below | roles, flax.live.modules.get(path)))
    return out


def _plain_layers(names: list[str], flax: Checkpoint, normed: Iterable[Owner]) -> list[Owner]:
    """Modules into which a norm may be folded: a kernel and perhaps a bias lie right below them. Not the `normed` ones,
    nor what an NNX wrapper holds beside its scales."""
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        path, _, role = _plain(name).rpartition("/")
        layers.setdefault(path, {})[role] = name
    apart = {"", *(owner.path for owner in normed)}
    wrappers = tuple(path.removesuffix("scales") for path in layers if path.endswith("/scales"))
    return [
        Owner(path, roles, flax.live.modules.get(path))
        for path, roles in layers.items()
        if "kernel" in roles and roles.keys() <= {"kernel", "bias"}
        if path not in apart and not path.startswith(wrappers)
    ]


def _pairs(fits: list[tuple[Owner, Owner, Connection]]) -> list[tuple[Owner, Owner, Connection]]:
    """Pairs with equal names first, then pairs that are the only one on both sides and whose names do not conflict;
    each leaf is used once."""
    out: list[tuple[Owner, Owner, Connection]] = []
    rest = list(fits)
    for rule in (_same_names, None):
        while True:
            open_ = [f for f in rest if rule is None or rule(f[0], f[1])]
            alone = [
                f
                for f in open_
                if sum(g[0] is f[0] for g in open_) == 1 and not any(g[0] is not f[0] and _share(g, f) for g in open_)
            ]
            if rule is None:
                alone = [f for f in alone if not unlike(f[0].path, f[1].path, lexicon())]
            if not alone:
                break
            out.append(alone[0])
            rest = [g for g in rest if g[0] is not alone[0][0] and not _share(g, alone[0])]
    return out


def _share(a: tuple[Owner, Owner, Connection], b: tuple[Owner, Owner, Connection]) -> bool:
    return bool(set(a[1].roles.values()) & set(b[1].roles.values()))


def _same_names(torch: Owner, flax: Owner) -> bool:
    return _words(torch.path, "torch") == _words(flax.path, "flax")


def _words(path: str, side: Side) -> list[str]:
    return [w for part in split_path(path, side) for w in re.findall(r"[a-z]+|\d+", part.lower())]


# ---------------------------------------------------------------- a bias on one side only


def _lone_biases(
    torch: Checkpoint, flax: Checkpoint, free_torch: list[str], free_flax: list[str], turned: bool
) -> Proposal:
    """Modules whose names are equal word for word, if one side has a bias and the other has none. The rest of the
    module is settled, and the bias is asked about (missing or unused) without a candidate, because nothing else may
    fill it."""
    lone = _with_bias(free_torch, "torch") ^ _with_bias(free_flax, "flax")
    if not lone:
        return Proposal()
    mine, theirs = _modules(free_torch, "torch"), _modules(free_flax, "flax")
    found: list[Connection] = []
    questions: list[Question] = []
    for words, (path, roles) in mine.items():
        other = theirs.get(words) if words in lone else None
        if other is None or ("bias" in roles) == ("bias" in other[1]):
            continue
        owners = (
            Owner(path, roles, torch.live.modules.get(path)),
            Owner(other[0], other[1], flax.live.modules.get(other[0])),
        )
        connection = _settled(*owners, torch, flax, partial=True)
        if not isinstance(connection, Connection) or connection.left != ("bias",) or connection.by == "shapes":
            continue
        square = any(torch[n].shape == torch[n].shape[::-1] and len(torch[n].shape) > 1 for n in roles.values())
        if square and connection.by != "modules":
            continue  # its siblings may show that this checkpoint stores (in, out)
        found.append(connection)
        on_torch = "bias" in roles
        name = roles["bias"] if on_torch else other[1]["bias"]
        if on_torch != turned:
            text = f"unexpected key: {name}: its module has no bias on the other side"
            questions.append(Question("unused", text, sources=(name,)))
        else:
            text = f"missing key: {name}: its module has no bias on the other side"
            questions.append(Question("missing", text, targets=(name,)))
    made = _proposal(found, turned)
    held = tuple(Entry(question.sources, question.targets) for question in questions)
    return Proposal(made.entries, tuple(questions), made.assumptions, broken=held)


def _with_bias(names: list[str], side: Side) -> set[tuple[str, ...]]:
    """The words of the modules that have a bias."""
    paths = [_plain(name) if side == "flax" else name for name in names if name.endswith("bias")]
    return {tuple(_words(path[:-5], side)) for path in paths if path[:-4].endswith((".", "/"))}


def _modules(names: list[str], side: Side) -> dict[tuple[str, ...], tuple[str, dict[str, str]]]:
    """words of a module's path -> (path, role -> leaf), for modules whose leaves lie right below them. Words that two
    modules share are left out."""
    separator = "/" if side == "flax" else "."
    by_path: dict[str, dict[str, str]] = {}
    for name in names:
        path, _, role = (_plain(name) if side == "flax" else name).rpartition(separator)
        by_path.setdefault(path, {})[role] = name
    out: dict[tuple[str, ...], tuple[str, dict[str, str]]] = {}
    twice: set[tuple[str, ...]] = set()
    for path, roles in by_path.items():
        words = tuple(_words(path, side))
        if words in out:
            twice.add(words)
        out[words] = (path, roles)
    return {words: module for words, module in out.items() if words not in twice}


# ---------------------------------------------------------------- connections


def _settled(
    torch: Owner, flax: Owner, torch_end: Checkpoint, flax_end: Checkpoint, partial: bool = False
) -> Connection | Failure | None:
    """The only connection of the two that has evidence; a Failure if the table refuses; None if neither."""
    live = _kind_of(flax, flax_end)
    parts = (
        Part(torch.path, "torch", torch.roles, torch_end.specs, torch.module),
        Part(flax.path, "flax", flax.roles, flax_end.specs, live),
    )
    try:
        found = connect(*parts, partial=partial)
    except LayoutError as error:
        return error.failures[0] if error.failures else Failure(str(error), key=torch.path)
    best = settled_connection(found)
    # A bare parameter is no layer, so the table does not judge its name.
    return None if best is None or best.layer == BARE else best


def _kind_of(owner: Owner, end: Checkpoint) -> Module | None:
    """The live module that shows the owner's kind: its own, or one inside it if only one kind there is known."""
    if owner.module is not None and known_kind(owner.module, "flax"):
        return owner.module
    paths = set(owner.roles.values())
    inside = [m for m in end.live.modules.values() if m.leaves and paths.issuperset(m.leaves.values())]
    known = [m for m in inside if known_kind(m, "flax")]
    outer = [m for m in known if not any(m is not n and set(m.leaves.values()) < set(n.leaves.values()) for n in known)]
    kinds = {known_kind(m, "flax") for m in outer}
    covered = {path for m in outer for path in m.leaves.values()}
    alone = len(outer) == 1 or all(kind.endswith("Cell") for kind in kinds)
    return outer[0] if alone and len(kinds) == 1 and covered == paths else None


def _proposal(found: Iterable[Connection], turned: bool) -> Proposal:
    entries: list[Entry] = []
    assumptions: list[Assumption] = []
    for connection in found:
        why = (f"the layer table connects them as {connection.layer}", *connection.evidence)
        for entry in connection.entries:
            made = Entry(entry.sources, entry.targets, entry.ops, why)
            entries.append(Entry(made.targets, made.sources, invert_chain(made.ops), made.evidence) if turned else made)
        names = tuple(name for entry in connection.entries for name in (entry.sources if turned else entry.targets))
        assumptions += [Assumption(text, PARITY, names) for text in connection.assumes]
    return Proposal(tuple(entries), (), tuple(assumptions))


def _refused(failure: Failure, torch: Owner, flax: Owner, turned: bool) -> Proposal:
    """A refusal; nothing else is asked about the two."""
    ends = (tuple(flax.roles.values()), tuple(torch.roles.values()))
    sources, targets = ends if turned else ends[::-1]
    shown = Failure(failure.what, failure.file, escape(failure.key), failure.expected, failure.found, failure.next)
    return Proposal(failures=(shown,), broken=(Entry(sources, targets),))
