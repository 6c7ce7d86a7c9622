"""The layer table as rows of text, and the text that `graftax layers` prints."""

from __future__ import annotations

import textwrap
from typing import Any

from graftax.layers.base import Layer, LayerForm
from graftax.layers.table import LAYERS

BY_RULES = (
    'Linear after a flatten of (C, H, W): flatten = "C H W": o (c h w) -> (h w c) o.',
    'Fused query, key, value: fused = "block" (rows of all queries, then keys, then values) or "interleaved" (head by '
    "head; with fewer key heads, group by group). Their shapes are identical.",
    'Rotary query and key, interleaved pairs -> halves: ops = "(h d p) i -> i (h p d)", h = HEADS, p = 2 (i h (p d) '
    'for a head axis); a bias "(h d p) -> (h p d)"; a per-head norm\'s scale "(d p) -> (p d)". Weight, bias and any '
    "per-head norm of query and key move together (score error 4.9 where the scale does not); the key by its own "
    "number of heads; with partial rotary the first rotary_dim rows of each head only.",
)
"""What no file shows, so that only a rule picks it."""
NO_WEIGHTS = (
    "GELU and other activations, Dropout, Flatten and pooling have no weights: nothing to port. jax.nn.gelu is tanh by "
    "default, torch's is erf."
)


def layer_rows() -> list[dict[str, Any]]:
    """One dict per layer type: name, torch, linen, nnx (class names), layouts, settings, exactness, refused (what,
    reason, rewrite) and note."""
    return [
        {
            "name": layer.name,
            "torch": list(layer.torch),
            "linen": list(layer.linen),
            "nnx": list(layer.nnx or layer.linen),
            "layouts": layer_layouts(layer),
            "settings": [f"{s.torch} = {s.flax}" for s in layer.settings],
            "exactness": layer.exactness,
            "refused": [{"what": r.what, "reason": r.reason, "rewrite": r.rewrite} for r in layer.refusals],
            "note": layer.note,
        }
        for layer in LAYERS
    ]


def layer_layouts(layer: Layer) -> list[str]:
    """What a row does to its leaves, one line per form, as far as it does not depend on shapes."""
    out: list[str] = []
    for form in layer.forms:
        if isinstance(form, LayerForm):
            steps = "; ".join(f"{_roles(s.torch)} -> {_roles(s.flax) or 'dropped'}{_ops(s.ops)}" for s in form.steps)
            out.append(f"{form.variant}: {steps}")
        else:
            out += form.lines
    return out


def _roles(roles: str | tuple[str, ...]) -> str:
    return ", ".join(role.split("|")[0] for role in ((roles,) if isinstance(roles, str) else roles))


def _ops(ops: Any) -> str:
    from graftax.ops import chain_text

    if not ops:
        return ""
    return f" ({ops})" if isinstance(ops, str) else f" ({chain_text(ops)})"


def layers_text(width: int = 110) -> str:
    """The whole table as text: what is supported, exact or measured, and what is refused and why."""
    out: list[str] = []
    for row in layer_rows():
        out += textwrap.wrap(f"{row['name']}  [{row['exactness']}]", width, subsequent_indent="  ")
        sides = (("torch", row["torch"]), ("Linen", row["linen"]), ("NNX", row["nnx"]))
        kinds = "; ".join(f"{name}: {', '.join(names) or 'any'}" for name, names in sides)
        out += textwrap.wrap(kinds, width, initial_indent="  ", subsequent_indent="    ")
        for line in row["layouts"]:
            out += textwrap.wrap(line, width, initial_indent="  - ", subsequent_indent="    ")
        if row["note"]:
            out += textwrap.wrap(row["note"], width, initial_indent="  ", subsequent_indent="  ")
        for refused in row["refused"]:
            text = f"refused: {refused['what']}: {refused['reason']}. {refused['rewrite']}"
            out += textwrap.wrap(text.strip(), width, initial_indent="  ", subsequent_indent="    ")
        out.append("")
    for text in (*BY_RULES, NO_WEIGHTS):
        out += textwrap.wrap(text, width, subsequent_indent="  ")
    return "\n".join(out)
