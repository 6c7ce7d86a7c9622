"""Files and folders whose weights graftax does not read: what each one is, and what the user can do.

One table with one row for each kind. The signs of a row are bytes at the beginning, names, or the content of a folder;
all signs of a row must be present. Slices of tensors are recognised by unmistakable names; for other names there is a
hint if the tensors do not fit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from graftax.errors import Failure, FormatError, StorageError, UnsafeInputError, escape
from graftax.formats.io import files
from graftax.formats.io.zip_read import first_member_name

_ELSEWHERE = "Save the weights as .safetensors with the library that wrote it."
_AGAIN = "Download it again: this is a web page of the site."
_KERAS = (
    "With Keras: numpy.savez('weights.npz', **{w.path: w.numpy() for w in keras.saving.load_model(PATH).weights}), "
    "then open weights.npz."
)
_TENSORFLOW = (
    "With TensorFlow: reader = tf.train.load_checkpoint(PREFIX); numpy.savez('weights.npz', **{name: "
    "reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}), then open weights.npz."
)
_ONNX = (
    "Take the weights from the framework that exported it; or, with onnx: numpy.savez('weights.npz', **{t.name: "
    "onnx.numpy_helper.to_array(t) for t in onnx.load(PATH).graph.initializer}), then open weights.npz."
)
_PADDLE = (
    "With Paddle: numpy.savez('weights.npz', **{k: v.numpy() for k, v in paddle.load(PATH).items()}), then open it."
)
_DCP = (
    "Join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt (dcp_to_torch_save in "
    "Python), then open weights.pt."
)
_ZERO = "Join it where DeepSpeed is: python zero_to_fp32.py FOLDER OUT (it lies in the folder), then open OUT."
_ZARR = (
    "Give the arrays their names: numpy.savez('weights.npz', **{name: array[...] for name, array in "
    "zarr.open_group(PATH, mode='r').arrays()}), then open weights.npz."
)
_PICKLE = (
    "Unpickling runs what its author wrote. Where you trust that: flax.serialization.msgpack_serialize of the nested "
    "dict, or numpy.savez, makes a file that graftax opens."
)
_UNPACK = "Unpack it, then open what is in it."


@dataclass(frozen=True, slots=True)
class Foreign:
    """A kind of file: `what` it is (with an article), and `next`: what to do.

    begins: bytes at offset `at`, in lower case, one of which must be present (in text, leading white space is skipped).
    contains: bytes that must be among the first 512. names: globs for the file's name, one of which must match. inside:
    globs joined by '|', each of which must match a name in the folder (folders end in '/'). weights: True if it holds
    weights; a web page does not. unsafe: reading it runs code. torch: torch.save writes such files.
    """

    what: str
    next: str
    begins: tuple[bytes, ...] = ()
    at: int = 0
    contains: bytes = b""
    names: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    weights: bool = True
    unsafe: bool = False
    torch: bool = False


_PICKLES = tuple(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5))
_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The magic number of torch.save's legacy files, which are pickles too."""
_PROTOBUF = (b"\x08",)
_ZARR_FILES = (".zarray", ".zgroup", ".zmetadata", ".zattrs", "zarr.json")
_ZLIB = (b"x\x01", b"x^", b"x\x9c", b"x\xda")

