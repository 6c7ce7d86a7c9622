"""The parts of a match: scopes, pairs of modules, links of leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graftax.match.names import Lexicon, Name, name_of
from graftax.match.sides import Column, Key, Module, Token
from graftax.ops import Op

Label = tuple[tuple[int, ...], str]
"""(axes of the stacked numbers, reading)"""


@dataclass(slots=True, eq=False)
class Link:
    """One leaf of a pair: both columns and the readings that fit every instance."""

    torch: Column
    flax: Column
    labels: frozenset[Label]
    chains: dict[tuple[Label, tuple[int, ...], tuple[int, ...]], tuple[Op, ...]]


@dataclass(slots=True, eq=False)
class Pair:
    """A torch module and a Flax module that fit. `score`: how alike the names are, 0..1; `blocked`: why the pair may
    not be taken although it fits; `whole`: both have the same roles and instances; `counts`: numbers that count one
    thing differ; `astray`: the names of two norms say two places, so that no order pairs them."""

    torch: Module
    flax: Module
    links: list[Link]
    whole: bool
    score: float = 0.0
    shared: tuple[str, ...] = ()
    telling: float = 0.0
    any_shared: float = 0.0
    blocked: str = ""
    soft: bool = False
    lone: bool = False
    head: bool = False
    loose: bool = False
    vague: bool = False
    remote: bool = False
    equal: bool = False
    counts: bool = False
    astray: bool = False
    why: str = ""
    bonus: float = 0.0

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
    label: str = ""
    torch_names: dict[int, Name] = field(default_factory=dict[int, Name])
    flax_names: dict[int, Name] = field(default_factory=dict[int, Name])
    wrappers: frozenset[str] = frozenset()
    experts: tuple[bool, bool] = (False, False)
    numbers: bool = True
    crowd: Mapping[str, int] = field(default_factory=dict[str, int])  # paths, numbers left out -> how many there are
    common: frozenset[str] = frozenset()
    around: frozenset[str] = frozenset()  # words for the part of the model around a module
    own: dict[int, frozenset[str]] = field(
        default_factory=dict[int, frozenset[str]]
    )  # what a name says about the module alone,
    beside: dict[int, frozenset[str]] = field(default_factory=dict[int, frozenset[str]])  # and about its place
    twins: frozenset[int] = frozenset()  # modules in one of several places that hold the same names
    norms: frozenset[str] = frozenset()  # words that all norms of a side have
    places: tuple[frozenset[str], ...] = (frozenset(), frozenset())  # the words for places of each side
    counted: tuple[frozenset[tuple[Token, ...]], ...] = (frozenset(), frozenset())  # where numbers tell modules apart

    def name(self, module: Module, torch: bool) -> Name:
        cache = self.torch_names if torch else self.flax_names
        found = cache.get(id(module))
        if found is None:
            found = cache[id(module)] = name_of(module.tokens, module.own, self.lex)
        return found
