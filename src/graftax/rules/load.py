"""Read rules: a TOML file, TOML text, tables, or rules already read."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graftax.errors import Failure, RulesError, StorageError, escape, worded
from graftax.rules.model import Rule
from graftax.rules.text import rule_lines
from graftax.rules.validate import make_rule

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
    if isinstance(rules, Rules):
        return rules
    out: list[Rule] = []
    failures: list[Failure] = []
    given: Any = () if rules is None else rules
    for data, name, place in _items(given, label):
        if isinstance(data, Rule):
            out.append(data)
        elif isinstance(data, RulesError):
            failures += data.failures or [Failure(str(data), key=f"{name}, {place}")]
        else:
            rule, faults = make_rule(data, name, place)
            failures += faults
            out += [rule] if rule is not None else []
    if failures:
        places = len({failure.key for failure in failures})
        what = "1 rule is" if places == 1 else f"{places} rules are"
        raise RulesError(f"{what} not well formed ({escape(label)}):", failures)
    return Rules(tuple(out), Path(given).name if _is_path(given) else label)


def _is_path(given: Any) -> bool:
    return isinstance(given, Path) or (isinstance(given, str) and not _TEXT.search(given))


def _items(given: Any, label: str, place: str = "") -> Iterator[tuple[Any, str, str]]:
    """(a table, a rule, or the error in its stead; its label; its place) of everything in `given`. `place`: that of an
    item in a list."""
    if _is_path(given):
        yield from _of_text(_read(Path(given)), Path(given).name)
    elif isinstance(given, str) and place and given.lstrip().startswith("{"):
        yield from _inline(given, label, place)
    elif isinstance(given, str):
        yield from _of_text(given, label)
    elif isinstance(given, dict) and set(cast("Any", given)) == {"rules"} and isinstance(given["rules"], (list, tuple)):
        yield from _items(cast("Any", given["rules"]), label)
    elif isinstance(given, (Mapping, Rule)) or (place and not isinstance(given, Rules)):
        yield given, label, place
    elif isinstance(given, (bytes, bytearray)) or not isinstance(given, Iterable):
        raise RulesError(f"rules are a path, TOML text or a list of tables, not {type(given).__name__}")
    else:
        for i, item in enumerate(cast("Iterable[Any]", given), 1):
            try:
                yield from list(_items(item, label, f"item {i}"))
            except RulesError as error:
                yield error, label, f"item {i}"


def _inline(line: str, label: str, place: str) -> Iterator[tuple[Any, str, str]]:
    """The inline tables of one line (an answer may hold several), with or without a comma after the last."""
    try:
        tables = tomllib.loads(f"rules = [{line.strip().rstrip(',')}]")["rules"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        tables = [RulesError(f"{escape(line)} is not an inline table: {escape(error)}")]
    yield from ((table, label, place) for table in tables)


def _read(path: Path) -> str:
    if not path.is_file():
        raise StorageError(f"there is no rules file {escape(path)}", next="Rules are one TOML file.")
    try:
        with path.open("rb") as file:
            raw = file.read(_LIMIT + 1)
    except OSError as error:
        raise StorageError(f"cannot read the rules {escape(path)}: {error.strerror or escape(error)}") from error
    if len(raw) > _LIMIT:
        raise RulesError(f"{escape(path)} is larger than {_LIMIT >> 20} MiB: no rules file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RulesError(f"{escape(path.name)}, line {line}: not UTF-8") from error


def _of_text(text: str, label: str) -> Iterator[tuple[Any, str, str]]:
    if text.lstrip().startswith("{"):
        if '"graftax_plan"' in text[:4096]:
            raise RulesError(
                f"{escape(label)} is a plan, not rules", next=worded("Give it as --plan.", "gx.load_plan reads it.")
            )
        for n, row in enumerate(text.splitlines(), 1):
            if row.strip() and not row.lstrip().startswith("#"):
                yield from _inline(row, label, f"line {n}")
        return
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RulesError(_toml_fault(text, label, error)) from None
    except RecursionError:
        raise RulesError(f"{escape(label)}: nested too deeply") from None
    strange = [name for name in data if name != "rules"]
    if strange:
        named = re.compile(rf"\s*\[*\s*[\"']?{re.escape(strange[0])}\b")
        line = next((n for n, row in enumerate(text.splitlines(), 1) if named.match(row)), 1)
        hint = "A rules file is `rules = [ ... ]`, one inline table a line."
        failures = [Failure(f"unknown key {escape(name)!r}", label, f"{label}, line {line}") for name in strange]
        raise RulesError(f"{escape(label)} holds more than rules", failures, next=hint)
    items: Any = data.get("rules")
    if not isinstance(items, list):
        raise RulesError(f"{escape(label)} has no `rules = [ ... ]`", next="Write one inline table a line.")
    tables = cast("list[Any]", items)
    lines = rule_lines(text)
    named = [f"line {n}" for n in lines] if len(lines) == len(tables) else [f"item {i + 1}" for i in range(len(tables))]
    yield from ((table, label, place) for table, place in zip(tables, named, strict=True))


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
