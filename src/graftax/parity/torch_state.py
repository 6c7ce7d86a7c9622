"""The state of a torch module around a run: restore it, find modules in train mode, find the code that failed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from graftax.adapters import nests
from graftax.errors import Failure, ModelError, escape

Paths = dict[str, torch.nn.Module]


def paths_of(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """path -> module, aliases too; '' is the module itself."""
    return dict(module.named_modules(remove_duplicate=False))


@contextlib.contextmanager
def kept(module: torch.nn.Module) -> Iterator[None]:
    """Undo whatever a run does to the attributes, buffers and tables of modules, and to the random state."""
    items = list(module.modules())
    tables = [dict(vars(item)) for item in items]
    inner = [(dict(i._parameters), dict(i._buffers), dict(i._modules)) for i in items]
    buffers = [(b, b._version, b.detach().clone()) for b in module.buffers() if not b.is_meta]
    random = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fast path would use all weights of an encoder layer at once, without calling its modules.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_rng_state(random)
        for item, table, (parameters, own, children) in zip(items, tables, inner, strict=True):
            for name, before in (("_parameters", parameters), ("_buffers", own), ("_modules", children)):
                now = table[name]
                if {k: id(v) for k, v in now.items()} != {k: id(v) for k, v in before.items()}:
                    now.clear()
                    now.update(before)
            if len(vars(item)) != len(table) or any(vars(item).get(k, item) is not v for k, v in table.items()):
                vars(item).clear()
                vars(item).update(table)
        with torch.no_grad():
            for buffer, version, old in buffers:
                if buffer._version != version:
                    buffer.copy_(old)


# ---------------------------------------------------------------- train mode


def require_eval(module: torch.nn.Module) -> None:
    """Raise ModelError that names the modules in train mode whose output depends on the mode."""
    left = {path: why for path, item in module.named_modules() if item.training and (why := _trains(item))}
    if left:
        raise train_mode_error(left, module)


def _trains(item: torch.nn.Module) -> str:
    """Why a module's output differs in train mode; '' if it does not."""
    if isinstance(item, torch.nn.modules.dropout._DropoutNd) and item.p > 0:
        return f"drops at random (p={item.p})"
    if isinstance(item, torch.nn.modules.batchnorm._NormBase) and item.track_running_stats:
        return "uses the batch's statistics and changes the running ones"
    dropout = getattr(item, "dropout", 0)
    inside = isinstance(item, (torch.nn.RNNBase, torch.nn.MultiheadAttention))
    return f"drops at random (dropout={dropout})" if inside and isinstance(dropout, float) and dropout > 0 else ""


def train_mode_error(left: Mapping[str, str], module: torch.nn.Module) -> ModelError:
    items = paths_of(module)
    failures = [
        Failure(f"{type(items[path]).__name__} {why}", key=f"torch {path or '(the model)'}")
        for path, why in left.items()
    ]
    return ModelError(
        f"{len(failures)} torch module(s) are in train mode: two runs would not agree",
        failures,
        next="Call .eval() on the torch module before the check.",
    )


def training_at(module: torch.nn.Module, path: str) -> bool:
    try:
        return module.get_submodule(path).training
    except AttributeError:
        return module.training


# ---------------------------------------------------------------- the code that failed


def running_module(paths: Paths) -> str | None:
    """The path of the innermost module that has a method on the stack now; torch's own containers count too."""
    names = {id(item): path for path, item in reversed(paths.items())}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and id(owner) in names:
            return names[id(owner)]
        frame = frame.f_back
    return None


def model_error(error: Exception, paths: Paths, module: torch.nn.Module, given: Any) -> ModelError:
    """The ModelError for an exception of the user's model, with the module and the line that were running."""
    names = {id(item): path for path, item in reversed(paths.items())}
    path, kind = "", type(module).__name__
    line = ""
    library = Path(str(torch.__file__)).parent
    here = Path(__file__).parent.parent
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and id(owner) in names:
            path, kind = names[id(owner)], type(owner).__name__
        file = Path(frame.f_code.co_filename)
        if library not in file.parents and here not in file.parents:
            line = f"{file}:{trace.tb_lineno} in {frame.f_code.co_name}"
        trace = trace.tb_next
    shapes = [_shape(leaf) for _, leaf in nests.leaves(given, lambda v: hasattr(v, "shape"))]
    return ModelError(
        f"the torch model failed in {escape(kind)} at {escape(path) or '(the model)'}: "
        f"{type(error).__name__}: {escape(error, 600)}",
        next=(f"Raised at {escape(line, 300)}. " if line else "") + f"It was called with {', '.join(shapes[:6])}."
        if shapes
        else "",
    )


def _shape(leaf: Any) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
