"""Take pairs, repeatedly: one without a rival, a mutual best with a clear margin, a complete order. What is left
becomes a question.

A pair that a judgement bars still competes, so that it can make a choice unclear, but it is not taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from graftax.match.pairs import Pair
from graftax.match.sides import Module

MARGIN = 0.12
ENOUGH = 0.3
COUPLING = 0.2

Step = Callable[[list[Pair], list[Pair]], list[Pair]]


class Board:
    """The open pairs, by row (torch module) and by column (Flax module)."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self.rows: defaultdict[int, dict[int, Pair]] = defaultdict(dict)
        self.cols: defaultdict[int, dict[int, Pair]] = defaultdict(dict)
        for pair in pairs:
            self.rows[id(pair.torch)][id(pair.flax)] = pair
            self.cols[id(pair.flax)][id(pair.torch)] = pair

    def pairs(self) -> list[Pair]:
        return [pair for row in self.rows.values() for pair in row.values()]

    def take(self, pair: Pair) -> None:
        """Remove both modules of the pair."""
        self.drop([pair.torch], [pair.flax])

    def drop(self, torch: Iterable[Module], flax: Iterable[Module]) -> None:
        """Remove modules that are settled in another way."""
        for module in torch:
            for other in self.rows.pop(id(module), {}).values():
                self.cols[id(other.flax)].pop(id(module), None)
        for module in flax:
            for other in self.cols.pop(id(module), {}).values():
                self.rows[id(other.torch)].pop(id(module), None)

    def remove(self, pair: Pair) -> None:
        """Remove one pair; both modules stay open."""
        self.rows[id(pair.torch)].pop(id(pair.flax), None)
        self.cols[id(pair.flax)].pop(id(pair.torch), None)

    def rivals(self, pair: Pair) -> list[Pair]:
        """Every other open pair of its row and its column."""
        out = [other for other in self.rows[id(pair.torch)].values() if other is not pair]
        return out + [other for other in self.cols[id(pair.flax)].values() if other is not pair]


def assign(
    pairs: list[Pair], orders: Step, crossing: Step, inside: Step, forced: list[Pair], numbers: bool
) -> tuple[list[Pair], Board]:
    """(the pairs taken, what is left open). `orders`: (open pairs, taken pairs) -> pairs that an order settles;
    `crossing`: -> open pairs that do not compete, because each end is in a part that pairs with another one; `inside`:
    -> open pairs that what is taken lets judge anew; `forced`: pairs that rules have settled; `numbers`: a number that
    siblings share counts."""
    board = Board(pairs)
    taken: list[Pair] = list(forced)
    for pair in forced:
        board.take(pair)
    _couple(board, forced, numbers)
    while True:
        fresh = _alone(board) or _clear(board) or orders(board.pairs(), taken)
        for pair in fresh:
            board.take(pair)
        taken += fresh
        _couple(board, fresh, numbers)
        if not fresh:
            apart = crossing(board.pairs(), taken)
            for pair in apart:
                board.remove(pair)
            if not apart and not inside(board.pairs(), taken):
                return taken, board


def _clear(board: Board) -> list[Pair]:
    """Pairs that are mutual bests with a margin, by names."""
    out: list[Pair] = []
    for row in list(board.rows.values()):
        if not row:
            continue
        pair = max(row.values(), key=lambda p: p.total)
        rivals = board.rivals(pair)
        if pair.total < ENOUGH or not pair.open_to("contest" if rivals else "names"):
            continue
        if pair.found("unmatched word") and any(not r.forbidden and not r.found("unmatched word") for r in rivals):
            continue  # the word that only one name has may tell it from the module that lacks it
        if all(other.total <= pair.total - MARGIN for other in rivals):
            by_name = all(other.score <= pair.score - MARGIN for other in rivals)
            if by_name:
                pair.why = pair.says or "the names agree"
            else:
                pair.why = "a sibling is paired" + (f", and {pair.says}" if pair.shared else "")
            out.append(pair)
    return out


def _alone(board: Board) -> list[Pair]:
    """Pairs without a rival: no other pair fits either end."""
    out: list[Pair] = []
    for row in list(board.rows.values()):
        if len(row) != 1:
            continue
        (pair,) = row.values()
        if not pair.whole or len(board.cols[id(pair.flax)]) != 1 or not pair.open_to("alone"):
            continue
        pair.why = "no other pair fits" + (f", and {pair.says}" if pair.shared else "")
        out.append(pair)
    return out


def siblings(torch: Module, flax: Module, numbers: bool = True) -> frozenset[object]:
    """What two modules share with their siblings, in pairs: each its parent, and its number (Conv_2 with
    BatchNorm_2), if `numbers`."""
    return frozenset((a, b) for a in _groups(torch, numbers) for b in _groups(flax, numbers))


def _groups(module: Module, numbers: bool) -> set[object]:
    """What a module shares with its siblings: its parent, and its number (Conv_2 with BatchNorm_2)."""
    tokens = module.tokens
    out: set[object] = set()
    above = module.cuts[-2] if len(module.cuts) > 1 else 0  # the last part may have several words: query_proj
    if len(tokens) > 1 and above:
        out.add(tokens[:above])
    if numbers and tokens and isinstance(tokens[-1], int):
        word = len(tokens) - 1
        while word and isinstance(tokens[word - 1], str):
            word -= 1
        out.add((tokens[:word], "#", tokens[-1]))
    return out


def _couple(board: Board, taken: list[Pair], numbers: bool) -> None:
    """Raise the scores of pairs of siblings of a taken pair: they are likelier to belong together."""
    known = frozenset[object]().union(*(siblings(pair.torch, pair.flax, numbers) for pair in taken))
    for pair in board.pairs():
        if not pair.bonus and siblings(pair.torch, pair.flax, numbers) & known:
            pair.bonus = COUPLING
