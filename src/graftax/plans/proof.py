"""What running both models proved about a plan: a small record that says for which bytes and which code it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from graftax.errors import escape
from graftax.ops import op_to_json
from graftax.plans.entries import Entry


@dataclass(frozen=True, slots=True)
class Proof:
    """Both models ran with the same redrawn weights and inputs, and their outputs agreed.

    leaves   how many leaves of the plan were decided, each by a value that both models make
    open     leaves that nothing in the run depends on: not proved
    error    the largest difference of the outputs on a second redraw, as a part of the largest entry, in float64
    facts    assumptions of the plan that the run settled, and leaves that are interchangeable
    models   sha256 of the code of both models, as it was traced: "torch", "flax"
    inputs   sha256 of the shapes, dtypes and values of the inputs
    plan     sha256 of the entries: for other entries the proof is void
    source   sha256 of the source's tensors; "" until a port compared the outputs on them
    ratio    then the error of Flax's outputs over torch float32's own (5 is allowed)
    """

    leaves: int
    open: tuple[str, ...] = ()
    error: float = 0.0
    facts: tuple[str, ...] = ()
    models: tuple[tuple[str, str], ...] = ()
    inputs: str = ""
    plan: str = ""
    source: str = ""
    ratio: float | None = None

    def __str__(self) -> str:
        text = f"{self.leaves} leaves proved by running both models (outputs agree to {self.error:.0e} in float64"
        if self.ratio is not None:
            text += f"; on the real weights {self.ratio:.1f}x float32's own error"
        text += ")"
        if self.open:
            shown = ", ".join(escape(name) for name in self.open[:6]) + ", ..." * (len(self.open) > 6)
            text += f"; not proved, because nothing in the run depends on them: {shown}"
        return text

    def as_json(self) -> dict[str, Any]:
        """The proof as JSON data; `proof_of_json` reads it."""
        return {
            "leaves": self.leaves, "open": list(self.open), "error": self.error, "facts": list(self.facts),
            "models": dict(self.models), "inputs": self.inputs, "plan": self.plan, "source": self.source,
            "ratio": self.ratio,
        }  # fmt: skip


def proof_of_json(data: Mapping[str, Any] | None) -> Proof | None:
    """The proof that `as_json` gave; None for none. Raises as any reader of a plan's JSON."""
    if data is None:
        return None
    ratio = data.get("ratio")
    return Proof(
        int(data["leaves"]),
        tuple(str(name) for name in data.get("open", ())),
        float(data["error"]),
        tuple(str(text) for text in data.get("facts", ())),
        tuple((str(side), str(code)) for side, code in data.get("models", {}).items()),
        str(data.get("inputs", "")),
        str(data.get("plan", "")),
        str(data.get("source", "")),
        None if ratio is None else float(ratio),
    )


def entries_hash(entries: Iterable[Entry]) -> str:
    """sha256 of what goes where, and how."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry.sources, entry.targets, [op_to_json(op) for op in entry.ops]]).encode())
    return digest.hexdigest()


def valid(proof: Proof | None, entries: Iterable[Entry]) -> Proof | None:
    """The proof, if it is about these entries."""
    return proof if proof is not None and proof.plan == entries_hash(entries) else None
