"""Replace only files that graftax itself wrote: reports, plans, suggestions."""

from __future__ import annotations

from pathlib import Path

from graftax.errors import StorageError, escape


def refuse_other_file(path: str | Path, mark: str, what: str) -> None:
    """StorageError if `path` is a file without `mark` near its start: then it may not be replaced."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot write {escape(path)}: {error.strerror}") from error
    if mark.encode() not in head:
        raise StorageError(f"{escape(path)} exists and is not {what}", next="Choose another name, or remove it.")
