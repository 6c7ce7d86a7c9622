"""A torch model whose tensors are looked for in a Flax model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graftax.adapters import nests
from graftax.errors import GraftaxError, ModelError, escape
from graftax.probe.evaluate import widened
from graftax.probe.hashes import sha
from graftax.probe.inputs import Call, Inputs
from graftax.probe.record import Record, Source
from graftax.probe.redraw import ids_of, probe_copy
from graftax.probe.torch_nests import array_of, tensors, to_torch
from graftax.probe.torch_record import TorchRecorder
from graftax.probe.torch_run import float64_run
from graftax.probe.values import OutOfBudget, Values


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
        args, kwargs = nests.mapped(call, nests.is_array, to_torch)
        try:
            return record_torch(probe_copy(self.module, seed), args, kwargs, self.inputs.torch_call)
        except (GraftaxError, OutOfBudget):
            raise
        except Exception as error:
            kind, text = type(self.module).__name__, escape(str(error).strip(), 500)
            raise ModelError(f"the torch model {escape(kind)} failed: {type(error).__name__}: {text}") from error

    def on(self, weights: Mapping[str, Any]) -> Record:
        """Its sources and outputs with these weights, on its own inputs."""
        made = probe_copy(self.module, 0)
        with torch.no_grad():
            for key, tensor in made.state_dict(keep_vars=True).items():
                if key in weights and isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.copy_(torch.from_numpy(np.asarray(widened(weights[key]), order="C")))
        args, kwargs = nests.mapped(self.call, nests.is_array, to_torch)
        return record_torch(made, args, kwargs, self.inputs.torch_call, values=False)

    def ids(self) -> int | None:
        return ids_of(self.module)


def record_torch(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], call: Any = None, values: bool = True
) -> Record:
    """The record of one run of `module`, whose floating tensors are float64; its sources and outputs alone, without
    `values`. ModelError if the model fails, or if it draws random numbers."""
    state = module.state_dict(keep_vars=True)
    record = Record(Values())
    parameters: dict[int, int] = {}
    names: dict[int, list[str]] = {}
    for key, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            names.setdefault(_identity(tensor), []).append(key)
    first: dict[int, int] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        same = names[_identity(tensor)]
        if same[0] == key:
            first[_identity(tensor)] = len(record.sources)
            record.sources.append(Source((key,), array_of(tensor, copy=True), names=tuple(same[1:])))
        parameters[id(tensor)] = first[_identity(tensor)]
    run = call or (lambda module, *args, **kwargs: module(*args, **kwargs))
    recorder = TorchRecorder(record, parameters) if values else None
    with float64_run(module, recorder or contextlib.nullcontext()):
        if recorder is not None:
            recorder.begin(tensors((tuple(args), dict(kwargs))))
        out = run(module, *args, **kwargs)
    found = nests.leaves(out, lambda item: isinstance(item, torch.Tensor))
    record.outputs = {path: array_of(t, copy=True) for path, t in found if t.is_floating_point()}
    return record


def _identity(tensor: torch.Tensor) -> Any:
    """Equal for two tensors that share all their values."""
    return (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())) if tensor.numel() else id(tensor)
