"""Modules that only one instance of a family holds, as modules of the scope around all families."""

from __future__ import annotations

from dataclasses import replace

from graftax.match.sides import Module, Token


def single_out(module: Module) -> Module | None:
    """The module with the numbers of its one instance in its name; None where several instances hold it."""
    support = module.support
    if len(support) != 1 or any(column.stack for column in module.roles.values()):
        return None
    (key,) = support
    numbers = iter(key)
    path: list[Token] = [next(numbers) if isinstance(token, tuple) else token for token in module.outer]
    roles = {
        role: replace(column, paths={(): column.paths[key]}, shapes={(): column.shapes[key]})
        for role, column in module.roles.items()
    }
    return Module((*path, *module.tokens), (), roles, module.raw)
