"""The library's front: plan, port, load. Everything here takes what the command line takes, and live objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from graftax.adapters import open_tree, plain_tree
from graftax.errors import GraftaxError, UsageError, escape
from graftax.execute.receipt import Receipt
from graftax.execute.streamed import Stream
from graftax.plan_json import load_plan_file
from graftax.planning import Options, make_plan
from graftax.plans import Plan
from graftax.tree import Checkpoint, Side

Tree = Any
"""A checkpoint (path, hub id, `pkg.mod:factory`) or a live tree: state_dict, torch Module, Linen variables,
gx.linen(...), nnx.Module, State, (GraphDef, State), a tree of ShapeDtypeStruct."""


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """A checkpoint on disk as a mapping from path to spec, with `.read(path)` for values.

    Nothing but headers is read. Raises StorageError, FormatError, UnsafeInputError.
    """
    from graftax.formats import open_path

    return open_path(str(path))


def plan(
    source: Tree,
    like: Tree = None,
    rules: Any = None,
    missing: str = "error",
    unused: str = "error",
    dtype: str | Mapping[str, str] | None = None,
    to: Side | None = None,
    overflow: str = "error",
) -> Plan:
    """What goes where, and how, from `source` to the tree `like`. Nothing is moved; look at it, answer its questions.

    rules      a rules file, TOML text, or a list of rule tables
    missing    a leaf of like that no source fills: "error", "keep" (like's own value), "zeros"
    unused     a source tensor that goes nowhere: "error" or "drop"
    dtype      None (a floating dtype that differs is a misfit), "source", "like", a dtype's name, or {selector: one}
    to         the side that comes out, where names do not tell
    overflow   of a cast: "error" or "saturate"

    An incomplete plan is returned, not raised: see `.complete`, `.questions`, `.failures`.
    """
    options = Options(rules, missing, unused, dtype, to, overflow)
    opened, opened_like = open_both(source, like)
    return _runnable(make_plan(opened, opened_like, options), opened_like)


def open_both(source: Tree, like: Tree) -> tuple[Checkpoint, Checkpoint | None]:
    """Both ends opened; where both fail, the graver error (unsafe input, then bad input, then missing)."""
    from graftax.errors import SEVERITY

    found: list[Checkpoint | None] = []
    errors: list[GraftaxError] = []
    for end in (source, like):
        try:
            found.append(None if end is None else open_tree(end))
        except GraftaxError as error:
            errors.append(error)
    if errors:
        raise min(errors, key=lambda e: SEVERITY.index(e.exit_code) if e.exit_code in SEVERITY else len(SEVERITY))
    source_checkpoint, like_checkpoint = found
    if source_checkpoint is None:
        raise UsageError("there is no source")
    return source_checkpoint, like_checkpoint


def load_plan(path: str | PathLike[str]) -> Plan:
    """The plan that `Plan.save` wrote, ready to run on the source it was made for. RulesError, StorageError."""
    return _runnable(load_plan_file(Path(path)), None)


def _runnable(made: Plan, like: Checkpoint | None) -> Plan:
    """The plan with a `run` that gives like's own kind of container."""
    made.runner = lambda plan, source: _rebuild(plan, like, host_arrays(plan, open_tree(source), like)[0])
    replanner = made.replanner
    if replanner is not None:
        made.replanner = lambda plan, line: _runnable(replanner(plan, line), like)
    return made


def host_arrays(made: Plan, source: Checkpoint, like: Checkpoint | None) -> tuple[dict[str, Any], Receipt]:
    """Every leaf of the plan's target as a NumPy array, in like's order, and the receipt."""
    receipt = Receipt()
    run = Stream(made, source, like, receipt, None)
    arrays = dict(run.arrays())
    run.close()
    return arrays, receipt


def _rebuild(
    made: Plan, like: Checkpoint | None, arrays: Mapping[str, Any], sharding: Any = None, rngs: Any = None
) -> Any:
    """`arrays` in like's own kind of container; a nested dict (Flax) or an OrderedDict (torch) where like is a file.

    A plan that runs backwards, or on a file of its own, has no live `like`: it gives the plain container of its side.
    """
    if like is not None and like.rebuild is not None and sharding is None and set(like) == set(arrays):
        return like.rebuild(arrays, adopt=True, **({} if rngs is None else {"rngs": rngs}))
    return plain_tree(made.like, arrays, host=sharding == "host", adopt=True)


def port(
    source: Tree,
    like: Tree = None,
    rules: Any = None,
    missing: str = "error",
    unused: str = "error",
    dtype: str | Mapping[str, str] | None = None,
    to: Side | None = None,
    overflow: str = "error",
    sharding: str | None = None,
    rngs: Any = None,
) -> Any:
    """The weights of `source` as a new tree like `like`; neither is changed. Options as in `plan`.

    Gives: for a torch Module or state_dict an OrderedDict of tensors; for a Linen wrapper or variables, variables; for
    an nnx.Module a new Module; for State or (GraphDef, State) a State; for a path or an abstract tree a nested dict
    (Flax) or an OrderedDict (torch). sharding=None follows like; "host" gives NumPy arrays in a nested dict. rngs:
    nnx.Rngs or a seed, for the random state of a Module from nnx.eval_shape.

    Raises PlanError where the plan is incomplete: its questions and misfits are on the exception.
    """
    if sharding not in (None, "host"):
        raise UsageError(f"sharding={escape(sharding)!r} is not None (as like) or 'host' (NumPy)")
    options = Options(rules, missing, unused, dtype, to, overflow)
    opened, opened_like = open_both(source, like)
    made = make_plan(opened, opened_like, options)
    return _rebuild(made, opened_like, host_arrays(made, opened, opened_like)[0], sharding, rngs)


def port_file(
    source: Tree,
    like: Tree,
    out: str | PathLike[str],
    rules: Any = None,
    missing: str = "error",
    unused: str = "error",
    dtype: str | Mapping[str, str] | None = None,
    to: Side | None = None,
    overflow: str = "error",
    *,
    plan: Plan | None = None,
    format: str | None = None,
    shard_size: int | str | None = None,
    clobber: bool = True,
    max_memory: int | str = "512MiB",
) -> Receipt:
    """Port to a file or folder, entry by entry, atomically: on any failure `out` is what it was before.

    out's ending picks the format (.safetensors .msgpack .npz .pt .pth .bin; none: Orbax for Flax, a sharded folder for
    torch); `format` overrides. plan: a finished plan instead of the options. shard_size: bytes, or text such as "5GB".
    max_memory: what safetensors (also in shards), msgpack and npz are written within, whatever the size of a tensor;
    .pt and Orbax are handed all tensors at once.
    Raises what `port` raises, and StorageError.
    """
    if plan is not None:
        opened = open_tree(source)
        opened_like = None if like is None else open_tree(like)
        made = plan
    else:
        opened, opened_like = open_both(source, like)
        made = make_plan(opened, opened_like, Options(rules, missing, unused, dtype, to, overflow))
    return write_plan(
        made,
        opened,
        opened_like,
        out,
        format=format,
        shard_size=shard_size,
        clobber=clobber,
        max_memory=max_memory,
    )


def write_plan(
    made: Plan,
    source: Checkpoint,
    like: Checkpoint | None,
    out: str | PathLike[str],
    *,
    format: str | None = None,
    shard_size: int | str | None = None,
    clobber: bool = True,
    max_memory: int | str = "512MiB",
    advance: Callable[[int], None] = lambda count: None,
) -> Receipt:
    """Run a plan into a file or folder. `advance` is told of the bytes as they are made."""
    from graftax.formats import Output, save
    from graftax.formats.sizes import parse_size

    made.require_complete()
    receipt = Receipt()
    tiles = Stream(made, source, like, receipt, parse_size(max_memory), advance)
    output = Output(
        made.like.specs,
        tiles.arrays(),
        made.like.side,
        made.like.real_keys,
        made.like.containers,
        None if shard_size is None else parse_size(shard_size),
        tiles=tiles,
    )
    inputs = (source,) if like is None else (source, like)
    receipt.notes = save(str(out), output, format=format, clobber=clobber, inputs=inputs).notes
    tiles.close()
    return receipt


def load_into(
    module: Any,
    source: Tree,
    rules: Any = None,
    missing: str = "error",
    unused: str = "error",
    dtype: str | Mapping[str, str] | None = None,
    to: Side | None = None,
    overflow: str = "error",
) -> Any:
    """Load `source` into a live torch Module or nnx.Module in place, all of it or nothing; gives the module back.

    Options as in `plan`. Everything is planned, read and checked first; then every leaf is assigned.
    """
    from graftax.loading import load_arrays, require_module

    require_module(module)
    opened, like = open_both(source, module)
    made = make_plan(opened, like, Options(rules, missing, unused, dtype, to, overflow))
    arrays, _ = host_arrays(made, opened, like)
    return load_arrays(module, arrays)
