"""Read rules: a TOML file, TOML text, tables, or rules already read."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graftax.errors import Failure, RulesError, StorageError, escape, worded
from graftax.rules.model import Rule
from graftax.rules.text import rule_lines
from graftax.rules.validate import make_rule
from graftax.tree import nearest

_TEXT = re.compile(r"^\s*(?:rules\s*=|\[\[\s*rules\s*\]\]|\{)", re.MULTILINE)
_LIMIT = 16 << 20
"""The most bytes of a rules file."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules in their order. `label`: the file, or its name in messages."""

    rules: tuple[Rule, ...] = ()
    label: str = "rules"

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def extended(self, line: str | Mapping[str, Any]) -> Rules:
        """These rules and one more, as a candidate of a question writes it. RulesError if the line is no rule."""
        return Rules((*self.rules, *load_rules([line], "answer")), self.label)


def load_rules(rules: Any, label: str = "rules") -> Rules:
    """Rules from a path, TOML text (a whole file or one inline table), a table {'rules': [...]}, the table of one rule,
    or a list of any of these. None: no rules.

    Raises RulesError with every fault and its line, StorageError if the file cannot be read.
    """
    if rules is None:
        return Rules((), label)
    if isinstance(rules, Rules):
        return rules
    if isinstance(rules, Path) or (isinstance(rules, str) and not _TEXT.search(rules)):
        return _from_text(_read(Path(rules)), Path(rules).name)
    if isinstance(rules, str):
        return _from_text(rules, label)
    if isinstance(rules, Mapping):
        table = cast("Mapping[str, Any]", rules)
        if set(table) == {"rules"} and isinstance(table["rules"], (list, tuple)):
            items = cast("Sequence[Any]", table["rules"])
            return _made([(item, f"item {i}") for i, item in enumerate(items, 1)], label)
        return _made([(table, "")], label)
    if isinstance(rules, (bytes, bytearray)) or not isinstance(rules, Iterable):
        raise RulesError(f"rules are a path, TOML text or a list of tables, not {type(rules).__name__}")
    return _from_list(cast("Iterable[Any]", rules), label)


def _from_list(items: Iterable[Any], label: str) -> Rules:
    out: list[Rule] = []
    failures: list[Failure] = []
    for i, item in enumerate(items, 1):
        if isinstance(item, Rule):
            out.append(item)
            continue
        try:
            if isinstance(item, Mapping):
                out += _made([(cast("Mapping[str, Any]", item), f"item {i}")], label)
            elif isinstance(item, (str, Path, Rules)):
                line = f"item {i}" if isinstance(item, str) and item.lstrip().startswith("{") else ""
                out += _made([(table, line) for table in _inline(item)], label) if line else load_rules(item, label)
            else:
                failures += make_rule(item, label, f"item {i}")[1]
        except RulesError as error:
            failures += error.failures or [Failure(str(error), key=f"{label}, item {i}")]
    _raise(failures, label)
    return Rules(tuple(out), label)


