"""One float64 run of a torch model in plain ops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from graftax.adapters import torch_float64
from graftax.errors import ModelError, escape
from graftax.probe.recurrent import stepwise


@contextlib.contextmanager
def float64_run(module: torch.nn.Module, *watching: AbstractContextManager[Any]) -> Iterator[None]:
    """Inside this context `module` runs in float64, without gradients and fused paths, its recurrent layers step by
    step; `watching` are the modes that see its ops. ModelError at the end if it drew random numbers."""
    drawn: list[str] = []
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for context in (torch.no_grad(), stepwise(module), *watching):
            stack.enter_context(context)
        stack.enter_context(torch_float64.precision(torch.float64, on_random=drawn.append))
        yield
    if drawn:
        raise ModelError(f"the torch model draws random numbers ({escape(drawn[0])}): two runs of it differ")
