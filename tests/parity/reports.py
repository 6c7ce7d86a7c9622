"""Parity reports made by hand: what the text, the page and the command line have to show well."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from graftax.parity.pairing import ModulePair
from graftax.parity.records import UNIT, Site
from graftax.parity.report.model import Cause, LayerRow, OutputRow, ParityReport, SettingRow, WeightRow

# (torch path in a block, Flax path in a block, torch kind, Flax kind)
BLOCK = [
    ("attention.self.query", "attention/self/query", "Linear", "Dense"),
    ("attention.self.key", "attention/self/key", "Linear", "Dense"),
    ("attention.self.value", "attention/self/value", "Linear", "Dense"),
    ("attention.output.dense", "attention/output/dense", "Linear", "Dense"),
    ("attention.output.LayerNorm", "attention/output/LayerNorm", "LayerNorm", "LayerNorm"),
    ("intermediate.dense", "intermediate/dense", "Linear", "Dense"),
    ("output.dense", "output/dense", "Linear", "Dense"),
    ("output.LayerNorm", "output/LayerNorm", "LayerNorm", "LayerNorm"),
]


def row(
    torch: str, flax: str, kinds: tuple[str, str], rng: random.Random, added: float = 1.0, arrives: float = 1.0,
    free: float = 1.0, call: int = 0, leaf: bool = True,
) -> LayerRow:  # fmt: skip
    """A row whose ratios are about these numbers."""
    floor_in, floor_out, floor_free = (UNIT * rng.uniform(1.0, 6.0) for _ in range(3))
    noise = [math.exp(rng.gauss(0, 0.15)) for _ in range(3)]
    status = "diverges" if added > 5 or arrives > 5 else "ok"
    return LayerRow(
        pair=ModulePair(torch, flax, leaf=leaf, kinds=kinds), site_torch=Site(torch, call), site_flax=Site(flax, call),
        kind=" / ".join(kinds), in_error=floor_in * arrives * noise[0], in_floor=floor_in,
        out_error=floor_out * added * noise[1], out_floor=floor_out, free_error=floor_free * free * noise[2],
        free_floor=floor_free, status=status,
    )  # fmt: skip


def encoder_rows(blocks: int, prefix: tuple[str, str] = ("encoder.layer.", "encoder/layer_"), seed: int = 0) -> Any:
    rng = random.Random(seed)
    rows = [
        row("embeddings.word_embeddings", "embeddings/word_embeddings", ("Embedding", "Embed"), rng),
        row("embeddings.position_embeddings", "embeddings/position_embeddings", ("Embedding", "Embed"), rng),
        row("embeddings.LayerNorm", "embeddings/LayerNorm", ("LayerNorm", "LayerNorm"), rng),
    ]
    for i in range(blocks):
        rows += [row(f"{prefix[0]}{i}.{t}", f"{prefix[1]}{i}/{f}", (a, b), rng) for t, f, a, b in BLOCK]
    rows.append(row("pooler.dense", "pooler/dense", ("Linear", "Dense"), rng))
    rows.append(row("classifier", "classifier", ("Linear", "Dense"), rng))
    return rows


def passing(blocks: int = 12) -> ParityReport:
    outputs = (
        OutputRow("logits", (4, 3), 1.9e-7, 1.5e-7, 1.27, True, {"max_abs": 4.2e-7, "top1": 1.0, "kl": 3.1e-14}),
        OutputRow("hidden", (4, 128, 256), 2.2e-7, 1.8e-7, 1.22, True, {"max_abs": 1.4e-6, "cosine": 1.0}),
    )
    return ParityReport(
        True, outputs, tuple(encoder_rows(blocks)), paired=(8 * blocks + 5, 8 * blocks + 5, 8 * blocks + 5),
        not_traced={"torch:encoder.layer.0.attention.self": "holds no parameters of its own"},
        seconds={"torch": 0.84, "Flax": 6.3, "flax": 1.91, "flax compile": 4.4, "audit": 0.05, "total": 7.2},
        torch_name="BertForSequenceClassification", flax_name="FlaxBertForSequenceClassificationModule",
        settings=(SettingRow("classifier_dropout", "dropout", "rate", 0.1, 0.0, "note", "no effect in evaluation"),),
    )  # fmt: skip


def epsilon(blocks: int = 12) -> ParityReport:
    """An epsilon that is off in every LayerNorm."""
    rng = random.Random(1)
    rows = encoder_rows(blocks)
    seen = 0.0
    for i, old in enumerate(rows):
        if "LayerNorm" in old.kind:
            seen += 1
            rows[i] = row(
                old.site_torch.path, old.site_flax.path, ("LayerNorm", "LayerNorm"), rng, 78, free=60 * seen**0.5
            )
        elif seen:
            rows[i] = replace(old, free_error=old.free_floor * 55 * seen**0.5)
    first = rows[2]
    cause = Cause(
        "epsilon", first.site_flax.path, "torch has eps=1e-12, Flax has epsilon=1e-06", "nn.LayerNorm(epsilon=1e-12)",
        first.out_error, 9.1e-8,
    )  # fmt: skip
    settings = tuple(
        SettingRow(r.site_torch.path, r.site_flax.path, "epsilon", 1e-12, 1e-6, "error", "torch eps=1e-12")
        for r in rows
        if "LayerNorm" in r.kind
    )
    bad = (
        OutputRow("logits", (4, 3), 4.4e-5, 1.5e-7, 293.0, False, {"max_abs": 8.8e-5, "top1": 1.0, "kl": 3.3e-9}),
        OutputRow("hidden", (4, 128, 256), 5.1e-5, 1.8e-7, 283.0, False, {"max_abs": 6.0e-4, "cosine": 0.99999}),
    )
    return replace(
        passing(blocks), ok=False, layers=tuple(rows), first=first, where="out", causes=(cause,), settings=settings,
        outputs=bad,
    )  # fmt: skip


def functional(blocks: int = 4) -> ParityReport:
    """tanh GELU in front of one Dense: code between the modules."""
    rng = random.Random(2)
    rows = encoder_rows(blocks)
    for i, old in enumerate(rows):
        if old.site_torch.path.endswith("output.dense") and "attention" not in old.site_torch.path:
            rows[i] = row(old.site_torch.path, old.site_flax.path, ("Linear", "Dense"), rng, 1, 2400, 900)
    first = next(r for r in rows if r.status != "ok")
    cause = Cause(
        "activation", first.site_flax.path, "torch applies gelu (erf), Flax gelu (tanh approximation)",
        "jax.nn.gelu(x, approximate=False)", first.in_error or 0.0, 1.2e-7,
    )  # fmt: skip
    return replace(
        epsilon(blocks), layers=tuple(rows), first=first, where="in", causes=(cause,), settings=(),
    )  # fmt: skip


def transposed() -> ParityReport:
    """A square kernel that was not transposed; the cause is found; the weights audit sees it too."""
    rng = random.Random(3)
    rows = [
        row("conv1", "Conv_0", ("Conv2d", "Conv"), rng),
        row("bn1", "BatchNorm_0", ("BatchNorm2d", "BatchNorm"), rng),
        row("fc1", "Dense_0", ("Linear", "Dense"), rng, 8.1e6, 1, 8.1e6),
        row("fc2", "Dense_1", ("Linear", "Dense"), rng, 1, 1, 7.7e6),
    ]
    causes = (
        Cause(
            "kernel not transposed", "Dense_0", "params/Dense_0/kernel equals fc1.weight bit for bit",
            "variables['params']['Dense_0']['kernel'] = weight.T", 1.42, 8.8e-8,
        ),
    )  # fmt: skip
    return ParityReport(
        False, (OutputRow("", (8, 10), 1.39, 1.6e-7, 8.7e6, False, {"max_abs": 3.1, "top1": 0.125, "kl": 2.3}),),
        tuple(rows), rows[2], "out", causes,
        (WeightRow("params/Dense_0/kernel", 2304, 2304, None, "from fc1.weight   o i -> i o"),),
        not_traced={"torch:dropout": "holds no parameters", "flax:Dropout_0": "holds no parameters"},
        notes=("Dense_0 computes in float32 of its own choice (dtype=float32).",),
        seconds={"torch": 0.02, "flax": 0.4, "total": 1.1}, paired=(4, 4, 4), torch_name="Net", flax_name="FlaxNet",
    )  # fmt: skip


def unknown() -> ParityReport:
    """NaN at one layer, no cause found."""
    found = transposed()
    first = found.first
    assert first is not None
    broken = replace(first, out_error=math.nan, free_error=math.nan)
    rows = tuple(broken if r is first else r for r in found.layers)
    return replace(found, layers=rows, first=broken, causes=(), weights=())


def weights_only() -> ParityReport:
    """One unit in the last place: every layer agrees."""
    rows = (WeightRow("params/encoder/layer_3/output/dense/kernel", 1, 65536, 1.0, "from encoder.layer.3..."),)
    return replace(passing(2), ok=False, weights=rows)


def outputs_only() -> ParityReport:
    """Traced layers agree, an output has another shape: no layer is to blame."""
    rows = (
        OutputRow("logits", (4, 3), math.inf, 1.5e-7, math.inf, False, {}, "torch gives (4, 3), Flax (4, 1, 3)"),
        OutputRow("hidden", (4, 128, 256), 2.2e-7, 1.8e-7, 1.22, True, {"max_abs": 1.4e-6}),
    )
    return replace(passing(2), ok=False, outputs=rows)


def long_names(blocks: int = 25) -> ParityReport:
    """Over two hundred layers under names of more than a hundred characters, several calls, rows not compared."""
    deep = "model.backbone.vision_tower.vision_model.encoder.transformer_layers_with_adapters."
    rows = encoder_rows(blocks, (deep, deep.replace(".", "/")), seed=4)
    rng = random.Random(5)
    at = 120
    rows[at] = row(rows[at].site_torch.path, rows[at].site_flax.path, ("Linear", "Dense"), rng, 31, 1, 40)
    rows[170] = row(rows[170].site_torch.path, rows[170].site_flax.path, ("Linear", "Dense"), rng, 6.2, 900, 400)
    rows[60] = replace(rows[60], in_error=None, out_error=None, free_error=None, status="not compared", text="shape")
    rows.insert(121, row("lm_head", "embed/attend", ("Linear", "Embed"), rng, call=1))
    return replace(
        functional(2), layers=tuple(rows), first=rows[at], where="out", causes=(),
        not_traced={f"flax:{deep}{i}.dropout": "never called" for i in range(40)},
    )  # fmt: skip


ALL = {
    "passing": passing, "epsilon": epsilon, "functional": functional, "transposed": transposed, "unknown": unknown,
    "weights_only": weights_only, "outputs_only": outputs_only, "long_names": long_names,
}  # fmt: skip
