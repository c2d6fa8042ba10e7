"""The pickle in a DCP checkpoint, read without making anything that it names.

Unpickling can call any function, replace attributes of any class, and take gigabytes for a few bytes. This reads the
few opcodes that ``pickle`` writes for DCP's metadata into plain nodes, of which ``metadata.py`` makes what they stand
for. Nothing is imported or called. Memory stays in proportion to the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from typing import Any

_DTYPES = frozenset(
    {
        *(f"float{bits}" for bits in ("64", "32", "16", "8_e4m3fn", "8_e5m2")),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (64, 32, 16, 8)),
        *("bfloat16", "bool"),
    }
)

_DCP = "torch.distributed.checkpoint.metadata"
_PATHS = frozenset(
    (module, f"{kind}Path")
    for module in ("pathlib", "pathlib._local")  # it is a package in Python 3.13
    for kind in ("", "Posix", "Windows")
)

CLASSES = frozenset(
    {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            (_DCP, name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
            )
        ),
    }
)
"""What instances are made of, by module and name."""
CALLED = (
    frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            (_DCP, "_MEM_FORMAT_ENCODING"),
            ("builtins", "getattr"),  # by which some releases of Python 3.11 pickle the member of an enumeration
        }
    )
    | _PATHS
)
"""What else is called with arguments."""


class Named:
    """A class or function, by its name."""

    def __init__(self, module: str, name: str) -> None:
        self.key = module, name
        self.name = name


class Made:
    """An instance of a class with its state, or a function with its arguments."""

    __slots__ = ("args", "key", "state")

    def __init__(self, key: tuple[str, str], args: tuple[Any, ...]) -> None:
        self.key, self.args = key, args
        self.state: Any = None


class Pairs(list[tuple[Any, Any]]):
    """A dictionary, as pairs of keys and values: nothing is hashed."""


def unpickle(data: bytes) -> Any:
    """The nodes in a pickle. Raises UnpicklingError for what DCP's metadata has no use for."""
    try:
        return _Machine(data).run()
    except (IndexError, struct.error, UnicodeDecodeError):
        raise UnpicklingError("it is truncated or damaged") from None


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        """The stacks below each mark that is open."""
        self.memo: list[Any] = []
        self.names: dict[tuple[str, str], Named] = {}

    def run(self) -> Any:
        data, operations = self.data, _OPERATIONS
        while True:
            operation = data[self.at]
            self.at += 1
            if operation == 0x2E:  # STOP
                break
            known = operations[operation]
            if known is None:
                raise UnpicklingError(f"it has the opcode {operation:#x}, which is not allowed in a checkpoint")
            known(self)
        if len(self.stack) != 1 or self.marks:
            raise UnpicklingError("it is truncated or damaged")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) < count:
            raise UnpicklingError("it is truncated")
        self.at += count
        return found

    def number(self, form: str, size: int) -> int:
        value: int = struct.unpack(form, self.take(size))[0]
        return value

    def text(self, size: int) -> None:
        self.stack.append(self.take(size).decode())

    def to_mark(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        found, self.stack = self.stack, self.marks.pop()
        return found

    def protocol(self) -> None:
        if self.take(1)[0] > 5:
            raise UnpicklingError("it has an unsupported pickle protocol")

    def frame(self) -> None:
        self.take(8)  # the length of what follows, for reading ahead

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def long(self) -> None:
        size = self.take(1)[0]
        if size > 8:
            raise UnpicklingError("it has a number of more than 64 bits")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnpicklingError("it is damaged")
        key = module, name
        if key not in CLASSES and key not in CALLED and not (module == "torch" and name in _DTYPES):
            raise UnpicklingError(f"it names {module[:80]}.{name[:80]}, which is not allowed in a checkpoint")
        self.stack.append(self.names.setdefault(key, Named(*key)))

    def instance(self, allowed: Iterable[tuple[str, str]]) -> None:
        args, named = self.stack.pop(), self.stack.pop()
        if not isinstance(named, Named) or type(args) is not tuple or named.key not in allowed:
            raise UnpicklingError("it calls a function that is not allowed in a checkpoint")
        self.stack.append(Made(named.key, args))

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is not Made or made.key not in CLASSES or made.state is not None:
            raise UnpicklingError("it modifies an object that it has not created")
        made.state = state

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise UnpicklingError("it is damaged")
        target += values

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not Pairs or len(values) % 2:
            raise UnpicklingError("it is damaged")
        target += zip(values[::2], values[1::2], strict=True)

    def tuple_to_mark(self) -> None:
        values = tuple(self.to_mark())
        self.stack.append(values)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise UnpicklingError("it is damaged")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(values)


_Operation = Callable[[_Machine], None]


def _operations() -> list[_Operation | None]:
    """By the opcode's byte; see ``pickletools``."""
    known: dict[bytes, _Operation] = {
        b"\x80": _Machine.protocol,
        b"\x95": _Machine.frame,
        b"(": _Machine.mark,
        b"N": lambda machine: machine.stack.append(None),
        b"\x88": lambda machine: machine.stack.append(True),
        b"\x89": lambda machine: machine.stack.append(False),
        b"K": lambda machine: machine.stack.append(machine.take(1)[0]),
        b"M": lambda machine: machine.stack.append(machine.number("<H", 2)),
        b"J": lambda machine: machine.stack.append(machine.number("<i", 4)),
        b"\x8a": _Machine.long,
        b"\x8c": lambda machine: machine.text(machine.take(1)[0]),
        b"X": lambda machine: machine.text(machine.number("<I", 4)),
        b"}": lambda machine: machine.stack.append(Pairs()),
        b"]": lambda machine: machine.stack.append([]),
        b")": lambda machine: machine.stack.append(()),
        b"\x85": lambda machine: machine.tuple_of(1),
        b"\x86": lambda machine: machine.tuple_of(2),
        b"\x87": lambda machine: machine.tuple_of(3),
        b"t": _Machine.tuple_to_mark,
        b"a": lambda machine: machine.append([machine.stack.pop()]),
        b"e": lambda machine: machine.append(machine.to_mark()),
        b"s": lambda machine: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
        b"u": lambda machine: machine.set_items(machine.to_mark()),
        b"\x94": _Machine.memoize,
        b"h": lambda machine: machine.stack.append(machine.memo[machine.take(1)[0]]),
        b"j": lambda machine: machine.stack.append(machine.memo[machine.number("<I", 4)]),
        b"\x93": _Machine.name,
        b"\x81": lambda machine: machine.instance(CLASSES),
        b"R": lambda machine: machine.instance(CALLED),
        b"b": _Machine.build,
    }
    table: list[_Operation | None] = [None] * 256
    for opcode, operation in known.items():
        table[opcode[0]] = operation
    return table


_OPERATIONS = _operations()
