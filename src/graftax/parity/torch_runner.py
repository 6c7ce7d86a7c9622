"""A live torch module that can be run with a tap, in float32 or in float64: the torch `Runner`.

A wrapper covers `forward` of every watched module for the time of a run, so that both `m(x)` and `m.forward(x)` are
seen. A module whose weights are used without a call (`F.linear(x, m.weight)`) is listed in `not_traced`.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from graftax.adapters import nests, torch_arrays, torch_float64, torch_tree
from graftax.errors import GraftaxError, ModelError, ReplayError, UsageError, escape
from graftax.parity import summing, torch_state
from graftax.parity.records import Site, Tap
from graftax.tree import Checkpoint, Module

FLOAT32_MAX = torch.finfo(torch.float32).max


class TorchRunner:
    """`records.Runner` for torch.

    module   a torch.nn.Module; its weights may be on the meta device if `source` has them
    dtype    "float32" or "float64": the precision of the run
    source   a checkpoint with the torch keys: it holds the values of meta weights, read leaf by leaf when they are used
    call     function (module, *args, **kwargs) -> outputs, instead of module(*args, **kwargs)
    """

    def __init__(
        self,
        module: torch.nn.Module,
        dtype: str = "float32",
        source: Checkpoint | None = None,
        call: Callable[..., Any] | None = None,
    ) -> None:
        self.module: torch.nn.Module = getattr(module, "_orig_mod", module)
        self.dtype = torch.float64 if dtype == "float64" else torch.float32
        self.source = source
        self.call = call
        self.drawn: dict[str, str] = {}
        """module path -> the op that drew random numbers there in the last wide run."""
        self._paths = torch_state.paths_of(self.module)
        state = self.module.state_dict(keep_vars=True)
        self._modules = torch_tree.modules_of(self.module, [k for k, v in state.items() if hasattr(v, "shape")])
        self._meta: dict[int, list[str]] = {}
        for key, tensor in state.items():
            if getattr(tensor, "is_meta", False):
                self._meta.setdefault(id(tensor), []).append(key)
        self._seen: dict[str, int] = {}
        self._watched: tuple[str, ...] = ()
        self._used: set[int] = set()
        self._active: list[str] = []

    @property
    def modules(self) -> Mapping[str, Module]:
        return self._modules

    # ------------------------------------------------------------ running

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        watch: Collection[str] = (),
        tap: Tap | None = None,
        reseed: bool = False,
        in_a_row: int | None = None,
    ) -> Any:
        """See `records.Runner`. ModelError if the user's code fails or a layer was left in train mode. reseed: use
        other random numbers than the last run. in_a_row: add the error of sequential summing to contractions, with this
        seed (`summing`)."""
        torch_state.require_eval(self.module)
        self._watched = tuple(path for path in watch if path in self._paths)
        self._seen = {}
        self._active = []
        self.drawn = {}
        call = self.call or (lambda module, *args, **kwargs: module(*args, **kwargs))
        with self._running() as shares, contextlib.ExitStack() as stack:
            if in_a_row is not None:
                stack.enter_context(summing.summed_in_a_row(self.module, in_a_row))
            if reseed:
                torch.manual_seed(torch.initial_seed() % (1 << 62) + 1)
            given = self._tensors(tuple(args)), self._tensors(dict(kwargs))
            if tap is not None:
                for path, item in self._to_watch():
                    stack.enter_context(self._covered(path, item, tap, shares))
            try:
                out = call(self.module, *given[0], **given[1])
            except GraftaxError:
                raise
            except Exception as error:
                raise torch_state.model_error(error, self._paths, self.module, (args, kwargs)) from error
            with _unwatched():
                return self._values(out, shares)

    @contextlib.contextmanager
    def _running(self) -> Iterator[Shares]:
        """Set up torch and the module for one run, and restore both afterwards."""
        narrow = {value.dtype for value in self.module.state_dict(keep_vars=True).values() if hasattr(value, "dtype")}
        wide = self.dtype is torch.float64 or self._meta or narrow & set(torch_float64.WIDER[torch.float32])
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch_state.kept(self.module))
            stack.enter_context(torch.no_grad())
            if wide:
                widening = stack.enter_context(torch_float64.precision(self.dtype, self._filled, self._random))
                self._used = widening.used
            yield Shares()

    def _to_watch(self) -> list[tuple[str, torch.nn.Module]]:
        """Every watched module once, under the first of its paths that is watched."""
        items = dict(self.module.named_modules(remove_duplicate=False))
        first: dict[int, str] = {}
        for path in self._watched:
            first.setdefault(id(items[path]), path)
        return [(path, items[path]) for path in first.values()]

    @contextlib.contextmanager
    def _covered(self, path: str, module: torch.nn.Module, tap: Tap, shares: Shares) -> Iterator[None]:
        """Cover `module.forward` by a function that reports to the tap."""
        plain = module.forward
        had = module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            site = Site(path, self._seen.get(path, 0))
            self._seen[path] = site.call + 1
            with _unwatched():
                new = tap.enter(site, self._values(args, shares), self._values(kwargs, shares))
                if new is not None:
                    args = self._replaced(args, new[0])
                    kwargs = self._replaced(kwargs, dict(new[1]))
            self._active.append(path)
            try:
                out = plain(*args, **kwargs)
            finally:
                self._active.pop()
            with _unwatched():
                other = tap.leave(site, self._values(out, shares))
                return out if other is None else self._replaced(out, other)

        module.__dict__["forward"] = forward
        try:
            yield
        finally:
            if had is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = had

    def not_traced(self) -> Mapping[str, str]:
        out: dict[str, str] = {}
        items = dict(self.module.named_modules(remove_duplicate=False))
        called = {id(items[path]) for path in self._seen}
        for path in self._watched:
            if id(items[path]) in called:
                continue
            used = any(id(value) in self._used for value in items[path].parameters(recurse=False))
            out[path] = "its weights are used outside its forward (functional use)" if used else "never called"
        return out

    # ------------------------------------------------------------ one module

    def replay(
        self,
        path: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        settings: Mapping[str, Any] | None = None,
        leaves: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `records.Runner`."""
        items = dict(self.module.named_modules(remove_duplicate=False))
        if path not in items:
            raise ReplayError(f"the torch model has no module {escape(path)!r}")
        module = items[path]
        with self._running() as shares:
            for name, value in (settings or {}).items():
                setattr(module, name, value)
            for key, array in (leaves or {}).items():
                owner, _, name = key.rpartition(".")
                holder = items[owner]
                table: dict[str, Any] = holder._parameters if name in holder._parameters else holder._buffers
                made = torch_arrays.to_torch(array)
                table[name] = torch.nn.Parameter(made, False) if table is holder._parameters else made
            try:
                out = module(*self._tensors(tuple(args)), **self._tensors(dict(kwargs)))
            except Exception as error:
                raise ReplayError(f"{escape(path)} cannot be run alone: {escape(error, 400)}") from error
            with _unwatched():
                return self._values(out, shares)

    # ------------------------------------------------------------ values

    def _values(self, nest: Any, shares: Shares) -> Any:
        return nests.mapped(nest, _is_tensor, shares.array)

    def _tensors(self, nest: Any) -> Any:
        """Arrays of any framework as tensors; floating ones in the run's dtype."""
        found = [_as_tensor(leaf) for _, leaf in nests.leaves(nest, nests.is_array)]
        made = [t.to(self.dtype) if t.is_floating_point() and t.dtype != self.dtype else t for t in found]
        return nests.rebuilt(nest, nests.is_array, made)

    def _replaced(self, nest: Any, new: Any) -> Any:
        """`nest` with its tensors replaced by the arrays of `new`, if both have the same number of them."""
        old = [tensor for _, tensor in nests.leaves(nest, _is_tensor)]
        arrays = [array for _, array in nests.arrays(new)]
        if len(old) != len(arrays):
            return nest
        made = [_like(tensor, array) for tensor, array in zip(old, arrays, strict=True)]
        return nests.rebuilt(nest, _is_tensor, made)

    def _filled(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """The values of a meta weight, from the source."""
        keys = self._meta.get(id(parameter), [])
        key = next((key for key in keys if self.source is not None and key in self.source), None)
        if key is None or self.source is None:
            raise ModelError(
                f"torch: {escape(keys[0] if keys else 'a tensor')} has no values (device meta), and no source holds it",
                next="Pass source= a checkpoint that holds it."
                if keys
                else "Buffers that no checkpoint holds must be made outside torch.device('meta').",
            )
        return _as_tensor(self.source.read(key)).reshape(parameter.shape)

    def _random(self, op: str) -> None:
        path = torch_state.running_module(self._paths) or (self._active[-1] if self._active else "")
        training = torch_state.training_at(self.module, path)
        if training:
            raise torch_state.train_mode_error({path: f"draws random numbers ({op})"}, self.module)
        self.drawn.setdefault(path, op)


class Shares:
    """Remembers the arrays of tensors: a layer's input is usually another layer's output, and is kept once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, Any]] = {}

    def array(self, tensor: torch.Tensor) -> Any:
        """The tensor as NumPy: float64 rounded to float32 (finite values stay finite), half precision widened, other
        dtypes unchanged. A copy, or the earlier array if the tensor is the same and unchanged."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        array, key = to_array(tensor), id(tensor)
        forget = weakref.ref(tensor, lambda ref: self._forget(key, ref))
        self._known[key] = (forget, tensor._version, array)
        return array

    def _forget(self, key: int, ref: Any) -> None:
        if key in self._known and self._known[key][0] is ref:
            del self._known[key]


def to_array(tensor: torch.Tensor) -> Any:
    """A tensor as a NumPy array of its own memory."""
    plain = tensor.detach()
    if plain.is_sparse or plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.dtype is torch.float64:
        made = plain.to(torch.float32)
        if not math.isfinite(float(made.sum())):  # cheap; finite only if all values are
            made = plain.clamp(-FLOAT32_MAX, FLOAT32_MAX).where(plain.isfinite(), plain).to(torch.float32)
        plain = made
    elif plain.is_floating_point():
        plain = plain.to(torch.float32, copy=True)
    elif plain.dtype is torch.complex128:
        plain = plain.to(torch.complex64)
    else:
        plain = plain.clone()
    return plain.resolve_conj().resolve_neg().cpu().numpy()


def _like(tensor: torch.Tensor, array: Any) -> torch.Tensor:
    """The array as a tensor with the old tensor's dtype and device; the old tensor if the shapes differ."""
    if tuple(array.shape) != tuple(tensor.shape):
        return tensor
    return torch.from_numpy(array.copy()).to(device=tensor.device, dtype=tensor.dtype)


def _as_tensor(array: Any) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    return torch_arrays.to_torch(array)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """Inside this context no precision mode is active: the tap's own conversions are not the model's code."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def runners(
    module: Any, source: Checkpoint | None = None, call: Callable[..., Any] | None = None
) -> tuple[TorchRunner, TorchRunner]:
    """(float64, float32) runners of one module. UsageError for an object that is not a torch.nn.Module."""
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"the torch side must be a torch.nn.Module, not {type(module).__name__}")
    return TorchRunner(module, "float64", source, call), TorchRunner(module, "float32", source, call)
