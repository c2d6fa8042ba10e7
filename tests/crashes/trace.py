"""What a program does to a folder, recorded as system calls by ``strace``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from .disk import Disk

_CALLS = (
    "openat,open,creat,close,lseek,write,pwrite64,writev,ftruncate,truncate,fallocate,copy_file_range,sendfile,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "fsync,fdatasync,sync,syncfs,sync_file_range,mmap"
)
_LINE = re.compile(r"([\d.]+) (\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+)")
_FD = re.compile(r"(\d+|AT_FDCWD)(?:<(.*)>)?$")
_HEX = re.compile(r"(?:\\x[0-9a-f]{2})*")


def why_no_trace() -> str:
    """Why programs cannot be traced here; empty if they can."""
    if not shutil.which("strace"):
        return "strace is not installed"
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def record(command: list[str], *, folder: Path, log: Path, environment: Mapping[str, str]) -> Disk:
    """Run ``command`` with ``folder`` as its working folder, and return what it did there, call by call."""
    log.mkdir()
    subprocess.run(
        ["strace", "-ff", "-ttt", "-y", "-xx", "-s", "1000000000", "-e", f"trace={_CALLS}", "-e", "signal=none",
         "-o", str(log / "t"), *command],
        cwd=folder, env=dict(environment), check=True, stdout=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    disk, recorder = Disk(), _Recorder(folder)
    for name, arguments, result in _calls(log):
        recorder.apply(disk, name, arguments, result)
    return disk


def _calls(log: Path) -> Iterator[tuple[str, str, int]]:
    """Name, arguments and result of all calls that have succeeded, of all threads, in the order of their beginning."""
    found = []
    for file in log.iterdir():
        for line in file.read_text(encoding="utf-8").splitlines():
            if match := _LINE.match(line):
                found.append((float(match[1]), match[2], match[3], int(match[4], 0)))
    found.sort(key=lambda call: call[0])
    for _, name, arguments, result in found:
        if result >= 0:
            yield name, arguments, result


class _Recorder:
    """Turns system calls into operations on a ``Disk``."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.offsets: dict[tuple[str, str], int] = {}
        self.appends: set[tuple[str, str]] = set()

    def apply(self, disk: Disk, name: str, text: str, result: int) -> None:
        arguments = _split(text)
        handler = getattr(self, f"_{name}", None)
        if handler is not None:
            handler(disk, arguments, result)

    # Paths

    def _inside(self, path: str) -> str | None:
        """``path`` relative to the folder, or None if it lies elsewhere."""
        path = os.path.normpath(os.path.join(self.folder, path))
        return os.path.relpath(path, self.folder) if path.startswith(f"{self.folder}/") else None

    def _at(self, base: str, path: str) -> str | None:
        match = _FD.match(base)
        return self._inside(os.path.join(_text(match[2] or "") if match else "", _text(path)))

    def _of(self, fd: str) -> tuple[str, str] | None:
        """The number of a file descriptor and its file, if that lies in the folder."""
        match = _FD.match(fd)
        path = self._inside(_text(match[2])) if match and match[2] else None
        return (match[1], path) if match and path is not None else None

    # Calls

    def _openat(self, disk: Disk, arguments: list[str], result: int) -> None:
        if (path := self._at(arguments[0], arguments[1])) is None or "O_DIRECTORY" in arguments[2]:
            return
        key, flags = (str(result), path), arguments[2]
        self.offsets[key] = 0
        self.appends.discard(key)
        if "O_APPEND" in flags:
            self.appends.add(key)
        if "O_CREAT" in flags and not disk.exists(path):
            disk.create(path)
        elif "O_TRUNC" in flags:
            disk.truncate(path, 0)

    def _lseek(self, disk: Disk, arguments: list[str], result: int) -> None:
        if key := self._of(arguments[0]):
            self.offsets[key] = result

    def _write(self, disk: Disk, arguments: list[str], result: int) -> None:
        if key := self._of(arguments[0]):
            self._put(disk, key, _bytes(arguments[1])[:result])

    def _writev(self, disk: Disk, arguments: list[str], result: int) -> None:
        if key := self._of(arguments[0]):
            data = b"".join(_bytes(found) for found in re.findall(r'iov_base="([^"]*)"', arguments[1]))
            self._put(disk, key, data[:result])

    def _put(self, disk: Disk, key: tuple[str, str], data: bytes) -> None:
        offset = disk.size(key[1]) if key in self.appends else self.offsets.get(key, 0)
        disk.write(key[1], offset, data)
        self.offsets[key] = offset + len(data)

    def _pwrite64(self, disk: Disk, arguments: list[str], result: int) -> None:
        if key := self._of(arguments[0]):
            disk.write(key[1], int(arguments[3]), _bytes(arguments[1])[:result])

    def _sendfile(self, disk: Disk, arguments: list[str], result: int) -> None:
        if key := self._of(arguments[0]):
            source = self._of(arguments[1])
            start = self.offsets.get(source, 0) if source else 0
            if source:
                data = disk.content(source[1])
                self.offsets[source] = start + result
            else:
                data = Path(_text(_FD.match(arguments[1])[2])).read_bytes()  # type: ignore[index]
            assert len(data) == result or source, "a copy in pieces from elsewhere"
            self._put(disk, key, data[start : start + result])

    def _copy_file_range(self, disk: Disk, arguments: list[str], result: int) -> None:
        assert self._of(arguments[2]) is None, "copy_file_range is not modelled"

    def _mmap(self, disk: Disk, arguments: list[str], result: int) -> None:
        writes = "PROT_WRITE" in arguments[2] and "MAP_SHARED" in arguments[3]
        assert not (writes and self._of(arguments[4])), "writing through a mapping is not modelled"

    def _ftruncate(self, disk: Disk, arguments: list[str], result: int) -> None:
        if key := self._of(arguments[0]):
            disk.truncate(key[1], int(arguments[1]))

    def _fallocate(self, disk: Disk, arguments: list[str], result: int) -> None:
        assert self._of(arguments[0]) is None, "fallocate is not modelled"

    def _fsync(self, disk: Disk, arguments: list[str], result: int) -> None:
        match = _FD.match(arguments[0])
        path = os.path.realpath(_text(match[2])) if match and match[2] else ""
        if path == self.folder:
            disk.sync("")
        elif key := self._of(arguments[0]):
            disk.sync(key[1])

    _fdatasync = _fsync

    def _rename(self, disk: Disk, arguments: list[str], result: int) -> None:
        self._move(disk, self._inside(_text(arguments[0])), self._inside(_text(arguments[1])))

    def _renameat(self, disk: Disk, arguments: list[str], result: int) -> None:
        self._move(disk, self._at(*arguments[:2]), self._at(*arguments[2:4]))

    _renameat2 = _renameat

    def _move(self, disk: Disk, source: str | None, target: str | None) -> None:
        if source is not None and target is not None:
            disk.rename(source, target)
        else:
            assert source is target, "a file is moved into the folder or out of it"

    def _unlink(self, disk: Disk, arguments: list[str], result: int) -> None:
        if (path := self._inside(_text(arguments[0]))) is not None:
            disk.remove(path)

    _rmdir = _unlink

    def _unlinkat(self, disk: Disk, arguments: list[str], result: int) -> None:
        if (path := self._at(*arguments[:2])) is not None:
            disk.remove(path)

    def _mkdir(self, disk: Disk, arguments: list[str], result: int) -> None:
        if (path := self._inside(_text(arguments[0]))) is not None:
            disk.make_folder(path)

    def _symlink(self, disk: Disk, arguments: list[str], result: int) -> None:
        if (path := self._inside(_text(arguments[1]))) is not None:
            disk.make_symlink(path, _text(arguments[0]))

    def _link(self, disk: Disk, arguments: list[str], result: int) -> None:
        assert self._inside(_text(arguments[1])) is None, "hard links are not modelled"


def _split(text: str) -> list[str]:
    """Arguments of a call. Strings are all hexadecimal, so they hold no comma or bracket."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def _bytes(text: str) -> bytes:
    body = text.strip('"')
    assert _HEX.fullmatch(body), f"not a whole string: {body[:100]}"
    return bytes.fromhex(body.replace("\\x", ""))


def _text(text: str) -> str:
    """A path: in quotes and hexadecimal, or, of a file descriptor, maybe plain."""
    body = text.strip('"')
    return os.fsdecode(bytes.fromhex(body.replace("\\x", ""))) if body.startswith("\\x") else body
