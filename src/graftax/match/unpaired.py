"""Leaves that nothing has paired although the other side has an unpaired leaf of their shape: open, whatever the
policies for missing and unused leaves say. A question a column, its candidates the columns of the other side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from graftax.errors import GraftaxError
from graftax.layers import leaf_connections
from graftax.match.words import BUFFERS
from graftax.plan_text import fold_names
from graftax.plans import Candidate, Proposal, Question
from graftax.rules import escape_key, rule_line
from graftax.tree import Checkpoint, Side, TensorSpec

_NUMBER = re.compile(r"\d+")
_MOST = 6  # candidates of one column

Shape = tuple[int, ...]


def unpaired(proposal: Proposal, source: Checkpoint, like: Checkpoint, source_side: Side, like_side: Side) -> Proposal:
    """The proposal with a question, with candidates, for every leaf of like that no source fills, whose module has no
    leaf that one fills, and whose shape (transposed, or with an axis of stacking) some source tensor has that goes
    nowhere. Such leaves are neither missing nor unused: they wait for an answer."""
    spoken = (*proposal.entries, *proposal.broken)
    used, filled = {n for e in spoken for n in e.sources}, {n for e in spoken for n in e.targets}
    asked = {n for q in proposal.questions if q.candidates for n in q.targets}
    offered = {n for q in proposal.questions if q.candidates for n in q.sources}
    homes = {_module(n, like_side) for n in filled}
    starts = {_module(n, source_side) for n in used}
    targets = [n for n in like if n not in filled and n not in asked and _module(n, like_side) not in homes]
    free = [n for n in source if n not in used and _module(n, source_side) not in starts]
    free = [n for n in free if re.split(r"[./]", n)[-1] not in BUFFERS]
    columns = _columns(free, {n: source[n].shape for n in free})
    questions: list[Question] = []
    for names in _columns(targets, {n: like[n].shape for n in targets}):
        shape = like[names[0]].shape
        if not _varied(shape):
            continue
        words = (source_side, like_side) if source_side != like_side else ("source", "target")
        lines = {
            tuple(column): line
            for column in columns
            if not offered.issuperset(column)
            and (line := _line(column, names, words, source[column[0]], like[names[0]])) is not None
        }
        if not lines:
            continue
        candidates = tuple(Candidate(line, column, "fits by shape") for column, line in lines.items())[:_MOST]
        text = (
            f"{', '.join(fold_names(names))}: not paired by names, and unpaired tensors of the source have its shape; "
            "say which it is, or that it is missing"
        )
        questions.append(Question("match", text, tuple(names), tuple(n for c in lines for n in c), candidates))
    covered = {n for q in questions for n in q.targets}
    kept = [q for q in proposal.questions if q.candidates or not q.targets or not covered.issuperset(q.targets)]
    return Proposal(
        proposal.entries,
        (*kept, *questions),
        proposal.assumptions,
        proposal.failures,
        proposal.reads,
        proposal.broken,
    )


def _module(path: str, side: Side) -> str:
    """The path of the module that holds a leaf, its collection aside."""
    if side == "torch":
        return path.rpartition(".")[0]
    head, _, rest = path.partition("/")
    plain = rest if head in ("params", "batch_stats") else path
    return plain.rpartition("/")[0]


def _varied(shape: Shape) -> bool:
    """More than one value: scalars say nothing by their shape."""
    return any(extent > 1 for extent in shape)


def _line(
    sources: list[str], targets: list[str], words: tuple[str, str], mine: TensorSpec, theirs: TensorSpec
) -> str | None:
    """A rule line that works for the two columns: side by side, or the sources stacked into one; None for neither."""
    if _joins(sources[0], mine, targets[0], theirs, words):
        (template, counts), (other, theirs_counts) = _template(sources), _template(targets)
        if template and other and counts == theirs_counts:
            return rule_line(**{words[0]: template, words[1]: other})
        return rule_line(**{words[0]: escape_key(sources[0]), words[1]: escape_key(targets[0])})
    if len(sources) > 1 and len(targets) == 1 and theirs.shape[:1] == (len(sources),):
        one = TensorSpec(theirs.shape[1:], theirs.dtype)
        template, _ = _template(sources)
        if template and _joins(sources[0], mine, targets[0], one, words):
            return rule_line(**{words[0]: template, words[1]: escape_key(targets[0]), "stack": {"i": 0}})
    return None


def _joins(source: str, mine: TensorSpec, target: str, theirs: TensorSpec, words: tuple[str, str]) -> bool:
    """Can the layer table carry one leaf into the other?"""
    if words == ("source", "target"):
        return mine.shape == theirs.shape
    ends = {words[0]: (source, mine), words[1]: (target, theirs)}
    (torch, torch_spec), (flax, flax_spec) = ends["torch"], ends["flax"]
    try:
        return bool(leaf_connections(torch.rpartition(".")[2], torch_spec, flax.rpartition("/")[2], flax_spec))
    except GraftaxError:
        return False


def _columns(names: Iterable[str], shapes: Mapping[str, Shape]) -> list[list[str]]:
    """Names alike but for their numbers, and of one shape, in order."""
    out: dict[tuple[str, Shape], list[str]] = {}
    for name in names:
        out.setdefault((_NUMBER.sub("\0", name), shapes[name]), []).append(name)
    return list(out.values())


def _template(names: list[str]) -> tuple[str, list[str]]:
    """`layers.{i}.w` and the values of i, for names in which exactly one number varies; else ""."""
    rows = [_NUMBER.findall(name) for name in names]
    varying = [place for place in range(len(rows[0])) if len({row[place] for row in rows}) > 1]
    if len(varying) != 1:
        return "", []
    pieces = [escape_key(piece) for piece in _NUMBER.split(names[0])]
    out = pieces[0]
    for place, piece in enumerate(pieces[1:]):
        out += ("{i}" if place == varying[0] else rows[0][place]) + piece
    return out, sorted(row[varying[0]] for row in rows)
