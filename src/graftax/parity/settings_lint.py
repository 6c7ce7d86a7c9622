"""Find settings that differ between two live models, pair by pair, from their declarations, without running
anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftax.layers.connect import settings_differ
from graftax.parity.pairing import ModulePair
from graftax.parity.report.model import SettingRow, Severity
from graftax.tree import Module

Settings = Mapping[str, Any]

SEVERITIES: Mapping[str, Severity] = {"momentum": "warning"}
"""The severity of a setting of the layer table. Every other setting changes the outputs and is an error."""
MOMENTUM = "it matters only in training: Flax's momentum is 1 - torch's"
SAME_STRIDE = "with a stride, SAME depends on the input's size and rarely equals torch's padding"


@dataclass(frozen=True, slots=True)
class Concept:
    """One setting under the names that models give it. `turn`: torch's value -> the Flax value."""

    name: str
    torch: tuple[str, ...]
    flax: tuple[str, ...]
    severity: Severity = "error"
    turn: Callable[[Any], Any] = lambda value: value


_EPSILON = ("epsilon", "eps", "variance_epsilon", "layer_norm_eps", "rms_norm_eps", "layernorm_epsilon", "norm_eps")
_HEADS = ("num_heads", "n_heads", "num_attention_heads", "heads", "n_head")
_KV = ("num_kv_heads", "num_key_value_heads", "n_kv_heads", "kv_heads")
_THETA = ("rope_theta", "theta", "rotary_base", "rotary_emb_base", "rope_base")
_TIES = ("tie_word_embeddings", "tie_embeddings", "tied", "tie_weights", "share_embeddings", "logits_via_embedding")
_APPROXIMATE = {"none": False, "tanh": True}
CONCEPTS: tuple[Concept, ...] = (
    Concept("epsilon", _EPSILON, _EPSILON),
    Concept("heads", _HEADS, _HEADS),
    Concept("key-value heads", _KV, _KV),
    Concept("rotary theta", _THETA, _THETA),
    Concept("ties", _TIES, _TIES),
    Concept("head_dim", ("head_dim", "d_kv", "head_size"), ("head_dim", "d_kv", "head_size")),
    Concept("softcap", ("logit_softcap", "final_logit_softcapping"), ("logit_softcap", "final_logit_softcap")),
    Concept("sliding window", ("sliding_window", "window_size"), ("sliding_window", "window_size")),
    Concept("activation", ("approximate",), ("approximate",), turn=lambda v: _APPROXIMATE.get(v, v)),
    Concept("negative_slope", ("negative_slope",), ("negative_slope",)),
    Concept("activation", ("hidden_act", "activation_function"), ("hidden_act", "activation_function"), "warning"),
)
"""Compared by attributes of these names, if the layer table does not know a module of either side."""


def lint_settings(
    pairs: Sequence[ModulePair], torch: Mapping[str, Module], flax: Mapping[str, Module]
) -> tuple[SettingRow, ...]:
    """Settings that do not agree, errors first. torch, flax: path -> Module, as the adapters read live models.

    error    the outputs differ (epsilon, padding, strides, heads, statistics of the batch)
    warning  it may make or hide a difference (bfloat16, momentum, SAME with a stride, dropout left on)
    note     worth knowing
    """
    found: list[SettingRow] = []
    for pair in pairs:
        theirs, ours = torch.get(pair.torch), flax.get(pair.flax)
        if theirs is not None and ours is not None:
            found += _pair(pair, theirs, ours)
    covered = {pair.flax for pair in pairs}
    found += [row for path, module in flax.items() if path not in covered for row in _alone(path, module)]
    unique: dict[tuple[Any, ...], SettingRow] = {}
    for row in found:
        unique.setdefault((row.flax, row.setting, repr(row.want), repr(row.have)), row)
    order = ("error", "warning", "note")
    return tuple(sorted(unique.values(), key=lambda row: order.index(row.severity)))


def _pair(pair: ModulePair, torch: Module, flax: Module) -> Iterator[SettingRow]:
    reported: set[str] = set()
    for row in _declared(pair, torch, flax):
        reported.add(row.setting)
        yield row
    for row in _concepts(pair, torch, flax):
        if row.setting not in reported and pair.leaf:
            yield row
    yield from _running(pair, torch, flax)
    yield from _half(pair.torch, pair.flax, torch, flax)
    yield from _alone(pair.flax, flax)


