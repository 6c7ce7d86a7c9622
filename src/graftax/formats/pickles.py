"""Read pickles of tensors as inert values: nothing is imported and nothing is called; what the pickle asks for is only
recorded. This makes a .pt file safe to open, with or without torch.

`load` runs a pickle on a stack machine whose values are dicts, lists, tuples, numbers, text and the records of `inert`.
What torch's own restricted reader knows (ALLOWED) becomes a tensor, a dict or an OpaqueValue. An object of another
class becomes an Object: the name of its class and nothing more. `pickle_globals` decides which names refuse the file.
The reader of the tree decides whether an object may stand at its place: among weights it may not.

Sources: the opcodes are those of Python's pickletools.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from graftax.errors import FormatError, escape
from graftax.formats.pickle_globals import RECONSTRUCTORS, may_be_called, may_be_named, shown
from graftax.tree.inert import (
    ALLOWED,
    CALLS,
    STORAGES,
    Global,
    Malformed,
    Object,
    OpaqueValue,
    TorchStorage,
    brief,
    set_item,
    unsafe_pickle,
)
from graftax.tree.limits import check_limit, limit

_GETATTR = "builtins.getattr"


@dataclass(slots=True)
class _State:
    stack: list[Any] = field(default_factory=list[Any])
    marks: list[list[Any]] = field(default_factory=list[list[Any]])
    memo: dict[int, Any] = field(default_factory=dict[int, Any])
    refused: dict[str, None] = field(default_factory=dict[str, None])
    foreign: dict[str, None] = field(default_factory=dict[str, None])  # names that are not refused
    storages: dict[str, TorchStorage] = field(default_factory=dict[str, TorchStorage])
    attributes: int = 0  # number of attributes taken by getattr
    made: int = 0
    label: str = ""
    most: int = 0  # limit on objects
    deepest: int = 0  # limit on nested marks


def _since_mark(state: _State) -> list[Any]:
    items = state.stack
    state.stack = state.marks.pop()
    return items


def _push(state: _State, value: Any) -> None:
    state.stack.append(value)


def _made(state: _State, value: Any) -> None:
    state.made += 1
    if state.made > state.most:
        check_limit("leaves", state.made, state.label)
    state.stack.append(value)


def _global(state: _State, arg: Any) -> None:
    module, _, name = str(arg).partition(" ")
    if module == "__builtin__":  # Python 2's name, which protocol 2 still writes
        module = "builtins"
    state.stack.append(_named(state, module, name))


def _named(state: _State, module: str, name: str) -> Global:
    full = f"{module}.{name}"
    if full == _GETATTR:  # refused unless each call takes a name from a class that may be named
        state.foreign[full] = None
    elif full not in ALLOWED:
        (state.foreign if may_be_named(module, name) else state.refused)[full] = None
    return Global(full)


def _stack_global(state: _State, arg: Any) -> None:
    name, module = state.stack.pop(), state.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Malformed("a global has no name")
    _global(state, f"{module} {name}")


def _reduce(state: _State, arg: Any) -> None:
    args, function = state.stack.pop(), state.stack.pop()
    _call(state, function, args)


def _newobj(state: _State, arg: Any) -> None:
    args, kind = state.stack.pop(), state.stack.pop()
    _call(state, kind, args, is_class=True)


def _newobj_ex(state: _State, arg: Any) -> None:
    options, args, kind = state.stack.pop(), state.stack.pop(), state.stack.pop()
    _call(state, kind, (*args, options) if isinstance(args, tuple) else args, is_class=True)


def _obj(state: _State, arg: Any) -> None:
    kind, *args = _since_mark(state)
    _call(state, kind, tuple(args))


def _inst(state: _State, arg: Any) -> None:
    args = _since_mark(state)
    _global(state, arg)
    _call(state, state.stack.pop(), tuple(args))


def _call(state: _State, function: Any, args: Any, is_class: bool = False) -> None:
    """Push the result of the call. A class makes an Object; of other functions only torch's are known."""
    name = function.name if isinstance(function, Global) else type(function).__name__
    if isinstance(function, (Object, OpaqueValue)):
        state.refused[f"{getattr(function, 'name', name)}()"] = None
        return _made(state, function)
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise Malformed(f"it calls {escape(name)}")
    if name in CALLS:
        try:
            made = CALLS[name](*args)
        except (TypeError, RecursionError) as error:
            raise Malformed(f"it calls {name} with the wrong arguments") from error
        return _made(state, made)
    if name in ALLOWED:
        raise Malformed(f"it calls {escape(name)}")
    if name == _GETATTR:
        return _made(state, _attribute(state, args))
    if name not in state.refused and not is_class and not may_be_called(name):
        state.refused[name] = None
    held = list(args)
    if name in RECONSTRUCTORS and args and isinstance(args[0], Global):
        name, held = args[0].name, held[1:]
    return _made(state, Object(shown(name), held))


