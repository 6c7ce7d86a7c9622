"""When only one pair fits by shape but the names conflict, ask."""

from __future__ import annotations

import re

from graftax.match.names import Lexicon, concepts, contradicts
from graftax.match.sides import tokens_of

KINDS = frozenset(
    ["lstm", "gru", "rnn", "cell", "cells", "recurrent", "optimized", "simple", "bi", "bidirectional", "bilstm"]
)
"""Words for recurrent layers: on both sides they say only what the shapes show."""


def unlike(path: str, flax: str, lex: Lexicon, torch: bool = True) -> bool:
    """True if the paths of two modules name parts that exclude each other (encoder and decoder), or if each has a word
    that the other lacks and they share no telling word."""
    a = _said(f"{path}.weight" if torch else f"{path}/kernel", torch, lex)
    b = _said(f"{flax}/kernel", False, lex)
    if contradicts(a, b, lex):
        return True
    telling = [{word for word in words if lex.weight(word) >= 1} for words in (a, b)]
    return bool(telling[0] and telling[1]) and not telling[0] & telling[1]


def _said(path: str, torch: bool, lex: Lexicon) -> frozenset[str]:
    found = concepts(tokens_of(path, "torch" if torch else "flax"), lex)
    return frozenset(word for word in found if re.sub(r"\d+$", "", word) not in KINDS)
