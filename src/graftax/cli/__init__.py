"""The command line: `graftax COMMAND ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from graftax.cli import running
from graftax.errors import command_line_words


def run(argv: Sequence[str]) -> int:
    """Run one command; prints the result and the message, gives the exit code."""
    from graftax.cli.commands import app

    with command_line_words():
        return running.run(app, argv)


def main() -> None:
    """The `graftax` command."""
    sys.exit(run(sys.argv[1:]))
