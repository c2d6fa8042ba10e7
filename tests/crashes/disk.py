"""What a disk may hold after a power cut.

A file system may write what was not yet synced in any order, in part, or not at all (Pillai et al. 2014, "All File
Systems Are Not Created Equal", sections 3 and 4). ``Disk`` records operations; ``Disk.states`` gives what may be left
of them after a cut. It assumes as little as POSIX promises: fsync of a file keeps its content, not its name; fsync of
a folder keeps its names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class Operation:
    """One change. ``about``: the file or folder, by number, whose fsync keeps it."""

    kind: str
    about: int
    name: str = ""
    """Of the entry in the folder ``about`` that is made, replaced or removed."""
    node: int = -1
    """The file or folder that gets the name; of a write, the file."""
    offset: int = 0
    data: bytes = b""
    target: str = ""
    """Of a symbolic link; of a rename, the name before."""
    source: int = -1
    """Of a rename: the folder before."""


@dataclass
class Node:
    """A file, a folder or a symbolic link."""

    kind: str
    data: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] = field(default_factory=dict)
    target: str = ""


class Disk:
    """Operations in order, and for each whether it was synced and when."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.synced: list[tuple[int, int]] = []
        """(number of operations so far, node) for each fsync."""
        self._nodes = [Node("folder")]

    # Recording: each method changes the disk as if nothing were ever lost

    def exists(self, path: str) -> bool:
        try:
            self._find(path)
        except KeyError:
            return False
        return True

    def content(self, path: str) -> bytes:
        return bytes(self._nodes[self._find(path)].data)

    def size(self, path: str) -> int:
        return len(self._nodes[self._find(path)].data)

    def create(self, path: str) -> None:
        self._make(path, Node("file"), "create")

    def make_folder(self, path: str) -> None:
        self._make(path, Node("folder"), "mkdir")

    def make_symlink(self, path: str, target: str) -> None:
        self._make(path, Node("symlink", target=target), "symlink", target=target)

    def write(self, path: str, offset: int, data: bytes) -> None:
        if self.exists(path):  # else it has been removed meanwhile
            number = self._find(path)
            self._add(Operation("write", number, node=number, offset=offset, data=data))

    def truncate(self, path: str, size: int) -> None:
        if self.exists(path):
            number = self._find(path)
            self._add(Operation("truncate", number, node=number, offset=size))

    def rename(self, source: str, target: str) -> None:
        node, (old, before), (new, name) = self._find(source), self._place(source), self._place(target)
        self._add(Operation("rename", new, name, node, target=before, source=old))

    def remove(self, path: str) -> None:
        folder, name = self._place(path)
        self._add(Operation("remove", folder, name))

    def sync(self, path: str) -> None:
        if self.exists(path):
            self.synced.append((len(self.operations), self._find(path)))

    def _make(self, path: str, node: Node, kind: str, *, target: str = "") -> None:
        folder, name = self._place(path)
        self._nodes.append(node)
        self._add(Operation(kind, folder, name, len(self._nodes) - 1, target=target))

    def _add(self, operation: Operation) -> None:
        self.operations.append(operation)
        _apply(self._nodes, operation)

    def _find(self, path: str) -> int:
        number = 0
        for name in filter(None, path.split("/")):
            number = self._nodes[number].entries[name]
            if self._nodes[number].kind == "symlink":
                raise KeyError(path)
        return number

    def _place(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        return self._find(folder), name

    # What may be left

    def pending(self, count: int) -> list[int]:
        """Of the first ``count`` operations those that no fsync has kept."""
        last = {node: 0 for _, node in self.synced}
        for after, node in self.synced:
            if after <= count:
                last[node] = max(last[node], after)
        return [i for i in range(count) if i >= last.get(self.operations[i].about, 0)]

    def states(self, count: int, *, random: Random, samples: int) -> Iterator[tuple[str, list[Node]]]:
        """What the disk may hold after a cut once ``count`` operations were asked for, with a description of each."""
        pending = self.pending(count)
        yield "everything", self._after(count, ())
        if not pending:
            return
        yield "what was synced", self._after(count, pending)
        for lost in pending[-samples:]:
            yield f"all but {self._name(lost)}", self._after(count, (lost,))
        for kept in pending[-samples:]:
            yield f"only {self._name(kept)}", self._after(count, [i for i in pending if i != kept])
        if (last := self.operations[count - 1]).kind == "write" and len(last.data) > 1:
            yield "half of the last write", self._after(count, (), torn=count - 1)
        for _ in range(samples):
            lost_ones = [i for i in pending if random.random() < 0.5]
            yield f"all but {', '.join(map(self._name, lost_ones))}"[:300], self._after(count, lost_ones)

    def _name(self, index: int) -> str:
        operation = self.operations[index]
        return f"{index}:{operation.kind} {operation.name or operation.node}"

    def _after(self, count: int, lost: Sequence[int], *, torn: int = -1) -> list[Node]:
        nodes = [Node(node.kind, target=node.target) for node in self._nodes]
        missing = set(lost)
        for index, operation in enumerate(self.operations[:count]):
            if index == torn:
                half = operation.data[: len(operation.data) // 2]
                _apply(
                    nodes, Operation("write", operation.about, node=operation.node, offset=operation.offset, data=half)
                )
            elif index not in missing:
                _apply(nodes, operation)
        return nodes


def _apply(nodes: list[Node], operation: Operation) -> None:
    """Change ``nodes``, as far as what ``operation`` needs is there."""
    if operation.kind == "write":
        data = nodes[operation.node].data
        end = operation.offset + len(operation.data)
        data.extend(bytes(max(0, end - len(data))))
        data[operation.offset : end] = operation.data
    elif operation.kind == "truncate":
        data = nodes[operation.node].data
        del data[operation.offset :]
        data.extend(bytes(max(0, operation.offset - len(data))))
    elif operation.kind == "rename":
        nodes[operation.about].entries[operation.name] = operation.node
        if nodes[operation.source].entries.get(operation.target) == operation.node:
            del nodes[operation.source].entries[operation.target]
    elif operation.kind == "remove":
        nodes[operation.about].entries.pop(operation.name, None)
    else:
        nodes[operation.about].entries[operation.name] = operation.node


def write_out(nodes: list[Node], folder: Path, number: int = 0) -> None:
    """Make ``folder`` hold what the folder ``number`` holds."""
    folder.mkdir()
    for name, entry in nodes[number].entries.items():
        node, path = nodes[entry], folder / name
        if node.kind == "folder":
            write_out(nodes, path, entry)
        elif node.kind == "symlink":
            os.symlink(node.target, path)
        else:
            path.write_bytes(node.data)
