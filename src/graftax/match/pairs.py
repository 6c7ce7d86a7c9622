"""The parts of a match: scopes, pairs of modules, links of leaves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from graftax.match.names import Lexicon, Name, name_of
from graftax.match.sides import Column, Key, Module, Token
from graftax.ops import Op
from graftax.rules.key_templates import Crowd

Label = tuple[tuple[int, ...], str]
"""(axes of the stacked numbers, reading)"""


@dataclass(slots=True, eq=False)
class Link:
    """One leaf of a pair: both columns and the readings that fit every instance. told: those that live modules leave,
    the likeliest first, and `why`; () if they show nothing."""

    torch: Column
    flax: Column
    labels: frozenset[Label]
    chains: dict[tuple[Label, tuple[int, ...], tuple[int, ...]], tuple[Op, ...]]
    told: tuple[Label, ...] = ()
    why: str = ""


Route = Literal["contest", "names", "alone", "numbers", "stream", "rest"]
"""The ways to take a pair. contest: its names are better than those of its rivals; names: its names speak for it, and
it has no rival; alone: no other pair fits; numbers: its place in a count; stream: its place along a block; rest: it is
part of the only pairing of everything that is left of two paired parts."""
BY_NAME: frozenset[Route] = frozenset(("contest", "names", "alone", "rest"))
EVERY: frozenset[Route] = BY_NAME | frozenset[Route](("numbers", "stream"))
LIVE = "live kinds"
"""The judgement of live modules, which no name changes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one judgement says against a pair: its name, the routes that it bars, and its reason ('' if it only says
    that evidence is missing)."""

    judgement: str
    bars: frozenset[Route]
    text: str = ""


@dataclass(slots=True, eq=False)
class Pair:
    """A torch module and a Flax module that fit. `score`: how alike the names are, 0..1; it orders candidates;
    `findings`: what judgements say against it; `whole`: both have the same roles and instances; `shared`: what both
    names say; `equal`: the names are equal, and so are their numbers; `bonus`: what a rule for another instance
    adds."""

    torch: Module
    flax: Module
    links: list[Link]
    whole: bool
    score: float = 0.0
    shared: tuple[str, ...] = ()
    equal: bool = False
    findings: tuple[Finding, ...] = ()
    why: str = ""
    bonus: float = 0.0

    def open_to(self, route: Route) -> bool:
        """True if no judgement bars the route."""
        return not any(route in finding.bars for finding in self.findings)

    def found(self, judgement: str) -> bool:
        return any(finding.judgement == judgement for finding in self.findings)

    @property
    def blocked(self) -> str:
        """Why the names forbid the pair, although it fits; '' if they do not."""
        return next((finding.text for finding in self.findings if finding.text), "")

    @property
    def forbidden(self) -> bool:
        """True if no route may take the pair."""
        return any(finding.bars == EVERY for finding in self.findings)

    @property
    def total(self) -> float:
        return self.score + self.bonus

    @property
    def says(self) -> str:
        """What both names say, as evidence: the meanings of their words, and their places among numbered siblings; ''
        if they share nothing."""
        places = [text for text in self.shared if text.startswith("number ")]
        meant = [text for text in self.shared if text not in places]
        texts = [f"both names mean: {', '.join(meant)}"] if meant else []
        return ", and ".join([*texts, *([f"both are {' and '.join(places)}"] if places else [])])


@dataclass(slots=True, eq=False)
class Scope:
    """What is matched together: the modules of two paired families, and which instance goes with which."""

    torch: list[Module]
    flax: list[Module]
    keys: list[tuple[Key, Key]]
    root: bool
    same: bool
    lex: Lexicon
    why: str = ""  # evidence for these blocks that is not about their modules
    names: dict[int, Name] = field(default_factory=dict[int, Name])
    wrappers: frozenset[str] = frozenset()
    experts: tuple[bool, bool] = (False, False)
    numbers: bool = True
    crowd: Crowd = field(default_factory=dict[str, "Collection[str]"])
    common: frozenset[str] = frozenset()
    around: frozenset[str] = frozenset()  # words for the part of the model around a module
    own: dict[int, frozenset[str]] = field(
        default_factory=dict[int, frozenset[str]]
    )  # what a name says about the module alone,
    beside: dict[int, frozenset[str]] = field(default_factory=dict[int, frozenset[str]])  # and about its place
    norms: frozenset[str] = frozenset()  # words that all norms of a side have
    places: tuple[frozenset[str], ...] = (frozenset(), frozenset())  # the words for places of each side
    blocks: tuple[frozenset[int], ...] = (frozenset(), frozenset())  # modules in a numbered block of layers
    counted: tuple[frozenset[tuple[Token, ...]], ...] = (frozenset(), frozenset())  # where numbers tell modules apart

    def name(self, module: Module) -> Name:
        found = self.names.get(id(module))
        if found is None:
            found = self.names[id(module)] = name_of(module.tokens, module.own, self.lex)
        return found
