"""Recognise training state (what a training run saves beside its weights) by the whole words of a name and by the
structure under it.

A name that only contains such a word (`upscaler`, `optimizer_head`, `strng`) proves nothing: all words of the name must
be known. This module handles names and nests of torch tensors; `training_tree` handles trees of paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_STATES = frozenset({"state", "states", "dict", "dicts"})
_QUALIFIERS = _STATES | {"lr", "grad", "amp", "loss", "native", "last", "history", "all", "tracker", "random"}
_QUALIFIERS |= {"cpu", "cuda", "gpu", "xla", "mps", "torch", "np", "numpy", "python"}
"""Words that may stand with a family's own: `lr_scheduler`, `last_optimizer_state`, `cuda_rng_state_all`."""
_FAMILIES = {
    "optimizer": frozenset({"optim", "optims", "optimizer", "optimizers", "optimiser", "optimisers"}),
    "scheduler": frozenset({"sched", "scheds", "scheduler", "schedulers"}),
    "scaler": frozenset({"scaler", "scalers"}),
    "rng": frozenset({"rng", "rngs", "prng"}),
    "callbacks": frozenset({"callback", "callbacks"}),
    "loops": frozenset({"loops"}),
}
USUAL = frozenset(
    {"state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "state", "variables"}
    | {"params", "parameters", "weights", "ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema"}
    | {"ema_params", "params_ema", "g_ema", "teacher", "student"}
)
"""Names that training scripts give the container of a model's weights."""
_NOTES = frozenset({"args", "arguments", "config", "configs", "cfg", "conf", "settings", "options", "opts", "meta"})
_NOTES |= {"metadata", "info", "version", "date", "time", "timestamp", "path", "git", "metrics", "metric", "results"}
"""Words for run metadata. They prove nothing about tensors: a model may have its own `options`."""
_SETTINGS = frozenset({"hparams", "hyperparams", "hyperparameters"})
_SMALL = frozenset({"scheduler", "scaler", "loops"})
"""Families whose states are single numbers. A larger tensor under such a name is something else (a feature scaler)."""

_FIELDS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"})
_FIELDS |= {"acc_delta", "sum", "ax", "mu", "prev", "step_size", "exp_avg_sq_row", "exp_avg_sq_col", "momentum"}
"""Fields that torch's and other common optimizers keep for each parameter."""

MOMENTS_OF_ADAM = (("mu", "nu"), ("m", "v"), ("exp_avg", "exp_avg_sq"))
"""What those call the two moments who write their own optimizer. The names prove nothing unless both repeat the weights
beside a counter: attention has a matrix `v`."""

_COUNTS = frozenset({"epoch", "epochs", "step", "steps", "iteration", "iterations", "iter", "iters", "seed"})
_COUNTS |= {"loss", "losses", "acc", "accuracy", "lr"}
_OF_COUNTS = frozenset({"global", "best", "current", "last", "val", "valid", "validation", "train", "training", "test"})
_OF_COUNTS |= {"eval", "num", "n", "count", "total", "start", "min", "max", "avg", "average"}
_BEST = frozenset({"score", "metric", "fitness", "prec", "precision", "recall", "auc", "f", "map", "iou", "miou"})
_BEST |= {"psnr", "ssim", "ppl", "perplexity", "error", "err", "wer", "bleu", "val"}
"""Quantities of which a run keeps the best value. Without `best` in front, a model may use these names."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^A-Za-z0-9]+")


def family(name: Any) -> str:
    """The kind of training state with this name: "optimizer", "scheduler", "scaler", "rng", "callbacks", "loops" or
    "settings"; "" for any other name."""
    words = words_of(name)
    rest = words - _QUALIFIERS
    if "".join(_in_order(name)) in _SETTINGS:
        return "settings"
    if words >= {"opt"} and words <= {"opt"} | _STATES and len(words) > 1:
        return "optimizer"
    if not rest and "random" in words and words & {"state", "states"}:
        return "rng"
    return next((kind for kind, own in _FAMILIES.items() if rest and rest <= own), "")


def is_count(name: Any) -> bool:
    """True for the name of a number of the training run: an epoch, a step, a loss, the best accuracy."""
    words = words_of(name)
    if words & _COUNTS and words <= _COUNTS | _OF_COUNTS:
        return True
    best = "best" in words and bool(words & _BEST) and words <= _BEST | _OF_COUNTS
    return best or "".join(_in_order(name)) == "learningrate"


def is_usual(name: Any) -> bool:
    """True for a usual name of the container of a model's weights."""
    return isinstance(name, str) and name.lower() in USUAL


def is_note(name: Any) -> bool:
    """True for a name of run metadata: its arguments, a date, an optimizer."""
    words = words_of(name)
    return bool(family(name)) or bool(words & _NOTES and words <= _NOTES | _OF_COUNTS | _QUALIFIERS | {"hyper", "run"})


def is_training_state(name: Any, value: Any, lightning: bool = False) -> bool:
    """True if a dict or list with tensors is training state by its own structure. A name alone is not enough: the
    tensors must be of the kind that such state has. In a Lightning checkpoint (`lightning`) the name is enough."""
    if is_optimizer(value) or _is_grad_scaler(value):
        return True
    kind = family(name)
    tensors = list(tensors_in(value))
    if kind == "optimizer":
        return _is_optimizer_part(value)
    if kind == "scheduler" and "lr" in words_of(name):
        return all(len(getattr(tensor, "shape", ())) <= 1 for tensor in tensors)
    if kind == "rng":
        return all(map(_is_random, tensors))
    if kind:
        return (lightning and kind in ("callbacks", "settings", "loops")) or all(map(_is_small, tensors))
    return isinstance(value, (list, tuple)) and is_count(name) and all(map(_is_small, tensors))


def has_training_name(name: Any) -> bool:
    """True if the name alone marks this as training state. If the structure does not confirm it (`is_training_state`),
    graftax asks."""
    kind = family(name)
    return bool(kind) and (kind not in _SMALL or "lr" in words_of(name) or kind == "loops")


def is_lightning(run: Any) -> bool:
    """True for a checkpoint as Lightning writes it."""
    return isinstance(run, dict) and "pytorch-lightning_version" in run


def holds_optimizer(value: Any) -> bool:
    """True if an optimizer's state stands anywhere in it."""
    if not isinstance(value, (dict, list, tuple)):
        return False
    return is_optimizer(value) or any(map(holds_optimizer, _children(value)))


def is_optimizer(value: Any) -> bool:
    """True for the state of a torch optimizer, or for a container of only such states."""
    if isinstance(value, dict) and "param_groups" in value:
        groups = value["param_groups"]
        return isinstance(groups, (list, tuple)) and all(isinstance(group, dict) for group in groups)
    if not isinstance(value, (dict, list, tuple)):
        return False
    children = [child for child in _children(value) if next(tensors_in(child), None) is not None]
    return bool(children) and all(map(is_optimizer, children))


def _is_optimizer_part(value: Any) -> bool:
    """True if a value with an optimizer's name holds or wraps the fields of an optimizer, and no container of
    weights."""
    if not isinstance(value, dict):
        return False
    state = value.get("state")
    if isinstance(state, dict) and state and all(type(key) is int for key in state):  # keyed by parameter number
        return True
    if holds_optimizer(value):
        return not any(is_usual(key) and key != "state" and isinstance(child, dict) for key, child in value.items())

    def fields(node: Any) -> list[bool]:
        found: list[bool] = []
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(child, (dict, list, tuple)):
                found += fields(child)
            elif hasattr(child, "dtype") and not _is_small(child):
                found.append(key in _FIELDS)
        return found

    known = fields(value)
    return all(known)


def is_random_bytes(name: Any, tensor: Any) -> bool:
    """True for the bytes of a random generator, as torch.get_rng_state gives them."""
    return _dtype(tensor) == "uint8" and family(name) == "rng"


def is_counter(name: Any, tensor: Any) -> bool:
    """True for a number of the training run that is stored as a tensor of one element."""
    return _is_small(tensor) and is_count(name)


def tensors_in(value: Any) -> Iterator[Any]:
    """Every tensor in a nest: every value with a dtype. The caller must have refused nests that are too large or
    contain themselves."""
    if isinstance(value, (dict, list, tuple)):
        for child in _children(value):
            yield from tensors_in(child)
    elif hasattr(value, "dtype"):
        yield value


def _is_random(tensor: Any) -> bool:
    """True for the bytes of a torch generator, the 624 words of a Mersenne Twister, or a number."""
    shape = tuple(getattr(tensor, "shape", ()))
    return "int" in _dtype(tensor) and (
        _is_small(tensor) or shape == (624,) or (_dtype(tensor), len(shape)) == ("uint8", 1)
    )


def _dtype(value: Any) -> str:
    return str(getattr(value, "dtype", ""))


def _children(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)


def _is_grad_scaler(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"scale", "growth_factor"} <= value.keys()
        and all(map(_is_small, tensors_in(value)))
    )


def _is_small(tensor: Any) -> bool:
    shape = getattr(tensor, "shape", None)
    return shape is not None and all(n <= 1 for n in shape)


def _in_order(name: Any) -> list[str]:
    """The words of a name in lower case: split at signs, at digits and at capitals."""
    if not isinstance(name, str):
        return []
    parts = re.split(r"[_.\-/: ]+", name)
    return [word.lower() for part in parts for word in _WORD.findall(part)]


def words_of(name: Any) -> frozenset[str]:
    """The words of a name without its numbers (`optimizer_0`, `best_acc1`)."""
    return frozenset(word for word in _in_order(name) if not word.isdigit())
