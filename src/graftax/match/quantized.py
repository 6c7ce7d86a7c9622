"""Recognise a quantized checkpoint: codes of few bits, and the scales that give the codes their meaning.

A cast of the codes alone has the right shape and wrong values, so such a source is refused, and the error names the
scheme. A scale alone proves nothing (`logit_scale`, the scale of a norm, layer scale): each row also needs the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graftax.errors import Failure, PlanError, escape
from graftax.tree import Checkpoint, TensorSpec, split_path, split_words, whole_words

CODES = frozenset(
    {"int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32"}
    | {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}
    | {"float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"}
)
"""dtypes of codes, including integers of 32 bits that hold several codes"""


@dataclass(frozen=True, slots=True)
class Scheme:
    """The tensor `X<beside>` shows that the tensor `X<codes>`, if it exists, holds codes. '.' also stands for '/'.

    `any_dtype`: only this scheme uses these names, so any dtype counts; else the codes must have a dtype of CODES.
    """

    name: str
    beside: str
    codes: str
    any_dtype: bool = False


SCHEMES = (
    Scheme("GPTQ", ".g_idx", ".qweight", any_dtype=True),
    Scheme("GPTQ or AWQ", ".qzeros", ".qweight", any_dtype=True),
    Scheme("GPTQ or AWQ", ".scales", ".qweight", any_dtype=True),
    Scheme("bitsandbytes 4-bit", ".quant_map", "", any_dtype=True),
    Scheme("bitsandbytes 4-bit", ".absmax", "", any_dtype=True),
    Scheme("bitsandbytes int8", ".SCB", ".weight"),
    Scheme("bitsandbytes int8", ".weight_format", ".weight"),
    Scheme("FP8 with inverse scales", "_scale_inv", "", any_dtype=True),
    Scheme("MXFP4 blocks", "_scales", "_blocks"),
    Scheme("compressed-tensors, packed", "_scale", "_packed"),
    Scheme("HQQ", ".scale", ".W_q", any_dtype=True),
    Scheme("HQQ", ".meta.scale", ".W_q", any_dtype=True),
    Scheme("AQLM", ".codebooks", ".codes", any_dtype=True),
    Scheme("EXL2", ".q_scale", ".q_weight", any_dtype=True),
    Scheme("QuIP#", ".SU", ".Qidxs", any_dtype=True),
    Scheme("Quanto", "._scale", "._data", any_dtype=True),
    Scheme("Qwix", ".scale", ".qvalue", any_dtype=True),
    Scheme("torch.ao, affine", ".zero_point", ".scale", any_dtype=True),
    Scheme("affine codes with zero points", "_zero_point", ""),
)
"""The more specific rows come first: a tensor is reported by the first row that fits."""

SCALED = "codes with scales"
"""Codes that no row names; their structure shows them: see `_is_scale`."""
MARKED = "scaled fp8"
_MARK = "scaled_fp8"  # an empty tensor of this name: every float8 weight beside and below it has a scale

_SCALES = frozenset(("scale", "scales", "scaling", "absmax"))
_PLAIN = frozenset(("weight", "weights", "kernel", "embedding", "w"))
_OF_SCALES = _PLAIN | {"input", "inputs", "in", "output", "out", "x", "a", "act", "activation", "activations", "bias"}
_OF_SCALES |= {"quant", "quantized", "quantizer", "quantization", "dequant", "dequantize", "dequantization", "scaled"}
_OF_SCALES |= {"inv", "inverse", "block", "channel", "group", "row", "column", "tensor", "global", "per", "factor"}
_OF_SCALES |= {"factors", "fp", "int", "param", "params"}
"""Words that may stand beside `scale` in the name of a scale of codes: not `logit`, not `norm`, not `layer`."""

_CONFIG_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class Found:
    """One sign of quantization: the scheme, the tensor of codes and the tensor beside it. No tensors if config.json
    states it."""

    scheme: str
    codes: str = ""
    beside: str = ""


def find_quantized(checkpoint: Checkpoint) -> tuple[Found, ...]:
    """Every sign of quantization, one per tensor of codes; empty for a plain checkpoint."""
    specs = checkpoint.specs
    plain = {path.replace("/", "."): path for path in specs}
    endings = tuple({row.beside for row in SCHEMES})
    found: dict[str, Found] = {}
    for name, path in plain.items():
        for row in SCHEMES if name.endswith(endings) else ():
            codes = plain.get(name.removesuffix(row.beside) + row.codes) if name.endswith(row.beside) else None
            if codes is not None and (row.any_dtype or specs[codes].dtype in CODES):
                found.setdefault(codes, Found(row.name, codes, path))
                break
    for item in (*_scaled(specs), *_marked(specs)):
        found.setdefault(item.codes, item)
    return (*_from_config(checkpoint.config), *found.values())


def _scaled(specs: Mapping[str, TensorSpec]) -> Iterator[Found]:
    """Codes of any name with a scale of any name in the same module, or below them."""
    homes: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for path, spec in specs.items():
        if spec.dtype in CODES and len(spec.shape) > 1:
            *module, leaf = split_path(path, "flax" if "/" in path else "torch")
            if not whole_words(leaf) & _SCALES:
                homes.setdefault(tuple(module), []).append((path, leaf))
    for path, spec in specs.items() if homes else ():
        if not whole_words(path) & _SCALES:
            continue
        parts = split_path(path, "flax" if "/" in path else "torch")
        for cut in (1, 2):
            for codes, leaf in homes.get(parts[:-cut], ()) if len(parts) >= cut else ():
                if _is_scale(parts[-cut:], spec, leaf, specs[codes]):
                    yield Found(SCALED, codes, path)


def _is_scale(parts: tuple[str, ...], scale: TensorSpec, leaf: str, codes: TensorSpec) -> bool:
    """True if the name `parts`, beside the codes `leaf`, says that it scales them. It has the whole word `scale`,
    and its other words name these codes or are about codes. A bare `scale` scales only a plain weight. Integers are
    codes only if they are called a weight or the scale is named after them, because index tables and masks are
    integers too."""
    named = frozenset(split_words(leaf))
    words = frozenset(split_words("_".join(parts)))
    if named == {"bias"} or not whole_words(parts[-1]) & _SCALES:
        return False
    if len(parts) > 1 and not whole_words(parts[0]) & (named | {"quantizer", "quant"}):
        return False  # it belongs to another module
    if named <= words:
        return True
    rest = {word for word in words if not word.isdigit()} - _SCALES
    about = rest <= _OF_SCALES and (named <= _PLAIN or (codes.floating and bool(rest)))
    return about and scale.floating and scale.dtype != codes.dtype


def _marked(specs: Mapping[str, TensorSpec]) -> Iterator[Found]:
    """Every float8 weight of a checkpoint that is marked as scaled."""
    for mark in (path for path in specs if path.endswith(_MARK)):
        above = mark[: -len(_MARK)]
        if above and above[-1] not in "./":
            continue
        for path, spec in specs.items():
            if path.startswith(above) and path != mark and len(spec.shape) > 1 and spec.dtype.startswith("float8"):
                yield Found(MARKED, path, mark)


def _from_config(config: Mapping[str, Any] | None) -> list[Found]:
    """What config.json states, at its top level or in the settings of a part."""
    parts = [config or {}]
    parts += [value for value in parts[0].values() if isinstance(value, dict)]
    settings = [part[key] for part in parts for key in _CONFIG_KEYS if isinstance(part.get(key), dict) and part[key]]
    return [Found(str(item.get("quant_method") or item.get("format") or "unnamed")) for item in settings[:1]]


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """PlanError that names the scheme and every tensor of codes, if `checkpoint` looks quantized."""
    found = find_quantized(checkpoint)
    if not found:
        return
    failures = [
        Failure(
            f"holds quantized codes; {escape(item.beside)} holds their scales"
            if item.scheme == SCALED
            else f"is quantized ({item.scheme}), as {escape(item.beside)} shows",
            checkpoint.label,
            item.codes,
            found=str(checkpoint[item.codes]),
            expected="plain values",
        )
        if item.codes
        else Failure(f"config.json: quantization_config says {escape(item.scheme)}", checkpoint.label)
        for item in found
    ]
    names = ", ".join(dict.fromkeys(escape(item.scheme) for item in found))
    stated = " If the weights are plain already, keep them apart from that config.json." if not found[0].codes else ""
    raise PlanError(
        f"{escape(checkpoint.label)} is quantized ({names}):",
        failures,
        next=f"Dequantize it first: load it with the library that wrote it and save plain float weights.{stated}",
    )
