"""Change one setting of the Flax module and run the module again alone, to find the settings that make it agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftax.layers.connect import settings_differ
from graftax.layers.conv_settings import conv_padding
from graftax.parity.causes.norms import EPSILONS
from graftax.tree import Module

NAMES: Mapping[str, str] = {
    "epsilon": "epsilon",
    "padding": "padding",
    "strides": "stride alignment",
    "kernel_dilation": "dilation",
    "input_dilation": "dilation",
    "feature_group_count": "groups",
    "num_groups": "groups",
    "group_size": "groups",
    "use_running_average": "train or eval statistics",
    "deterministic": "train or eval statistics",
    "use_fast_variance": "fast variance",
    "dtype": "bfloat16 accumulation",
    "precision": "bfloat16 accumulation",
    "preferred_element_type": "bfloat16 accumulation",
    "approximate": "activation",
    "activation_fn": "activation",
    "negative_slope": "activation",
    "num_heads": "head order",
    "transpose_kernel": "kernel flipped",
    "use_bias": "norm statistics",
    "use_scale": "norm statistics",
}
"""Flax attribute -> the name of the cause."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Settings to run the module with, the name of the cause, the text and the fix."""

    settings: Mapping[str, Any]
    name: str
    text: str
    fix: str


def trials(torch: Module | None, flax: Module) -> Iterator[Trial]:
    """Settings to try: first those that torch's own settings require, then the usual values."""
    declared: dict[str, Any] = {}
    if torch is not None:
        for difference in settings_differ(torch, flax):
            name, want = difference.setting.flax, difference.want
            if name in flax.settings and name != "momentum" and _possible(name, want):
                declared.setdefault(name, want)
    for name, want in declared.items():
        yield _trial(flax, name, want, torch)
    if len(declared) > 1:
        text = ", ".join(f"{name}={_shown(want)}" for name, want in declared.items())
        first = next(iter(declared))
        yield Trial(declared, NAMES.get(first, first), f"torch's settings require {text}", f"{flax.kind}({text})")
    for name, values in _USUAL.items():
        if name in flax.settings:
            for value in values(flax, torch):
                if flax.settings[name] != value and not (name in declared and declared[name] == value):
                    yield _trial(flax, name, value, torch)


def _trial(flax: Module, name: str, want: Any, torch: Module | None) -> Trial:
    have, shown = _shown(flax.settings[name]), _shown(want)
    text = f"{name} is {have} in Flax; {shown} agrees with torch"
    if name == "epsilon" and torch is not None and "eps" in torch.settings:
        text = f"torch has eps={_shown(torch.settings['eps'])}, Flax has epsilon={have}"
    return Trial({name: want}, NAMES.get(name, name), text, f"nn.{flax.kind}({name}={shown})")


def _possible(name: str, want: Any) -> bool:
    return not (name == "padding" and isinstance(want, str) and want not in ("SAME", "VALID", "CIRCULAR", "REFLECT"))


def _shown(value: Any) -> str:
    if isinstance(value, (type, np.dtype)):
        return f"jnp.{np.dtype(value).name}"
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value)


# ---------------------------------------------------------------- the usual values


def _rank(flax: Module) -> int:
    size = flax.settings.get("kernel_size")
    return len(size) if isinstance(size, (tuple, list)) else 1 if isinstance(size, int) else 0


def _paddings(flax: Module, torch: Module | None) -> Iterator[Any]:
    rank = _rank(flax)
    size = flax.settings.get("kernel_size")
    sizes = [k for k in (size if isinstance(size, (tuple, list)) else (size,) * rank) if isinstance(k, int)]
    if not rank or len(sizes) != rank:
        return
    if torch is not None and isinstance(own := conv_padding(torch.settings), tuple):
        yield own
    yield tuple((k // 2, k // 2) for k in sizes)
    yield from ("SAME", "VALID")
    yield tuple(((k - 1) // 2, k // 2) for k in sizes)
    yield tuple((k // 2, (k - 1) // 2) for k in sizes)
    yield tuple((0, k - 1) for k in sizes)
    yield tuple((k - 1, 0) for k in sizes)
    yield from ("CIRCULAR", "REFLECT")


def _strides(flax: Module, torch: Module | None) -> Iterator[Any]:
    for stride in (1, 2, 3, 4):
        yield (stride,) * _rank(flax)


_Values = Callable[[Module, Module | None], Iterator[Any] | Sequence[Any]]
_USUAL: Mapping[str, _Values] = {
    "use_running_average": lambda flax, torch: (True, False),
    "epsilon": lambda flax, torch: EPSILONS,
    "dtype": lambda flax, torch: () if flax.settings["dtype"] in (None, "float32", "float64") else (np.float32,),
    "padding": _paddings,
    "strides": _strides,
    "kernel_dilation": lambda flax, torch: [(n,) * _rank(flax) for n in (1, 2, 3, 4)],
    "use_fast_variance": lambda flax, torch: (False,),
    "precision": lambda flax, torch: ("highest",),
    "deterministic": lambda flax, torch: (True,),
    "num_groups": lambda flax, torch: (32, 16, 8, 4, 2, 1),
    "approximate": lambda flax, torch: (False, True),
    "negative_slope": lambda flax, torch: (0.01, 0.1, 0.2, 0.3),
    "transpose_kernel": lambda flax, torch: (True, False),
}  # fmt: skip
"""Setting -> values that ports often get wrong; the likely settings come first."""
