"""graftax: port weights between PyTorch and Flax, operate on them, and prove the result.

    import graftax as gx
    params = gx.port("model.safetensors", gx.linen(model, example))      # plan, check, run
    params = gx.replace(params, "**/kernel", gx.constant(0.5))           # nothing else is touched

Names resolve on first use, so that `import graftax` imports no framework and no NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftax import errors, examples, types
    from graftax.adapters import linen
    from graftax.adapters.shardings import on_mesh
    from graftax.api import load_into, load_plan, open_checkpoint, plan, port, port_file
    from graftax.parity.check import assert_parity, check_parity
    from graftax.probe.inputs import Inputs
    from graftax.report.comparing import diff
    from graftax.report.inspecting import inspect
    from graftax.report.suggesting import suggest
    from graftax.studies.ablation import ablate
    from graftax.studies.comparing import compare
    from graftax.studies.parts import Part, part
    from graftax.surgery import replace, select
    from graftax.surgery.values import (
        add_normal,
        constant,
        from_checkpoint,
        mean,
        mix,
        normal,
        quantized,
        rounded,
        scaled,
        zeros,
    )

_HOMES = {
    "plan": "api",
    "port": "api",
    "port_file": "api",
    "load_plan": "api",
    "load_into": "api",
    "open_checkpoint": "api",
    "linen": "adapters",
    "on_mesh": "adapters.shardings",
    "check_parity": "parity.check",
    "assert_parity": "parity.check",
    "Inputs": "probe.inputs",
    "suggest": "report.suggesting",
    "inspect": "report.inspecting",
    "diff": "report.comparing",
    "ablate": "studies.ablation",
    "compare": "studies.comparing",
    "part": "studies.parts",
    "Part": "studies.parts",
    "replace": "surgery",
    "select": "surgery",
    "constant": "surgery.values",
    "zeros": "surgery.values",
    "normal": "surgery.values",
    "add_normal": "surgery.values",
    "scaled": "surgery.values",
    "mean": "surgery.values",
    "mix": "surgery.values",
    "rounded": "surgery.values",
    "quantized": "surgery.values",
    "from_checkpoint": "surgery.values",
}
_MODULES = ("errors", "examples", "types")

__all__ = [
    "Inputs",
    "Part",
    "ablate",
    "add_normal",
    "assert_parity",
    "check_parity",
    "compare",
    "constant",
    "diff",
    "errors",
    "examples",
    "from_checkpoint",
    "inspect",
    "linen",
    "load_into",
    "load_plan",
    "mean",
    "mix",
    "normal",
    "on_mesh",
    "open_checkpoint",
    "part",
    "plan",
    "port",
    "port_file",
    "quantized",
    "replace",
    "rounded",
    "scaled",
    "select",
    "suggest",
    "types",
    "zeros",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"graftax.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'graftax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"graftax.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))])
