"""A Flax model whose leaves are looked for in another Flax model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftax.probe.flax_record import record_flax, redrawn_leaves
from graftax.probe.flax_side import as_arrays, flax_forward, input_arrays
from graftax.probe.hashes import steps_hash
from graftax.probe.inputs import Call, Inputs
from graftax.probe.record import Record
from graftax.probe.rewrite import Unknown, apart


@dataclass(slots=True)
class FlaxOrigin:
    """A Flax model whose leaves are looked for in another Flax model."""

    model: Any
    call: Call
    inputs: Inputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        forward = flax_forward(self.model)
        return {path: tuple(spec.shape) for path, spec in zip(forward.paths, forward.specs, strict=True)}

    def code(self) -> tuple[str, str]:
        return "source", steps_hash(flax_forward(self.model).program(*as_arrays(self.call)))

    def record(self, seed: int, call: Call) -> Record:
        """Its record with redrawn weights."""
        forward = flax_forward(self.model)
        program = forward.program(*as_arrays(call))
        apart(program, [Unknown(path, program.leaves[path], ()) for path in forward.paths])
        return record_flax(program, forward, redrawn_leaves(forward, seed), input_arrays(*call))

    def ids(self) -> int | None:
        return None