def _declared(pair: ModulePair, torch: Module, flax: Module) -> Iterator[SettingRow]:
    """The rows of settings that the layer table compares."""
    for difference in settings_differ(torch, flax):
        name, want, have = difference.setting.name, difference.want, difference.have
        severity, text = SEVERITIES.get(name, "error"), difference.setting.note
        if name == "momentum":
            text = MOMENTUM
        if name == "padding" and have == "SAME":
            if _ones(flax.settings.get("kernel_size")) and want in (((0, 0),), ((0, 0),) * 2, ((0, 0),) * 3):
                continue  # a window of size one needs no padding
            severity, text = "warning", SAME_STRIDE
        yield SettingRow(pair.torch, pair.flax, name, want, have, severity, text)


def _ones(size: Any) -> bool:
    return size == 1 or (isinstance(size, (tuple, list)) and all(k == 1 for k in size))


def _concepts(pair: ModulePair, torch: Module, flax: Module) -> Iterator[SettingRow]:
    for concept in CONCEPTS:
        theirs, ours = _value(torch.settings, concept.torch), _value(flax.settings, concept.flax)
        if theirs is None or ours is None:
            continue
        want = concept.turn(theirs)
        if type(want) is type(ours) and want != ours:
            text = f"torch has {theirs!r}"
            yield SettingRow(pair.torch, pair.flax, concept.name, want, ours, concept.severity, text)


def _value(settings: Settings, names: Iterable[str]) -> Any:
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def _running(pair: ModulePair, torch: Module, flax: Module) -> Iterator[SettingRow]:
    """Flax uses statistics of the batch, torch running statistics: parity is judged in evaluation mode."""
    tracked = any(role.rpartition(".")[2] == "running_mean" for role in torch.leaves)
    if tracked and flax.settings.get("use_running_average") is False:
        text = "in evaluation mode torch uses the running statistics"
        yield SettingRow(pair.torch, pair.flax, "use_running_average", True, False, "error", text)


_HALF = ("bfloat16", "float16")


def _half(torch_path: str, flax_path: str, torch: Module, flax: Module) -> Iterator[SettingRow]:
    have = flax.settings.get("dtype")
    if have in _HALF and torch.settings.get("dtype") not in _HALF:
        text = "the module computes in this dtype whatever its input is, which hides small faults"
        yield SettingRow(torch_path, flax_path, "dtype", "float32", have, "warning", text)


def _alone(path: str, flax: Module) -> Iterator[SettingRow]:
    """The rows that need the Flax module alone."""
    if flax.settings.get("deterministic") is False and _dropout(flax.settings):
        text = "dropout is on: call .eval(), or pass deterministic=True"
        yield SettingRow("", path, "deterministic", True, False, "warning", text)


def _dropout(settings: Settings) -> bool:
    return any(isinstance(rate := settings.get(name), (int, float)) and rate > 0 for name in ("rate", "dropout_rate"))


# ---------------------------------------------------------------- two Flax models


OWN = frozenset({"name", "order", "input_shape", "output_shape", "inner_shapes", "param_dtype", "parent"})
"""What two equal Flax modules may declare differently: where they stand, what they were called with."""


def flax_settings(
    pairs: Sequence[ModulePair], reference: Mapping[str, Module], flax: Mapping[str, Module]
) -> tuple[SettingRow, ...]:
    """Settings that both modules of a pair declare under one name, with different values. They are warnings: Linen and
    NNX may mean different things by a name."""
    rows: list[SettingRow] = []
    for pair in pairs:
        theirs, ours = reference.get(pair.torch), flax.get(pair.flax)
        if theirs is None or ours is None or not pair.leaf:
            continue
        for name in theirs.settings.keys() & ours.settings.keys() - OWN:
            want, have = theirs.settings[name], ours.settings[name]
            if want != have and None not in (want, have) and not callable(want):
                rows.append(
                    SettingRow(pair.torch, pair.flax, name, want, have, "warning", f"the reference has {want!r}")
                )
    return tuple(sorted(rows, key=lambda row: (row.flax, row.setting)))