def _attribute(state: _State, args: tuple[Any, ...]) -> Any:
    """An attribute of a class, which is another name of something; or a method of an object."""
    owner, name = args if len(args) == 2 else (None, None)
    state.attributes += 1
    if isinstance(name, str) and name.isidentifier():
        if isinstance(owner, Global) and owner.name != _GETATTR:
            return _named(state, owner.name, name)
        if isinstance(owner, Object) and not name.startswith("__"):
            return Object(f"{owner.name}.{name}", [owner])
    state.refused[_GETATTR] = None
    return Object(_GETATTR)


def _build(state: _State, arg: Any) -> None:
    """Set the state of an object: an OrderedDict's `_metadata`, or the state that a class would take."""
    value = state.stack.pop()
    if isinstance(state.stack[-1], Object):
        state.stack[-1].held.append(value)
    elif not isinstance(state.stack[-1], (dict, OpaqueValue)):
        raise Malformed("a state is set on a value that has none")


def _append(state: _State, arg: Any) -> None:
    item = state.stack.pop()
    _extend(state.stack[-1], [item])


def _appends(state: _State, arg: Any) -> None:
    items = _since_mark(state)
    _extend(state.stack[-1], items)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, (list, Object)):
        (target.held if isinstance(target, Object) else target).extend(items)
    elif not isinstance(target, OpaqueValue):
        raise Malformed("an item is appended to a value that is not a list")


def _setitem(state: _State, arg: Any) -> None:
    value, key = state.stack.pop(), state.stack.pop()
    set_item(state.stack[-1], key, value)


def _setitems(state: _State, arg: Any) -> None:
    items = _since_mark(state)
    if len(items) % 2:
        raise Malformed("a key has no value")
    target = state.stack[-1]
    for i in range(0, len(items), 2):
        set_item(target, items[i], items[i + 1])


def _mark(state: _State, arg: Any) -> None:
    if len(state.marks) > state.deepest:
        check_limit("depth", len(state.marks), state.label)
    state.marks.append(state.stack)
    state.stack = []


def _tuple(count: int) -> Callable[[_State, Any], None]:
    def handler(state: _State, arg: Any) -> None:
        if len(state.stack) < count:
            raise Malformed("a tuple needs items that are not on the stack")
        items = tuple(state.stack[-count:])
        del state.stack[-count:]
        _made(state, items)

    return handler


def _get(state: _State, arg: Any) -> None:
    state.stack.append(state.memo[arg])


def _put(state: _State, arg: Any) -> None:
    state.memo[arg] = state.stack[-1]


def _persistent(state: _State, arg: Any) -> None:
    """A storage: ('storage', class, key, location, elements[, None or (key, offset, elements) of a window])."""
    pid = state.stack.pop()
    if isinstance(pid, tuple) and pid and pid[0] in ("module", b"module"):
        # torch < 0.4 kept a module's source text here, beside its class
        named = pid[1] if len(pid) > 1 else None
        return _push(state, named if isinstance(named, Global) else OpaqueValue("a module"))
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
        raise Malformed("a persistent object is not a storage")
    kind = pid[1].name.rpartition(".")[2] if isinstance(pid[1], Global) else ""
    key, count = _text(pid[2]), pid[4]
    if kind not in STORAGES or key is None or type(count) is not int or count < 0:
        raise Malformed(f"a storage has the unknown type {kind or brief(pid[1])}")
    itemsize = STORAGES[kind][1]
    start, length = 0, count
    if len(pid) == 6 and pid[5] is not None:
        window = pid[5]
        if not isinstance(window, tuple) or len(window) != 3 or any(type(n) is not int for n in window[1:]):
            raise Malformed("a storage's window is malformed")
        start, length = window[1], window[2]
        if start < 0 or length < 0 or start + length > count:
            raise Malformed("a storage's window ends beyond the storage")
    storage = TorchStorage(key, kind, start * itemsize, length * itemsize, count * itemsize)
    state.storages[key] = storage
    return _made(state, storage)


