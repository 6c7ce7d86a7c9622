"""The contenders of `bench.py file`, each in a process of its own: torch's file in, Flax's file out, on the disk.

A job: source, bin, like, truth, out, config (the folder of the model), hugging (its Flax class), max_memory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import checkpoints
from benchmarks.measuring import NotRun
from benchmarks.processes import Job, Made, Worker, serve


def _sync(out: Path) -> Path:
    """`out`, once it is on the disk."""
    fd = os.open(out, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return out


def _checked(job: Job) -> Any:
    return lambda made: checkpoints.check(checkpoints.read(Path(job["out"])), checkpoints.read(Path(job["truth"])))


def _renamed(job: Job) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """torch name -> (path, axes): what a script that somebody wrote for this one model knows."""
    leaves = checkpoints.KINDS[job["kind"]].leaves(job["scale"])
    return {leaf.torch: (leaf.flax, leaf.axes) for leaf in leaves if leaf.flax}


def graftax(job: Job) -> tuple[Any, Any]:
    """The plan is inferred from names and shapes, and run."""
    import graftax.api
    import graftax.execute.streamed
    import graftax.formats.safetensors_file
    import graftax.formats.spec_file
    import graftax.match.planning

    return lambda: graftax.port_file(job["source"], job["like"], job["out"], max_memory=job["max_memory"]), _checked(
        job
    )


def naive_numpy(job: Job) -> tuple[Any, Any]:
    """Load all, transpose, save: with NumPy."""
    import ml_dtypes  # noqa: F401
    import numpy as np
    from safetensors.numpy import load_file, save_file

    names = _renamed(job)

    def work() -> Any:
        out = {}
        for name, array in load_file(job["source"]).items():
            if name in names:
                path, axes = names[name]
                out[path] = array if axes is None else np.ascontiguousarray(array.transpose(axes))
        save_file(out, job["out"])
        return _sync(Path(job["out"]))

    return work, _checked(job)


def naive_torch(job: Job) -> tuple[Any, Any]:
    """The same with torch's tensors, from safetensors."""
    from safetensors.torch import load_file, save_file

    return _with_torch(job, lambda: load_file(job["source"]), save_file)


def torch_load(job: Job) -> tuple[Any, Any]:
    """The same from what torch.save wrote."""
    import torch
    from safetensors.torch import save_file

    return _with_torch(job, lambda: torch.load(job["bin"], map_location="cpu", weights_only=True), save_file)


def _with_torch(job: Job, load: Any, save: Any) -> tuple[Any, Any]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    names = _renamed(job)

    def work() -> Any:
        out = {}
        for name, tensor in load().items():
            if name in names:
                path, axes = names[name]
                out[path] = tensor if axes is None else tensor.permute(axes).contiguous()
        save(out, job["out"])
        return _sync(Path(job["out"]))

    return work, _checked(job)


def transformers(job: Job) -> tuple[Any, Any]:
    """transformers' own converter, and its way to save. from_pretrained would draw random weights first, which takes
    longer than all the rest: the converter is given the model's shapes instead."""
    if not job["hugging"]:
        raise NotRun("transformers has no Flax class for it")
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is looked up on the network
    import transformers as hf
    from flax.serialization import to_bytes
    from transformers.modeling_flax_pytorch_utils import load_pytorch_checkpoint_in_flax_state_dict as convert

    hf.logging.set_verbosity_error()
    cls = getattr(hf, job["hugging"])
    model = cls(cls.config_class.from_pretrained(job["config"]), _do_init=False)
    like = SimpleNamespace(params=model.params_shape_tree, base_model_prefix=model.base_model_prefix)
    out = Path(job["out"])

    def work() -> Any:
        out.write_bytes(to_bytes(convert(like, job["source"], is_sharded=False)))
        return _sync(out)

    def check(made: Made) -> int:
        return checkpoints.check(_msgpack(made), checkpoints.read(Path(job["truth"])))

    return work, check


def weightbridge(job: Job) -> tuple[Any, Any]:
    """weightbridge finds the names by itself, as graftax does."""
    import ml_dtypes  # noqa: F401
    import numpy as np
    import weightbridge as other
    from safetensors.numpy import load_file, save_file

    tensors = json.loads(Path(job["like"]).read_text())["tensors"]

    def work() -> Any:
        like = {name: np.empty(entry["shape"], entry["dtype"]) for name, entry in tensors.items()}
        try:
            made = other.adapt(load_file(job["source"]), like, "pytorch", "flax", ".", "/")
        except Exception as error:  # its own way to say that it finds no mapping
            raise NotRun(f"finds no mapping: {str(error).partition(chr(10))[0][:120]}") from error
        save_file({name: np.ascontiguousarray(array) for name, array in made.items()}, job["out"])
        return _sync(Path(job["out"]))

    return work, _checked(job)


def _msgpack(path: Path) -> dict[str, Made]:
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    return flatten_dict(msgpack_restore(path.read_bytes()), sep="/")


WORKERS: dict[str, Worker] = {
    function.__name__: function
    for function in (graftax, naive_numpy, naive_torch, torch_load, transformers, weightbridge)
}

if __name__ == "__main__":
    serve(WORKERS)
