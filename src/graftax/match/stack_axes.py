"""The axes on which leaves are stacked, judged over all leaves of a scope."""

from __future__ import annotations

from collections.abc import Sequence

from graftax.match.choose import Choice, Habits
from graftax.match.pairs import Link, Pair, Scope


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
