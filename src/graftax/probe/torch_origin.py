"""A torch model whose tensors are looked for in a Flax model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graftax.adapters import nests, torch_arrays
from graftax.errors import GraftaxError, ModelError, escape
from graftax.probe.hashes import sha
from graftax.probe.inputs import Call, Inputs
from graftax.probe.record import Record
from graftax.probe.redraw import ids_of, probe_copy
from graftax.probe.torch_record import record_torch
from graftax.probe.values import OutOfBudget


@dataclass(slots=True)
class TorchOrigin:
    """The torch model whose tensors are looked for."""

    module: Any
    call: Call
    inputs: Inputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """key -> shape of its tensors."""
        return {key: tuple(t.shape) for key, t in self.module.state_dict().items() if hasattr(t, "shape")}

    def code(self) -> tuple[str, str]:
        return "torch", sha(repr(self.module))

    def record(self, seed: int, call: Call) -> Record:
        """Its record with redrawn weights."""
        args, kwargs = nests.mapped(call, nests.is_array, _to_torch)
        try:
            return record_torch(probe_copy(self.module, seed), args, kwargs, self.inputs.torch_call)
        except (GraftaxError, OutOfBudget):
            raise
        except Exception as error:
            kind, text = type(self.module).__name__, escape(str(error).strip(), 500)
            raise ModelError(f"the torch model {escape(kind)} failed: {type(error).__name__}: {text}") from error

    def ids(self) -> int | None:
        return ids_of(self.module)


def _to_torch(array: Any) -> Any:
    made = torch_arrays.to_torch(np.ascontiguousarray(array))
    return made.long() if made.dtype in (torch.int32, torch.int16) else made
