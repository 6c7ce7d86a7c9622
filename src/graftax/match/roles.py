"""The role of a leaf in its module, from the leaf's own name: weight, bias, mean, var, g, v, or a value by itself."""

from __future__ import annotations

from graftax.layers.readings import Kind

Role = str

# leaf name: (role, kind)
ROLES: dict[str, tuple[str, Kind]] = {
    "weight": ("weight", "free"),
    "kernel": ("weight", "kernel"),
    "embedding": ("weight", "embedding"),
    "scale": ("weight", "norm"),
    "gamma": ("weight", "norm"),
    "w": ("weight", "free"),
    "bias": ("bias", "free"),
    "beta": ("bias", "norm"),
    "b": ("bias", "free"),
    "running_mean": ("mean", "norm"),
    "running_var": ("var", "norm"),
    "moving_mean": ("mean", "norm"),
    "moving_variance": ("var", "norm"),
    "moving_var": ("var", "norm"),
    "mean": ("mean", "norm"),
    "var": ("var", "norm"),
    "weight_g": ("g", "free"),
    "weight_v": ("v", "free"),
    "kernel_g": ("g", "kernel"),
    "kernel_v": ("v", "kernel"),
    "num_batches_tracked": ("counter", "norm"),
}

SUFFIXES: tuple[tuple[str, Role, Kind], ...] = (
    ("_weight", "weight", "free"),
    ("_kernel", "weight", "kernel"),
    ("_bias", "bias", "free"),
)
"""Endings of a bare parameter's name that show its role: `in_proj_weight` is the weight of `in_proj`."""


def role_of(last: str) -> tuple[Role, Kind, str]:
    """(role, kind, the rest of the name, which belongs to the module's path) of a leaf's last part."""
    known = ROLES.get(last)
    if known is not None:
        return known[0], known[1], ""
    for ending, role, kind in SUFFIXES:
        if last.endswith(ending) and len(last) > len(ending):
            return role, kind, last[: -len(ending)]
    return "value", "raw", last
