"""The checkpoints that benchmarks move: random values under the names and shapes of real architectures, and the truth.

    FOLDER/NAME/model.safetensors   the torch side, config.json beside it
    FOLDER/NAME/bin/pytorch_model.bin   the same, as torch.save writes it (where torch is there)
    FOLDER/NAME/like.json           what to produce: a spec file
    FOLDER/NAME/truth.safetensors   what must come out: made from the same numbers by NumPy alone

`scale` multiplies the number of parameters (of tensors, for the one of small tensors). What was made is used again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import Wrong

Axes = tuple[int, ...]
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64"}
KERNEL: Axes = (1, 0)
CONV: Axes = (2, 3, 1, 0)
_BLOCK = 1 << 24  # bytes compared at a time
_VERSION = 2


@dataclass(frozen=True, slots=True)
class Leaf:
    """torch: its name and shape there; flax: its path, None for what is dropped; axes: the order in which torch's axes
    come out, None where they stay."""

    torch: str
    shape: tuple[int, ...]
    flax: str | None
    axes: Axes | None = None
    dtype: str = "F32"

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * WIDTHS[self.dtype]

    @property
    def flax_shape(self) -> tuple[int, ...]:
        return self.shape if self.axes is None else tuple(self.shape[axis] for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Kind:
    """title: as people call it; leaves(scale): its tensors; config(scale): its config.json. hugging: the Flax class of
    transformers that loads it."""

    title: str
    leaves: Callable[[float], list[Leaf]]
    config: Callable[[float], dict[str, Any]]
    hugging: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """A checkpoint on disk."""

    kind: Kind
    folder: Path
    leaves: Sequence[Leaf]

    @property
    def source(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def bin(self) -> Path:
        return self.folder / "bin" / "pytorch_model.bin"

    @property
    def like(self) -> Path:
        return self.folder / "like.json"

    @property
    def truth(self) -> Path:
        return self.folder / "truth.safetensors"

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def title(self) -> str:
        return f"{self.kind.title}, {len(self.leaves):,} tensors, {self.nbytes / 1e9:.3g} GB"


# ---------------------------------------------------------------- the architectures


def _size(full: int, scale: float, multiple: int = 1) -> int:
    """A width or a depth, when parameters are to be `scale` times as many."""
    return max(multiple, round(full * scale ** (1 / 3) / multiple) * multiple)


def _linear(torch: str, flax: str, shape: tuple[int, int], dtype: str = "F32") -> Leaf:
    return Leaf(f"{torch}.weight", shape, f"{flax}/kernel", KERNEL, dtype)


def _gpt2_config(scale: float) -> dict[str, Any]:
    width = _size(1024, scale, 64)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2Model"],
        "n_embd": width,
        "n_head": width // 64,
        "n_layer": _size(24, scale),
        "n_positions": _size(1024, scale),
        "vocab_size": _size(50257, scale),
        "torch_dtype": "float32",
    }


def _gpt2(scale: float) -> list[Leaf]:
    config = _gpt2_config(scale)
    d = config["n_embd"]
    out = [
        Leaf("wte.weight", (config["vocab_size"], d), "wte/embedding"),
        Leaf("wpe.weight", (config["n_positions"], d), "wpe/embedding"),
    ]
    for i in range(config["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            out += _norm(f"h.{i}.{norm}", f"h/{i}/{norm}", d)
        for part, shape in (
            ("attn.c_attn", (d, 3 * d)),
            ("attn.c_proj", (d, d)),
            ("mlp.c_fc", (d, 4 * d)),
            ("mlp.c_proj", (4 * d, d)),
        ):
            flax = f"h/{i}/{part.replace('.', '/')}"
            out += [_linear(f"h.{i}.{part}", flax, shape), Leaf(f"h.{i}.{part}.bias", shape[1:], f"{flax}/bias")]
    return out + _norm("ln_f", "ln_f", d)


def _norm(torch: str, flax: str, width: int) -> list[Leaf]:
    return [Leaf(f"{torch}.weight", (width,), f"{flax}/scale"), Leaf(f"{torch}.bias", (width,), f"{flax}/bias")]


def _llama_config(scale: float) -> dict[str, Any]:
    width = _size(2048, scale, 128)
    return {
        "model_type": "llama",
        "architectures": ["LlamaModel"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": _size(16, scale),
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "vocab_size": _size(128256, scale),
        "torch_dtype": "bfloat16",
    }


def _llama(scale: float) -> list[Leaf]:
    config = _llama_config(scale)
    d, kv, inner = config["hidden_size"], config["hidden_size"] // 2, config["intermediate_size"]
    out = [Leaf("embed_tokens.weight", (config["vocab_size"], d), "embed_tokens/embedding", None, "BF16")]
    for i in range(config["num_hidden_layers"]):
        for part, shape in (
            ("self_attn.q_proj", (d, d)),
            ("self_attn.k_proj", (kv, d)),
            ("self_attn.v_proj", (kv, d)),
            ("self_attn.o_proj", (d, d)),
            ("mlp.gate_proj", (inner, d)),
            ("mlp.up_proj", (inner, d)),
            ("mlp.down_proj", (d, inner)),
        ):
            out.append(_linear(f"layers.{i}.{part}", f"layers/{i}/{part.replace('.', '/')}", shape, "BF16"))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out.append(Leaf(f"layers.{i}.{norm}.weight", (d,), f"layers/{i}/{norm}/weight", None, "BF16"))
    return [*out, Leaf("norm.weight", (d,), "norm/weight", None, "BF16")]


def _resnet(scale: float) -> list[Leaf]:
    out: list[Leaf] = []
    for i in range(max(4, round(833 * scale))):  # 6 tensors each, 5 of them with weights
        torch, flax = f"blocks.{i}", f"blocks_{i}"
        width = (16, 24, 32, 48)[i % 4]
        out.append(Leaf(f"{torch}.conv.weight", (width, 16, 3, 3), f"params/{flax}/conv/kernel", CONV))
        for role, path in (
            ("weight", f"params/{flax}/norm/scale"),
            ("bias", f"params/{flax}/norm/bias"),
            ("running_mean", f"batch_stats/{flax}/norm/mean"),
            ("running_var", f"batch_stats/{flax}/norm/var"),
        ):
            out.append(Leaf(f"{torch}.norm.{role}", (width,), path))
        out.append(Leaf(f"{torch}.norm.num_batches_tracked", (), None, None, "I64"))
    return out


KINDS: dict[str, Kind] = {
    "gpt2": Kind("GPT-2-medium f32", _gpt2, _gpt2_config, "FlaxGPT2Model"),
    "llama": Kind("Llama-like bf16", _llama, _llama_config, "FlaxLlamaModel"),
    "resnet": Kind("ResNet-like f32, small tensors", _resnet, lambda scale: {}),
}


# ---------------------------------------------------------------- making them


def make(name: str, folder: Path, scale: float = 1.0, seed: int = 0) -> Made:
    """The checkpoint of that name in `folder`/NAME, made where it is not there yet."""
    kind = KINDS[name]
    made = Made(kind, folder / name, kind.leaves(scale))
    mark = made.folder / "made.json"
    wanted = {"version": _VERSION, "scale": scale, "seed": seed, "torch": _torch() is not None}
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return made
    made.folder.mkdir(parents=True, exist_ok=True)
    (made.folder / "config.json").write_text(json.dumps(kind.config(scale)) + "\n")
    made.like.write_text(json.dumps(_spec(made.leaves)) + "\n")
    torch_side = {leaf.torch: (leaf.dtype, leaf.shape) for leaf in made.leaves}
    flax_side = {leaf.flax: (leaf.dtype, leaf.flax_shape) for leaf in made.leaves if leaf.flax}
    with _Writer(made.source, "pt", torch_side) as source, _Writer(made.truth, "flax", flax_side) as truth:
        for leaf, array in zip(made.leaves, _values(made.leaves, seed), strict=True):
            source.write(array)
            if leaf.flax:
                truth.write(array if leaf.axes is None else array.transpose(leaf.axes))
    _make_bin(made)
    mark.write_text(json.dumps(wanted) + "\n")
    os.sync()
    return made


def _values(leaves: Sequence[Leaf], seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """The bits of each tensor: half-normal noise of small scale, as unsigned integers of its width."""
    for number, leaf in enumerate(leaves):
        rng = np.random.default_rng((seed, number))
        if leaf.dtype == "I64":
            yield np.full(leaf.shape, 1000 + number, np.uint64)
            continue
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        bits = values.view(np.uint32)
        yield bits if leaf.dtype == "F32" else (bits >> 16).astype(np.uint16)


class _Writer:
    """A safetensors file, written tensor by tensor in order."""

    def __init__(self, path: Path, side: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        at = 0
        header: dict[str, Any] = {"__metadata__": {"format": side}}
        for name, (dtype, shape) in tensors.items():
            end = at + int(np.prod(shape, dtype=np.int64)) * WIDTHS[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            at = end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        self._file = path.open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, array: np.ndarray[Any, Any]) -> None:
        self._file.write(np.ascontiguousarray(array).data)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _spec(leaves: Sequence[Leaf]) -> dict[str, Any]:
    tensors = {
        leaf.flax: {"shape": list(leaf.flax_shape), "dtype": DTYPE_NAMES[leaf.dtype]} for leaf in leaves if leaf.flax
    }
    return {"graftax_spec": 1, "side": "flax", "tensors": tensors, "keys": {}, "containers": {}}


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch


def _make_bin(made: Made) -> None:
    torch = _torch()
    if torch is None:
        return
    from safetensors.torch import load_file

    made.bin.parent.mkdir(exist_ok=True)
    torch.save(load_file(made.source), made.bin)


# ---------------------------------------------------------------- the truth


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a safetensors file as unsigned integers of its width, mapped; read by this module alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", 8 + length) if path.stat().st_size > 8 + length else np.empty(0, np.uint8)
    out: dict[str, np.ndarray[Any, Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = np.asarray(data[begin:end])
        out[name] = raw.view(f"u{WIDTHS[entry['dtype']]}").reshape(entry["shape"])
    return out


def flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
    """path -> NumPy array, of nested dicts of jax arrays, or of one that is flat already."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= flat(value, f"{path}/")
        else:
            out[path] = np.asarray(value)
    return out


def check(found: Mapping[str, Any], wanted: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """How many values were compared with those that are wanted, all of them equal bit for bit. Raises Wrong."""
    if set(found) != set(wanted):
        missing, more = sorted(set(wanted) - set(found))[:2], sorted(set(found) - set(wanted))[:2]
        raise Wrong(f"other names: {len(found)} found, {len(wanted)} wanted; lacks {missing}, adds {more}")
    count = 0
    for name, expected in wanted.items():
        array = np.asarray(found[name])
        if array.shape != expected.shape or array.dtype.itemsize != expected.dtype.itemsize:
            raise Wrong(f"{name} is {array.dtype}{list(array.shape)}, not of {expected.dtype}{list(expected.shape)}")
        _same(array, expected, name)
        count += expected.size
    return count


def _same(array: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], name: str) -> None:
    left = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    right = expected.reshape(-1).view(np.uint8)
    for start in range(0, len(right), _BLOCK):
        if not np.array_equal(left[start : start + _BLOCK], right[start : start + _BLOCK]):
            raise Wrong(f"{name} differs from the truth")