def _additems(state: _State, arg: Any) -> None:
    items = _since_mark(state)
    if isinstance(state.stack[-1], Object):  # the items of a set are not inspected
        state.stack[-1].held.extend(items)


def _pop(state: _State, arg: Any) -> None:
    if state.stack:
        state.stack.pop()
    else:
        _since_mark(state)


def _text(key: Any) -> str | None:
    if isinstance(key, bytes):
        return key.decode("latin1")
    return str(key) if type(key) in (str, int) else None


_ARGUMENTS = (
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8 INT LONG FLOAT STRING UNICODE"
)
_MACHINE: dict[str, Callable[[_State, Any], None]] = {
    **dict.fromkeys(_ARGUMENTS.split(), _push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda state, arg: None),
    "NONE": lambda state, arg: _push(state, None),
    "NEWTRUE": lambda state, arg: _push(state, True),
    "NEWFALSE": lambda state, arg: _push(state, False),
    "EMPTY_TUPLE": lambda state, arg: _push(state, ()),
    "EMPTY_DICT": lambda state, arg: _made(state, {}),
    "EMPTY_LIST": lambda state, arg: _made(state, []),
    "EMPTY_SET": lambda state, arg: _made(state, OpaqueValue("set()")),
    "FROZENSET": lambda state, arg: _made(state, Object("builtins.frozenset", _since_mark(state))),
    "BYTEARRAY8": lambda state, arg: _push(state, bytes(arg)),
    "ADDITEMS": _additems,
    "POP": _pop,
    "POP_MARK": lambda state, arg: _since_mark(state).clear(),
    "MARK": _mark,
    "TUPLE": lambda state, arg: _made(state, tuple(_since_mark(state))),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda state, arg: _put(state, len(state.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _newobj,
    "NEWOBJ_EX": _newobj_ex,
    "OBJ": _obj,
    "INST": _inst,
    "BUILD": _build,
    "BINPERSID": _persistent,
}


def load(stream: BinaryIO, label: str, storages: dict[str, TorchStorage] | None = None) -> Any:
    """The value of the pickle that starts at the stream's position; afterwards the stream is at the end of the pickle.
    `storages` collects every storage that the pickle names, also for an object (key -> one of the storages with this
    key).

    Raises UnsafeInputError, naming every global that is not torch's, or the limit that is exceeded; and FormatError for
    a pickle that is truncated or malformed. Nothing is imported and nothing of the file is called.
    """
    # 4 of a tensor's 7 objects stay; optimizers hold tensors too; a tensor takes four marks, a container one.
    state = _State(label=label, most=3 * limit("leaves"), deepest=4 * limit("depth"))
    problem: Exception | None = None
    try:
        for opcode, arg, _ in pickletools.genops(stream):
            handler = _MACHINE.get(opcode.name)
            if handler is None:
                raise Malformed(f"it has the opcode {opcode.name}, which no checkpoint needs")
            handler(state, arg)
        if len(state.stack) != 1 or state.marks:
            raise Malformed("values are left over at its end")
    except (Malformed, ValueError, IndexError, KeyError, OverflowError, EOFError) as error:
        problem = error
    if state.refused or (_GETATTR in state.foreign and not state.attributes):
        raise unsafe_pickle(label, list(state.refused | state.foreign))
    if problem is not None:
        text = str(problem) if isinstance(problem, Malformed) else "it is truncated or damaged"
        raise FormatError(f"{label}: its pickle cannot be read: {text}") from problem
    if storages is not None:
        storages.update(state.storages)
    return state.stack[0]
