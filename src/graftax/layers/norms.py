"""Rows for normalisation layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graftax.layers.base import Layer, LayerFacts, LayerForm, Makes, Refusal, Setting, Settings, Step
from graftax.layers.leaf_axes import NORM_AXES
from graftax.ops import Drop, Offset

_AFFINE = (Step("weight|gamma", "scale|weight", optional=True), Step("bias|beta", "bias", optional=True))
COUNTER = "num_batches_tracked counts batches for torch's momentum=None; Flax has no such counter"
_EPS32 = 2.0**-23  # finfo(float32).eps, which torch's RMSNorm uses for eps=None


def _epsilon(note: str = "torch 1e-5, Flax 1e-6 by default") -> Setting:
    return Setting("epsilon", "eps", "epsilon", _eps, lambda f: f.get("epsilon"), note)


def _eps(t: Settings) -> Any:
    return _EPS32 if "eps" in t and t["eps"] is None else t.get("eps")


def _momentum(t: Settings) -> Any:
    value = t.get("momentum")
    return None if value is None else 1 - value


def _instance_statistics(facts: LayerFacts) -> bool:
    live = facts.torch_kind.startswith("InstanceNorm") and facts.flax_kind in ("InstanceNorm", "GroupNorm")
    return live and "running_mean" in facts.torch


def _groups(f: Settings) -> Any:
    """num_groups in torch's sense: Flax may state the size of a group instead."""
    if f.get("num_groups") is not None or not f.get("group_size"):
        return f.get("num_groups")
    features = f.get("num_features")
    return features // f["group_size"] if isinstance(features, int) else None


def _no_statistics(facts: LayerFacts) -> bool:
    batch = facts.torch_kind.startswith("BatchNorm") or facts.flax_kind == "BatchNorm"
    return batch and "mean" not in facts.flax and "running_mean" not in facts.torch


def _flat_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    """nnx.LayerNorm over several axes holds a flat scale: num_features is their product."""
    rank = len(facts.torch.get("weight", facts.torch.get("bias", ())))
    if rank < 2 or len(facts.flax.get("scale", facts.flax.get("bias", ()))) != 1:
        return
    axes = " ".join("abcdefgh"[:rank])
    steps = tuple(Step(step.torch, step.flax, f"{axes} -> ({axes})", optional=True) for step in _AFFINE)
    yield LayerForm("layer norm, flat", steps, "identity", why="scale and bias pair by name, with their axes merged")


_STATISTICS = (
    *_AFFINE,
    Step("running_mean", "mean"),
    Step("running_var", "var"),
    Step("num_batches_tracked", (), (Drop(COUNTER, fill=0.0),), optional=True),
)

NORM_ROWS: tuple[Layer, ...] = (
    Layer(
        "LayerNorm",
        torch=("LayerNorm",),
        linen=("LayerNorm",),
        forms=(
            LayerForm("layer norm", _AFFINE, "identity", why="scale and bias pair by name"),
            Makes(_flat_forms, ("layer norm over several axes, flat in NNX: a b -> (a b)",)),
        ),
        settings=(_epsilon(),),
        axes=NORM_AXES,
        note="Over several axes (a, b): reduction_axes=feature_axes=(-2, -1). use_fast_variance=True loses precision "
        "at a large mean.",
    ),
    Layer(
        "GroupNorm",
        torch=("GroupNorm",),
        linen=("GroupNorm",),
        forms=(LayerForm("group norm", _AFFINE, "identity", why="scale and bias pair by name"),),
        settings=(
            _epsilon(),
            Setting("num_groups", "num_groups", "num_groups", lambda t: t.get("num_groups"), _groups,
                    "Flax 32 by default"),
        ),
        axes=NORM_AXES,
        note="use_fast_variance=True loses precision at a large mean.",
    ),
    Layer(
        "InstanceNorm",
        torch=("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        linen=("InstanceNorm",),
        forms=(LayerForm("instance norm", _AFFINE, "identity", why="scale and bias pair by name"),),
        settings=(_epsilon(),),
        refusals=(
            Refusal(
                _instance_statistics,
                "InstanceNorm(track_running_stats=True)",
                "in evaluation torch uses its running statistics, Flax's InstanceNorm always those of the input",
                "Use a Flax BatchNorm(use_running_average=True): in evaluation the two are the same.",
            ),
        ),
        axes=NORM_AXES,
        note="torch has no scale and bias unless affine=True; Flax has them by default (use_scale, use_bias).",
    ),
    Layer(
        "RMSNorm",
        torch=("RMSNorm",),
        linen=("RMSNorm",),
        forms=(
            LayerForm("rms norm", _AFFINE[:1], "identity", why="the scale pairs by name"),
            LayerForm("rms norm, zero-centred", (Step("weight|gamma", "scale|weight", (Offset(1.0),)),), "zero-centred",
                 rule="offset = 1", why="the torch weight is the scale minus one", offered=False),
        ),
        settings=(_epsilon("torch None is finfo(float32).eps, Flax 1e-6"),),
        exactness="exact; measured for the zero-centred form (x + 1)",
        axes=NORM_AXES,
        note="Variants that store scale - 1 are zero-centred: `offset = 1`. No file shows it, and how many values "
        "survive depends on the values: measured, never assumed.",
    ),
    Layer(
        "BatchNorm",
        torch=("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "InstanceNorm1d", "InstanceNorm2d",
               "InstanceNorm3d"),
        linen=("BatchNorm",),
        forms=(
            LayerForm("batch norm", _STATISTICS, "identity", why="both sides have running statistics"),
            LayerForm(
                "batch norm without statistics",
                (*_AFFINE, Step("num_batches_tracked", (), (Drop(COUNTER, fill=0.0),), optional=True)),
                "identity",
                why="scale and bias pair by name",
                holds=_no_statistics,
            ),
        ),
        settings=(
            _epsilon("torch 1e-5, Flax 1e-5 by default"),
            Setting("momentum", "momentum", "momentum", _momentum, lambda f: f.get("momentum"),
                    "Flax's is 1 - torch's (defaults .99 and .1); torch's None (a plain average) has no equivalent"),
        ),
        axes=NORM_AXES,
        note="Evaluation is exact. In training torch's running variance is unbiased, Flax's biased: a factor "
        "n / (n - 1). num_batches_tracked is dropped and comes back as 0. An InstanceNorm with running statistics is "
        "a BatchNorm in evaluation.",
    ),
)  # fmt: skip