FOREIGN: tuple[Foreign, ...] = (
    # no weights: what a download can produce in place of a checkpoint
    Foreign(
        "a Git LFS pointer, not the file it stands for",
        "Fetch the file itself: git lfs pull",
        (b"version https://git-lfs",),
        weights=False,
    ),
    Foreign("an HTML page saved in place of a checkpoint", _AGAIN, (b"<!doctype html", b"<html"), weights=False),
    Foreign("an OpenVINO model", _ELSEWHERE, (b"<?xml",), contains=b"<net "),
    Foreign(
        "an XML document (often a storage service's error)",
        "Read its text, then download it again.",
        (b"<?xml",),
        weights=False,
    ),
    Foreign("compressed by gzip", "Unpack it first.", (b"\x1f\x8b",), weights=False),
    Foreign("compressed by zstd", "Unpack it first.", (b"\x28\xb5\x2f\xfd",), weights=False),
    Foreign("compressed by xz", "Unpack it first.", (b"\xfd7zxz\0",), weights=False),
    Foreign("compressed by bzip2", "Unpack it first.", (b"bzh",), contains=b"1AY&SY", weights=False),
    # Keras, TensorFlow
    Foreign("an HDF5 file (as Keras writes)", _KERAS, (b"\x89hdf\r\n",)),
    Foreign("a Keras archive (.keras)", _KERAS, (b"metadata.json", b"config.json"), 30, contains=b"PK\x03\x04"),
    Foreign("a Keras archive (.keras)", _KERAS, (b"pk\x03\x04",), names=("*.keras",)),
    Foreign("a TensorFlow SavedModel", _TENSORFLOW, _PROTOBUF, names=("saved_model.pb",)),
    Foreign("a TensorFlow SavedModel", _TENSORFLOW, inside=("saved_model.pb|saved_model.pbtxt",)),
    Foreign("a frozen TensorFlow graph", _TENSORFLOW, (b"\n",), names=("*.pb",)),
    Foreign("a part of a TensorFlow checkpoint", _TENSORFLOW, names=("*.data-[0-9]*-of-[0-9]*",)),
    Foreign("the index of a TensorFlow checkpoint", _TENSORFLOW, (b"\0\0",), names=("*.index",)),
    Foreign("a TensorFlow checkpoint's note of its latest", _TENSORFLOW, (b"model_checkpoint_path:",)),
    Foreign("a TensorFlow checkpoint", _TENSORFLOW, inside=("*.index", "*.data-[0-9]*-of-[0-9]*")),
    Foreign("a TensorFlow Lite model", _ELSEWHERE, (b"tfl3",), at=4),
    Foreign("weights of a TensorFlow.js model", _ELSEWHERE, names=("group*-shard*of*",)),
    # formats for inference
    Foreign("a GGUF file (llama.cpp's: quantized, or laid out anew)", _ELSEWHERE, (b"gguf", b"lmgg", b"tjgg")),
    Foreign("an ONNX model", _ONNX, _PROTOBUF, names=("*.onnx", "*.ort")),
    Foreign("an ONNX model", _ONNX, _PROTOBUF, contains=b"onnx"),
    Foreign("an ONNX model", _ONNX, _PROTOBUF, contains=b"pytorch"),
    Foreign("an ONNX Runtime model", _ONNX, (b"ortm",), at=4),
    Foreign("the data of an ONNX model", _ONNX, names=("*.onnx_data", "*.onnx.data")),
    Foreign("a Core ML model", _ELSEWHERE, _PROTOBUF, names=("*.mlmodel",)),
    Foreign("a Core ML package", _ELSEWHERE, inside=("Manifest.json", "Data/")),
    Foreign("a TensorRT engine", _ELSEWHERE, (b"ftrt", b"ptrt")),
    Foreign("an ExecuTorch program", _ELSEWHERE, (b"et12",), at=4),
    Foreign(
        "a torch.export program",
        "With torch: torch.save(torch.export.load(PATH).state_dict, 'weights.pt'), then open weights.pt.",
        (b"pk\x03\x04",),
        names=("*.pt2",),
    ),
    Foreign("an ncnn model", _ELSEWHERE, (b"7767517",)),
    Foreign("a protobuf message, as ONNX, Core ML and TensorFlow write", _ONNX, _PROTOBUF, names=("*.pb", "*.pbtxt")),
    # pickles and arrays of others
    Foreign("a file of Paddle's", _PADDLE, _PICKLES, names=("*.pdparams", "*.pdopt")),
    Foreign("a file of Paddle's", _PADDLE, _PICKLES, contains=b"paddle"),
    Foreign("a Paddle model for inference", _PADDLE, names=("*.pdiparams", "*.pdmodel")),
    Foreign("parameters of MXNet", _ELSEWHERE, (b"\x12\x01" + bytes(14),)),
    Foreign("a joblib file", _PICKLE, _PICKLES, contains=b"joblib", unsafe=True),
    Foreign("a joblib file, compressed", _PICKLE, _ZLIB, names=("*.joblib", "*.pkl*"), unsafe=True),
    Foreign("a pickle of NumPy arrays", _PICKLE, _PICKLES, contains=b"numpy", unsafe=True),
    Foreign("a pickle of JAX arrays", _PICKLE, _PICKLES, contains=b"jax", unsafe=True),
    Foreign("a pickle of Haiku parameters", _PICKLE, _PICKLES, contains=b"haiku", unsafe=True),
    Foreign("a pickle of Flax objects", _PICKLE, _PICKLES, contains=b"flax.", unsafe=True),
    Foreign("a MATLAB file", "Save its arrays with numpy.savez.", (b"matlab 5.0",)),
    Foreign("a NeMo archive", f"{_UNPACK} Its weights are model_weights.ckpt.", (b"ustar",), 257, names=("*.nemo",)),
    # torch.distributed.checkpoint, DeepSpeed, Megatron
    Foreign("a part of a torch.distributed.checkpoint", _DCP, names=("*.distcp",), torch=True),
    Foreign("the index of a torch.distributed.checkpoint", _DCP, _PICKLES, contains=b"torch.distributed.checkpoint"),
    Foreign("a torch.distributed.checkpoint (DCP, as FSDP and torchtitan write)", _DCP, inside=("*.distcp",)),
    Foreign("a DeepSpeed ZeRO checkpoint, its weights divided among processes", _ZERO, inside=("*_optim_states.pt",)),
    Foreign("a DeepSpeed ZeRO checkpoint, its weights divided among processes", _ZERO, inside=("zero_to_fp32.py",)),
    # arrays in folders
    Foreign("a zarr array or group, without a checkpoint's index", _ZARR, inside=("|".join(_ZARR_FILES),)),
    Foreign("the index of a zarr array or group", _ZARR, names=_ZARR_FILES),
    Foreign("a zipped zarr group", _ZARR, (b"pk\x03\x04",), contains=b".zgroup"),
    Foreign("a zipped zarr group", _ZARR, (b"pk\x03\x04",), contains=b"zarr.json"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ranked:
    """The names of a set of files (or folders) that each hold a slice of every tensor. `pattern` matches these names
    and no others, and captures the number of the slice. alone: every file except number 0 counts as a slice even if the
    others are missing."""

    what: str
    next: str
    pattern: str
    alone: bool = True


_MERGE = "Join them with the framework that wrote them, to a tensor-parallel size of 1; then open the result."
RANKED: tuple[Ranked, ...] = (
    Ranked(
        "model-parallel slices, as Meta writes (consolidated.NN.pth)",
        "Join them with transformers: convert_llama_weights_to_hf.py, then open the folder that it writes.",
        r"consolidated\.(\d\d)\.(?:pth|pt)",
    ),
    Ranked(
        "model-parallel slices, as DeepSpeed writes",
        "Join them where DeepSpeed is: ds_to_universal.py, or zero_to_fp32.py; then open the result.",
        r"(?:\w*zero_pp_rank_\d+_)?mp_rank_(\d\d+)_model_states\.pt",
    ),
    Ranked("slices and stages of a model, as DeepSpeed writes", _MERGE, r"layer_\d+-model_(\d\d+)-model_states\.pt"),
    Ranked(
        "model-parallel slices, as Megatron-LM writes",
        "Join them with Megatron-LM: tools/checkpoint/convert.py with --target-tensor-parallel-size 1 "
        "--target-pipeline-parallel-size 1.",
        r"mp_rank_(\d\d)(?:_(\d{3}))?(?:_(\d{3}))?",
    ),
    Ranked("tensor-parallel slices, as vLLM writes", _MERGE, r"model-rank-(\d+)-part-\d+\.safetensors"),
    Ranked(
        "slices of tensors, as torch.distributed.checkpoint writes for Hugging Face",
        "Join them with torch: consolidate_safetensors_files of torch.distributed.checkpoint.",
        r"shard-(\d{5})-model-\d{5}-of-\d{5}\.safetensors",
        alone=False,
    ),
    Ranked(
        "model-parallel slices, as fairseq writes",
        _MERGE,
        r"(?:checkpoint\w*|reshard)-model_part-(\d+)(?:-shard\d+)?\.pt",
    ),
)
_MARKS = ("rank", "consolidated", "layer_", "part", "shard")
"""Every name of RANKED contains one of these."""
_PERHAPS = re.compile(
    r"(?:.*[._-])?(?:rank|shard|part|(?:tp|mp|tensor[_-]?parallel|model[_-]?parallel)[._-]?(?:rank)?)[._-]?(\d+)(?:[._-].*)?",
    re.ASCII,
)
"""Ambiguous names: slices have them, and so do members of an ensemble, folds, or adapters of several ranks."""
_NO_WEIGHTS = re.compile(r"(?:.*[._-])?(?:rng|random|optim\w*|scheduler|scaler)(?:[._-].*)?", re.ASCII)


def refuse_foreign(path: Path, head: bytes, label: str) -> None:
    """FormatError if a file is empty or of a kind in FOREIGN; UnsafeInputError if reading that kind would run code."""
    if not head:
        raise FormatError(f"{label} is empty (0 bytes)", next="Download or write it again.")
    if (row := foreign_file(path.name, head)) is not None:
        raise _refusal(row, label)


def foreign_file(name: str, head: bytes) -> Foreign | None:
    """The row that matches a file's name and first 512 bytes."""
    ours = _is_torch(head)  # then its name does not matter
    lower = head.lower()
    text = lower.removeprefix(b"\xef\xbb\xbf").lstrip()[:32]
    rows = (row for row in FOREIGN if not row.inside and (row.torch or not ours))
    return next((row for row in rows if _shows(row, name, head, lower, text)), None)


def _is_torch(head: bytes) -> bool:
    """True if these are the first bytes of a file by torch.save: a zip whose first member is NAME/data.pkl, or, in old
    files, a pickle of torch's magic number."""
    if head[:2] in _PICKLES:
        return _TORCH in head[:32]
    return (first_member_name(head) or "").endswith("/data.pkl")


def _shows(row: Foreign, name: str, head: bytes, lower: bytes, text: bytes) -> bool:
    if row.begins and not lower.startswith(row.begins, row.at) and (row.at or not text.startswith(row.begins)):
        return False
    if row.contains and row.contains not in head:
        return False
    return not row.names or any(fnmatchcase(name, glob) for glob in row.names)


def refuse_prefix(text: str) -> None:
    """FormatError if `text`, which is not an existing file, is the name prefix of a TensorFlow checkpoint of several
    files."""
    if os.path.isfile(f"{text}.index"):
        raise FormatError(
            f"{escape(text)} is a TensorFlow checkpoint, a format that graftax does not read",
            next=_TENSORFLOW.replace("PREFIX", repr(text)),
        )


def refuse_mlx(shapes: Mapping[str, tuple[int, ...]], label: str) -> None:
    """FormatError if weights that MLX wrote may be convolutions. MLX keeps channels last under torch's names, while
    torch keeps them second. With 3 channels and 3 x 3 taps the shape does not tell."""
    convolutions = [
        Failure("this may be a convolution: MLX keeps its channels last", label, name, found=escape(shape))
        for name, shape in shapes.items()
        if 3 <= len(shape) <= 5 and name.endswith("weight")
    ]
    if convolutions:
        raise FormatError(
            f"{label} was written by MLX, and {len(convolutions)} of its tensors do not have torch's layout:",
            convolutions,
            next="In MLX: w.moveaxis(-1, 1) of every convolution, then mx.save_safetensors with {'format': 'pt'}.",
        )


def refuse_slice(path: Path, label: str) -> None:
    """FormatError if a file, or its folder, belongs to a set that holds slices of tensors."""
    here = Path(os.path.abspath(path)) if isinstance(path, Path) else path  # anything else is a file at a URL
    for place in (here, here.parent) if isinstance(here, Path) else (here,):
        if (found := _ranks(place.name)) is None:
            continue
        try:
            names = os.listdir(place.parent) if isinstance(place, Path) else []
        except OSError:
            names = []
        others = _sets([place.name, *names])[found[0]]
        if _sliced(found[0], others):
            told = f"{len(others)} are beside one another" if len(others) > 1 else "the others are not beside it"
            raise FormatError(
                f"{label} is one of {found[0].what}: it holds a part of every tensor ({told})", next=found[0].next
            )


def _ranks(name: str) -> tuple[Ranked, tuple[int, ...]] | None:
    """The row whose set a name belongs to, and the numbers in the name."""
    if not any(mark in name for mark in _MARKS) or _NO_WEIGHTS.fullmatch(name):
        return None
    for row in RANKED:
        if (match := re.fullmatch(row.pattern, name, re.ASCII)) is not None:
            return row, tuple(int(number) for number in match.groups() if number is not None)
    return None


def _sets(names: Iterable[str]) -> dict[Ranked, set[tuple[int, ...]]]:
    sets: dict[Ranked, set[tuple[int, ...]]] = {}
    for name in names:
        if (found := _ranks(name)) is not None:
            sets.setdefault(found[0], set()).add(found[1])
    return sets


def _sliced(row: Ranked, numbers: set[tuple[int, ...]]) -> bool:
    return len(numbers) > 1 or (row.alone and any(map(any, numbers)))


def _form(name: str) -> str | None:
    """A name of `_PERHAPS` without its number."""
    if (found := _PERHAPS.fullmatch(name)) is None or _NO_WEIGHTS.fullmatch(name):
        return None
    return f"{name[: found.start(1)]}/{name[found.end(1) :]}"


def perhaps_slices(paths: Iterable[Path]) -> str:
    """A hint for tensors that do not fit: their file, or its folder, has a name that slices of a set may have, and
    another of the set stands beside it. Empty if there is no such file. Only the values could tell slices from an
    ensemble."""
    for place in (place for path in paths if isinstance(path, Path) for place in (path, path.parent)):
        if (form := _form(place.name)) is None:
            continue
        try:
            names = os.listdir(os.path.abspath(place.parent))
        except OSError:
            continue
        if other := next((name for name in sorted(names) if name != place.name and _form(name) == form), ""):
            return f"{escape(place.name)} and {escape(other)} may be tensor-parallel slices. If they are: {_MERGE}"
    return ""


def refuse_foreign_folder(path: Path, names: Iterable[str]) -> None:
    """FormatError if a folder with these `names` is one of FOREIGN, or holds a set of RANKED."""
    names = list(names)
    listed = [f"{name}/" if os.path.isdir(path / name) else name for name in names]
    for row in FOREIGN:
        if row.inside and all(any(_fits(name, globs) for name in listed) for globs in row.inside):
            raise _refusal(row, escape(path))
    for row, numbers in _sets(names).items():
        if _sliced(row, numbers):
            raise FormatError(f"{escape(path)} holds {row.what}: {len(numbers)} parts of every tensor", next=row.next)


def refuse_foreign_inside(path: Path, names: Iterable[str], depth: int = 2) -> None:
    """As `refuse_foreign_folder`, for a folder that contains something foreign: a file, or a folder up to `depth`
    levels below."""
    for name in list(names)[:_LOOKED_AT]:
        place = path / name
        try:
            if os.path.isdir(place):
                below = sorted(os.listdir(place)) if depth else []
                refuse_foreign_folder(place, below)
                refuse_foreign_inside(place, below, depth - 1)
            elif (head := files.read_head(place)) and (row := foreign_file(name, head)) and row.weights:
                raise _refusal(row, escape(place))
        except (OSError, StorageError):
            continue  # an unreadable entry shows nothing about the folder


_LOOKED_AT = 50
"""The number of entries of a folder that are checked."""


def _fits(name: str, globs: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs.split("|"))


def _refusal(row: Foreign, label: str) -> FormatError | UnsafeInputError:
    known = ", a format that graftax does not read" if row.weights else ""
    return (UnsafeInputError if row.unsafe else FormatError)(f"{label} is {row.what}{known}", next=row.next)
