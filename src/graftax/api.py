"""The library's public functions: plan, port, load. Each takes whatever the command line takes, and live objects."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, Unpack

from graftax.adapters import plain_tree
from graftax.adapters.shardings import HOST, Place, places, spans_processes
from graftax.errors import Failure, GraftaxError, UsageError
from graftax.execute.device_placement import joint_stage, place_leaves, same_work
from graftax.execute.distributed import peers
from graftax.execute.eager import load
from graftax.execute.factories import call_factory
from graftax.execute.opening import open_weights
from graftax.execute.receipt import Receipt
from graftax.execute.streamed import Stream
from graftax.formats.foreign import perhaps_slices
from graftax.match.planning import make_plan as infer_plan
from graftax.plans import Plan, PlanOptions, WriteOptions
from graftax.plans.options import PlanAndWriteKeywords, PlanKeywords, options_of, takes
from graftax.plans.plan import MadeFrom
from graftax.plans.proof import valid
from graftax.probe.both import both_models
from graftax.tree import Checkpoint, Side
from graftax.tree.gc_paused import gc_paused

Tree = Any
"""A checkpoint (path, hub id, `pkg.mod:factory`) or a live tree: state_dict, torch Module, Linen variables,
gx.linen(...), nnx.Module, State, (GraphDef, State), a tree of ShapeDtypeStruct."""
Module = TypeVar("Module")


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """A checkpoint on disk as a mapping from path to spec, with `.read(path)` for values.

    Nothing but headers is read. Raises StorageError, FormatError, UnsafeInputError.
    """
    from graftax.formats import open_path

    return open_path(str(path))


@takes(PlanOptions)
def plan(source: Tree, like: Tree = None, *positional: Any, **options: Unpack[PlanKeywords]) -> Plan:
    """What goes where, and how, from `source` to the tree `like`. Nothing is moved; look at it, answer its questions.

    An incomplete plan is returned, not raised: see `.complete`, `.questions`, `.failures`. The options, of which rules
    may also be TOML text or a list of rule tables, and dtype a mapping {selector: dtype}:
    """
    planning = options_of(plan, PlanOptions, positional, options)
    opened, opened_like = open_both(source, like, planning.source_side, planning.to)
    return make_plan(opened, opened_like, planning)


def open_both(
    source: Tree,
    like: Tree,
    source_side: Side | None = None,
    to: Side | None = None,
    opener: Callable[..., Checkpoint] = open_weights,
) -> tuple[Checkpoint, Checkpoint | None]:
    """Open `source` and `like`. The given side counts for an end that does not declare its own. The default opener
    opens the weights alone; pass `open_tree` to open every leaf. If both ends fail, raise the graver error (unsafe
    input, then bad input, then missing)."""
    from graftax.errors import SEVERITY

    found: list[Checkpoint | None] = []
    errors: list[GraftaxError] = []
    for end, side in ((source, source_side), (like, to)):
        try:
            found.append(None if end is None else opener(end, side=side))
        except GraftaxError as error:
            errors.append(error)
    if errors:
        raise min(errors, key=lambda e: SEVERITY.index(e.exit_code) if e.exit_code in SEVERITY else len(SEVERITY))
    source_checkpoint, like_checkpoint = found
    if source_checkpoint is None:
        raise UsageError("there is no source")
    return source_checkpoint, like_checkpoint


def make_plan(source: Checkpoint, like: Checkpoint | None, options: PlanOptions) -> Plan:
    """The plan for two opened checkpoints. If tensors do not fit and the source's files may be slices, a failure says
    so."""
    options = replace(options, source_model=_live(options.source_model))
    both = both_models(source, like, options)
    made = infer_plan(source, like, options, None if both is None else both.prove)
    made = made if both is None else both.noted(made)
    fits = not made.failures and all(question.candidates for question in made.questions)
    hint = "" if fits else perhaps_slices(source.storage.files)
    if not hint:
        return made
    slices = Failure("its tensors may be slices of larger tensors", source.label, next=hint)
    return replace(made, failures=(*made.failures, slices))


def _inputs_given(options: PlanOptions) -> bool:
    return options.inputs is not None and options.inputs is not False


def _live(model: Any) -> Any:
    """The live model that `source_model` is, or names."""
    return call_factory(model) if isinstance(model, str) else model


def plan_again(made_from: MadeFrom, rule: str) -> Plan:
    """The same plan, made again with one more rule."""
    options = made_from.options
    return make_plan(made_from.source, made_from.like, replace(options, rules=options.rules.extended(rule)))


def load_plan(path: str | PathLike[str]) -> Plan:
    """The plan that `Plan.save` wrote, ready to run on the source it was made for. RulesError, StorageError."""
    return Plan.load(Path(path))


def prove_port(made: Plan, source: Checkpoint) -> Plan:
    """The plan with the proof that both models agree on the source's weights, where it was made with inputs; the plan
    itself where it was not. ParityError with `.report` if they do not agree."""
    made = replace(made, proof=valid(made.proof, made.entries))
    if made.made_from is None or not _inputs_given(made.made_from.options):
        return made
    made_from = made.made_from
    both = both_models(made_from.source, made_from.like, made_from.options)
    if both is None or both.inputs is None:
        return made
    own_weights = made_from.options.source_model is not None
    # Parity stands above the front, as both use it.
    proving = importlib.import_module("graftax.parity.proving")
    ratio: float | None = None
    if both.is_torch:
        report = proving.prove_port(made, both.module, both.model, both.inputs, source, both.flipped, own_weights)
        ratio = float(max((row.ratio for row in report.outputs), default=0.0))
    elif proving.prove_within_side(made, both.module, both.model, both.inputs, source) is None:
        return made
    if made.proof is None:  # parity holds on these weights; nothing is proved for others
        return made
    proof = replace(made.proof, source=_values_hash(source, made), ratio=ratio)
    return replace(made, proof=proof)


def _values_hash(source: Checkpoint, made: Plan) -> str:
    """sha256 of the names and bytes of the tensors that the plan reads."""
    digest = hashlib.sha256()
    for name in sorted(name for entry in made.entries for name in entry.sources if entry.dropped is None):
        digest.update(name.encode())
        digest.update(source.read(name).tobytes())
    return digest.hexdigest()


def run_plan(made: Plan, source: Tree, sharding: Any = None, rngs: Any = None, receipt: Receipt | None = None) -> Any:
    """Run a plan on `source`. The result is like's own kind of container if the plan was made from a live `like`. See
    `port`."""
    like = None if made.made_from is None else made.made_from.like
    spans = spans_processes(sharding, like if sharding is None and peers() is not None else None)
    with joint_stage("planning", spans):
        opened = open_weights(source, side=made.source.side)
        where = _places(made, like, sharding)
    return _made(made, opened, like, where, spans, rngs, receipt)


def _places(made: Plan, like: Checkpoint | None, sharding: Any) -> dict[str, Place] | None:
    """path -> the devices of its leaf; None: NumPy arrays in a plain container."""
    if isinstance(sharding, str) and sharding == HOST:
        return None
    return places(sharding, made.like.specs, made.like.side, made.like.label, like)


def _leaves(
    made: Plan, source: Checkpoint, like: Checkpoint | None, where: dict[str, Place], spans: bool, receipt: Receipt
) -> dict[str, Any]:
    """path -> leaf of the Flax tree that the plan makes. If it `spans` processes, all of them succeed or all of them
    fail."""
    same_work(made, source, like, where, spans)
    with joint_stage("loading", spans):
        return place_leaves(made, source, like, where, receipt, spans)


@gc_paused()
def _made(
    made: Plan,
    source: Checkpoint,
    like: Checkpoint | None,
    where: dict[str, Place] | None,
    spans: bool,
    rngs: Any,
    receipt: Receipt | None,
) -> Any:
    """The result of a plan, in like's own kind of container. It is a nested dict (Flax) or an OrderedDict (torch) if
    like is a file, and for NumPy arrays.

    An inverse plan and a plan loaded from a file have no live `like`: they give the plain container of their side.
    """
    receipt = Receipt() if receipt is None else receipt
    final = where if made.like.side == "flax" else None
    if final is not None:
        arrays = _leaves(made, source, like, final, spans, receipt)
    else:
        arrays, _ = host_arrays(made, source, like, receipt)
    if where is None or like is None or like.live.rebuild is None or set(like) != set(arrays):
        return plain_tree(made.like, arrays, host=where is None, adopt=True, final=final is not None)
    options = {} if rngs is None else {"rngs": rngs}
    return like.live.rebuild(arrays, adopt=True, sharding=None if final is None else "given", **options)


def host_arrays(
    made: Plan, source: Checkpoint, like: Checkpoint | None, receipt: Receipt | None = None
) -> tuple[dict[str, Any], Receipt]:
    """Every leaf of the plan's target as a NumPy array, in like's order, and the receipt."""
    receipt = Receipt() if receipt is None else receipt
    run = Stream(made, source, like, receipt, None)
    arrays = load(run, source, made.like.specs)
    run.close()
    return arrays, receipt


@takes(PlanOptions)
def port(
    source: Tree,
    like: Tree = None,
    *positional: Any,
    sharding: Any = None,
    rngs: Any = None,
    receipt: Receipt | None = None,
    **options: Unpack[PlanKeywords],
) -> Any:
    """The weights of `source` as a new tree like `like`; neither is changed.

    Gives: for a torch Module or state_dict an OrderedDict of tensors; for a Linen wrapper or variables, variables; for
    an nnx.Module a new Module; for State or (GraphDef, State) a State; for a path or an abstract tree a nested dict
    (Flax) or an OrderedDict (torch).

    sharding  None: as like's leaves are laid out, or as their boxes and metadata say; "host": NumPy arrays in a nested
              dict; a jax Sharding, a Mesh (with like's axis names), gx.on_mesh(mesh, specs, rules), a tree or prefix
              tree of Shardings, or {selector: one}. Each process reads only what its own devices hold; where a
              sharding spans processes, all of them must call, and all fail together.
    rngs      nnx.Rngs or a seed, for the random state of a Module from nnx.eval_shape
    receipt   a types.Receipt to be filled with what was done and read

    Raises PlanError where the plan is incomplete: its questions and misfits are on the exception; and where a leaf
    cannot be laid out as asked. The other options are those of `plan`:
    """
    planning = options_of(port, PlanOptions, positional, options)
    made, opened, opened_like, where, spans = _planned(source, like, planning, sharding)
    return _made(made, opened, opened_like, where, spans, rngs, receipt)


def _planned(
    source: Tree, like: Tree, options: PlanOptions, sharding: Any
) -> tuple[Plan, Checkpoint, Checkpoint | None, dict[str, Place] | None, bool]:
    """The complete plan, both checkpoints, the devices of each leaf, and whether they span several processes."""
    if sharding is None and like is not None and peers() is not None:
        like = open_weights(like, side=options.to)
        spans = spans_processes(None, like)
    else:
        spans = spans_processes(sharding, None)
    with joint_stage("planning", spans):
        opened, opened_like = open_both(source, like, options.source_side, options.to)
        made = make_plan(opened, opened_like, options)
        made.require_complete()
        made = prove_port(made, opened)
        where = _places(made, opened_like, sharding)
    return made, opened, opened_like, where, spans


@takes(PlanOptions, WriteOptions)
def port_file(
    source: Tree,
    like: Tree,
    out: str | PathLike[str],
    *positional: Any,
    plan: Plan | None = None,
    **options: Unpack[PlanAndWriteKeywords],
) -> Receipt:
    """Port to a file or folder, entry by entry, atomically: on any failure `out` is what it was before.

    out's ending picks the format (.safetensors .msgpack .npz .pt .pth .bin; none: Orbax for Flax, a sharded folder for
    torch); `format` overrides. plan: a finished plan instead of the options that make one. What is kept to resume lies
    beside `out`.
    Under an initialised jax.distributed all processes call it alike, each writes a part, and all raise alike; resume is
    for one process.
    Into a folder what stands beside the weights in like's folder (config, tokenizer) is copied unchanged; where like is
    no folder, and the leaves are the source's own, from the source's.
    Raises what `port` raises, StorageError, and UsageError to resume from what is not in files. The options:
    """
    planning = options_of(port_file, PlanOptions, positional, options)
    writing = options_of(port_file, WriteOptions, (), options)
    if plan is not None:
        _refuse_what_a_plan_settled(plan, planning)
    with joint_stage("planning", spans=True):
        if plan is not None:
            opened = open_weights(source, side=plan.source.side)
            opened_like = None if like is None else open_weights(like, side=plan.like.side)
            made = plan
        else:
            opened, opened_like = open_both(source, like, planning.source_side, planning.to)
            made = make_plan(opened, opened_like, planning)
    return write_plan(made, opened, opened_like, out, writing)


def _refuse_what_a_plan_settled(plan: Any, options: PlanOptions) -> None:
    """UsageError for a plan that is none, and for options beside a plan that would not be obeyed."""
    if not isinstance(plan, Plan):
        raise UsageError(f"plan= is a {type(plan).__name__}, not a Plan", next="gx.load_plan(path) reads a saved one.")
    given = [f.name for f in fields(PlanOptions) if getattr(options, f.name) is not f.default]
    if given:
        raise UsageError(f"the plan is finished: {', '.join(given)} cannot change it", next="Plan again with them.")


def write_plan(
    made: Plan,
    source: Checkpoint,
    like: Checkpoint | None,
    out: str | PathLike[str],
    options: WriteOptions,
    advance: Callable[[int], None] = lambda count: None,
) -> Receipt:
    """Run a plan into a file or folder. `advance` is told of the bytes as they are made."""
    from graftax.execute.writing import write
    from graftax.formats.sidecars import for_port

    joined = peers()
    if joined is not None:
        from graftax.execute.shared_write import write_shared

        return write_shared(joined, made, source, like, str(out), options, advance)
    made.require_complete()
    made = prove_port(made, source)
    return write(made, source, like, out, options, for_port(source, like, made.like.specs), advance)


@takes(PlanOptions)
def load_into(
    module: Module,
    source: Tree,
    *positional: Any,
    sharding: Any = None,
    receipt: Receipt | None = None,
    **options: Unpack[PlanKeywords],
) -> Module:
    """Load `source` into a live torch Module or nnx.Module in place, all of it or nothing; gives the module back.

    sharding and receipt are as in `port` (sharding=None: each leaf stays where the module has it).
    Everything is planned, read and checked first; then every leaf is assigned (a torch Module's own load_state_dict
    with its hooks) and read back. PlanError where a module does not hold what it was given: then it has its old values.
    The other options are those of `plan`:
    """
    from graftax.surgery.loading import load_arrays, require_module

    planning = options_of(load_into, PlanOptions, positional, options)
    require_module(module)
    made, opened, like, where, spans = _planned(source, module, planning, sharding)
    receipt = Receipt() if receipt is None else receipt
    if made.like.side == "torch":
        if where is None:
            raise UsageError("a torch Module holds tensors: sharding='host' is for gx.port")
        return load_arrays(module, host_arrays(made, opened, like, receipt)[0], given=True)
    where = dict.fromkeys(made.like.specs, HOST) if where is None else where
    arrays = _leaves(made, opened, like, where, spans, receipt)
    return load_arrays(module, arrays, given=True)
