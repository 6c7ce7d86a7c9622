"""Plans as JSON: written whole or not at all, and read as data that may be hostile."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftax.errors import Failure, GraftaxError, RulesError, StorageError, escape, option
from graftax.ops import op_from_json, op_to_json
from graftax.plans.entries import End, Entry
from graftax.plans.proof import Proof, proof_of_json
from graftax.plans.questions import Assumption, Candidate, Proposal, Question
from graftax.tree import Key, TensorSpec

if TYPE_CHECKING:
    from graftax.plans.plan import Plan

SCHEMA = 1
_RULES = re.compile(
    r"^[ \t]*(?:rules[ \t]*=|\[\[[ \t]*rules\b|\{[ \t]*(?:torch|flax|source|target)[ \t]*=)", re.MULTILINE
)
"""What a rules file has but JSON has not."""


def plan_as_json(plan: Plan, candidates: int | None) -> dict[str, Any]:
    """The plan as JSON data, each question with its first `candidates` (None: all); `parts_of_json` reads it."""
    return {
        "graftax_plan": SCHEMA,
        "complete": plan.complete,
        "lossless": plan.lossless,
        "source": _end_json(plan.source),
        "like": _end_json(plan.like),
        "entries": [
            {
                "sources": list(entry.sources),
                "targets": list(entry.targets),
                "ops": [op_to_json(op) for op in entry.ops],
                "evidence": list(entry.evidence),
            }
            for entry in plan.entries
        ],
        "questions": [question.as_json(candidates) for question in plan.questions],
        "assumptions": [assumption.as_json() for assumption in plan.assumptions],
        "failures": [failure.as_json() for failure in plan.failures],
        "reads": list(plan.reads),
        "proof": None if plan.proof is None else plan.proof.as_json(),
    }


@dataclass(frozen=True, slots=True)
class PlanParts:
    """The parts of a plan's JSON, each valid by itself; whether they fit together is not checked here."""

    ends: tuple[End, End]
    proposal: Proposal
    failures: tuple[Failure, ...]
    proof: Proof | None = None


@contextmanager
def damaged_plan(label: str) -> Generator[None]:
    """Turn any error in a plan's data into a RulesError that names the plan."""
    try:
        yield
    except GraftaxError as error:
        raise RulesError(f"{escape(label)}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RulesError(f"{escape(label)} is damaged: {type(error).__name__} {escape(error)}") from error


def parts_of_json(data: Any) -> PlanParts:
    """The parts of the plan that `plan_as_json` gave. RulesError, or an error that `damaged_plan` turns into one."""
    if not isinstance(data, dict) or cast("dict[str, Any]", data).get("graftax_plan") != SCHEMA:
        raise RulesError(f"not a graftax plan of schema {SCHEMA}")
    table = cast("dict[str, Any]", data)
    source, like = _end_from_json(table["source"]), _end_from_json(table["like"])
    entries = tuple(
        Entry(
            _names(item["sources"]),
            _names(item["targets"]),
            tuple(op_from_json(op) for op in item["ops"]),
            _names(item.get("evidence", ())),
        )
        for item in table["entries"]
    )
    questions = tuple(
        Question(
            str(item["kind"]),
            str(item["text"]),
            _names(item["targets"]),
            _names(item["sources"]),
            tuple(Candidate(str(c["rule"]), _names(c["sources"]), str(c["evidence"])) for c in item["candidates"]),
        )
        for item in table.get("questions", ())
    )
    assumptions = tuple(
        Assumption(str(item["text"]), str(item["check"]), _names(item["targets"]))
        for item in table.get("assumptions", ())
    )
    failures = tuple(
        Failure(**{str(key): str(value) for key, value in item.items()}) for item in table.get("failures", ())
    )
    reads = _names(table.get("reads", ()))
    proposal = Proposal(entries, questions, assumptions, (), reads)
    return PlanParts((source, like), proposal, failures, proof_of_json(table.get("proof")))


def read_json(path: Path) -> Any:
    """The JSON data at `path`. StorageError if it cannot be read, RulesError if it is not JSON."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot read the plan {escape(path)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RulesError(f"{escape(path)} is not a plan: not UTF-8") from error
    except ValueError as error:
        raise StorageError(f"{escape(path)} is no path: {escape(error)}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(path).endswith(".toml") or _RULES.search(text):
            raise RulesError(
                f"{escape(path)} is a rules file, not a plan", next=f"Give it as {option('rules')}."
            ) from error
        raise RulesError(f"{escape(path)} is not JSON: {escape(error)}") from error


def write_json(data: Any, path: Path) -> None:
    """Write JSON data, whole or not at all. StorageError if that fails."""
    try:
        raw = json.dumps(data, indent=1, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a name with half a surrogate pair
        raw = json.dumps(data, indent=1).encode() + b"\n"
    try:
        staged = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with staged.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or escape(error)
        raise StorageError(f"cannot write the plan to {escape(path)}: {why}") from error


def _end_json(end: End) -> dict[str, Any]:
    return {
        "label": end.label,
        "side": end.side,
        "tensors": {name: {"shape": list(spec.shape), "dtype": spec.dtype} for name, spec in end.specs.items()},
        "keys": {k: list(v) if isinstance(v, tuple) else v for k, v in end.real_keys.items()},
        "containers": dict(end.containers),
        "left": dict(end.left),
    }


def _end_from_json(data: Mapping[str, Any]) -> End:
    if data["side"] not in ("torch", "flax"):
        raise RulesError(f"side {escape(data['side'])!r} is neither torch nor flax")
    specs: dict[str, TensorSpec] = {}
    for name, spec in data["tensors"].items():
        shape = tuple(spec["shape"])
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
            raise RulesError(f"{escape(name)} has the shape {escape(shape)}")
        specs[str(name)] = TensorSpec(shape, str(spec["dtype"]))
    keys: dict[str, Key] = {}
    for name, key in data.get("keys", {}).items():
        if isinstance(key, bool) or not isinstance(key, (str, int, list)):
            raise RulesError(f"{escape(name)} has the key {escape(repr(key), 80)}")
        keys[str(name)] = tuple(cast("list[Any]", key)) if isinstance(key, list) else key
    left = {str(name): str(what) for name, what in data.get("left", {}).items()}
    return End(str(data["label"]), data["side"], specs, keys, dict(data.get("containers", {})), left)


def _names(items: Any) -> tuple[str, ...]:
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise TypeError(f"a list of names expected, got {items!r}")
    return tuple(str(item) for item in cast("Sequence[Any]", items))
