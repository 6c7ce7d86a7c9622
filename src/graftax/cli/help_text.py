"""`--help` as plain text: one entry per option, wrapped to the terminal, its further lines indented."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel

_WIDEST = 110


class HelpText:
    """A formatter for `cyclopts.App(help_formatter=...)`."""

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        if not panel.entries:
            return
        _print(console, f"{panel.title}:" if panel.title else "")
        for entry in panel.entries:
            _print(console, _text(entry), "  ", "      ")
        console.print()

    def render_usage(self, console: Any, options: Any, usage: Any) -> None:
        if usage:
            _print(console, f"Usage: {_plain(usage).strip().removeprefix('Usage: ')}\n")

    def render_description(self, console: Any, options: Any, description: Any) -> None:
        if text := _plain(description):
            _print(console, text + "\n")


def _text(entry: HelpEntry) -> str:
    labels = ", ".join(entry.display_labels_with_metavar)
    notes = [_plain(entry.description)]
    if entry.choices:
        notes.append(f"[choices: {', '.join(entry.choices)}]")
    if entry.default not in (None, "", "False"):
        notes.append(f"[default: {entry.default}]")
    if entry.required:
        notes.append("[required]")
    return f"{labels}: {' '.join(note for note in notes if note)}".removesuffix(": ")


def _plain(value: Any) -> str:
    """What rich shows of a value, as text."""
    if value is None:
        return ""
    if hasattr(value, "__rich_console__") and not hasattr(value, "plain"):
        from rich.console import Console

        quiet = Console(width=10_000, no_color=True, highlight=False, markup=False, emoji=False, force_terminal=False)
        with quiet.capture() as captured:
            quiet.print(value, end="")
        return captured.get().strip()
    return str(getattr(value, "plain", value)).strip()


def _print(console: Any, text: str, indent: str = "", further: str = "") -> None:
    """Print paragraphs, each wrapped again: a docstring was wrapped for the source file."""
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        width = max(40, min(console.width, _WIDEST))
        wrapped = textwrap.fill(
            words,
            width,
            initial_indent=indent,
            subsequent_indent=further,
            break_on_hyphens=False,
            break_long_words=False,
        )
        console.print(wrapped, highlight=False, markup=False, soft_wrap=True)
    if text.endswith("\n"):
        console.print()
