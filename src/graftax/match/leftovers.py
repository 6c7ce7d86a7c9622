"""The leftovers of a scope: modules that only one instance of a family holds, and blocks of several kinds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from graftax.match.pairs import Scope
from graftax.match.sides import Column, Key, Module, Token


def single_out(module: Module) -> Module | None:
    """The module with the numbers of its only instance in its name; None if several instances hold it."""
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
    cuts = tuple(at + len(path) for at in (0, *module.cuts) if at + len(path))
    return Module((*path, *module.tokens), (), roles, module.raw, cuts=cuts, own=len(path) + module.own)


def by_kind(scope: Scope) -> list[Scope]:
    """The scope cut by kinds of blocks that hold the same modules on both sides (with a projection, without one): one
    scope per kind, its modules cut to its instances."""
    kinds: defaultdict[tuple[frozenset[int], frozenset[int]], list[tuple[Key, Key]]] = defaultdict(list)
    left, right = _holders(scope.torch), _holders(scope.flax)
    for key, other in scope.keys:
        kinds[(frozenset(left.get(key, ())), frozenset(right.get(other, ())))].append((key, other))
    out: list[Scope] = []
    for keys in kinds.values():
        torch = cut_to(scope.torch, {key for key, _ in keys})
        flax = cut_to(scope.flax, {other for _, other in keys})
        made = Scope(torch, flax, keys, scope.root, scope.same, scope.lex, scope.why)
        made.wrappers, made.experts = scope.wrappers, scope.experts
        out.append(made)
    return out


def _holders(modules: list[Module]) -> dict[Key, list[int]]:
    out: defaultdict[Key, list[int]] = defaultdict(list)
    for n, module in enumerate(modules):
        for key in module.support:
            out[key].append(n)
    return out


def cut_to(modules: list[Module], keys: set[Key]) -> list[Module]:
    """The modules with these instances only."""
    out: list[Module] = []
    for module in modules:
        roles: dict[str, Column] = {}
        for role, column in module.roles.items():
            paths = {key: path for key, path in column.paths.items() if key in keys}
            if paths:
                roles[role] = replace(column, paths=paths, shapes={key: column.shapes[key] for key in paths})
        if roles:
            out.append(Module(module.tokens, module.outer, roles, module.raw, module.alias, module.cuts, module.own))
    return out