def _inline(line: Any) -> list[Any]:
    """The inline tables of one line (an answer may hold several), with or without a comma after the last."""
    try:
        return tomllib.loads(f"rules = [{str(line).strip().rstrip(',')}]")["rules"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RulesError(f"{escape(line)} is not an inline table: {escape(error)}") from None


def _read(path: Path) -> str:
    try:
        if not path.exists():
            raise StorageError(f"there is no rules file {escape(path)}")
        if not path.is_file():
            raise StorageError(f"{escape(path)} is not a file: rules are one TOML file")
        with path.open("rb") as file:
            raw = file.read(_LIMIT + 1)
    except OSError as error:
        raise StorageError(f"cannot read the rules {escape(path)}: {error.strerror or escape(error)}") from error
    except ValueError as error:  # a NUL in the path
        raise StorageError(f"{escape(path)} is no path: {escape(error)}") from error
    if len(raw) > _LIMIT:
        raise RulesError(f"{escape(path)} is larger than {_LIMIT >> 20} MiB: no rules file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RulesError(f"{escape(path.name)}, line {line}: not UTF-8") from error


def _from_text(text: str, label: str) -> Rules:
    if text.lstrip().startswith("{"):
        if '"graftax_plan"' in text[:4096]:
            raise RulesError(
                f"{escape(label)} is a plan, not rules", next=worded("Give it as --plan.", "gx.load_plan reads it.")
            )
        rows = [(n, row.strip()) for n, row in enumerate(text.splitlines(), 1)]
        rows = [(n, row) for n, row in rows if row and not row.startswith("#")]
        failures = [
            Failure("is no inline table", label, f"{label}, line {n}", "{ ... }", escape(row, 40))
            for n, row in rows
            if not row.startswith("{")  # as an item of a list, such a line would name another file
        ]
        if failures:
            raise RulesError(f"{escape(label)} is no rules file:", failures, next="Write one inline table a line.")
        return _from_list([row for _, row in rows], label)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RulesError(_toml_fault(text, label, error)) from None
    except RecursionError:
        raise RulesError(f"{escape(label)}: nested too deeply") from None
    strange = [name for name in data if name != "rules"]
    if strange:
        line = _line_of(text, strange[0])
        near = nearest(strange[0], ["rules"])
        hint = "A rules file is `rules = [ ... ]`, one inline table a line."
        failures = [Failure(f"unknown key {escape(name)!r}", label, f"{label}, line {line}") for name in strange]
        raise RulesError(
            f"{escape(label)} holds more than rules{' (near: rules)' if near else ''}", failures, next=hint
        )
    items: Any = data.get("rules")
    if not isinstance(items, list):
        raise RulesError(f"{escape(label)} has no `rules = [ ... ]`", next="Write one inline table a line.")
    tables = cast("list[Any]", items)
    lines = rule_lines(text)
    named = [f"line {n}" for n in lines] if len(lines) == len(tables) else [f"item {i + 1}" for i in range(len(tables))]
    return _made(list(zip(tables, named, strict=True)), label)


def _toml_fault(text: str, label: str, error: tomllib.TOMLDecodeError) -> str:
    """TOML's own message, with the line, and a hint for the faults that pasting makes."""
    found = re.search(r"\(at line (\d+), column (\d+)\)|\(at end of document\)", str(error))
    said = str(error).partition(" (at ")[0]
    line = int(found[1]) if found and found[1] else text.count("\n") + 1
    hint = ""
    rows = text.splitlines()
    row = rows[line - 1] if line <= len(rows) else ""
    before = next((r.strip() for r in reversed(rows[: line - 1]) if r.strip() and r.strip()[0] != "#"), "")
    if row.count("{") > row.count("}"):
        hint = " (an inline table must be on one line)"
    elif before.endswith("}") and row.lstrip().startswith("{"):
        hint = " (a comma must follow every rule)"
    return f"{escape(label)}, line {line}: not TOML: {escape(said)}{hint}"


def _line_of(text: str, name: str) -> int:
    rows = text.splitlines()
    return next((i for i, row in enumerate(rows, 1) if re.match(rf"\s*\[*\s*[\"']?{re.escape(name)}\b", row)), 1)


def _made(items: Sequence[tuple[Any, str]], label: str) -> Rules:
    out: list[Rule] = []
    failures: list[Failure] = []
    for data, line in items:
        rule, faults = make_rule(data, label, line)
        failures += faults
        if rule is not None:
            out.append(rule)
    _raise(failures, label)
    return Rules(tuple(out), label)


def _raise(failures: Sequence[Failure], label: str) -> None:
    if failures:
        places = len({failure.key for failure in failures})
        what = "1 rule is" if places == 1 else f"{places} rules are"
        raise RulesError(f"{what} not well formed ({escape(label)}):", failures)
