"""A Flax model whose leaves are looked for in another Flax model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftax.probe.evaluate import widened
from graftax.probe.flax_record import record_flax, redrawn_leaves
from graftax.probe.flax_side import FlaxForward, as_arrays, flax_forward, input_arrays
from graftax.probe.hashes import steps_hash
from graftax.probe.inputs import Call
from graftax.probe.program import Program
from graftax.probe.record import Record
from graftax.probe.rewrite import Unknown, apart


@dataclass(slots=True)
class FlaxOrigin:
    """A Flax model whose leaves are looked for in another Flax model."""

    call: Call
    forward: FlaxForward
    program: Program

    @classmethod
    def of(cls, model: Any, call: Call) -> FlaxOrigin:
        """ModelError if the model cannot be traced on this call."""
        forward = flax_forward(model)
        program = forward.program(*as_arrays(call))
        apart(program, [Unknown(path, program.leaves[path], ()) for path in forward.paths])
        return cls(call, forward, program)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(spec.shape) for path, spec in zip(self.forward.paths, self.forward.specs, strict=True)}

    def code(self) -> tuple[str, str]:
        return "source", steps_hash(self.program)

    def record(self, seed: int, call: Call) -> Record:
        """Its record with redrawn weights."""
        leaves = redrawn_leaves(self.forward, seed)
        return record_flax(self.program, self.forward, leaves, input_arrays(*call))

    def on(self, weights: Mapping[str, Any]) -> Record:
        """Its sources and outputs with these weights, on its own inputs."""
        leaves = {path: widened(weights[path]) for path in self.forward.paths}
        return record_flax(self.program, self.forward, leaves, input_arrays(*self.call), values=False)

    def ids(self) -> int | None:
        return None
